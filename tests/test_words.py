"""Numbers with their nouns."""

from __future__ import annotations

import pytest

from deos_fx.words import counted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((1, "question"), "1 question"),
        ((2, "visual token"), "2 visual tokens"),
        ((0, "row"), "0 rows"),
        ((1, "entry", "entries"), "1 entry"),
        ((3, "entry", "entries"), "3 entries"),
        ((f"{1.0:g}", "token"), "1 token"),
        ((f"{1234:,}", "byte"), "1,234 bytes"),
        ((0.5, "token"), "0.5 tokens"),
    ],
)
def test_a_noun_has_the_number_of_its_count(given: tuple[float, str], said: str) -> None:
    assert counted(*given) == said
