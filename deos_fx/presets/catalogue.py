"""Keep the catalogue of presets: the source and the needs of each, besides its policy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from deos_fx.policy.policy import Policy

__all__ = ["CATALOGUE", "Method", "method"]

_Function = TypeVar("_Function", bound=Callable[..., "Policy"])


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        name: Name of the preset.
        function: Returns its policy; the defaults are those of the official code.
        title: Its summary in one line.
        source: Paper and official code.
        licence: Licence of the official code, none of which is in this project.
        needs: Requirements on the model.
        place: Where it reduces first: in the vision ``tower`` or by what that attends to, at the
            ``projector``, or inside the ``decoder``.
    """

    name: str
    function: Callable[..., Policy]
    title: str
    source: str
    licence: str
    needs: str
    place: str


CATALOGUE: dict[str, Method] = {}


def method(source: str, *, licence: str, needs: str = "") -> Callable[[_Function], _Function]:
    """Make a decorator that enters a preset into the catalogue, and checks that numbers are given.

    Args:
        source: Paper and official code.
        licence: Licence of the official code.
        needs: What the model must have besides visual tokens in its prompt.
    """

    def enter(function: _Function) -> _Function:
        # The docstring's first line is the title, so that the two cannot differ.
        name = function.__name__
        title = (function.__doc__ or "").partition("\n")[0]
        checked = _with_numbers(function)
        # The presets of each place have a module, named after it.
        place = function.__module__.rpartition(".")[2]
        CATALOGUE[name] = Method(name, checked, title, source, licence, needs, place)
        return checked

    return enter


def _with_numbers(function: _Function) -> _Function:
    """Refuse anything but numbers where the default of an argument is one."""
    signature = inspect.signature(function)
    defaults = {name: each.default for name, each in signature.parameters.items()}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Policy:
        # Here, since a list of the presets does not wait for torch.
        from deos_fx.policy.tier import check_number

        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if type(defaults[name]) in (int, float):
                check_number(f"{function.__name__}: {name}", value, -1e9, 1e9)
        return function(*args, **kwargs)

    return cast(_Function, checked)
