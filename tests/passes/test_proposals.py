"""Where a search starts, what it rounds to and what it varies, on sites made by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import prompts, shared

from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.passes.analyse.sites import Encoder, Site, Sites
from deos_fx.passes.search import places
from deos_fx.passes.search import problem as problem_module
from deos_fx.passes.search.objective import AugmentedLagrangian
from deos_fx.passes.search.places import factors, nearby, placed
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.proposals import adapted, discretise, fitted_preset, variations
from deos_fx.passes.search.regimes import in_regimes
from deos_fx.passes.search.search import default_steps
from deos_fx.passes.search.space import keep_fractions, relaxed, start_reduction
from deos_fx.passes.search.state import SearchState
from deos_fx.policy.budget import Budget
from deos_fx.policy.counts import as_shares
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.presets.tower import tome

TOKENS = 64
IN_DECODER = ("last_text_attention", "text_attention", "feature_norm", "novelty", "key_norm")
SITES = Sites(
    (
        Site("projector", "projector", "", ("cls_attention", "feature_norm", "novelty")),
        Site("decoder.0", "decoder_0", "", IN_DECODER),
        Site("decoder.1", "decoder_1", "something is in the way", IN_DECODER),
        Site("decoder.2", "decoder_2", "", IN_DECODER),
    ),
    "projector",
    "embedding",
    Encoder.PATCHWISE,
    "vision_1",
)
POLICY = Policy((Reduction("projector", 32), Reduction("decoder.2", 8, gain=1.0)), name="start")


def saturated(**retention: float) -> dict[str, RelaxedReduction]:
    """Sites that are surely active, with what they keep of the tokens that reach them."""
    found = {}
    for name, kept in retention.items():
        site = name.replace("_", ".")
        found[site] = RelaxedReduction.from_reduction(Reduction(site, 0.5), kept)
    return found


def test_a_start_has_scores_of_its_site_and_directions_of_its_tokens() -> None:
    tokens = torch.randn(2, TOKENS, 40, generator=torch.Generator().manual_seed(0))
    for site in SITES.available():
        start = start_reduction(site, tokens)
        assert start.site == site.name and set(start.scores) <= set(site.scores)
        assert torch.equal(start.learned["probe"], torch.zeros(40))
        metric = start.learned["metric"]
        torch.testing.assert_close(metric.mT @ metric, torch.eye(32), atol=1e-5, rtol=0)
        # They are the directions along which the tokens are largest.
        flat = tokens.flatten(0, 1)
        largest = torch.linalg.eigvalsh(flat.mT @ flat)[-32:].sum()
        torch.testing.assert_close((flat @ metric).square().sum(), largest)


def test_a_site_without_attention_starts_from_novelty() -> None:
    site = Site("projector", "projector", "", ("feature_norm", "novelty"))
    assert start_reduction(site, torch.randn(1, 9, 4)).scores == {"novelty": 1.0}


def test_the_count_of_one_site_is_given_and_those_of_several_are_trained() -> None:
    alone = relaxed(Policy(POLICY.reductions[:1]), TOKENS)["projector"]
    assert alone.keep_fraction().item() == pytest.approx(0.5)
    assert not alone.retention.requires_grad and not alone.activation.requires_grad
    both = relaxed(POLICY, TOKENS, runners_up=3)
    assert keep_fractions(both) == pytest.approx({"projector": 0.5, "decoder.2": 8 / TOKENS})
    for site in both.values():
        assert site.retention.requires_grad and site.runners_up == 3


def test_rounding_leaves_out_sites_that_keep_nearly_everything() -> None:
    reductions = saturated(projector=0.5, decoder_0=0.99, decoder_2=0.25)
    found = discretise(reductions, TOKENS)
    assert {step.site: step.keep for step in found.reductions} == {"projector": 32, "decoder.2": 8}
    # The site that drops the largest share; counts are of all tokens that are left there.
    (only,) = discretise(reductions, TOKENS, most_sites=1).reductions
    assert (only.site, only.keep) == ("decoder.2", 8)


def differences(one: Reduction, other: Reduction) -> set[str]:
    names = (field.name for field in fields(Reduction))
    return {name for name in names if getattr(one, name) != getattr(other, name)}


def test_presets_of_the_tower_where_only_a_call_shows_how_images_come() -> None:
    """What is before the blocks of Gemma 4 does not follow from its config."""
    budget = Budget(visual_tokens=0.5)
    problem = SearchProblem.of(shared("gemma4"), [prompts("gemma4", 2)] * 4, budget)
    fitted = fitted_preset(problem, "visionzip")
    assert fitted is not None and fitted.reductions[0].site == "vision.1"


def test_a_variation_changes_one_thing() -> None:
    together = [{"gain", "temperature", "mass_bias", "residual", "weighting", "sharpness"}]
    together += [{"selector", "diversity"}, {"scores"}, {"keep"}, {"site"}, {"position"}]
    seen = [found.reductions for found in variations(POLICY, SITES, TOKENS)]
    assert len(seen) > 20
    kinds = []
    for steps in seen:
        if len(steps) < 2:
            assert steps[0] in POLICY.reductions
            kinds.append({"fewer"})
            continue
        changed = [
            found
            for one, other in zip(steps, POLICY.reductions, strict=True)
            if (found := differences(one, other))
        ]
        assert len(changed) == 1
        assert any(changed[0] <= group for group in together), changed
        kinds += changed
        counts = Policy(steps).counts(TOKENS)
        assert counts == sorted(counts, reverse=True)
        assert all(SITES[step.site].available for step in steps)
        assert all(set(step.scores) <= set(SITES[step.site].scores) for step in steps)
    for kind in ({"fewer"}, {"keep"}, {"scores"}, {"position"}, {"selector", "diversity"}):
        assert kind in kinds


def test_numbers_stay_in_their_ranges() -> None:
    ends = {"gain": 1.0, "mass_bias": 4.0, "weighting": "score", "sharpness": 1e3}
    at = Policy((Reduction("projector", 8, selector="greedy", diversity=1e3, **ends),))
    seen = [found.reductions[0] for found in variations(at, SITES, TOKENS)]
    for name in ("mass_bias", "sharpness", "diversity"):
        largest = max(getattr(found, name) for found in seen)
        assert largest == getattr(at.reductions[0], name)


def test_numbers_change_a_little() -> None:
    numbers = {"diversity": 0.5, "gain": 0.5, "temperature": 0.2, "mass_bias": 0.5}
    at = Policy((Reduction("projector", 8, selector="greedy", **numbers),))
    seen = [found.reductions[0] for found in variations(at, SITES, TOKENS)]
    for name, expected in (
        ("diversity", {0.35, 0.7}),
        ("gain", {0.4, 0.6}),
        ("temperature", {0.1, 0.4}),
        ("mass_bias", {0.25, 0.75}),
    ):
        assert expected <= {round(getattr(found, name), 6) for found in seen}


def test_merging_is_taken_away_in_steps() -> None:
    gain = 0.3
    for expected in (0.2, 0.1, 0.0):
        at = Policy((Reduction("projector", 8, gain=gain),))
        gains = {found.reductions[0].gain for found in variations(at, SITES, TOKENS)}
        # The last is no 5e-17, which would be a merge of nothing.
        assert expected in gains
        gain = expected


def test_depths_move_to_neighbours_that_can_be_reduced() -> None:
    at = Policy((Reduction("decoder.2", 8),))
    moved = {found.reductions[0].site for found in variations(at, SITES, TOKENS)}
    # The layer before it cannot, and the layer after it does not exist.
    assert moved == {"decoder.2"}


# *** places and regimes ***


def test_places_nearby_keep_the_order_of_their_sites() -> None:
    sites = SITES.sites
    assert nearby(["projector"], sites, 1) == [["decoder.0"]]
    assert nearby(["projector", "decoder.0"], sites, 1) == [["projector", "decoder.1"]]
    assert nearby(["projector", "decoder.2"], sites, 2) == [["projector", "decoder.0"]]


@pytest.mark.parametrize(
    ("losses", "steps", "expected"),
    [
        # A single token loses 2, so half of what there is to lose is 1.
        ({1: 0.9}, 9, [1]),
        ({1: 1.5, 2: 1.0}, 9, [2, 1]),
        ({1: 1.5, 2: 1.1, 4: 0.5}, 9, [4, 2, 1]),
        ({1: 1.5, 2: 1.1, 4: 0.5}, 2, [2, 1]),
        # With eight times the tokens of 8, nothing would be dropped.
        ({1: 2.0, 2: 2.0, 4: 2.0}, 9, [4, 2, 1]),
    ],
)
def test_steps_begin_with_as_many_tokens_as_say_something(
    monkeypatch: pytest.MonkeyPatch, losses: dict[int, float], steps: int, expected: list[int]
) -> None:
    start, single = (Policy((Reduction("projector", keep),)) for keep in (8, 1))
    wide = {factor: Policy(name=str(factor)) for factor in losses}
    monkeypatch.setattr(places, "widened", lambda problem, start, factor: (problem, wide[factor]))
    known = {wide[factor].name: loss for factor, loss in losses.items()} | {"": 0.0}

    def loss(policy: Policy) -> float:
        return 2.0 if policy.reductions == single.reductions else known[policy.name]

    problem: Any = SimpleNamespace(static_loss=loss, visual_tokens=TOKENS)
    assert factors(problem, start, steps) == expected
    assert factors(problem, POLICY, steps) == [1]


def test_a_place_drops_tokens_at_each_of_its_sites() -> None:
    place = [Reduction("projector", 0.5), Reduction("decoder.0", 0.5)]

    def start(fit: Any) -> Policy | None:
        problem: Any = SimpleNamespace(visual_tokens=TOKENS, fit=fit)
        return placed(problem, place)

    found = start(lambda policy: policy)
    assert found is not None and found.counts(TOKENS) == [2, 1]
    assert start(lambda policy: None) is None
    # A limit that allows all tokens.
    everything = [replace(step, keep=TOKENS) for step in place]
    assert start(lambda policy: Policy(tuple(everything[: len(policy.reductions)]))) is None


@pytest.mark.parametrize(("prompts", "steps"), [(16, 60), (200, 100), (10000, 240)])
def test_steps_follow_from_the_data(prompts: int, steps: int) -> None:
    batch = SimpleNamespace(call=SimpleNamespace(inputs={"input_ids": range(prompts // 2)}))
    found: Any = SimpleNamespace(training=[batch, batch])
    assert default_steps(found) == steps


def test_regimes_are_tried_one_reduction_at_a_time() -> None:
    found = list(in_regimes(POLICY))
    regimes = [[step.regime for step in each.reductions] for each in found]
    # As it was: prune, then merge.
    assert {first for first, second in regimes if second == "merge"} >= {"merge", "pool"}
    assert {second for first, second in regimes if first == "prune"} >= {"prune", "reweight"}


# *** the state of the steps ***


def state(**settings: Any) -> SearchState:
    torch.manual_seed(0)
    reductions = saturated(projector=0.5, decoder_2=0.25)
    return SearchState.start(reductions, AugmentedLagrangian({"flops": 2.0}), settings)


def steps(of: SearchState, number: int) -> None:
    for _ in range(number):
        loss = sum(p.square().sum() for p in of.reductions.parameters())
        of.optimizer.zero_grad()
        loss.backward()
        of.optimizer.step()
        of.lagrangian.update({"flops": torch.tensor(3.0)})
        of.history.append(
            {
                "step": of.step + 1,
                "task": loss.item(),
                "finite": True,
                "not_finite": [],
                "gate_temperature": 0.5,
                "flops": 3.0,
                "multiplier_flops": of.lagrangian.multipliers["flops"],
                "keep": {"projector": 0.5},
            }
        )
        of.consider(abs(of.step - 3))


def test_a_state_continues_from_its_folder_to_the_last_bit(tmp_path: Path) -> None:
    whole, first, second = state(seed=1), state(seed=1), state(seed=1)
    steps(whole, 4)
    steps(first, 2)
    first.save(tmp_path)
    first.save(tmp_path)
    second.resume(tmp_path)
    assert second.step == 2
    steps(second, 2)
    assert second.history == whole.history
    assert second.lagrangian.multipliers == whole.lagrangian.multipliers
    assert list(second.by_site()) == ["projector", "decoder.2"]
    assert (second.best_loss, second.best_step) == (whole.best_loss, whole.best_step)
    assert all(torch.equal(second.best[name], value) for name, value in whole.best.items())
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_states_are_refused_and_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.part").write_text("mine")
    state(seed=1).save(tmp_path)
    assert (tmp_path / "mine.part").exists()
    tensors = tmp_path / "step-0.safetensors"
    data = tensors.read_bytes()
    for place in (0, len(data) // 2, len(data) - 1):
        tensors.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"step-0\.safetensors is damaged"):
            state(seed=1).resume(tmp_path)


def test_states_of_another_search_are_refused(tmp_path: Path) -> None:
    state(seed=1).resume(tmp_path / "nothing here is a start")
    state(seed=1).save(tmp_path)
    with pytest.raises(ValueError, match="holds another search"):
        state(seed=2).resume(tmp_path)
    (tmp_path / "search.json").write_text("[]")
    message = "is not the state of a search.*Give another checkpoint folder, or delete this one"
    with pytest.raises(ValueError, match=message):
        state(seed=1).resume(tmp_path)


def test_halves_are_checked_for_images_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """ToMe's first cut leaves half of each image, rounded: too few where halves are uneven."""
    monkeypatch.setattr(problem_module, "check_reduction", lambda *given: None)
    image, later = (SimpleNamespace(sizes=(size,)) for size in (16, 9))
    problem: Any = SimpleNamespace(
        captured=SimpleNamespace(graph_module=None),
        cost=SimpleNamespace(sizes_vary=True),
        sites=SITES,
        layout=image,
        others=(),
    )
    policies = {
        first: as_shares(tome(merged=8, blocks=2, visual_tokens=16, class_token=first), 16)
        for first in (True, False)
    }
    for policy in policies.values():
        SearchProblem.check(problem, policy)
    problem.others = ((SimpleNamespace(layout=later), {}),)
    SearchProblem.check(problem, policies[False])
    with pytest.raises(ValueError, match="vision.0: .* keeps 4 of 9 tokens, .* keep at least 5"):
        SearchProblem.check(problem, policies[True])


@pytest.mark.parametrize("left", [POLICY, None])
def test_a_preset_that_shrinks_until_it_cannot_run_is_none(left: Policy | None) -> None:
    given = Policy(POLICY.reductions[:1])
    problem: Any = SimpleNamespace(
        sites=SITES,
        cost=SimpleNamespace(for_any_size=lambda policy: policy),
        runs=lambda policy: policy is left or policy.reductions == given.reductions,
        meets=lambda policy: False,
        fit=lambda policy: POLICY,
    )
    assert adapted(problem, given) is left
