"""The places that go on after their trials."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deos_fx.passes.search.choice import charged, descended, finalists


def descent(loss: float, *sites: str, history: list[dict[str, float]] | None = None) -> Any:
    """What a choice looks at."""
    state = SimpleNamespace(best_loss=loss, history=history or [])
    return SimpleNamespace(state=state, reductions=dict.fromkeys(sites))


def test_a_single_site_and_some_pairs_go_on() -> None:
    singles = [descent(1.5, "projector"), descent(1.6, "decoder.2")]
    pairs = [descent(loss, "projector", f"decoder.{i}") for i, loss in enumerate((1.2, 1.0, 1.1))]
    assert finalists(singles + pairs, [], 2) == [singles[0], pairs[1], pairs[2]]
    assert finalists(singles, [], 2) == singles[:1]
    assert finalists(pairs, [], 1) == [pairs[1]]


def test_only_the_best_of_a_neighbourhood_joins_what_was_tried_first() -> None:
    """So pairs elsewhere go on as well, however well the neighbours do."""
    single, first = descent(1.5, "projector"), descent(1.0, "projector", "decoder.0")
    other = descent(1.3, "projector", "decoder.4")
    near = [descent(0.9, "projector", "decoder.1"), descent(0.95, "projector", "decoder.2")]
    assert finalists([single, first, other], near, 3) == [single, near[0], first, other]
    assert finalists([single, first, other], near, 2) == [single, near[0], first]
    worse = [descent(1.1, "projector", "decoder.1")]
    assert finalists([single, first, other], worse, 3) == [single, first, other]


def test_a_place_is_as_good_as_where_its_steps_end() -> None:
    """However good its start is: from there, more steps lead nowhere."""
    worse = [{"task": 1.0, "static": 0.9}, {"task": 1.0, "static": 1.1}, {"task": 1.0}]
    better = [{"task": 1.0, "static": 1.3}, {"task": 1.0, "static": 1.0}]
    stays = descent(0.9, "decoder.0", history=worse)
    improves = descent(1.0, "decoder.4", history=better)
    assert descended(stays) == 1.1 and descended(improves) == 1.0
    assert finalists([stays, improves], [], 1) == [improves]
    # Where no step was finite, the start is all there is.
    assert descended(descent(1.2, "decoder.2", history=[{"task": 1.0}])) == 1.2


def test_a_second_site_has_to_earn_its_cost() -> None:
    assert descended(descent(1.0, "projector")) == 1.0
    assert descended(descent(1.0, "projector", "decoder.0")) == charged(1.0, 2)
    assert charged(1.0, 2) == pytest.approx(1.05)
