"""Check the inputs of a call and fill in the defaults that the model would choose itself."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.inputs.kinds import has_images, image_inputs
from deos_fx.inputs.media import (
    PromptImages,
    images_of_prompts,
    placeholders,
)
from deos_fx.models.blocks import find_blocks
from deos_fx.models.facts import image_token_of
from deos_fx.models.families import FORMER_IMAGES
from deos_fx.models.layers import has_codes
from deos_fx.models.shapes_only import ShapesOnly
from deos_fx.models.upstream import CACHE, FORMER_CACHE
from deos_fx.models.views import shallow_copy
from deos_fx.tokens.cache import ReducedCache
from deos_fx.tokens.layout import PromptLayout

__all__ = ["complete_inputs", "normal_inputs", "prompt_layout", "prompt_layouts"]


def normal_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call in the one form that all later code reads.

    transformers accepts more forms with the same meaning: former names of the pixels and the
    cache, ids and positions in 32 bits, padding flags of any type. Like transformers, it warns of
    the former name of the cache (FutureWarning).

    Args:
        inputs: Arguments of the model's forward, or of its `generate`.

    Returns:
        The inputs with today's names, and with ids, positions and padding flags in 64 bits.
    """
    named = {"pixel_values" if name in FORMER_IMAGES else name: x for name, x in inputs.items()}
    if CACHE != FORMER_CACHE and FORMER_CACHE in named:
        warnings.warn(f"{FORMER_CACHE} is deprecated, use {CACHE}", FutureWarning, stacklevel=2)
        former = named.pop(FORMER_CACHE)
        named.setdefault(CACHE, former)
    for name in ("input_ids", "position_ids"):
        value = named.get(name)
        if isinstance(value, Tensor) and not value.is_floating_point():
            named[name] = value.long()
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        flags = mask != 0 if mask.is_floating_point() else mask
        named["attention_mask"] = flags.long()
    return named


def complete_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with everything explicit that the model's forward would default.

    Args:
        model: The model.
        inputs: Arguments of its forward, without those that are None.

    Returns:
        The inputs with position ids and, unless ``use_cache`` is False, a cache.

    Raises:
        ValueError: If ``input_ids`` is missing, the cache is not a `ReducedCache` or not one of
            this text, a later turn has new images, or the call asks for an output that a reduced
            model does not have.
    """
    inputs = normal_inputs(inputs)
    if "input_ids" not in inputs:
        raise ValueError(
            "deos_fx finds the visual tokens by input_ids, which is missing: pass input_ids with "
            "image placeholders and pixel_values, not inputs_embeds."
        )
    config = model.config.get_text_config()
    cache = inputs.get(CACHE)
    if cache is None and inputs.setdefault("use_cache", config.use_cache):
        cache = inputs[CACHE] = ReducedCache(config)
    if cache is not None and not isinstance(cache, ReducedCache):
        raise ValueError(
            f"{CACHE} is a {type(cache).__name__}: the layers of a reduced model hold "
            "different numbers of tokens. Pass None, or the cache an earlier call returned."
        )
    if cache is not None and cache.get_seq_length():
        # Case: the call continues a text.
        inputs = _without_images(model, inputs, cache)
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise ValueError(
                f"attention_mask is {tuple(mask.shape)} in a call that goes on with a cache, whose "
                "layers hold different tokens: give flags [B, T] of what is real, of the cache and "
                "the new tokens."
            )
    _check_outputs(model, inputs)
    inputs["return_dict"] = True
    if "position_ids" not in inputs:
        inputs["position_ids"] = _default_positions(model, inputs)
    return inputs


def _without_images(
    model: PreTrainedModel, inputs: dict[str, Any], cache: ReducedCache
) -> dict[str, Any]:
    """Check that a call continues the text of its cache, and return its inputs without images.

    Processors give the images of the whole conversation in every turn; the cache has them already.
    """
    ids, rows = inputs["input_ids"], cache.rows
    if ids.shape[1] == 0 or len(ids) != rows:
        raise ValueError(
            f"input_ids {tuple(ids.shape)} do not continue a cache of {rows} rows and "
            f"{cache.get_seq_length()} tokens: give generate the whole conversation, or a call the "
            "new tokens alone, with an attention_mask over both."
        )
    given, known = image_inputs(model, inputs), cache.images
    again = all(_same(value, known.get(name)) for name, value in given.items())
    if not again or has_images(given) and placeholders(model, ids).any():
        raise ValueError(
            "There are images in a later turn that are not those of the cache, and images in a "
            "later turn are not supported. Start again with one prompt that has all images; leave "
            "out pixel_values if they are in the cache."
        )
    return {name: value for name, value in inputs.items() if name not in given}


def _same(value: Tensor, known: Tensor | None) -> bool:
    # generate passes the very same tensors at every step; these need no comparison.
    return value is known or known is not None and torch.equal(value, known.to(value.device))


# Inputs that only the whole model takes, and the pixels, on which positions do not depend.
_NOT_OF_CORE = {"pixel_values", "pixel_values_videos", "labels", "logits_to_keep"}


class _DecoderReached(Exception):  # noqa: N818 - not an error: it stops the run early
    """Raised in place of the decoder, once the positions are known."""


def _default_positions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return the position ids that the model's own code computes, which differs by family.

    The model runs on the text alone and is stopped before its decoder. What it remembers of the
    prompt goes into the cache, for the positions of later tokens.
    """
    found: list[Any] = []

    def stop(*args: Any, **kwargs: Any) -> None:
        found.append(kwargs.get("position_ids"))
        raise _DecoderReached

    cache: Any = inputs.get(CACHE)
    seen = 0 if cache is None else cache.get_seq_length()
    core = _stopping_core(model, stop)
    if hasattr(core, "rope_deltas"):
        # The model remembers how positions continue after the images of its latest prompt.
        core.rope_deltas = cache.rope_deltas if seen else None
    text = {name: value for name, value in inputs.items() if name not in _NOT_OF_CORE}
    # Quantised embeddings may not run on shapes alone; a lookup is cheap enough to run for real.
    coded = any(map(has_codes, model.get_input_embeddings().modules()))
    run = contextlib.nullcontext() if coded else ShapesOnly()
    with contextlib.suppress(_DecoderReached), torch.no_grad(), run:
        core.forward(**text)
    if cache is not None and not seen:
        cache.rope_deltas = getattr(core, "rope_deltas", None)
    if found and found[0] is not None:
        # With a cache, some models return positions of all tokens that the attention mask covers.
        return found[0][..., -inputs["input_ids"].shape[1] :]
    # Case: the model passes no positions to its decoder; count from the length of the cache.
    input_ids = inputs["input_ids"]
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None] + seen


def _stopping_core(model: PreTrainedModel, stop: Callable[..., Any]) -> Any:
    """Return a view of a model's core that calls `stop` in place of its decoder.

    The model itself stays as it is, since other threads may be running it.
    """
    core: Any = shallow_copy(model.base_model)
    # Otherwise transformers puts output hooks into the model's own modules, which the view shares.
    core._output_capturing_hooks_installed = True
    decoder = model.get_decoder()
    if decoder is model.base_model:
        # Case: the decoder handles the images too, so the positions first reach its layers.
        decoder = model.get_submodule(find_blocks(model).decoder[0])
    names = (name for name, module in core.named_modules() if module is decoder)
    path = next(names, "").split(".")
    parent = core
    for part in path if path[0] else ():
        parent._modules[part] = shallow_copy(parent._modules[part])
        parent = parent._modules[part]
    if parent is not core:
        parent.forward = stop
    return core


def _check_outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Refuse outputs that layers compute inside, which are nowhere in the graph.

    An argument asks for them or, where it is missing, a config.
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


def prompt_layout(model: PreTrainedModel, inputs: Mapping[str, Any]) -> PromptLayout:
    """Find where the visual tokens of a batch are; its prompts must be alike in that.

    Args:
        model: The model.
        inputs: Arguments of its forward.

    Returns:
        The layout that a graph is lowered for.

    Raises:
        ValueError: If there is no image, prompts differ in their images or in whether they end
            in one, or images and placeholders do not match.
    """
    prompts = _prompts(model, inputs)
    layouts = [prompt.layout for prompt in prompts]
    if len({prompt.alike for prompt in prompts}) > 1 or layouts[0] is None:
        counts = sorted({sum(layout.sizes) if layout else 0 for layout in layouts})
        raise ValueError(
            f"The prompts of this batch differ: they have {counts} visual tokens, and "
            f"{sum(one is not None and one.ends for one in layouts)} of {len(layouts)} end in one. "
            "Only calling and generating take such batches; here give prompts with equally many "
            "images of the same sizes, all with text at the end or none, or one by one."
        )
    return layouts[0]


def prompt_layouts(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[PromptLayout | None]:
    """Find where the visual tokens of each prompt of a batch are; None for a prompt of text alone.

    Args:
        model: The model.
        inputs: Arguments of its forward.

    Raises:
        ValueError: If there is no image, or images and placeholders do not match.
    """
    return [prompt.layout for prompt in _prompts(model, inputs)]


def _prompts(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[PromptImages]:
    if not has_images(inputs):
        raise ValueError(
            "The prompt has no image, so there are no visual tokens to look at. Give a prompt with "
            f"pixel_values and image placeholders (token id {image_token_of(model)}) in input_ids."
        )
    return images_of_prompts(model, inputs)
