"""FLOPs of a transformer block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deos_fx.cost.operator_flops import Amount

__all__ = ["Block", "at_most", "heads_of"]


@dataclass(frozen=True)
class Block:
    """The cost of a transformer block, and the sizes of its attention.

    Attributes:
        linear: FLOPs for each token.
        quadratic: FLOPs for each pair of tokens.
        heads: Query heads.
        key_heads: Key and value heads.
        dim: Size of a head.
        width: Size of a hidden state.
    """

    linear: float
    quadratic: float
    heads: int
    key_heads: int
    dim: int
    width: int

    def flops(self, tokens: Amount) -> Amount:
        """Compute the FLOPs of the block: linear layers, query-key and attention-value products."""
        return tokens * self.linear + self.quadratic * tokens * tokens

    def row_flops(self, queries: Amount, tokens: Amount) -> Amount:
        """Compute the FLOPs of the attention logits of a few queries that a score observes."""
        return 2 * self.heads * self.dim * queries * tokens

    @property
    def projections(self) -> int:
        """Compute the FLOPs of the queries, keys and values of one token."""
        return 2 * self.width * (self.heads + 2 * self.key_heads) * self.dim


def heads_of(block: nn.Module) -> tuple[int, int, int, int]:
    """Read query heads, key heads, size of a head and width from a block's attention config."""
    configs: list[Any] = [module.config for module in block.modules() if hasattr(module, "config")]
    config = next((item for item in configs if hasattr(item, "num_attention_heads")), None)
    if config is None:
        # Case: the attention of this block cannot be observed.
        return 0, 0, 0, 0
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, key_heads, dim, config.hidden_size


def at_most(tokens: Amount, most: int | None) -> Amount:
    """Return a number of tokens, limited to `most`, the tokens of a window; None for no limit."""
    if most is None:
        return tokens
    return tokens.clamp(max=most) if isinstance(tokens, Tensor) else min(tokens, most)
