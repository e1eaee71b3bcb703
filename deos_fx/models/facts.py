"""Infer the facts of a model that are needed before it is captured, once for each model.

`facts_of` is the door to every model: it refuses what cannot be served, and returns `ModelFacts`,
which all later code reads in place of the model's config and classes.
"""

from __future__ import annotations

import copy
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from deos_fx.errors import CaptureError
from deos_fx.models.blocks import (
    Blocks,
    counts_positions,
    find_blocks,
    image_tower,
    indexes_keys,
    puts_in_front,
)
from deos_fx.models.families import (
    ENCODERS,
    FORMER_IMAGES,
    IMAGE_TOKENS,
    IN_FRONT,
    MARKS,
    PIXELS,
    POSITIONS,
    QUERIES,
    READ,
    VIDEO_TOKENS,
    WRITER,
)
from deos_fx.models.shapes_only import count_visual_tokens
from deos_fx.models.upstream import check_upstream
from deos_fx.policy.policy import ModelSignature

__all__ = ["ModelFacts", "ModelState", "configs_of", "facts_of"]


# *** the state that facts depend on ***


class ModelState:
    """A snapshot of a model's modules, their forwards, and its config, to notice later changes.

    Weights are not part of the snapshot: graphs share them with the model, so they may be changed
    in place, moved or loaded. The snapshot does not keep the model alive.

    Args:
        model: The model as it is now.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # The model is held weakly, and so is every forward, which may be bound to it. Its parts do
        # not refer to it, so they may be held.
        self._model = weakref.ref(model)
        self._class = type(model)
        _, *parts = model.modules()
        self._classes = [(part, type(part)) for part in parts]
        # A module replaced by assignment (a new head, an adapter) shows in its parent's dict.
        self._children = [
            (one._modules, dict(one._modules)) for one in (model, *parts) if one._modules
        ]
        # accelerate sets a forward of its own on a module, which may be bound to the model.
        self._forwards = [(vars(part), _reference(vars(part).get("forward"))) for part in parts]
        self._forward = _reference(vars(model).get("forward"))
        # A value that does not equal its own copy is left out: it would always seem changed.
        self._settings = [
            (vars(config), name, copied)
            for config in configs_of(model.config)
            for name, value in vars(config).items()
            if _is_setting(name, value) and (copied := copy.deepcopy(value)) == value
        ]

    def holds(self) -> bool:
        """Return whether nothing has changed.

        Every call of a reduced model compares thousands of values here, so each check is a plain
        comparison.
        """
        model = self._model()
        return (
            model is not None
            and type(model) is self._class
            and vars(model).get("forward") is self._forward()
            and all(now == before for now, before in self._children)
            and all(type(part) is kind for part, kind in self._classes)
            and all(now.get("forward") is own() for now, own in self._forwards)
            and all(now.get(name, now) == value for now, name, value in self._settings)
        )


def _reference(value: Any) -> Callable[[], Any]:
    """Return a function that returns the value as long as it is alive."""
    return _nothing if value is None else weakref.ref(value)


def _nothing() -> None:
    return None


# Types of settings that can be copied and compared safely.
_PLAIN = (bool, int, float, str, list, tuple, dict, type(None), torch.dtype)


def _is_setting(name: str, value: Any) -> bool:
    """Return whether this is a config entry that a model's code may read.

    Names with an underscore are left out, such as the implementation of attention, which is a part
    of the structure of a call.
    """
    return isinstance(value, _PLAIN) and not name.startswith("_")


def configs_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and all configs in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs_of(value)


# *** the facts ***


# Everything that works on a model imports this module, so the check runs before anything relies on
# a name that is gone.
check_upstream()


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """Everything that is inferred about a model; it travels in place of the model.

    Facts hold for the modules and the config that the model had: `facts_of` infers new ones when
    these change. They do not keep the model alive.

    Attributes:
        name: Name of the model's class.
        blocks: Its transformer blocks.
        image_token: Id of the placeholder of one visual token of an image.
        video_token: Id of the placeholder of one visual token of a video; None without videos.
        arguments: The signature of the model's forward, with ``pixel_values`` under this name, and
            by name those of `text_model` if that is another, which the model hands on to it.
        encoders: Method of the model's core that encodes images or videos -> its arguments.
        size_inputs: Inputs that give the size of each image: the tensors, other than the pixels,
            that both the model and its image encoder take.
        has_class_token: Whether the vision tower puts a CLS token in front of the patches.
        in_front: Whether the model itself puts images in front of the text, so that prompts have no
            placeholders. A call gets some, see `deos_fx.inputs.in_front`.
    """

    name: str
    blocks: Blocks
    image_token: int
    video_token: int | None
    arguments: inspect.Signature
    encoders: Mapping[str, frozenset[str]]
    size_inputs: frozenset[str]
    has_class_token: bool
    in_front: bool
    _model: Callable[[], PreTrainedModel | None]
    _state: ModelState

    @property
    def model(self) -> PreTrainedModel:
        """Return the model, which the caller keeps alive."""
        model = self._model()
        assert model is not None, "the model of these facts is gone"
        return model

    @property
    def text_model(self) -> PreTrainedModel:
        """Return what runs text alone: the model itself, or a language model inside it.

        Some models always encode an image. They have a `generate` of their own, which does that
        once and leaves the rest to that of the language model.
        """
        return _text_model(self.model, self.blocks)

    @cached_property
    def text_paths(self) -> tuple[str, str]:
        """Return the paths of the decoder and of its first layer in the core of `text_model`.

        That of a decoder which is this core itself is empty.
        """
        text = self.text_model
        paths = {module: path for path, module in text.base_model.named_modules()}
        layer = self.model.get_submodule(self.blocks.decoder[0])
        return paths[text.get_decoder()], paths[layer]

    @cached_property
    def position_maker(self) -> str | None:
        """Return the path in `text_model` of a module that finds positions by the ids, if any."""
        parts = self.text_model.named_modules()
        return next((path for path, module in parts if hasattr(module, POSITIONS)), None)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Return rows and columns of one image's visual tokens; (0, 0) if its size decides them.

        If their number is not a square, or they stand for no place, they count as one row.
        """
        count = _visual_tokens(self, self.size_inputs)
        side = math.isqrt(count)
        names = (name.rpartition(".")[2] for name, _ in self.model.named_parameters())
        # With no tokens counted, the last case gives (0, 0).
        in_square = side * side == count and QUERIES.isdisjoint(names)
        return (side, side) if in_square else (min(1, count), count)

    @property
    def sizes_vary(self) -> bool:
        """Return whether the number of visual tokens of an image depends on its size."""
        return self.grid == (0, 0)

    @cached_property
    def counts_positions(self) -> bool:
        """Return whether decoder layers count positions themselves, by the tokens that they get."""
        return counts_positions(self.model.get_submodule(self.blocks.decoder[0]))

    @cached_property
    def indexes_keys(self) -> bool:
        """Return whether decoder layers choose the keys that a token sees, by an index of them."""
        layers = (self.model.get_submodule(path) for path in self.blocks.decoder)
        return any(map(indexes_keys, layers))

    @property
    def position(self) -> str:
        """Return the rule for positions that reductions have unless a user says otherwise."""
        return "compact" if self.counts_positions else "keep"

    def encodes_as_one(self, inputs: Container[str]) -> bool:
        """Return whether the image encoder of a call stays one node, with its blocks hidden inside.

        Tracing cannot enter an encoder that reads values into Python. Two kinds do:

        1. Encoders that read the size of each image.
        2. Encoders of videos, which split their input by the number of frames.

        Args:
            inputs: Names of the inputs of the call.
        """
        return self.sizes_vary or PIXELS[1] in inputs

    @cached_property
    def signature(self) -> ModelSignature:
        """Return the signature of the model, which a policy made for one model must match."""
        rows, columns = self.grid
        return ModelSignature(
            model_type=self.model.config.model_type,
            vision_layers=len(self.blocks.vision),
            decoder_layers=len(self.blocks.decoder),
            visual_tokens=rows * columns,
        )

    def image(self) -> dict[str, torch.Tensor]:
        """Return what the image encoder takes of an image of the config's size.

        That is its pixels [1, C, H, W] on "meta", so only a shape, and `words`.
        """
        return {"pixel_values": _image(self.model), **self.words}

    @property
    def words(self) -> dict[str, torch.Tensor]:
        """Return a word [1, 1] of the text that the image encoder reads beside an image, if any."""
        read = READ & self.encoders.get("get_image_features", frozenset())
        return {name: torch.ones(1, 1, dtype=torch.int64) for name in sorted(read)}


_FACTS: weakref.WeakKeyDictionary[PreTrainedModel, ModelFacts] = weakref.WeakKeyDictionary()
# One thread infers at a time. Others wait for its result rather than repeat the work, and all of
# them get the same object, by which results are cached elsewhere.
_INFERRING = threading.RLock()


def facts_of(model: PreTrainedModel) -> ModelFacts:
    """Return the facts of a model, inferred anew if its modules or its config have changed.

    Args:
        model: A transformers vision-language model.

    Raises:
        TypeError: If it is not a transformers model, is wrapped, or runs other code than its class.
            The message names what to give instead.
        ValueError: If it reads no images, or not through placeholders in its prompt. The message
            names the reason.
    """
    _check_unwrapped(model)
    with _INFERRING:
        known = _FACTS.get(model)
        if known is None or not known._state.holds():
            known = _FACTS[model] = _infer(model)
        return known


def _infer(model: PreTrainedModel) -> ModelFacts:
    name = type(model).__name__
    # 1. Is it a model that looks and answers?
    if {"image", "video"}.isdisjoint(model.input_modalities) or not model.can_generate():
        raise ValueError(
            f"{name} does not read images and answer in text. Give a vision-language model that "
            "does, for example LlavaForConditionalGeneration."
        )
    if type(model).forward is torch.nn.Module.forward:
        # Case: several models, which its `generate` calls one after the other.
        reading = [
            path
            for path, part in model.named_children()
            if isinstance(part, PreTrainedModel) and "image" in part.input_modalities
        ]
        given = " or ".join(f"model.{path}" for path in reading) or "the one that reads images"
        raise ValueError(
            f"{name} has no forward of its own: it is several models, of which one reads images. "
            f"Give {given}."
        )
    # 2. Does it have blocks that can be told apart, and tokens that can be dropped? Or an error.
    blocks = find_blocks(model)
    # 3. How are the places of its visual tokens marked in the prompt?
    configs = (model.config, getattr(model.config, "vision_config", None))
    named = (_first_entry(config, IMAGE_TOKENS) for config in configs)
    image_token = next((token for token in named if token is not None), None)
    if MARKS in inspect.signature(type(model).forward).parameters:
        # Case: flags say where images are; no token has this id.
        image_token = -1
    in_front = puts_in_front(model)
    if in_front:
        # Case: there are no placeholders until a call gets some. Their id is that of no word.
        image_token = IN_FRONT
    if image_token is None:
        raise ValueError(
            f"The config of {name} names no image placeholder ({' or '.join(IMAGE_TOKENS)}), by "
            "which deos_fx finds the visual tokens in input_ids. Set model.config.image_token_id "
            "if prompts have one."
        )
    core, arguments = model.base_model, _arguments(model, _text_model(model, blocks))
    facts = ModelFacts(
        name=name,
        blocks=blocks,
        image_token=image_token,
        video_token=_first_entry(model.config, VIDEO_TOKENS),
        arguments=arguments,
        encoders={
            method: frozenset(inspect.signature(_call_of(getattr(core, method))).parameters)
            for method in (*ENCODERS, WRITER)
            if hasattr(core, method)
        },
        size_inputs=_size_inputs(model).intersection(arguments.parameters),
        has_class_token=_has_class_token(model),
        in_front=in_front,
        _model=weakref.ref(model),
        _state=ModelState(model),
    )
    if in_front and facts.sizes_vary:
        raise CaptureError(
            f"{name} has no image placeholders in its prompts, and how many tokens of an image it "
            "puts in front of the text does not follow from its config. Use a model whose visual "
            "tokens take the places of placeholders, for example LlavaForConditionalGeneration."
        )
    return facts


def _call_of(encoder: Any) -> Callable[..., Any]:
    """Return the function that a method is, or that a module calls."""
    return encoder.forward if isinstance(encoder, torch.nn.Module) else encoder


def _text_model(model: PreTrainedModel, blocks: Blocks) -> PreTrainedModel:
    if getattr(type(model), "generate", None) is GenerationMixin.generate:
        return model
    *path, _ = blocks.decoder[0].split(".")
    around = (model.get_submodule(".".join(path[:end])) for end in range(1, len(path) + 1))
    return next((part for part in around if _generates(part)), model)


def _generates(part: torch.nn.Module) -> TypeGuard[PreTrainedModel]:
    return isinstance(part, PreTrainedModel) and part.can_generate()


def _arguments(model: PreTrainedModel, text_model: PreTrainedModel) -> inspect.Signature:
    own = inspect.signature(type(model).forward)
    others = inspect.signature(type(text_model).forward).parameters.values()
    added = [one.replace(kind=one.KEYWORD_ONLY) for one in others if one.name not in own.parameters]
    # Those without a fixed name, **kwargs, are last.
    *named, last = own.parameters.values()
    if PIXELS[0] not in own.parameters:
        # Case: the pixels under another name.
        named = [one.replace(name=PIXELS[0]) if one.name in FORMER_IMAGES else one for one in named]
    return own.replace(parameters=[*named, *added, last])


def _first_entry(config: Any, names: tuple[str, ...]) -> int | None:
    # The first entry that exists decides, even if it is None.
    return next((getattr(config, name) for name in names if hasattr(config, name)), None)


# *** models that are refused ***

# Attribute of a wrapper -> expression for the model inside: the wrappers of peft, of torch.compile
# and of several devices, and a reduced model.
_INSIDE = {
    "get_base_model": "get_base_model()",
    "_orig_mod": "_orig_mod",
    "module": "module",
    "model": "model",
}


def _check_unwrapped(model: Any) -> None:
    """Refuse anything but a transformers model that runs the code of its class."""
    name = type(model).__name__
    # Case: peft with prompt learning. It would shift every position in the prompt.
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise TypeError(
            f"model is a {name} that puts tokens of its own in the prompt, which deos_fx does not "
            "know of. Give a model without them; adapters in its layers are no hindrance."
        )
    if not isinstance(model, PreTrainedModel):
        # Case: a wrapper, or no transformers model at all.
        inside = _inside(model, "model")
        raise TypeError(
            f"model is a {name}; give a transformers vision-language model, for example "
            "LlavaForConditionalGeneration.from_pretrained(...)."
            if inside is None
            else f"model is a {name} around a transformers model; give {inside}, in which the "
            "adapters of its layers stay at work."
            if "get_base_model" in inside
            else f"model is a {name} around a transformers model; give {inside}."
        )
    # Case: accelerate made forward run in mixed precision.
    if "_original_forward" in vars(model):
        raise TypeError(
            f"model is a {name} that accelerate has prepared for mixed precision, and deos_fx runs "
            "the model's own code. Give accelerator.unwrap_model(model, keep_fp32_wrapper=False), "
            "and call the result in accelerator.autocast()."
        )
    # Case: a forward set on the instance, with other code than the class has. The hooks of
    # accelerate that bring in weights replace forward too, but are supported.
    replaced = None if hasattr(model, "_hf_hook") else vars(model).get("forward")
    if replaced is not None and _code_of(replaced) is not _code_of(type(model).forward):
        raise TypeError(
            f"model is a {name} whose forward was replaced, and deos_fx runs the one of its class. "
            "Take the replacement away (del model.forward), or make a subclass of it."
        )


def _inside(wrapper: Any, path: str) -> str | None:
    """Return the expression for the transformers model inside nested wrappers; None if none is."""
    if isinstance(wrapper, PreTrainedModel):
        return path
    for name, how in _INSIDE.items():
        inner = getattr(wrapper, name, None)
        if isinstance(wrapper, torch.nn.Module) and inner is not None:
            found = _inside(inner() if how.endswith("()") else inner, f"{path}.{how}")
            if found is not None:
                return found
    return None


def _code_of(forward: Any) -> Any:
    return inspect.unwrap(getattr(forward, "__func__", forward))


# *** images ***


def _size_inputs(model: PreTrainedModel) -> frozenset[str]:
    """Return the tensors other than the pixels that the image encoder takes and the text does not.

    The signatures tell: whatever code runs between pixels and features has to be given the sizes.
    """
    core: Any = model.base_model
    if hasattr(core, WRITER):
        # Case: a module that takes images and other media, and names them so.
        names = inspect.signature(getattr(core, WRITER).forward).parameters
        return frozenset(name for name in names if "image" in name) - FORMER_IMAGES
    tower = image_tower(model)
    encode = getattr(core, "get_image_features", None)
    taken = frozenset[str]()
    if encode is not None:
        # One of the two may only know them as lists (Step 3.7).
        own = _tensor_arguments(type(model).forward).intersection(
            inspect.signature(encode).parameters
        )
        taken = (own | _tensor_arguments(encode)) - READ
    if tower is not None:
        taken |= _tensor_arguments(tower.forward)
    # Towers built like text models also take an attention mask, but not that of the prompt.
    of_text = _tensor_arguments(model.get_decoder().forward)
    return taken - of_text - {"pixel_values"} - FORMER_IMAGES


def _tensor_arguments(function: Any) -> frozenset[str]:
    # Annotations may be types, unions or strings; as text, all of them name Tensor.
    parameters = inspect.signature(function).parameters.values()
    return frozenset(item.name for item in parameters if "Tensor" in str(item.annotation))


def _visual_tokens(facts: ModelFacts, size_inputs: frozenset[str]) -> int:
    """Return the number of visual tokens of an image; 0 unless its pixels alone decide it."""
    model = facts.model
    config: Any = getattr(model.config, "vision_config", None)
    tower = image_tower(model)
    if tower is None or not hasattr(config, "image_size"):
        # Case: no image encoder, or images of no fixed size.
        return 0
    if _tensor_arguments(tower.forward) & size_inputs:
        # Case: the encoder is told the size of each image.
        return 0
    if any(PIXELS[0] in name for name in size_inputs):
        # Case: an image may come with further pixels, such as those of its parts.
        return 0
    return count_visual_tokens(model, facts.image())


def _image(model: PreTrainedModel) -> torch.Tensor:
    config: Any = model.config.vision_config
    sides = config.image_size
    height, width = sides if isinstance(sides, (list, tuple)) else (sides, sides)
    shape = (1, getattr(config, "num_channels", 3), height, width)
    return torch.empty(shape, dtype=model.dtype, device="meta")


def _has_class_token(model: PreTrainedModel) -> bool:
    # A CLS token is a learned vector. transformers' towers give its parameter one of two names.
    tower = image_tower(model)
    names = () if tower is None else (name for name, _ in tower.named_parameters())
    return any("class_embedding" in name or "cls_token" in name for name in names)
