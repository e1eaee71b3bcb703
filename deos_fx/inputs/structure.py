"""The structure of a call: what a captured graph depends on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

__all__ = ["configs_of", "structure_of"]


def structure_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[Hashable, ...]:
    """Return what a captured graph depends on: the inputs given, their types, and constants.

    Args:
        model: The model.
        inputs: Arguments of its forward.

    Raises:
        TypeError: If an input is a container with tensors in it, or cannot be compared.
    """
    parts: list[Hashable] = [model.dtype]
    parts += [config._attn_implementation for config in configs_of(model.config)]
    for name, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            # Position ids are [4, B, t] in a prompt's own steps and [1, B, t] in a later turn.
            coordinates = value.shape[:-2] if name == "position_ids" else ()
            parts.append((name, value.dtype, value.device, value.ndim, coordinates))
        elif isinstance(value, Cache) or _is_number(value):
            # A number is an input of the graph, and a guard checks what it decides.
            parts.append((name, type(value)))
        else:
            parts.append((name, _frozen(name, value)))
    return tuple(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _frozen(name: str, value: Any) -> Hashable:
    """Return a constant of the structure as a hashable key.

    Raises:
        TypeError: If it contains tensors, or something that cannot be compared.
    """
    if isinstance(value, Mapping):
        return tuple((key, _frozen(name, item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
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


def configs_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and all configs in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs_of(value)
