"""The places that go on after their trials."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deos_fx.passes.search.choice import charged, descended, finalists


def descent(loss: float, *sites: str) -> Any:
    """What a choice looks at."""
    return SimpleNamespace(state=SimpleNamespace(best_loss=loss), reductions=dict.fromkeys(sites))


def test_a_single_site_and_two_pairs_go_on() -> None:
    singles = [descent(1.5, "projector"), descent(1.6, "decoder.2")]
    pairs = [descent(loss, "projector", f"decoder.{i}") for i, loss in enumerate((1.2, 1.0, 1.1))]
    assert finalists(singles + pairs, [], 2) == [singles[0], pairs[1], pairs[2]]
    assert finalists(singles, [], 2) == singles[:1]
    assert finalists(pairs, [], 1) == [pairs[1]]


def test_the_best_of_a_neighbourhood_stands_for_it() -> None:
    """So a pair elsewhere goes on as well, however well the neighbours do."""
    single, first = descent(1.5, "projector"), descent(1.0, "projector", "decoder.0")
    other = descent(1.3, "projector", "decoder.4")
    near = [descent(0.9, "projector", "decoder.1"), descent(0.95, "projector", "decoder.2")]
    assert finalists([single, first, other], near, 2) == [single, near[0], other]
    worse = [descent(1.1, "projector", "decoder.1")]
    assert finalists([single, first, other], worse, 2) == [single, first, other]


def test_a_second_site_has_to_earn_its_cost() -> None:
    assert descended(descent(1.0, "projector")) == 1.0
    assert descended(descent(1.0, "projector", "decoder.0")) == charged(1.0, 2)
    assert charged(1.0, 2) == pytest.approx(1.05)
