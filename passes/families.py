"""What analysis cannot infer of a model family: one row each.

Everything else (which module is what, which token is a placeholder, how many tokens an image has,
what runs over the prompt) is read from the model, its config or the captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["HELPERS", "visual_rows"]


def visual_rows(visual: Tensor, features: Tensor) -> Tensor:
    """One row for every prompt position: the features where it is visual, zeros elsewhere.

    Args:
        visual: Flags [B, N].
        features: [T, d], one for every flag that is set, row after row.

    Returns:
        [B, N, d].
    """
    rows = torch.zeros(*visual.shape, features.shape[-1], dtype=features.dtype)
    return rows.to(features.device).masked_scatter(visual[..., None], features)


def _add_deep_features(rows: Callable[..., Any]) -> Callable[..., Any]:
    """DeepStack: features of earlier vision blocks are added to the visual tokens' hidden states.

    The models assign to some rows of a tensor. The same sum as a value for every position follows
    its tokens when they are re-indexed.
    """

    def add(module: Any, hidden: Any, visual: Any, features: Any) -> Any:
        return hidden + rows(visual, features).to(hidden.dtype)

    return add


HELPERS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    # qwen3_vl, qwen3_vl_moe
    "_deepstack_process": (visual_rows, _add_deep_features),
}
"""Method of a model's code -> a leaf function, and what makes the method's stand-in of the leaf."""
