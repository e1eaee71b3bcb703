"""How the FLOPs of a block grow with the tokens that go through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from deos_fx.cost.amounts import Amount

__all__ = ["Growth", "whole_part"]

# Every usual size of a chunk divides it.
_WHOLE = 256


@dataclass(frozen=True)
class Growth:
    """FLOPs of n tokens in c = ceil(n / chunk) chunks, as a polynomial of both.

    They are quadratic n^2 + linear n + constant + per_chunk c + per_chunks c^2. Linear attention
    and state spaces run over chunks of so many tokens, of which the last one is padded, and
    convolutions over a few more tokens than there are. An index of keys may have one for each pool
    of tokens: pooled n p more, with p = floor(n / pool).

    Attributes:
        linear: FLOPs for each token.
        quadratic: FLOPs for each pair of tokens.
        constant: FLOPs that do not depend on the tokens.
        per_chunk: FLOPs for each chunk that is begun.
        per_chunks: FLOPs for each pair of chunks.
        chunk: Tokens of a chunk.
        pooled: FLOPs for each pair of a token and a whole pool.
        pool: Tokens of a pool.
    """

    linear: float
    quadratic: float
    constant: float = 0
    per_chunk: float = 0
    per_chunks: float = 0
    chunk: int = 1
    pooled: float = 0
    pool: int = 1

    @classmethod
    def of_attention(cls, flops: Callable[[int], int], short: int, long: int) -> Growth:
        """Return the growth of a block without chunks and constants, from two lengths.

        Args:
            flops: Returns the FLOPs of so many tokens.
            short: A length.
            long: Another one.
        """
        # f(n) / n = a n + b, so a is the slope of that.
        rise = whole_part(flops(long), long) - whole_part(flops(short), short)
        quadratic = whole_part(rise, long - short)
        return cls(whole_part(flops(short), short) - quadratic * short, quadratic)

    @classmethod
    def of_state(cls, flops: Callable[[int], int]) -> Growth:
        """Return the growth of a block that keeps a state, from the lengths around a whole chunk.

        Args:
            flops: Returns the FLOPs of so many tokens.
        """
        n = _WHOLE
        # 1. Inside a chunk, the number of chunks is a constant.
        quadratic = whole_part(flops(n) - 2 * flops(n - 1) + flops(n - 2), 2)
        linear = flops(n) - flops(n - 1) - quadratic * (2 * n - 1)

        def of_chunks(tokens: int) -> int:
            return flops(tokens) - quadratic * tokens * tokens - linear * tokens

        # 2. With c chunks in n tokens, one token more begins another: it adds d + e (2c + 1), and
        # d + e (4c + 1) after 2n tokens; n tokens more add d c + 3 e c^2.
        first = of_chunks(n + 1) - of_chunks(n)
        rise = of_chunks(2 * n + 1) - of_chunks(2 * n) - first
        more = of_chunks(2 * n) - of_chunks(n)
        if not first:
            assert not rise and not more, "chunks of more tokens than these lengths have"
            return cls(linear, quadratic, of_chunks(n))
        chunks = whole_part(2 * more + rise, 2 * first + rise)
        per_chunks = whole_part(rise, 2 * chunks)
        per_chunk = first - rise - per_chunks
        constant = of_chunks(n) - per_chunk * chunks - per_chunks * chunks**2
        return cls(linear, quadratic, constant, per_chunk, per_chunks, whole_part(n, chunks))

    @classmethod
    def of_index(cls, flops: Callable[[int], int]) -> Growth:
        """Return the growth of a block that chooses keys by an index, from lengths around pools.

        Args:
            flops: Returns the FLOPs of so many tokens, where a pool that is begun counts as a whole
                one: on shapes alone it is not known to be left out.
        """
        n = _WHOLE
        # 1. At whole pools of p tokens, m tokens take (q + u) m^2 + l m, where u p is for each pair
        # of a token and a pool.
        short, long = flops(n) / n, flops(2 * n) / (2 * n)
        both = (long - short) / n
        linear = short - both * n
        # 2. One token more begins a pool: then each token takes u p - u more than that, and with
        # two tokens more u p - 2 u.
        one, two = ((flops(m) / m - both * m - linear) for m in (n + 1, n + 2))
        if round(one) == 0:
            return cls(round(linear), both)
        per_pool = round(2 * one - two)
        pool = round(per_pool / (one - two))
        return cls(round(linear), round(both - per_pool / pool), pooled=per_pool, pool=pool)

    def flops(self, tokens: Amount) -> Amount:
        """Compute the FLOPs of so many tokens; differentiable, with chunks as if they were even."""
        chunks = self._chunks(tokens)
        pools = tokens / self.pool if isinstance(tokens, Tensor) else tokens // self.pool
        by_tokens = tokens * (self.linear + self.pooled * pools) + self.quadratic * tokens * tokens
        return by_tokens + self.constant + (self.per_chunk + self.per_chunks * chunks) * chunks

    def _chunks(self, tokens: Amount) -> Amount:
        if not isinstance(tokens, Tensor):
            return -(-tokens // self.chunk)
        even = tokens / self.chunk
        return even + (even.ceil() - even).detach()


def whole_part(number: int, divisor: int) -> int:
    """Divide FLOPs of a block by something that they are a multiple of."""
    quotient, rest = divmod(number, divisor)
    assert not rest, "the FLOPs of a block are a polynomial of its tokens and chunks"
    return quotient
