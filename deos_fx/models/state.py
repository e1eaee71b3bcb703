"""The state of a model that facts about it and captured graphs depend on."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["ModelState", "configs_of"]


class ModelState:
    """The modules of a model, their forwards, and its config.

    Weights that are changed in place, moved or loaded are no part of it: graphs share them. It does
    not keep the model alive.

    Args:
        model: The model as it is now.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._class = type(model)
        _, *parts = model.modules()
        self._classes = [(part, type(part)) for part in parts]
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
        """Return whether nothing has changed; every call checks thousands of values here."""
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
