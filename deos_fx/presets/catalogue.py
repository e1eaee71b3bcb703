"""Keep the catalogue of presets: the source and the needs of each, besides its policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from deos_fx.policy.policy import Policy

__all__ = ["CATALOGUE", "Method", "method"]

_Function = TypeVar("_Function", bound=Callable[..., Policy])


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
    """

    name: str
    function: Callable[..., Policy]
    title: str
    source: str
    licence: str
    needs: str


CATALOGUE: dict[str, Method] = {}


def method(source: str, *, licence: str, needs: str = "") -> Callable[[_Function], _Function]:
    """Make a decorator that enters a preset into the catalogue.

    Args:
        source: Paper and official code.
        licence: Licence of the official code.
        needs: What the model must have besides visual tokens in its prompt.
    """

    def enter(function: _Function) -> _Function:
        # The docstring's first line is the title, so that the two cannot differ.
        name = function.__name__
        title = (function.__doc__ or "").partition("\n")[0]
        CATALOGUE[name] = Method(name, function, title, source, licence, needs)
        return function

    return enter
