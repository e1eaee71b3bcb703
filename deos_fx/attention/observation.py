"""Observations that a block can report of its attention, and the features made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["MADE_OF", "OBSERVED", "Asked", "Observation"]


@dataclass(frozen=True)
class Observation:
    """An observation that a block reports of its attention, in addition to its own output.

    Attributes:
        kind: ``attention`` (received by every key from some queries, [B, N]), ``keys`` (mean over
            heads, [B, N, D]) or ``joint_keys`` (heads side by side, [B, N, H_kv D]).
        heads: How the attention of the heads becomes one: their ``mean``, their ``max`` (FitPrune),
            or ``joint``: one softmax over full-width products, scaled by (H D)^-1/2 (PruMerge).
        strongest: Number of heads that count, those that attend most to the keys asked about
            (SparseVLM+); 0 for all.
        gravity: Whether attention is divided by the value that rotary positions alone give each
            distance (SparseVLM+).
    """

    kind: Literal["attention", "keys", "joint_keys"] = "attention"
    heads: Literal["mean", "max", "joint"] = "mean"
    strongest: int = 0
    gravity: bool = False


Asked = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The queries of an observation: their positions [B, R] (None for all), their votes [B, R] (None
for equal ones) and, for ``Observation.strongest``, positions [B, V] of the keys that count.
"""


# SparseVLM+ reads the 14 heads that attend most to the image, of the 28 or 32 in its models.
_STRONGEST_HEADS = 14

OBSERVED: Mapping[str, tuple[Observation, str]] = {
    "keys": (Observation("keys"), ""),
    "joint_keys": (Observation("joint_keys"), ""),
    "text_keys": (Observation("joint_keys"), ""),
    "attention_cls": (Observation(), "class"),
    "attention_cls_joint": (Observation(heads="joint"), "class"),
    "attention_last": (Observation(), "last"),
    "attention_text": (Observation(), "text"),
    "attention_text_max": (Observation(heads="max"), "text"),
    "attention_raters": (Observation(), "raters"),
    "attention_raters_plus": (
        Observation(strongest=_STRONGEST_HEADS, gravity=True),
        "raters",
    ),
    "attention_mutual": (Observation(), "visual"),
    "attention_mutual_max": (Observation(heads="max"), "visual"),
}
"""Feature of attention -> its observation and the kind of its queries; a new one is a row here."""

MADE_OF = {"text_score": "text_keys"}
"""Feature -> the feature in ``OBSERVED`` that it is computed from."""
