"""Later turns of a conversation: their new tokens, and their new images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deos_fx.inputs.batch import media_between
from deos_fx.inputs.call import Call
from deos_fx.inputs.items import has_images
from deos_fx.inputs.media import placeholders
from deos_fx.models.facts import ModelFacts
from deos_fx.models.upstream import CACHE
from deos_fx.tokens.cache import ReducedCache

__all__ = ["new_tokens", "same_images", "without_known_images"]


def without_known_images(facts: ModelFacts, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the images of earlier turns from the inputs of `generate` in a later one.

    Processors give the images of the whole conversation in every turn. If those of a later turn
    alone are given, they stay.

    Args:
        facts: The facts of the model.
        inputs: Arguments of its `generate`, with the whole conversation as ``input_ids``.

    Returns:
        The inputs. Images that are not those of the cache stay, and are refused later.
    """
    cache, ids = inputs.get(CACHE), inputs.get("input_ids")
    given = {name: value for name, value in inputs.items() if value is not None}
    if not (isinstance(cache, ReducedCache) and isinstance(ids, Tensor) and has_images(given)):
        return dict(inputs)
    seen = cache.get_seq_length()
    if not 0 < seen < ids.shape[1] or len(ids) != cache.rows:
        return dict(inputs)
    whole = Call.of(facts, given)
    if not _match(whole):
        # Case: the images of the new tokens alone.
        return dict(inputs)
    # Case: the images of the whole conversation. Those of each turn must be those of the cache.
    starts = [start for start, _ in cache.turns]
    for (start, known), end in zip(cache.turns, [*starts[1:], seen], strict=True):
        taken = media_between(whole, start, end)
        if not all(same_images(value, known.get(name)) for name, value in taken.items()):
            return dict(inputs)
    return {**inputs, **media_between(whole, seen, ids.shape[1])}


def new_tokens(inputs: Mapping[str, Any], seen: int) -> dict[str, Any]:
    """Return inputs of a whole conversation without the tokens that a cache has.

    Args:
        inputs: Inputs with ``input_ids`` [B, T].
        seen: Number of tokens in the cache.
    """
    shape = inputs["input_ids"].shape
    return {
        name: value[:, seen:] if isinstance(value, Tensor) and value.shape == shape else value
        for name, value in inputs.items()
        if name not in (CACHE, "position_ids")
    }


def same_images(value: Any, known: Any) -> bool:
    """Return whether two inputs are equal; both may be missing."""
    # generate passes the very same tensors at every step; these need no comparison.
    if value is known:
        return True
    if not isinstance(value, Tensor) or not isinstance(known, Tensor):
        return False
    return torch.equal(value, known.to(value.device))


def _match(call: Call) -> bool:
    """Return whether the images of a call are those of its placeholders."""
    if not bool(placeholders(call.facts, call.inputs).any()):
        return False
    try:
        call.check_images()
    except ValueError:
        return False
    return True
