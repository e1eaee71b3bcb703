"""How the FLOPs of a block grow with the tokens that go through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from deos_fx.cost.amounts import Amount

__all__ = ["Growth"]

# Every usual size of a chunk divides it.
_WHOLE = 256


@dataclass(frozen=True)
class Growth:
    """FLOPs of n tokens: quadratic n^2 + linear n + constant + per_chunk ceil(n / chunk).

    Linear attention and state spaces run over chunks of so many tokens, of which the last one is
    padded, and convolutions over a few more tokens than there are.

    Attributes:
        linear: FLOPs for each token.
        quadratic: FLOPs for each pair of tokens.
        constant: FLOPs that do not depend on the tokens.
        per_chunk: FLOPs for each chunk that is begun.
        chunk: Tokens of a chunk.
    """

    linear: float
    quadratic: float
    constant: float = 0
    per_chunk: float = 0
    chunk: int = 1

    @classmethod
    def of_attention(cls, flops: Callable[[int], int], short: int, long: int) -> Growth:
        """Return the growth of a block without chunks and constants, from two lengths.

        Args:
            flops: Returns the FLOPs of so many tokens.
            short: A length.
            long: Another one.
        """
        # f(n) / n = a n + b, so a is the slope of that.
        rise = _whole(flops(long), long) - _whole(flops(short), short)
        quadratic = _whole(rise, long - short)
        return cls(_whole(flops(short), short) - quadratic * short, quadratic)

    @classmethod
    def of_state(cls, flops: Callable[[int], int]) -> Growth:
        """Return the growth of a block that keeps a state, from the lengths around a whole chunk.

        Args:
            flops: Returns the FLOPs of so many tokens.
        """
        n = _WHOLE
        # Inside a chunk, f(n) = a n^2 + b n + rest.
        quadratic = _whole(flops(n) - 2 * flops(n - 1) + flops(n - 2), 2)
        linear = flops(n) - flops(n - 1) - quadratic * (2 * n - 1)
        # One token more begins another chunk, and n tokens more are n / chunk of them.
        per_chunk = flops(n + 1) - flops(n) - linear - quadratic * (2 * n + 1)
        of_chunks = flops(2 * n) - flops(n) - linear * n - quadratic * 3 * n * n
        chunk = _whole(n * per_chunk, of_chunks) if per_chunk else 1
        constant = flops(n) - quadratic * n * n - linear * n - of_chunks
        return cls(linear, quadratic, constant, per_chunk, chunk)

    def flops(self, tokens: Amount) -> Amount:
        """Compute the FLOPs of so many tokens; differentiable, with chunks as if they were even."""
        return (
            tokens * self.linear
            + self.quadratic * tokens * tokens
            + self.constant
            + self.per_chunk * self._chunks(tokens)
        )

    def _chunks(self, tokens: Amount) -> Amount:
        if not isinstance(tokens, Tensor):
            return -(-tokens // self.chunk)
        even = tokens / self.chunk
        return even + (even.ceil() - even).detach()


def _whole(number: int, divisor: int) -> int:
    quotient, rest = divmod(number, divisor)
    assert not rest, "the FLOPs of a block are a n^2 + b n + c + d ceil(n / chunk)"
    return quotient
