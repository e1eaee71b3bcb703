"""Write numbers with their nouns."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: float | str, noun: str, plural: str = "") -> str:
    """Return a number with its noun: ``1 question``, ``2 questions``, ``0.5 questions``.

    Args:
        number: The number, or its text if it is to be written in a format of its own.
        noun: The noun for one, of one word or several, the last of which has the plural.
        plural: What several are called; by default the noun with an s.
    """
    return f"{number} {noun if str(number) == '1' else plural or noun + 's'}"
