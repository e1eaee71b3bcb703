"""Every function of the operator stays on the device of its tokens: checked without that device.

Tensors of the meta device stand for those of a GPU: torch refuses to add others to them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from site_inputs import TEXT, TOKENS, WIDTH
from torch import Tensor

from deos_fx import operator
from deos_fx.operator import SCORES, SELECTORS
from deos_fx.operator.learned import LEARNED
from deos_fx.operator.sequential import greedy_penalty, max_min_ranking

ROWS, KEPT, DEVICE = 3, 5, torch.device("meta")


def random(*shape: int) -> Tensor:
    return torch.rand(shape, device=DEVICE)


def flags(*shape: int) -> Tensor:
    return torch.zeros(shape, device=DEVICE)


def indices(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=DEVICE)


def needed(name: str) -> Any:
    """What a row of a table names, as on a GPU."""
    if name.startswith("attention"):
        return random(ROWS, TOKENS)
    return {
        "alive": random(ROWS, TOKENS),
        "already": KEPT,
        "columns": 6,
        "diversity": 1.0,
        "grid": indices(ROWS, TOKENS, 3),
        "halves": random(ROWS, TOKENS // 2, TOKENS // 2),
        "joint_keys": random(ROWS, TOKENS, WIDTH),
        "keys": random(ROWS, TOKENS, WIDTH),
        "members": indices(4, TOKENS // 4),
        "normed_text": random(ROWS, TEXT, WIDTH),
        "normed_tokens": random(ROWS, TOKENS, WIDTH),
        "score": random(ROWS, TOKENS),
        "seed": indices(),
        "sides": indices(ROWS, 2),
        "similarity": random(ROWS, TOKENS, TOKENS),
        "taken": flags(ROWS, TOKENS),
        "text_mask": random(ROWS, TEXT),
        "text_score": random(ROWS, TEXT),
        "text_tokens": random(ROWS, TEXT, WIDTH),
        "tokens": random(ROWS, TOKENS, WIDTH),
    }[name]


@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str) -> None:
    row = SCORES[name]
    score = row.function(*map(needed, row.needs), *([needed("alive")] if row.compares else []))
    assert score.device == DEVICE and score.shape == (ROWS, TOKENS)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_parts(name: str) -> None:
    row = LEARNED[name]
    part = random(*{"probe": [WIDTH], "place": [4, 4]}.get(name, [WIDTH * len(row.needs), 2]))
    if name == "text":
        part = random(2 * WIDTH, 2)
    assert row.function(*map(needed, row.needs), part).device == DEVICE


# The anchors of a grid are computed on the CPU, once for every graph.
@pytest.mark.parametrize("name", SELECTORS.keys() - {"grid"})
@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("exporting", [False, True])
def test_selectors(
    name: str, taken: bool, exporting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = SELECTORS[name]
    given = [needed(need) if taken or need != "taken" else None for need in row.needs]
    options = [3 if value is None else value for value in row.options.values()]
    count = TOKENS // 2 if name == "bipartite" else KEPT
    if exporting and name in ("top_k", "windows"):
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    kept = row.function(*given, count, *options)
    assert kept.device == DEVICE
    assert kept.shape == (ROWS, TOKENS if row.flags else count)


OTHERS = {
    "between_halves": lambda: operator.between_halves({"key": needed("keys")}, {"key": 1.0}, 1),
    "centred": lambda: operator.centred(needed("tokens"), needed("alive")),
    "chosen": lambda: operator.chosen(indices(ROWS, KEPT), needed("tokens")),
    "combine": lambda: operator.combine([needed("score")] * 2, random(2)),
    "favour": lambda: operator.favour(needed("score"), needed("taken")),
    "greedy_penalty": lambda: greedy_penalty(needed("score"), needed("similarity"), 3, 1.0),
    "importance": lambda: operator.importance(needed("score"), 2.0),
    "k_nearest": lambda: operator.k_nearest(random(ROWS, KEPT, TOKENS), indices(ROWS, KEPT), 2),
    "max_min_ranking": lambda: max_min_ranking(needed("similarity"), 3, needed("alive")),
    "merge": lambda: operator.merge(
        needed("tokens"),
        indices(ROWS, KEPT),
        indices(ROWS, 9),
        random(ROWS, KEPT, 9),
        random(ROWS, KEPT),
        needed("score"),
        needed("score"),
        0.5,
        0.5,
        True,
    ),
    "merge of nothing": lambda: operator.merge(
        needed("tokens"),
        indices(ROWS, KEPT),
        None,
        random(ROWS, 3, 0),
        random(ROWS, 3),
        None,
        None,
        1.0,
        0.5,
    ),
    "merged_mass": lambda: operator.merged_mass(
        indices(ROWS, KEPT), None, random(ROWS, KEPT, TOKENS), needed("score"), 0.5
    ),
    "merged_mass of nothing": lambda: operator.merged_mass(
        indices(ROWS, KEPT), None, random(ROWS, 3, 0)
    ),
    "nearest": lambda: operator.nearest(random(ROWS, KEPT, 9)),
    "others": lambda: operator.others(indices(ROWS, KEPT), needed("tokens")),
    "own_part": lambda: operator.own_part(flags(ROWS, KEPT), indices(ROWS, KEPT), needed("score")),
    "places of a grid": lambda: operator.similarity(
        {"grid": needed("grid")}, {"grid": 0.5}, indices(1, KEPT), slice(None, None, 2)
    ),
    "rest": lambda: operator.rest(None, flags(ROWS, KEPT), indices(ROWS, 9), 0.0),
    "rest with an assignment": lambda: operator.rest(
        random(ROWS, KEPT, 9), flags(ROWS, KEPT), indices(ROWS, 9), 0.5
    ),
    "rest_beside": lambda: operator.rest_beside(
        random(ROWS, KEPT, TOKENS), flags(ROWS, KEPT), indices(ROWS, KEPT), 0.5
    ),
    "reweight": lambda: operator.reweight(
        random(ROWS, KEPT, WIDTH), needed("score"), indices(ROWS, KEPT), 0.5
    ),
    "second_half": lambda: operator.second_half(indices(ROWS, 20), needed("tokens"), 1),
    "slot_of": lambda: operator.slot_of(indices(ROWS, KEPT), indices(ROWS, 1)),
    "soft": lambda: operator.soft(random(ROWS, KEPT, 9), 0.5),
    "standardize": lambda: operator.standardize(needed("score"), needed("alive")),
    "standing_in": lambda: operator.standing_in(
        random(1, KEPT, TOKENS), indices(1, KEPT), indices(ROWS, KEPT)
    ),
    "uniform": lambda: operator.uniform(indices(ROWS, KEPT), indices(ROWS, 9)),
    "with_last": lambda: operator.with_last(indices(ROWS, KEPT), needed("tokens"), 3, 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions(name: str) -> None:
    assert OTHERS[name]().device == DEVICE
