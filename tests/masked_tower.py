"""An oracle: the original vision tower, whose blocks do not see the keys of dropped patches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from deos_fx.models.facts import facts_of

_NAME = "tests_masked_tower"


def blocks_of(model: Any) -> list[Any]:
    """The blocks of a model's vision tower."""
    return [model.get_submodule(path) for path in facts_of(model).blocks.vision]


@contextlib.contextmanager
def tower_masked(
    model: Any, site: int, kept: Tensor, received: list[Tensor] | None = None
) -> Iterator[None]:
    """The model with keys masked in the blocks after one of them.

    Args:
        model: The original model.
        site: Index of the block after which patches are dropped.
        kept: Flags [R, P] of the patches that are seen, in the order of the hidden states.
        received: Gets the attention [R, n] that patches get in the block of the site from all
            others, segment by segment.
    """
    at_site = {*blocks_of(model)[site].modules()}
    later, handles = set(), []
    # Attention of towers with segments is called for one segment after the other.
    seen: dict[Any, int] = {}
    configs = []
    for i, block in enumerate(blocks_of(model)):
        handles.append(block.register_forward_pre_hook(lambda *_: seen.clear()))
        for part in block.modules():
            config = getattr(part, "config", None)
            if config is not None and all(config is not other for other, _ in configs):
                configs.append((config, config._attn_implementation))
            if i > site:
                later.add(part)

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        logits = query @ key.transpose(2, 3) * scale
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -1e9)
        elif mask is not None:
            logits = logits + mask
        if module in later:
            start = seen.get(module, 0)
            seen[module] = start + key.shape[2]
            hidden = ~kept[:, None, None, start : start + key.shape[2]]
            logits = logits.masked_fill(hidden, -1e9)
        if received is not None and module in at_site:
            received.append(logits.softmax(dim=-1).mean(dim=1).sum(dim=1))
        return (logits.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, attention)
    for config, _ in configs:
        config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        for config, before in configs:
            config._attn_implementation_internal = before
        for handle in handles:
            handle.remove()
