"""The page of a search on its own."""

from __future__ import annotations

import os

from deos_fx.files import write_text
from deos_fx.results.page import build_page, tiles
from deos_fx.results.sections import Found, command, policy_section, savings, search_section

__all__ = ["search_report"]


def search_report(result: Found, path: str | os.PathLike[str]) -> None:
    """Write the report of a search on its own.

    Args:
        result: The result of the search.
        path: The HTML file to write.

    Raises:
        OSError: If the file cannot be written.
    """
    sections = [
        policy_section(result.policy, result.best.cost, result.unreduced),
        search_section(result),
    ]
    lead = "Found by gradient for a fixed model, rounded to whole tokens, and within every limit."
    figures = tiles(savings(result.best.cost, result.unreduced))
    text = build_page("A searched token-reduction policy", lead, figures, sections, command())
    write_text(path, text)
