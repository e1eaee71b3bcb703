"""An oracle: the original model, whose layers do not see the keys that a reduction has dropped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deos_fx.models.upstream import CACHE


def alive_of(cache: Any, prompt: Tensor) -> dict[int, Tensor]:
    """First layer -> flags [B, N] of the prompt's tokens that it and those behind it hold."""
    nothing = torch.zeros(prompt.shape, dtype=torch.bool)
    return {space.first_layer: nothing.scatter(1, space.origin, True) for space in cache.spaces}


@contextlib.contextmanager
def masked_from(model: Any, alive: dict[int, Tensor]) -> Iterator[Any]:
    """The model with keys masked from some layers on, in calls with and without a cache.

    Args:
        model: The original model.
        alive: See `alive_of`; everything behind the prompt is seen.
    """
    handles = []
    for i, layer in enumerate(model.get_decoder().layers):
        first = max((start for start in alive if start <= i), default=None)
        if first is not None:
            hook = _hide(alive[first], i)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _hide(alive: Tensor, layer: int) -> Any:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        rows, new = args[0].shape[:2]
        cache = kwargs.get(CACHE)
        seen = new + (0 if cache is None else cache.get_seq_length(layer))
        mask = kwargs["attention_mask"]
        if mask is None:
            mask = torch.ones(1, 1, new, seen, dtype=torch.bool).tril(seen - new)
        # A window holds the last keys only.
        held = torch.arange(seen)[-mask.shape[-1] :]
        # Beams and several answers are further rows of one prompt.
        prompt = alive.repeat_interleave(rows // len(alive), dim=0)
        keys = torch.cat([prompt, torch.ones(rows, seen - prompt.shape[1]).bool()], dim=1)
        itself = torch.arange(seen - new, seen)[:, None] == held
        hidden = ~(keys[:, None, None, held] | itself)
        if mask.dtype == torch.bool:
            mask = mask & ~hidden
        else:
            mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    return hook
