"""Random cases: families, policies, batches, against oracles that are not the code under test.

FUZZ_CASES=5000 pytest tests/fuzz -n auto        # many cases
FUZZ_FIRST=1234 FUZZ_CASES=1 pytest tests/fuzz   # the same one again
"""

from __future__ import annotations

import os

import pytest
import torch
from drawing import draw
from properties import PROPERTIES

from deos_fx.runtime.reduced_model import ReducedModel

FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
CASES = int(os.environ.get("FUZZ_CASES", "40"))


@pytest.mark.fuzz
@pytest.mark.parametrize("number", range(FIRST, FIRST + CASES))
@torch.no_grad()
def test_case(number: int) -> None:
    case = draw(number)
    try:
        reduced = ReducedModel(case.model, case.policy)
        reduced(**case.batch)
    except ValueError as error:
        # A policy that a model cannot run is refused, with words and before anything is computed.
        pytest.skip(f"{case}: {error}")
    for holds in PROPERTIES:
        try:
            holds(case, reduced)
        except Exception as error:
            raise AssertionError(f"{holds.__name__} fails in {case}") from error
