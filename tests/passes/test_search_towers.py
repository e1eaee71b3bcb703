"""Sites of groups of patches in a search: settings are tried, and the report says so."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from families import prompts, shared

import deos_fx
from deos_fx.passes.analyse.sites import Encoder, Site, Sites
from deos_fx.passes.search.towers import before_others
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction


def test_groups_are_tried_and_single_patches_trained() -> None:
    sites = Sites((), "features", "embeddings", Encoder.OPAQUE, "features")
    assert sites.in_groups("vision.1") and not sites.in_groups("projector")
    assert not replace(sites, encoder=Encoder.PATCHWISE).in_groups("vision.1")


def test_one_reduction_more_comes_before_all_others() -> None:
    sites = [Site(f"vision.{i}", "", "", ("novelty", "feature_norm")) for i in range(9)]
    policy = Policy((Reduction("decoder.1", 4, position="compact"), Reduction("decoder.3", 2)))
    found = [*before_others(policy, sites, 10)]
    # Twelve tokens are more than an image has.
    assert {step.reductions[0].keep for step in found} == {6}
    assert {step.reductions[0].keep for step in before_others(policy, sites, 13)} == {6, 12}
    assert [step.reductions[0].site for step in found[::2]] == [f"vision.{i}" for i in (0, 3, 5, 8)]
    assert all(step.reductions[1:] == policy.reductions for step in found)
    assert {step.reductions[0].position for step in found} == {"compact"}
    assert not [*before_others(found[0], sites, 10)] and not [*before_others(Policy(), sites, 10)]


def test_a_search_tries_groups_and_says_so(tmp_path: Path) -> None:
    model, batch = shared("internvl"), prompts("internvl", 2)
    sites, budget = ["vision.0", "projector"], deos_fx.Budget(visual_tokens=0.25)
    found = deos_fx.search(model, [batch] * 2, budget=budget, sites=sites, steps=2)
    places = [{step.site for step in each.policy.reductions} for each in found.candidates]
    assert {"vision.0"} in places and {"projector"} in places
    assert any({"vision.0"} < each for each in places)
    best = min(found.candidates, key=lambda each: each.loss)
    assert best is found.best
    tried = next(each for each in found.candidates if each.source == "tried at vision.0")
    assert found.limits["visual_tokens"] >= tried.cost.visual_tokens
    inside = any(step.site == "vision.0" for step in found.policy.reductions)
    assert math.isnan(found.relaxed_loss) == inside
    found.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "tried at vision.0" in page and ("have no relaxed form" in page) == inside
