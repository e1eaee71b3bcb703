"""Check the inputs of a call and fill in the defaults that the model would choose itself."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deos_fx.inputs.call import Call
from deos_fx.inputs.media import placeholders
from deos_fx.inputs.turns import same_images
from deos_fx.models.facts import ModelFacts
from deos_fx.models.families import IN_FRONT, MARKS, POSITIONS, READ
from deos_fx.models.shapes_only import ShapesOnly
from deos_fx.models.states import goes_on
from deos_fx.models.upstream import CACHE
from deos_fx.models.views import has_codes, shallow_copy
from deos_fx.tokens.cache import ReducedCache
from deos_fx.tokens.turn import TurnCache
from deos_fx.words import counted

__all__ = ["completed"]


def completed(call: Call) -> Call:
    """Return a call that names everything the model's forward would otherwise choose itself.

    1. The cache: a new one, unless there is one or ``use_cache`` is False.
    2. The images: if the call continues a text, those that the cache has are left out. With new
       ones, the cache becomes a `TurnCache`, and the mask that of the new tokens.
    3. The position ids: the model's own code computes them, in a run on shapes alone. A new cache
       remembers how they go on after the prompt.

    Args:
        call: The call.

    Raises:
        ValueError: If ``input_ids`` is missing, the cache is not a `ReducedCache` or not one of
            this text, images are neither those of the cache nor those of the new tokens, layers
            with a state would read padding, or the call asks for an output that a reduced model
            does not have.
    """
    model, inputs = call.model, dict(call.inputs)
    if "input_ids" not in inputs:
        raise ValueError(
            "deos_fx finds the visual tokens by input_ids, which is missing: pass input_ids with "
            "image placeholders and pixel_values, not inputs_embeds."
        )
    # 1. The cache.
    config = model.config.get_text_config()
    cache = inputs.get(CACHE)
    if cache is None and inputs.setdefault("use_cache", getattr(config, "use_cache", True)):
        cache = inputs[CACHE] = ReducedCache(config)
    if cache is not None and not isinstance(cache, ReducedCache):
        raise ValueError(
            f"{CACHE} is a {type(cache).__name__}: the layers of a reduced model hold "
            "different numbers of tokens. Pass None, or the cache an earlier call returned."
        )
    if cache is not None and cache.get_seq_length():
        # 2. The call continues a text.
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise ValueError(
                f"attention_mask is {tuple(mask.shape)} in a call that goes on with a cache, whose "
                "layers hold different tokens: give flags [B, T] of what is real, of the cache and "
                "the new tokens."
            )
        inputs = _continued(call, inputs, cache)
    if cache is not None and cache.has_states:
        _check_padding(call, inputs.get("attention_mask"))
    _check_outputs(model, inputs)
    # A graph returns named fields; `ReducedModel.forward` makes a tuple of them if asked to.
    inputs["return_dict"] = True
    # 3. The position ids.
    if "position_ids" not in inputs:
        try:
            inputs["position_ids"] = _default_positions(call.facts, inputs)
        except (LookupError, RuntimeError):
            # Code that places the tokens of images by their sizes fails on other placeholders,
            # without saying why.
            if call.has_images:
                replace(call, inputs=inputs).check_images()
            raise
    return replace(call, inputs=inputs)


def _continued(call: Call, inputs: dict[str, Any], cache: ReducedCache) -> dict[str, Any]:
    """Check that a call continues the text of its cache, and return its inputs.

    Processors give the images of the whole conversation in every turn. Images that the cache has
    are left out; with those of the new tokens, the inputs become those of a prompt of its own.
    """
    ids, rows = inputs["input_ids"], cache.rows
    if ids.shape[1] == 0 or len(ids) != rows:
        raise ValueError(
            f"input_ids {tuple(ids.shape)} do not continue a cache of "
            f"{counted(rows, 'row')} and {counted(cache.get_seq_length(), 'token')}: give generate "
            "the whole conversation, or a call the new tokens alone, with an attention_mask over "
            "both."
        )
    if call.has_images and bool(placeholders(call.facts, inputs).any()):
        return _turn(call, inputs, cache)
    # Every image given must be one that the cache has.
    given, known = call.images, cache.images
    same = all(same_images(value, known.get(name)) for name, value in given.items())
    if not same and call.facts.in_front:
        raise ValueError(
            f"A later turn brings images, and {call.facts.name} puts images in front of the whole "
            "text. Start again with a prompt of the new image, or leave out pixel_values."
        )
    if not same:
        raise ValueError(
            "There are images in a later turn that are neither those of the cache nor those of "
            "placeholders among the new tokens. Give generate the whole conversation with all its "
            "images, or a call the new tokens with their own; leave out pixel_values if there are "
            "no new images."
        )
    return {name: value for name, value in inputs.items() if name not in {*given, *READ, MARKS}}


def _turn(call: Call, inputs: dict[str, Any], cache: ReducedCache) -> dict[str, Any]:
    """Return the inputs of a turn with images as those of a prompt of its own."""
    config = call.model.config.get_text_config()
    reason = cache.why_no_images(len(call.facts.blocks.decoder))
    if not reason and cache.has_states and not goes_on(call.model):
        reason = "layers of this model forget their state when several tokens come at once"
    if reason:
        raise ValueError(
            f"A later turn brings images, which is not supported here: {reason}. Start again with "
            "one prompt that has all images."
        )
    seen, new = cache.get_seq_length(), inputs["input_ids"].shape[1]
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape[1] != seen + new:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)} for {counted(seen, 'token')} in the cache and "
            f"{new} new: give flags [B, {seen + new}] of both."
        )
    # Flags and types of the new tokens alone; some models are given those of the whole text.
    own = {
        name: value[:, seen:]
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == (cache.rows, seen + new)
    }
    inputs = inputs | own | {CACHE: TurnCache(config, cache, mask)}
    # Now, since the model's own code would fail on other images without saying why.
    replace(call, inputs=inputs).check_images()
    return inputs


def _check_padding(call: Call, mask: Any) -> None:
    """Refuse padding that layers with a state would read between or after the tokens of a text."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask.int().diff(dim=1) < 0).any()):
        raise ValueError(
            f"attention_mask has padding after real tokens, and layers of {call.facts.name} keep a "
            "state, which forgets where there is padding. Pad prompts on the left, or pass "
            "use_cache=False if nothing is to follow; continue conversations one by one whose "
            "questions differ in length."
        )


# Left out in the run for the positions: inputs that only the whole model takes, and the pixels, on
# which positions do not depend.
_NOT_OF_CORE = {"pixel_values", "pixel_values_videos", "labels", "logits_to_keep"} | READ


class _PositionsReached(Exception):  # noqa: N818 - not an error: it stops the run early
    """Raised once the positions are known, or in place of the first layer."""


def _default_positions(facts: ModelFacts, inputs: Mapping[str, Any]) -> Tensor:
    """Return the position ids that the model's own code computes, which differs by family.

    The model runs on the text alone and is stopped where its decoder or, if that makes them itself,
    the first layer is given positions. What it remembers of the prompt goes into the cache, for the
    positions of later tokens.
    """
    found: list[Any] = []

    def look(positions: Any, *, last: bool) -> None:
        if positions is not None:
            found.append(positions)
        if last or found:
            raise _PositionsReached

    cache: Any = inputs.get(CACHE)
    if facts.in_front:
        return _positions_of_text(
            inputs["input_ids"], 0 if cache is None else cache.get_seq_length()
        )
    core = _watched_core(facts, look)
    turn = cache if isinstance(cache, TurnCache) else None
    if turn is not None and not hasattr(core, "rope_deltas"):
        # Case: a later turn, and positions do not depend on images: they go on as those of text.
        cache, turn = turn.earlier, None
        inputs = {**inputs, CACHE: cache, "attention_mask": inputs[CACHE].attention_mask}
    seen = 0 if cache is None else cache.get_seq_length()
    if hasattr(core, "rope_deltas"):
        # The model remembers how positions continue after its latest prompt, which may be that of
        # another text or thread. The view gets what the cache of this text remembers.
        core.rope_deltas = cache.rope_deltas if seen else None
    text = {name: value for name, value in inputs.items() if name not in _NOT_OF_CORE}
    # Otherwise code that counts flags would make some without values.
    ids = inputs["input_ids"]
    text.setdefault("attention_mask", ids.new_ones(len(ids), seen + ids.shape[1]))
    # Quantised embeddings may not run on shapes alone. A lookup is cheap enough to run for real.
    coded = any(map(has_codes, facts.model.get_input_embeddings().modules()))
    run = contextlib.nullcontext() if coded else ShapesOnly()
    with contextlib.suppress(_PositionsReached), torch.no_grad(), run:
        core.forward(**text)
    if cache is not None and not seen:
        cache.rope_deltas = getattr(core, "rope_deltas", None)
    if found and turn is not None:
        # Case: a later turn with images, whose positions were counted from 0.
        return found[0] + turn.first_position()
    if found:
        # Case: the model passes positions. With a cache, some models pass those of all tokens that
        # the attention mask covers, of which the last are the new ones.
        return found[0][..., -inputs["input_ids"].shape[1] :]
    input_ids = inputs["input_ids"]
    if facts.position_maker is not None:
        # Case: positions are found by the ids, and added to the embeddings.
        maker: Any = facts.text_model.get_submodule(facts.position_maker)
        return getattr(maker, POSITIONS)(input_ids, maker.padding_idx, seen)
    # Case: the layers get no positions; count from the length of the cache.
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None] + seen


def _positions_of_text(ids: Tensor, seen: int) -> Tensor:
    """Return the positions [1, N] of a text in front of which a model has put images.

    The text counts from 0 whatever is in front of it, and later text from the length of the cache.
    """
    count = int((ids[0] == IN_FRONT).sum())
    return (torch.arange(ids.shape[1], device=ids.device)[None] - count).clamp(min=0) + seen


def _watched_core(facts: ModelFacts, look: Callable[..., None]) -> Any:
    """Return a view of what runs text, whose decoder and first layer show their positions.

    The model itself stays as it is, since other threads may be running it.

    Args:
        facts: The facts of the model.
        look: Is called with the positions that the decoder gets and, if it returns, with those of
            the first layer; there it has to raise.
    """
    core = _with_own(shallow_copy(facts.text_model.base_model))
    decoder, first = facts.text_paths
    layer = _view_inside(core, first)
    layer.forward = lambda *args, **kwargs: look(kwargs.get("position_ids"), last=True)
    if decoder:
        # Otherwise the decoder handles the images too, and positions first reach its layers.
        view = _view_inside(core, decoder)

        def forward(*args: Any, **kwargs: Any) -> Any:
            look(kwargs.get("position_ids"), last=False)
            return type(view).forward(view, *args, **kwargs)

        view.forward = forward
    return core


def _view_inside(core: nn.Module, path: str) -> Any:
    """Put a view in the place of each module on a path in `core`, and return the last one."""
    for name in path.split("."):
        core._modules[name] = view = _with_own(shallow_copy(core._modules[name]))
        core = view
    return core


def _with_own(view: Any) -> Any:
    """Give a view no hooks: transformers' would be shared, and the user's are told of real calls.

    Some of these run even if a call raises.
    """
    view._output_capturing_hooks_installed = True
    view._forward_pre_hooks, view._forward_hooks = OrderedDict(), OrderedDict()
    return view


def _check_outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Refuse to return what layers compute inside, such as attention weights: no graph has it.

    An argument asks for it or, where the argument is missing, a config.
    """
    parts = (model, model.base_model, model.get_decoder())
    for name in _recorded(tuple(map(type, parts))):
        given = inputs.get(name)
        if given or given is None and any(getattr(part.config, name, None) for part in parts):
            inside = "attention weights are never materialised"
            if name != "output_attentions":
                inside = "a graph has what a layer gives, and not what it computes inside"
            raise ValueError(
                f"{name} is not supported: {inside}. Leave it out (or pass {name}=False, if the "
                "model's config asks for it), see ReducedModel.explain for what each reduction "
                "saw, or use the original model."
            )
    if isinstance(inputs.get("logits_to_keep"), torch.Tensor):
        raise ValueError(
            "logits_to_keep is a tensor of prompt positions, and reductions move these. Give the "
            "number of last logits as an int, or 0 for all."
        )


@functools.cache
def _recorded(kinds: tuple[type, ...]) -> tuple[str, ...]:
    """Return the arguments that ask model classes for what hooks record inside their layers.

    Hidden states are not among them: they are the outputs of layers.
    """
    recorded = (getattr(kind, "_can_record_outputs", None) or () for kind in kinds)
    found = {"attentions"}.union(*recorded) - {"hidden_states"}
    return tuple(sorted(f"output_{name}" for name in found))
