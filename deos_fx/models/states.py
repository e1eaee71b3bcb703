"""Whether layers that keep a state go on from it, found out by running a few tokens."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from deos_fx.models.upstream import CACHE
from deos_fx.models.views import execution_device

__all__ = ["goes_on"]

_KNOWN: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()

# Far above what rounding to bfloat16 adds up to, and far below what a lost state is worth.
_DIFFERENT = 0.2


def goes_on(model: PreTrainedModel) -> bool:
    """Return whether several new tokens read the state that earlier ones have left.

    Layers of Jamba begin anew unless a token comes alone (transformers 5.24). Six words run at
    once, and again by threes, once for each model.

    Args:
        model: The model, with its weights.
    """
    known = _KNOWN.get(model)
    if known is None:
        decoder: Any = model.get_decoder()
        words = torch.arange(1, 7, device=execution_device(model))[None]
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            # The first of the outputs is the hidden states, or the logits where the head is inside.
            whole = decoder(input_ids=words, use_cache=False)[0][:, 3:].float()
            for part in words.split(3, dim=1):
                output = decoder(input_ids=part, use_cache=True, **{CACHE: cache})[0]
        difference = (output.float() - whole).norm() / whole.norm()
        known = _KNOWN[model] = bool(difference < _DIFFERENT)
    return known
