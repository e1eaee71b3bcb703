"""What a result rests on, and the warnings where the data is too little to tell."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from deos_fx.results.evidence import Evidence

ENOUGH = Evidence(
    model="llava",
    trained=300,
    scored=100,
    held_back=True,
    answers=True,
    preset="preset merge",
    preset_loss=0.5,
    lead=0.1,
    error=0.02,
)


def test_enough_data_leaves_no_doubt() -> None:
    assert ENOUGH.doubts == []
    text = str(ENOUGH)
    assert "on 300 prompts" in text and "on 100 prompts, others that were held back" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"error": 0.06}, "differ by 0.1 with a standard error of 0.06"),
        ({"lead": -0.1}, "cannot tell the policy from preset merge, which is simpler"),
        ({"error": math.inf}, "the losses are on one batch alone"),
        ({"error": math.nan}, "cannot tell the policy from preset merge"),
        ({"held_back": False}, "No prompts are held back"),
    ],
)
def test_too_little_data_is_said(changes: dict[str, Any], words: str) -> None:
    (doubt,) = replace(ENOUGH, **changes).doubts
    assert words in doubt


def test_a_preset_that_won_is_not_compared_with_itself() -> None:
    assert replace(ENOUGH, preset="", lead=0.0, error=math.inf).doubts == []
