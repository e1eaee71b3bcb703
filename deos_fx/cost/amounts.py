"""The cost of a prefill in numbers, and its comparison with the unreduced model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

__all__ = ["Amount", "Cost", "CostReport"]

Amount: TypeAlias = float | Tensor
"""A number, or a 0-dim tensor through which a gradient flows."""


@dataclass(frozen=True)
class Cost:
    """Cost of one prefill.

    Attributes:
        visual_tokens_per_layer: Visual tokens of a prompt that each decoder layer processes.
        visual_tokens: Their mean over the decoder layers.
        flops: Floating-point operations of the whole batch.
        kv_bytes: Bytes of the key-value cache of the whole batch.
    """

    visual_tokens_per_layer: tuple[int, ...]
    visual_tokens: float
    flops: int
    kv_bytes: int

    @property
    def amounts(self) -> dict[str, float]:
        """Return the amounts that a `Budget` limits, by the names of its fields."""
        return {
            "visual_tokens": self.visual_tokens,
            "flops": self.flops,
            "kv_cache": self.kv_bytes,
        }

    @property
    def in_units(self) -> tuple[float, float, float]:
        """Return the amounts in the units of tables: visual tokens, GFLOPs and KiB."""
        return self.visual_tokens, self.flops / 1e9, self.kv_bytes / 1024

    @property
    def cells(self) -> dict[str, str]:
        """Return the cells of a row about this cost, by the heads of their columns."""
        tokens, gflops, kib = self.in_units
        return {"visual tokens": f"{tokens:.4g}", "GFLOPs": f"{gflops:.3g}", "KV KiB": f"{kib:.0f}"}


@dataclass(frozen=True)
class CostReport:
    """Cost without and with the reductions; printed as a table.

    Attributes:
        before: Cost of the same graph with no reduction.
        after: Cost of the reduced model.
    """

    before: Cost
    after: Cost

    def __str__(self) -> str:
        # Title of each row -> digits after the point, in the order of `in_units`.
        names = {"visual tokens (mean)": 1, "prefill GFLOPs": 3, "KV cache (KiB)": 1}
        amounts = zip(self.before.in_units, self.after.in_units, strict=True)
        lines = [f"{'':22}{'before':>12}{'after':>12}{'ratio':>8}"]
        for (name, digits), (old, new) in zip(names.items(), amounts, strict=True):
            lines.append(f"{name:22}{old:12,.{digits}f}{new:12,.{digits}f}{new / old:8.1%}")
        per_layer = " ".join(map(str, self.after.visual_tokens_per_layer))
        return "\n".join([*lines, f"visual tokens per decoder layer: {per_layer}"])
