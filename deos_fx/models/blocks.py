"""Find the transformer blocks of a vision-language model, or refuse it with the reason."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from deos_fx.errors import CaptureError
from deos_fx.models.families import ENCODERS, IMAGE_TOKENS, MARKS, PIXELS, VIDEO_TOKENS, WRITER

__all__ = [
    "Block",
    "Blocks",
    "counts_positions",
    "decoder_blocks",
    "find_blocks",
    "image_tower",
    "indexes_keys",
    "only_keeps_state",
    "puts_in_front",
]

_CACHES = "transformers.cache_utils"

# Methods of a cache that say how many tokens a layer holds.
_HELD = {"get_mask_sizes", "get_query_offset", "get_seq_length"}

# Method of a cache that keeps the index by which a layer chooses keys.
_INDEXES = "update_indexer"

# Methods of a cache that keep the state of a layer.
_STATES = {"update_conv_state", "update_recurrent_state"}

# What a model's core has that encodes its images.
_WAYS = ("get_image_features", WRITER)

_INSTEAD = (
    "Use a model whose visual tokens take the places of image placeholders in the prompt, for "
    "example LlavaForConditionalGeneration."
)


@dataclass(frozen=True, order=True)
class Block:
    """One transformer block of a model.

    Attributes:
        stage: ``vision`` or ``decoder``.
        index: Its place in its stage, from 0.
    """

    stage: str
    index: int

    @property
    def name(self) -> str:
        """Return its name in graphs: ``vision_0``, ``decoder_0``, ..."""
        return f"{self.stage}_{self.index}"

    @property
    def site(self) -> str:
        """Return the name of the site right after it: ``vision.0``, ``decoder.0``, ..."""
        return f"{self.stage}.{self.index}"

    @property
    def next(self) -> Block:
        """Return the block after it, which the model need not have."""
        return Block(self.stage, self.index + 1)


@dataclass(frozen=True)
class Blocks:
    """Module paths of the blocks, in order.

    Attributes:
        vision: Paths of the vision tower's blocks.
        decoder: Paths of the language model's decoder layers.
    """

    vision: tuple[str, ...]
    decoder: tuple[str, ...]

    def by_path(self) -> dict[str, Block]:
        """Return module path -> block."""
        return {path: Block("vision", i) for i, path in enumerate(self.vision)} | {
            path: Block("decoder", i) for i, path in enumerate(self.decoder)
        }


def find_blocks(model: PreTrainedModel) -> Blocks:
    """Find the stacks of blocks, by transformers' own accessors and base class of blocks.

    Args:
        model: A transformers vision-language model.

    Returns:
        The paths of its vision blocks and decoder layers.

    Raises:
        CaptureError: If its images are not tokens of its decoder's prompt, its decoder is not made
            of such blocks, or visual tokens cannot be dropped there.
    """
    # The order gives the most telling error: first how images are read, then what the decoder does.
    _check_reading(model)
    tower = image_tower(model)
    blocks = Blocks(
        () if tower is None else _blocks_under(model, tower),
        decoder_blocks(model),
    )
    # The vision tower may have no such blocks: then there are no sites inside it.
    if not blocks.decoder:
        raise CaptureError(
            f"{type(model).__name__} has no list of decoder layers that derive from transformers' "
            "GradientCheckpointingLayer. Use a model with a decoder made of such layers."
        )
    _check_layers(model)
    return blocks


def image_tower(model: PreTrainedModel) -> nn.Module | None:
    """Return the module that encodes images; None where patches enter the prompt without one."""
    tower = model.get_encoder(modality="image")
    if tower not in (model, model.base_model):
        return tower
    # transformers answers with the model itself where it has no encoder, or knows of none.
    if not puts_in_front(model):
        return None
    parts = (part for part in model.base_model.children() if isinstance(part, PreTrainedModel))
    return next((part for part in parts if part.main_input_name == PIXELS[0]), None)


def decoder_blocks(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the paths of the decoder layers of a model, or of its core."""
    return _blocks_under(model, model.get_decoder(), image_tower(model))


def puts_in_front(model: PreTrainedModel) -> bool:
    """Return whether a model that reads images has no way to say where they are in a prompt.

    It puts them in front of the text then, inside its own forward.
    """
    core: Any = model.base_model
    entries = (*IMAGE_TOKENS, *VIDEO_TOKENS)
    return not (
        MARKS in inspect.signature(type(model).forward).parameters
        or any(hasattr(core, method) for method in (*ENCODERS, WRITER))
        or any(hasattr(model.config, entry) for entry in entries)
    )


def _check_reading(model: PreTrainedModel) -> None:
    """Refuse models whose images are not tokens of the decoder's prompt."""
    name = type(model).__name__
    # Case: an encoder-decoder, such as Florence, or one inside, such as the T5 of some BLIP-2. That
    # of DiffusionGemma, which writes a block of text at a time, is not called one in its config.
    configs = (model.config, model.config.get_text_config())
    given = inspect.signature(type(model).forward).parameters
    if any(each.is_encoder_decoder for each in configs) or "decoder_position_ids" in given:
        raise CaptureError(
            f"{name} reads images in an encoder that its decoder attends to, so its decoder has no "
            f"visual tokens to reduce. {_INSTEAD}"
        )
    # Case: cross-attention in the decoder, such as that of Mllama. No class is common to these
    # layers, but their names say what they are.
    parts = model.get_decoder().named_modules()
    if any("cross" in f"{path} {type(part).__name__}".lower() for path, part in parts):
        raise CaptureError(
            f"{name} reads images through cross-attention, not in its prompt: its decoder has no "
            f"visual tokens to reduce. {_INSTEAD}"
        )
    core: Any = model.base_model
    marked = MARKS in inspect.signature(type(model).forward).parameters
    if marked or puts_in_front(model) or any(hasattr(core, way) for way in _WAYS):
        return
    raise CaptureError(
        f"{name} has no get_image_features, so its images do not enter the prompt in the way that "
        f"transformers' models share and deos_fx follows. {_INSTEAD}"
    )


def _check_layers(model: PreTrainedModel) -> None:
    """Refuse decoders with layers for which it is not known what dropping a token means."""
    # Layers whose cache is a class of the family, with a rule that is not known.
    caches = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    own = {type(cache).__name__ for cache in caches if type(cache).__module__ != _CACHES}
    if own:
        raise CaptureError(
            f"{type(model).__name__} keeps keys by a rule of its own ({', '.join(sorted(own))}), "
            "which is not known to hold when some have been dropped. Use a model with the caches "
            "that transformers' models share."
        )


def counts_positions(layer: nn.Module) -> bool:
    """Return whether a layer counts positions itself, by the tokens that it is given and holds.

    It is recognised by its code, which asks a cache how many these are. An index of keys asks for
    that, too, but only for which of them come before a token.
    """
    named = _names_in_code(layer)
    return any(not _HELD.isdisjoint(names) and _INDEXES not in names for names in named)


def indexes_keys(layer: nn.Module) -> bool:
    """Return whether a layer chooses the keys that a token sees, by an index of its own.

    It is recognised by its code, which keeps the index in a cache beside keys and values.
    """
    return any(_INDEXES in names for names in _names_in_code(layer))


def only_keeps_state(layer: nn.Module) -> bool:
    """Return whether a layer keeps a state in a cache, and no keys.

    It is recognised by its code, which updates the one and not the other. Layers whose code writes
    their state elsewhere are known by their mask, which is one of padding.
    """
    names = {name for names in _names_in_code(layer) for name in names}
    return not _STATES.isdisjoint(names) and "update" not in names


def _names_in_code(layer: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yield the names that the forward of each part of a layer uses."""
    forwards = (inspect.unwrap(type(part).forward) for part in layer.modules())
    codes = (getattr(forward, "__code__", None) for forward in forwards)
    return (code.co_names for code in codes if code is not None)


def _blocks_under(
    model: nn.Module, part: nn.Module, without: nn.Module | None = None
) -> tuple[str, ...]:
    """Return the paths (in `model`) of the elements of the longest block list inside `part`.

    Lists inside `without` do not count.
    """
    inside = {id(module) for module in part.modules()}
    inside -= {id(module) for module in (without.modules() if without is not None else ())}
    stacks = [
        [f"{path}.{i}" for i in range(len(module))]
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and id(module) in inside
        and len(module) > 0
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    ]
    # A part may hold smaller lists of blocks as well; the stack is the longest.
    longest: list[str] = max(stacks, key=lambda stack: len(stack), default=[])
    return tuple(longest)
