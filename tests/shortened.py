"""An oracle: the original model, whose layers get only the tokens that a reduction has kept.

Layers that keep a state have no keys to hide: what they have read has changed the state. So each of
the model's own layers runs on what is left of the prompt, with the positions and masks that its
tokens had in the whole of it, and without a cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from closeness import ROUNDINGS, assert_close, difference
from masked import STEPS, generate, layers_of
from torch import Tensor

from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE


def assert_reduced_is_shortened(
    model: Any,
    reduced: Any,
    prompt: dict[str, Tensor],
    continued: Callable[[Tensor], dict[str, Tensor]],
    roundings: float = ROUNDINGS,
) -> None:
    """Fail unless a model that prunes equals the original one whose layers get what was kept.

    Logits are compared in the prefill, and token by token with those of a longer prompt.

    Args:
        model: The original model.
        reduced: The same model with a policy that only prunes.
        prompt: One prompt, without padding.
        continued: Makes the inputs of the same prompt with more tokens [1, t] after it.
        roundings: See `closeness.assert_close`.
    """
    output, facts = reduced(**prompt), facts_of(model)
    # A placeholder among the new tokens would have no image.
    placeholders = [x for x in (facts.image_token, facts.video_token) if x is not None]
    tokens, logits = generate(reduced, prompt, suppress_tokens=placeholders)
    longer = continued(tokens)
    length = prompt["input_ids"].shape[1]
    kept = kept_of(output[CACHE], longer["input_ids"].shape[1])
    with shortened_from(model, {first: left[0] for first, left in kept.items()}):
        whole = model(**longer, use_cache=False).logits
    left = output.logits.shape[1]
    assert left < length
    assert_close(output.logits, whole[:, :left], roundings)
    assert_close(logits, whole[:, left - 1 : left - 1 + STEPS], roundings)
    # What was dropped matters, so the comparison says something.
    at_end = model(**longer, use_cache=False).logits[:, length - 1]
    assert difference(at_end, whole[:, left - 1]) > 1e-3


def kept_of(cache: Any, length: int) -> dict[int, Tensor]:
    """First layer -> positions [B, M] of what it and those after it hold, up to a later length."""
    new = torch.arange(cache.prompt_length, length).expand(cache.rows, -1)
    return {space.first_layer: torch.cat([space.origin, new], dim=1) for space in cache.spaces}


@contextlib.contextmanager
def shortened_from(model: Any, kept: Mapping[int, Tensor]) -> Iterator[None]:
    """Let layers from some on have only the tokens [M] of a prompt, in calls without a cache.

    Args:
        model: The original model.
        kept: First layer -> positions in the prompt of the tokens that it and those after it get.
    """
    handles = []
    for i, layer in enumerate(layers_of(model)):
        begun = [first for first in sorted(kept) if first <= i]
        if begun:
            # The hidden states that a layer gets are those of the last space already, except at
            # the first layer of a space.
            before = kept[begun[-2]] if len(begun) > 1 else None
            hook = _shorten(kept[begun[-1]], before, is_first=begun[-1] == i)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shorten(index: Tensor, before: Tensor | None, *, is_first: bool) -> Any:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden, *rest = args
        if is_first:
            here = index if before is None else torch.searchsorted(before, index)
            hidden = hidden[:, here]
        # Everything else comes from outside of the layers, so it has the whole prompt.
        length = int(index[-1]) + 1
        taken = torch.utils._pytree.tree_map_only(
            Tensor, lambda value: _taken(value, index, length), (rest, kwargs)
        )
        return (hidden, *taken[0]), taken[1]

    return hook


def _taken(value: Tensor, index: Tensor, length: int) -> Tensor:
    """The kept tokens along every axis that is as long as the prompt: masks have two of them."""
    for axis in range(1, value.ndim):
        if value.shape[axis] == length:
            value = value.index_select(axis, index)
    return value
