"""An oracle: the original model, whose layers get only the tokens that a reduction has kept.

Layers that keep a state have no keys to hide: what they have read has changed the state. So each of
the model's own layers runs on what is left of the prompt, with the positions and masks that its
tokens had in the whole of it, and without a cache. Layers that count positions themselves count
what they get; what others of these models are given goes by that count as well.
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
    left = kept[max(kept)][0]
    assert output.logits.shape[1] < length
    assert_close(output.logits, whole[:, left[left < length]], roundings)
    assert_close(logits, whole[:, length - 1 : length - 1 + STEPS], roundings)
    # What was dropped matters, so the comparison says something.
    at_end = model(**longer, use_cache=False).logits[:, length - 1]
    assert difference(at_end, whole[:, length - 1]) > 1e-3


def kept_of(cache: Any, length: int) -> dict[int, Tensor]:
    """First layer -> positions [B, M] of what it and those after it hold, up to a later length."""
    new = torch.arange(cache.prompt_length, length).expand(cache.rows, -1)
    return {space.first_layer: torch.cat([space.origin, new], dim=1) for space in cache.spaces}


@contextlib.contextmanager
def shortened_from(
    model: Any, kept: Mapping[int, Tensor], counted: bool | None = None
) -> Iterator[None]:
    """Let layers from some on get only the tokens [M] of a prompt, in calls without a cache.

    Logits at other places have no meaning.

    Args:
        model: The original model.
        kept: First layer -> positions in the prompt of the tokens that it and those after it get.
        counted: Whether positions are those among the tokens that are left; by default, where
            layers count positions themselves.
    """
    handles = []
    counted = facts_of(model).counts_positions if counted is None else counted
    for i, layer in enumerate(layers_of(model)):
        first = max((first for first in kept if first <= i), default=None)
        if first is not None:
            before, after = _shortened(kept[first], counted)
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shortened(index: Tensor, counted: bool) -> tuple[Any, Any]:
    """Hooks that take the tokens out of what a layer is given, and write its result over them.

    What is between the layers sees the whole prompt, in which nobody reads the tokens dropped.
    """
    whole: list[Tensor] = []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        whole.append(args[0])
        length, first = args[0].shape[1], torch.arange(len(index))
        positions = {name: kwargs[name] for name in kwargs if counted and "position" in name}
        kwargs = _taken(kwargs, index, length) | _taken(positions, first, length)
        return _taken(args, index, length), kwargs

    def after(module: Any, args: Any, output: Any) -> Any:
        result = output[0] if isinstance(output, tuple) else output
        result = whole.pop().index_copy(1, index, result)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    return before, after


def _taken(values: Any, index: Tensor, length: int) -> Any:
    """The kept tokens along every axis that is as long as the prompt: masks have two of them."""

    def taken(value: Tensor) -> Tensor:
        for axis in range(1, value.ndim):
            if value.shape[axis] == length:
                value = value.index_select(axis, index)
        return value

    return torch.utils._pytree.tree_map_only(Tensor, taken, values)
