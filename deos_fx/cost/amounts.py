"""The cost of a policy in numbers, and its comparison with the unreduced model."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cost", "CostReport"]


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
        before, after = self.before, self.after
        rows = [
            ("visual tokens (mean)", before.visual_tokens, after.visual_tokens, "{:,.1f}"),
            ("prefill GFLOPs", before.flops / 1e9, after.flops / 1e9, "{:,.3f}"),
            ("KV cache (KiB)", before.kv_bytes / 1024, after.kv_bytes / 1024, "{:,.1f}"),
        ]
        lines = [f"{'':22}{'before':>12}{'after':>12}{'ratio':>8}"]
        for name, old, new, style in rows:
            numbers = f"{style.format(old):>12}{style.format(new):>12}"
            lines.append(f"{name:22}{numbers}{new / old:8.1%}")
        per_layer = " ".join(map(str, after.visual_tokens_per_layer))
        return "\n".join([*lines, f"visual tokens per decoder layer: {per_layer}"])
