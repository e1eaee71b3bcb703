"""Intervals against scipy's bootstrap, and the files and the page of a comparison."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_report import check_page

from deos_fx import presets
from deos_fx.cost.amounts import Cost
from deos_fx.policy.policy import Policy
from deos_fx.results.compared import Row, Run, bootstrap_means, kept_at
from deos_fx.results.comparison import Comparison

QUESTIONS = 200
KINDS = ["at", "a <b> kind"] * (QUESTIONS // 2)


def scores(share: float, seed: int) -> list[float]:
    return (np.random.default_rng(seed).random(QUESTIONS) < share).astype(float).tolist()


def run_of(values: list[float], tokens: int, policy: Policy | None = None, seed: int = 0) -> Run:
    cost = Cost((tokens,) * 6, float(tokens), 10**9 * (tokens + 1), 1024 * (tokens + 16))
    options = {"temperature": 0.25} if policy is not None and policy.name == "redistribute" else {}
    return Run(["7"] * QUESTIONS, values, cost, 1.5 + tokens, policy, seed, options, 9)


@pytest.fixture(name="result")
def _result() -> Comparison:
    merge, spread = presets.merge(keep=8), presets.redistribute(keep=8)
    runs = [run_of(scores(0.5, i), 8, presets.random(keep=8, seed=i), i) for i in range(3)]
    rows = [
        Row("no reduction", "unreduced", [run_of(scores(0.9, 10), 64)]),
        Row("random", "preset", runs),
        Row("mine <1>", "policy", [run_of(scores(0.8, 11), 9, merge)]),
        Row("redistribute", "preset", [run_of(scores(0.6, 12), 8, spread)]),
        Row("evit", "preset", [], "evit needs <sites>"),
        Row("no image", "input", [run_of(scores(0.2, 13), 0)]),
    ]
    return Comparison(rows, KINDS, 8.0, 64, {"device": "cpu"})


# *** intervals ***


def close(found: Any, expected: tuple[float, float]) -> None:
    # Ten thousand resamples leave an end uncertain by at most one of a hundred answers.
    assert abs(found.low - expected[0]) < 0.0101 and abs(found.high - expected[1]) < 0.0101


@pytest.mark.parametrize("kind", ["", "at"])
def test_intervals_are_those_of_a_paired_bootstrap(result: Comparison, kind: str) -> None:
    asked = np.array([not kind or own == kind for own in KINDS])
    mine, whole = result.row("mine <1>"), result.unreduced
    a, b = mine.scores[0][asked], whole.scores[0][asked]

    def difference(x: Any, y: Any, axis: int) -> Any:
        return x.mean(axis=axis) - y.mean(axis=axis)

    expected = stats.bootstrap(
        (a, b), difference, paired=True, n_resamples=10_000, method="percentile", rng=1
    ).confidence_interval
    found = result.against(mine, whole, kind)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    close(found, expected)
    alone = stats.bootstrap((a,), np.mean, n_resamples=10_000, method="percentile", rng=1)
    close(result.accuracy(mine, kind), alone.confidence_interval)


def test_pairing_narrows_the_interval() -> None:
    values = np.array(scores(0.6, 1))
    # The same answers but for a few that are better.
    better = values.copy()
    better[np.flatnonzero(values == 0)[:5]] = 1
    means = bootstrap_means([values[None], better[None]])
    paired = np.std(means[:, 1] - means[:, 0])
    assert paired == pytest.approx(np.std(better - values) / QUESTIONS**0.5, rel=0.05)
    assert paired < np.std(means[:, 0]) / 2


def test_runs_are_drawn_too() -> None:
    # Two runs that agree within themselves: only which of them is drawn varies.
    opposite = np.stack([np.ones(QUESTIONS), np.zeros(QUESTIONS)])
    means = bootstrap_means([opposite])[:, 0]
    assert set(means.tolist()) == {0.0, 0.5, 1.0}
    assert means.mean() == pytest.approx(0.5, abs=0.02)
    assert np.std(bootstrap_means([opposite[:1]])) == 0


def test_a_method_against_itself(result: Comparison) -> None:
    same = result.against(result.unreduced, result.unreduced)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize(("ours", "count"), [(1.0, 1), (1.0, 24), (0.0, 24)])
def test_answers_that_are_all_alike_are_not_certain(ours: float, count: int) -> None:
    def compared(*values: float) -> Comparison:
        rows = [Row(f"{i}", "policy", [run_of([v] * count, 8)]) for i, v in enumerate(values)]
        return Comparison(rows, [""] * count, 8.0, 64, {})

    result = compared(ours, ours, 1 - ours)
    whole, same, other = result.rows
    share = stats.binomtest(int(ours * count), count).proportion_ci(method="exact")
    found = result.accuracy(same)
    assert found.mean == ours
    assert (found.low, found.high) == pytest.approx((share.low, share.high))
    # Of 24 questions, in how many the two may differ.
    least = stats.binomtest(count, count).proportion_ci(method="exact").low
    equal = result.against(same, whole)
    assert (equal.mean, equal.low, equal.high) == pytest.approx((0, least - 1, 1 - least))
    # One question shows no difference, as in a test of signs.
    ahead = result.against(other, whole)
    assert ahead.mean == 1 - 2 * ours
    assert (min(abs(ahead.low), abs(ahead.high)) > 0 and ahead.low * ahead.high > 0) == (count > 5)


# *** order, files ***


def test_methods_are_ranked(result: Comparison) -> None:
    names = [row.name for row in result.measured]
    assert names == ["no reduction", "mine <1>", "redistribute", "random", "no image"]
    assert result.best is not None and result.best.name == "mine <1>"
    assert [row.name for row in result.left_out] == ["evit"]
    assert result.kind_names == ["at", "a <b> kind"]
    assert result.row("random").visual_tokens == 8 and result.row("random").milliseconds == 9.5


def test_csv_has_a_line_for_each_method(result: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert [line["method"] for line in lines] == [
        *(row.name for row in result.measured),
        "evit",
    ]
    mine, evit = lines[1], lines[-1]
    assert float(mine["accuracy"]) == result.accuracy(result.measured[1]).mean
    assert float(mine["minus_unreduced_low"]) < float(mine["minus_unreduced"]) < 0
    assert float(mine["minus_best"]) == 0
    assert mine["tokens_kept"] == "projector 8"
    assert float(mine["accuracy_at"]) == result.accuracy(result.measured[1], "at").mean
    assert (evit["reason"], evit["accuracy"]) == ("evit needs <sites>", "")


def test_json_has_every_answer(result: Comparison) -> None:
    saved = json.loads(json.dumps(result.to_dict()))
    random = next(method for method in saved["methods"] if method["method"] == "random")
    assert [run["seed"] for run in random["runs"]] == [0, 1, 2]
    assert [run["scores"] for run in random["runs"]] == result.row("random").scores.tolist()
    assert Policy.from_json(json.dumps(random["runs"][2]["policy"])) == presets.random(8, seed=2)


def test_tokens_kept_in_words() -> None:
    policy = presets.pyramid_drop((2, 4), (0.5, 0.25))
    assert kept_at(policy, 64) == "decoder.1 32, decoder.3 16"
    assert kept_at(None, 64) == ""


# *** the page ***


def test_page_is_one_whole_page(result: Comparison, tmp_path: Any) -> None:
    result.save(tmp_path)
    text = (tmp_path / "comparison.html").read_text()
    check_page(text)
    for words in ("mine &lt;1&gt;", "a &lt;b&gt; kind (100)", "evit needs &lt;sites&gt;"):
        assert words in text
    assert "temperature 0.25" in text and "Above the budget: mine &lt;1&gt;." in text


def test_plots_have_colours_of_their_own(result: Comparison, tmp_path: Any) -> None:
    result.save(tmp_path)
    for name in ("accuracy", "cost"):
        text = (tmp_path / f"{name}.svg").read_text()
        assert text.startswith("<svg ") and "var(" not in text and "#0065a8" in text


def test_page_without_kinds_and_without_reductions(result: Comparison, tmp_path: Any) -> None:
    bare = Comparison([result.rows[0], result.rows[-1]], [""] * QUESTIONS, 8.0, 64)
    bare.save(tmp_path)
    text = (tmp_path / "comparison.html").read_text()
    check_page(text)
    assert bare.best is None and "no method that reduces it could be run" in text


def test_a_tie_is_called_one_and_shares_stay_below_100_percent(tmp_path: Any) -> None:
    alike = [1.0] * QUESTIONS
    rows = [Row("no reduction", "unreduced", [run_of(alike, 64)])]
    rows += [Row(name, "preset", [run_of(alike, 8)]) for name in ("merge", "evit")]
    Comparison(rows, [""] * QUESTIONS, 8.0, 64).save(tmp_path)
    text = (tmp_path / "comparison.html").read_text()
    assert "merge, 100.0 %, as does the next, evit." in text
    chart = (tmp_path / "accuracy.svg").read_text()
    shares = [float(value) for value in re.findall(r">\s*(\d+(?:\.\d+)?)\s*</text>", chart)]
    assert len(shares) > 1 and max(shares) <= 100
