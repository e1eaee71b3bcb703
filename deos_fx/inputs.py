"""Check the inputs of a call and fill in what the model would make up by itself."""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from deos_fx.cache import ReducedCache
from deos_fx.passes.find_blocks import find_blocks
from deos_fx.passes.layout import PromptLayout
from deos_fx.passes.shapes_only import ShapesOnly
from deos_fx.signature import grid_of, image_token_of, size_inputs, sizes_vary
from deos_fx.tokens import is_separator

__all__ = ["complete_inputs", "image_inputs", "prompt_layout"]

_SEPARATORS: weakref.WeakKeyDictionary[PreTrainedModel, dict[Hashable, int]]
_SEPARATORS = weakref.WeakKeyDictionary()


def complete_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with everything explicit that the model's forward would default.

    Args:
        model: The model.
        inputs: Arguments of its forward, without those that are None.

    Returns:
        The inputs with position ids and, unless ``use_cache`` is False, a cache.

    Raises:
        ValueError: If ``input_ids`` is missing, the cache is not a `ReducedCache` or not of this
            text, there are new images in a later turn, or something is asked for that a reduced
            model does not have.
    """
    inputs = dict(inputs)
    if "input_ids" not in inputs:
        raise ValueError(
            "deos_fx finds the visual tokens by input_ids, which is missing: pass input_ids with "
            "image placeholders and pixel_values, not inputs_embeds."
        )
    config = model.config.get_text_config()
    cache = inputs.get("past_key_values")
    if cache is None and inputs.setdefault("use_cache", config.use_cache):
        cache = inputs["past_key_values"] = ReducedCache(config)
    if cache is not None and not isinstance(cache, ReducedCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}: the layers of a reduced model hold "
            "different numbers of tokens. Pass None, or the cache an earlier call returned."
        )
    if cache is not None and cache.get_seq_length():
        inputs = _without_images(model, inputs, cache)
    _check_outputs(inputs)
    inputs["return_dict"] = True
    if "position_ids" not in inputs:
        inputs["position_ids"] = _default_positions(model, inputs)
    return inputs


def image_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of the inputs that images come in: pixels, and how large each image is."""
    names = {*MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, *size_inputs(model)}
    given = {name: inputs[name] for name in sorted(names & inputs.keys())}
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def _without_images(
    model: PreTrainedModel, inputs: dict[str, Any], cache: ReducedCache
) -> dict[str, Any]:
    """The inputs of a call that continues a text, after checking that they do.

    Processors give the images of the whole conversation in every turn: these are in the cache.
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
    if not again or "pixel_values" in given and (ids == image_token_of(model)).any():
        raise ValueError(
            "There are images in a later turn that are not those of the cache, and images in a "
            "later turn are not supported. Start again with one prompt that has all images; leave "
            "out pixel_values if they are in the cache."
        )
    return {name: value for name, value in inputs.items() if name not in given}


def _same(value: Tensor, known: Tensor | None) -> bool:
    # generate gives the very same tensors at every step: these need no comparison.
    return value is known or known is not None and torch.equal(value, known.to(value.device))


# What only the whole model takes, and the images, which positions do not depend on.
_NOT_OF_CORE = {"pixel_values", "labels", "logits_to_keep"}


class _DecoderReached(Exception):  # noqa: N818 - not an error: how the rest is left out
    """The model has come to its decoder."""


def _default_positions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """The position ids that the model's own code makes up, by families in many ways.

    It is asked for them with the text alone and stopped before its decoder runs.
    """
    found: list[Any] = []

    def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.append(kwargs.get("position_ids"))
        raise _DecoderReached

    cache: Any = inputs.get("past_key_values")
    seen = 0 if cache is None else cache.get_seq_length()
    core: Any = model.base_model
    if seen and hasattr(core, "rope_deltas"):
        # The model remembers how positions go on behind the images of its latest prompt.
        core.rope_deltas = cache.rope_deltas
    decoder = model.get_decoder()
    if decoder is core:
        # Where the decoder has the images too, its layers are what is told the positions.
        decoder = model.get_submodule(find_blocks(model).decoder[0])
    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        text = {name: value for name, value in inputs.items() if name not in _NOT_OF_CORE}
        with torch.no_grad(), ShapesOnly():
            core.forward(**text)
    except _DecoderReached:
        pass
    finally:
        handle.remove()
    if found and found[0] is not None:
        return found[0]
    input_ids = inputs["input_ids"]
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None] + seen


def _check_outputs(inputs: Mapping[str, Any]) -> None:
    if inputs.get("output_attentions"):
        raise ValueError(
            "output_attentions is not supported: attention weights are never materialised. See "
            "ReducedModel.explain for what each reduction saw, or use the original model."
        )
    if isinstance(inputs.get("logits_to_keep"), torch.Tensor):
        raise ValueError(
            "logits_to_keep is a tensor of prompt positions, and reductions move these. Give the "
            "number of last logits as an int, or 0 for all."
        )


def prompt_layout(model: PreTrainedModel, inputs: Mapping[str, Any]) -> PromptLayout:
    """Where the visual tokens of a batch are, after checking that every prompt has the same images.

    Args:
        model: The model.
        inputs: Arguments of its forward.

    Returns:
        The layout that a graph is lowered for.

    Raises:
        ValueError: If there is no image, prompts differ in their number of images, or images and
            placeholders do not match.
    """
    rows, columns = grid_of(model)
    per_image = rows * columns
    token = image_token_of(model)
    placeholders = (inputs["input_ids"] == token).sum(dim=1)
    counts = sorted(set(placeholders.tolist()))
    if counts[-1] == 0 or "pixel_values" not in inputs:
        raise ValueError(
            "The prompt has no image: deos_fx reduces visual tokens, so the first call needs "
            f"pixel_values and image placeholders (token id {token}) in input_ids. "
            "Use the original model for text alone."
        )
    if len(counts) == 1 and sizes_vary(model):
        return _layout_of_sizes(model, inputs, counts[0])
    if len(counts) > 1 or counts[0] % per_image:
        raise ValueError(
            f"The prompts of this batch have {counts} image placeholders; every prompt needs the "
            f"same number of images of {per_image or 'equally many'} tokens each. Batch prompts "
            "with equally many images of one size, or pass them one by one."
        )
    images = counts[0] // per_image
    given = inputs["pixel_values"].shape[0]
    if given != images * len(placeholders):
        raise ValueError(
            f"pixel_values has {given} images, but input_ids has placeholders for "
            f"{images * len(placeholders)}."
        )
    return PromptLayout(token, images, (rows, columns))


def _layout_of_sizes(
    model: PreTrainedModel, inputs: Mapping[str, Any], placeholders: int
) -> PromptLayout:
    """The layout of prompts with so many placeholders each, whose images may be of any size."""
    separators = _separators(model, inputs)
    visual, batch = placeholders - separators, len(inputs["input_ids"])
    sizes = [inputs[name] for name in sorted(size_inputs(model)) if name in inputs]
    table = next((size for size in sizes if size.ndim == 2 and size.shape[1] in (2, 3)), None)
    pixels = inputs["pixel_values"]
    if table is not None:
        height, width = table[0, -2:].tolist()
        images, rest = divmod(len(table), batch)
        alike = bool((table == table[0]).all())
    else:
        height, width = pixels.shape[-2:]
        images, rest = divmod(math.prod(pixels.shape[:-3]), batch)
        alike = pixels.ndim > 3
    token = image_token_of(model)
    if alike and not rest and visual % images == 0:
        # The tokens of an image stand as its pixels do: n = rows x columns in its aspect ratio.
        rows = math.isqrt(visual // images * height // width)
        if rows and rows * rows * width == visual // images * height:
            grid = rows, visual // images // rows
            return PromptLayout(token, images, grid, separators)
    return PromptLayout(token, 1, (1, visual), separators, placed=False)


def _separators(model: PreTrainedModel, inputs: Mapping[str, Any]) -> int:
    """Placeholders of a prompt that stand for the end of an image row, not for a part of it.

    Their features are a parameter of the model, whatever the pixels are.
    """
    core: Any = model.base_model
    newline = getattr(core, "image_newline", None)
    if newline is None:
        return 0
    names = sorted(size_inputs(model) & inputs.keys())
    sizes = tuple((name, repr(inputs[name].tolist())) for name in names)
    pixels = inputs["pixel_values"]
    known = _SEPARATORS.setdefault(model, {})
    key = (*sizes, tuple(pixels.shape), len(inputs["input_ids"]))
    if key not in known:
        with torch.no_grad():
            given = {name: inputs[name] for name in names}
            output = core.get_image_features(pixels, **given, return_dict=True)
        count = int(is_separator(torch.cat(list(output.pooler_output)), newline).sum())
        known[key] = count // len(inputs["input_ids"])
    return known[key]
