"""A call of a model's forward, in the one form that all later code reads.

What a caller may write in many ways (positional or by name, former names, ids in 32 bits) is
settled here, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

from deos_fx.inputs.in_front import with_places
from deos_fx.inputs.items import encoding, given_kinds, has_images, image_inputs
from deos_fx.inputs.media import PromptImages, images_of_prompts
from deos_fx.models.facts import ModelFacts, configs_of
from deos_fx.models.families import FORMER_IMAGES, READ
from deos_fx.models.upstream import CACHE, FORMER_CACHE
from deos_fx.tokens.layout import PromptLayout

__all__ = ["Call", "batch_axis", "normal_inputs"]


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a model's forward by name, and the images that are in them.

    Every function that takes arguments from outside turns them into a call, with `bind` or `of`, so
    that nothing else has to know in which forms they may come. Images are counted once, when they
    are first asked for. `deos_fx.inputs.complete` fills in what the model would choose itself.

    Attributes:
        facts: The facts of the model.
        inputs: The arguments by name, as `normal_inputs` gives them, without those that are None.
        model: The model.
    """

    facts: ModelFacts
    inputs: dict[str, Any]
    model: PreTrainedModel = field(init=False)

    def __post_init__(self) -> None:
        # Facts do not keep the model alive; a call does.
        object.__setattr__(self, "model", self.facts.model)

    @classmethod
    def of(cls, facts: ModelFacts, inputs: Mapping[str, Any]) -> Call:
        """Make a call from arguments by name.

        Args:
            facts: The facts of the model.
            inputs: Arguments of its forward.
        """
        # For every model of transformers, None means the same as leaving the argument out.
        given = {name: value for name, value in inputs.items() if value is not None}
        named = normal_inputs(given)
        # Text that only an image encoder reads goes with the images.
        without = frozenset[str]() if has_images(named) else READ
        taken = {name: value for name, value in named.items() if name not in without}
        return cls(facts, with_places(facts, taken) if facts.in_front else taken)

    @classmethod
    def bind(cls, facts: ModelFacts, *args: Any, **kwargs: Any) -> Call:
        """Make a call from arguments as they are given to the model's forward.

        Raises:
            TypeError: If the forward does not take these arguments.
        """
        # The signature is that of the class, so None stands for self.
        inputs = facts.arguments.bind_partial(None, *args, **kwargs).arguments
        inputs.pop("self", None)
        # What only **kwargs of the forward takes counts like any other argument.
        inputs |= inputs.pop("kwargs", {})
        return cls.of(facts, inputs)

    def having(self, **inputs: Any) -> Call:
        """Return the call with these inputs added, in place of any of the same names."""
        return replace(self, inputs=self.inputs | inputs)

    # *** images ***

    @property
    def has_images(self) -> bool:
        """Return whether there are pixels of images or videos."""
        return has_images(self.inputs)

    @cached_property
    def images(self) -> dict[str, Tensor]:
        """Return the inputs that images and videos come in: their pixels and sizes."""
        return image_inputs(self.facts, self.inputs)

    @property
    def encodings(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the name and the arguments of the method that encodes each kind of media."""
        kinds = given_kinds(self.inputs)
        return [encoding(self.facts, self.inputs, kind) for kind in kinds]

    @cached_property
    def prompts(self) -> list[PromptImages]:
        """Find the images of every prompt of the batch.

        Raises:
            ValueError: If there is no image, or images and placeholders do not match.
        """
        if not self.has_images:
            raise ValueError(
                "The prompt has no image, so there are no visual tokens to look at. Give a prompt "
                f"with pixel_values and image placeholders (token id {self.facts.image_token}) in "
                "input_ids."
            )
        return images_of_prompts(self.facts, self.inputs)

    def check_images(self) -> None:
        """Refuse a call without images, or whose images and placeholders do not match.

        Raises:
            ValueError: If the call is refused.
        """
        _ = self.prompts

    @property
    def layout(self) -> PromptLayout:
        """Find where the visual tokens are in a batch whose prompts are alike.

        Returns:
            The layout that a graph is lowered for.

        Raises:
            ValueError: If there is no image, prompts differ in their images or in whether they end
                in one, or images and placeholders do not match.
        """
        layouts = [prompt.layout for prompt in self.prompts]
        if len({prompt.alike for prompt in self.prompts}) > 1 or layouts[0] is None:
            counts = sorted({sum(layout.sizes) if layout else 0 for layout in layouts})
            raise ValueError(
                f"The prompts of this batch differ: they have {counts} visual tokens, and an image "
                f"ends {sum(one is not None and one.ends for one in layouts)} of {len(layouts)}. "
                "Only calling and generating take such batches; here give prompts with "
                "equally many images of the same sizes, all with text at the end or none, or one "
                "by one."
            )
        return layouts[0]

    def first_prompt(self) -> Call:
        """Return the call of the first prompt of a batch whose prompts are alike."""
        batch = len(self.inputs["input_ids"])

        def first(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            axis = batch_axis(name, value)
            # An axis of images or patches has an equal part for each prompt; [1, N] serves all.
            return value.narrow(axis, 0, max(1, value.shape[axis] // batch))

        return replace(self, inputs={name: first(name, x) for name, x in self.inputs.items()})

    # *** structure ***

    @property
    def structure(self) -> tuple[Hashable, ...]:
        """Return everything a captured graph depends on, as a key: one capture serves equal keys.

        1. The precision of the model, and the attention implementation of each of its configs.
        2. Of a tensor, its type, device and number of axes: its sizes and values are free.
        3. Of a cache or a number, its type: the graph takes it as an input.
        4. Of everything else, its value: the graph has it as a constant.

        Raises:
            TypeError: If an input is a container with tensors in it, or cannot be compared.
        """
        parts: list[Hashable] = [self.model.dtype]
        parts += [config._attn_implementation for config in configs_of(self.model.config)]
        for name, value in sorted(self.inputs.items()):
            if isinstance(value, Tensor):
                # Case 2. Position ids are [4, B, t] in a prompt's own steps, and [1, B, t] in a
                # later turn, which is another graph.
                coordinates = value.shape[:-2] if name == "position_ids" else ()
                parts.append((name, value.dtype, value.device, value.ndim, coordinates))
            elif isinstance(value, Cache) or _is_number(value):
                # Case 3. If a number decides a branch of the model's code, a guard checks that.
                parts.append((name, type(value)))
            else:
                # Case 4.
                parts.append((name, _frozen(name, value)))
        return tuple(parts)


def batch_axis(name: str, value: Tensor) -> int:
    """Return the axis of an input that counts prompts, or the images of all prompts.

    Positions may have several coordinates [k, B, N], or be shared by all rows [1, N].
    """
    return value.ndim - 2 if name == "position_ids" else 0


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
    # Case: the cache under its former name. Today's name wins if both are given.
    if CACHE != FORMER_CACHE and FORMER_CACHE in named:
        warnings.warn(f"{FORMER_CACHE} is deprecated, use {CACHE}", FutureWarning, stacklevel=2)
        former = named.pop(FORMER_CACHE)
        named.setdefault(CACHE, former)
    for name in ("input_ids", "position_ids"):
        value = named.get(name)
        if isinstance(value, Tensor) and not value.is_floating_point():
            named[name] = value.long()
    # Padding flags, of tokens and of patches. Masks of queries and keys have four axes, and their
    # type has a meaning.
    for name, mask in named.items():
        of_tokens = name == "attention_mask"
        if isinstance(mask, Tensor) and (
            mask.ndim == 2 if of_tokens else name == "image_attention_mask"
        ):
            flags = mask != 0 if mask.is_floating_point() else mask
            named[name] = flags.long()
    return named


def _is_number(value: Any) -> bool:
    # Python counts True among the integers; here a flag is a constant.
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _frozen(name: str, value: Any) -> Hashable:
    """Return the value of a constant as a hashable key.

    Raises:
        TypeError: If it contains tensors, or something that cannot be compared.
    """
    if isinstance(value, Mapping):
        return tuple((key, _frozen(name, item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        # Code may branch on the type: a list and a tuple differ, and so do 1, 1.0 and True below.
        return type(value).__name__, *(_frozen(name, item) for item in value)
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} is a list with tensors in it, and only tensors themselves are data of a call. "
            "Give one tensor, as a processor does with return_tensors='pt'."
        )
    if not isinstance(value, Hashable):
        raise TypeError(
            f"{name} is a {type(value).__name__}, by which captured graphs cannot be told apart. "
            "Give a tensor, a number, a string or a list of these."
        )
    return type(value), value
