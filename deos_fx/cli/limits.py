"""Read limits as a user writes them: 12.5%, 0.125, 18 or 1e12."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from deos_fx.policy.budget import Budget

__all__ = ["DEFAULT_LIMIT", "limit_beside", "read_limit"]

DEFAULT_LIMIT = 0.125
"""The limit on visual tokens if a command is given none."""

_FORMS = "write a share of all as 12.5% or 0.125, and a number as 18"


def read_limit(text: str) -> int | float:
    """Read a limit: ``12.5%`` or ``0.125`` is a share, ``18`` or ``1e12`` a number.

    Raises:
        typer.BadParameter: If it is neither.
    """
    share = text.endswith("%")
    # Digits alone make a number: "1" is one token, and "1.0" is all of them.
    whole = text.lstrip("+-").isdigit()
    try:
        value = int(text) if whole else float(text.removesuffix("%"))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no limit; {_FORMS}") from None
    value = value / 100 if share else value
    if not value > 0:
        raise typer.BadParameter(f"{text} leaves nothing; {_FORMS}")
    if whole or value <= 1:
        return value
    if share:
        raise typer.BadParameter(f"{text} is more than there is; {_FORMS}")
    if value != value // 1:
        raise typer.BadParameter(
            f"{text} is neither a share nor a whole number; did you mean {text}%? {_FORMS}"
        )
    return int(value)


def limit_beside(policies: Collection[str], budget: int | float | None) -> Budget | None:
    """Return the limit of presets beside policies.

    Args:
        policies: The names of the policies.
        budget: The limit on visual tokens that the user gave.

    Returns:
        The budget; None if there are policies alone, whose tokens are the limit then.
    """
    from deos_fx.policy.budget import Budget

    if budget is None and policies:
        return None
    return Budget(visual_tokens=DEFAULT_LIMIT if budget is None else budget)
