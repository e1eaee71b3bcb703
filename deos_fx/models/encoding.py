"""Encode images as a model does, whatever part of it encodes them and hands their features on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from deos_fx.models.blocks import decoder_blocks, puts_in_front
from deos_fx.models.families import FEATURES, PIXELS, WRITER, features_of, own_name
from deos_fx.models.views import shallow_copy

__all__ = ["encoded_by"]


def encoded_by(core: Any, method: str, given: Mapping[str, Any]) -> Any:
    """Encode images or videos as a model does.

    Args:
        core: The model's core, or a view of it.
        method: One of `ENCODERS`, or `WRITER`; the core need not have it.
        given: Its arguments, as a call has them.

    Returns:
        The features, see `features_of`; or prompts [B, N, d] with these written into them.
    """
    encode = getattr(core, method, None)
    if encode is None and puts_in_front(core):
        return _put_in_front(core, given)
    if encode is None:
        return _given_to_text(core, given)
    called = encode.forward if method == WRITER else encode
    named = {own_name(name, called): value for name, value in given.items()}
    if method == WRITER:
        return encode(inputs_embeds=core.get_input_embeddings()(given["input_ids"]), **named)
    return features_of(encode(**named, return_dict=True))


class _TextReached(Exception):  # noqa: N818 - not an error: it stops the run early
    """Raised in place of the text model, with what it is given."""


def _given_to_text(core: Any, given: Mapping[str, Any]) -> Any:
    """Return the features that a model without a method for them gives its text model."""
    view, forward = shallow_copy(core), type(core).forward

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _TextReached(kwargs[FEATURES])

    view._modules["text_model"] = text = _without_hooks(core.text_model)
    text.forward = stop
    try:
        forward(view, **{own_name(name, forward): value for name, value in given.items()})
    except _TextReached as reached:
        return reached.args[0]
    raise AssertionError("the text model was not reached")


def _without_hooks(module: nn.Module) -> Any:
    """Return a view of a module that is left early: hooks before it would miss those after it."""
    view = shallow_copy(module)
    view._forward_pre_hooks, view._forward_hooks = OrderedDict(), OrderedDict()
    return view


class _DecoderReached(Exception):  # noqa: N818 - not an error: it stops the run early
    """Raised in place of the first decoder layer, with the hidden states that it is given."""


def _put_in_front(core: Any, given: Mapping[str, Any]) -> Tensor:
    """Return the features [B, V, d] that a model puts in front of a text, here of one word."""
    view, forward = shallow_copy(core), type(core).forward
    first, *_ = decoder_blocks(core)
    part: Any = view
    for name in first.split("."):
        part._modules[name] = part = _without_hooks(part._modules[name])
    part.forward = _stop
    pixels = given[PIXELS[0]]
    word = torch.zeros(len(pixels), 1, dtype=torch.int64, device=pixels.device)
    named = {own_name(name, forward): value for name, value in given.items()}
    try:
        forward(view, input_ids=word, **named)
    except _DecoderReached as reached:
        (hidden,) = reached.args
        return hidden[:, :-1]
    raise AssertionError("the decoder was not reached")


def _stop(hidden: Tensor, *_: Any, **__: Any) -> NoReturn:
    raise _DecoderReached(hidden)
