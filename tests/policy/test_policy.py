"""Policies: construction, counts, JSON and files."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deos_fx.operator import SCORES, SELECTORS, SIMILARITIES
from deos_fx.operator.learned import LEARNED
from deos_fx.policy.learned import Learned
from deos_fx.policy.policy import ModelSignature, Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier

TINY = ModelSignature(model_type="llava", vision_layers=4, decoder_layers=10, visual_tokens=144)
SITES = ["projector", "decoder.0", "decoder.4", "decoder.12", "vision.3"]

weights = st.floats(0.01, 10)
PICKING = sorted(name for name, row in SELECTORS.items() if "taken" in row.needs)
FIRST = sorted(SELECTORS)
ANYWHERE = [name for name in FIRST if not SELECTORS[name].whole_grid]


@st.composite
def tiers(draw: st.DrawFn, selectors: Sequence[str] = PICKING, most_scores: int = 3) -> Tier:
    """A tier with the options that its selector and scores know."""
    selector = draw(st.sampled_from(selectors))
    scores = draw(st.dictionaries(st.sampled_from(sorted(SCORES)), weights, max_size=most_scores))
    known = set(SELECTORS[selector].options).union(*(SCORES[name].options for name in scores))
    options: dict[str, Any] = {name: draw(st.integers(1, 9)) for name in known - {"first"}}
    if "first" in known:
        options["first"] = draw(st.integers(0, 1))
    return Tier(
        keep=draw(st.one_of(st.integers(1, 9), st.floats(0.001, 0.3))),
        selector=selector,
        scores=scores,
        diversity=draw(st.floats(0, 3)) if selector == "greedy" else 0.0,
        options=options,
        observe=draw(st.sampled_from(["", "next", "vision.1"])),
    )


@st.composite
def reductions(
    draw: st.DrawFn, site: str = "projector", selectors: Sequence[str] = FIRST
) -> Reduction:
    """A reduction of any kind that is possible at a site."""
    weighting = draw(st.sampled_from(["one", "score", "raw"]))
    first = draw(tiers(selectors, most_scores=1 if weighting == "raw" else 3))
    if weighting == "raw" and not first.scores:
        first = replace(first, scores={"novelty": 1.0})
    # Negative weights make sums alone.
    sums = weighting == "raw" and any(SCORES[name].signed for name in first.scores)
    row = SELECTORS[first.selector]
    later = draw(st.lists(tiers([x for x in selectors if x in PICKING]), max_size=2))
    if row.flags:
        later.append(Tier(keep=1.0))
    neighbours = draw(st.sampled_from([0, 0, 3]))
    windows = ["similar", "window"] if first.selector == "grid" else ["similar"]
    residual = row.ranks and not row.flags and draw(st.booleans())
    order, position = "position", draw(st.sampled_from(["keep", "compact"]))
    if position == "compact" and not site.startswith("decoder"):
        mixed = [] if first.selector == "bipartite" else ["tier"]
        order = draw(st.sampled_from(["position", "selection", *mixed]))
    similarity = draw(st.dictionaries(st.sampled_from(sorted(SIMILARITIES)), weights))
    names = ["probe", "place", "text"] if row.ranks and weighting != "raw" else []
    parts = draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    parts += ["metric"] if "learned" in similarity else []
    shapes = {name: (5, 3)[: part.axes] for name, part in LEARNED.items()}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return Reduction(
        site,
        draw(st.one_of(st.integers(1, 144), st.floats(0.001, 1))),
        learned=Learned({name: torch.randn(shapes[name], generator=generator) for name in parts}),
        sharpness=draw(st.floats(0, 9)) if weighting == "score" else 1.0,
        scores=first.scores,
        selector=first.selector,
        diversity=first.diversity,
        options=first.options,
        observe=first.observe,
        tiers=tuple(later),
        order=order,
        receivers=draw(st.sampled_from(["all", "last"])),
        gain=draw(st.floats(0, 1)),
        assignment="k_nearest" if neighbours else draw(st.sampled_from(windows)),
        neighbours=neighbours,
        temperature=draw(st.one_of(st.floats(0, 100), st.just(math.inf))),
        similarity=similarity,
        weighting=weighting,
        exponent=0.0 if sums else draw(st.floats(0, 2)),
        average=not residual and not sums and draw(st.booleans()),
        reweight=draw(st.floats(-1, 1)),
        residual=residual,
        keep_class=order != "position" and site.startswith("vision") and draw(st.booleans()),
        mass_bias=draw(st.floats(0, 2)),
        position=position,
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    sites = draw(st.lists(st.sampled_from(SITES), unique=True, max_size=4))
    parts = tuple(draw(reductions(site, ANYWHERE)) for site in sites)
    model = draw(st.sampled_from([None, TINY]))
    # Neither control characters nor halves of surrogate pairs.
    name = draw(st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=8))
    scale = draw(st.one_of(st.just(1.0), st.floats(0.001, 1)))
    return Policy(parts, name=name, model=model, image_scale=scale)


@settings(deadline=None, max_examples=100)
@given(policies())
def test_json_round_trip(policy: Policy) -> None:
    text = policy.to_json()
    read = Policy.from_json(text, policy.tensors)
    assert read == policy
    assert read.to_json() == text


def test_the_scale_of_images() -> None:
    policy = Policy(image_scale=0.5)
    assert repr(policy) == "Policy:\n  images enter at 0.5 of their size"
    assert policy != Policy() and policy == Policy(image_scale=1 / 2)
    assert json.loads(policy.to_json())["image_scale"] == 0.5
    # A policy without it is written as before there was one.
    assert "image_scale" not in Policy(image_scale=1).to_json()


@settings(deadline=None, max_examples=50)
@given(reductions())
def test_reductions_survive_json_and_repr(reduction: Reduction) -> None:
    text = json.dumps(reduction.to_dict())
    assert Reduction.from_dict(json.loads(text), reduction.learned) == reduction
    if reduction.temperature != math.inf and not reduction.learned:
        assert eval(repr(reduction)) == reduction
    assert str(reduction)


@settings(deadline=None, max_examples=50)
@given(reductions())
def test_weights_are_on_the_simplex(reduction: Reduction) -> None:
    if reduction.uses_scores and (reduction.scores or not reduction.learned.scores):
        assert sum(reduction.scores.values()) == pytest.approx(1)
    assert sum(reduction.similarity.values()) == pytest.approx(1)


def test_defaults_are_left_out_of_the_json() -> None:
    data = json.loads(Policy((Reduction("decoder.1", 18),)).to_json())
    assert data == {
        "deos_fx": "policy",
        "version": 1,
        "reductions": [
            {"site": "decoder.1", "keep": 18, "scores": {"last_text_attention": 1.0}},
        ],
    }


def test_default_scores_follow_the_site() -> None:
    assert Reduction("projector", 1).scores == {"cls_attention": 1.0}
    assert Reduction("vision.0", 1).scores == {"cls_attention": 1.0}
    assert Reduction("decoder.0", 1).scores == {"last_text_attention": 1.0}
    assert Reduction("projector", 1, selector="grid").scores == {}
    assert Reduction("projector", 1, selector="grid", reweight=0.1).scores != {}


def test_reductions_are_sorted_by_depth() -> None:
    policy = Policy(tuple(Reduction(site, 1) for site in SITES))
    order = ["vision.3", "projector", "decoder.0", "decoder.4", "decoder.12"]
    assert [reduction.site for reduction in policy.reductions] == order


def test_empty_policy() -> None:
    assert Policy().is_empty
    assert Policy().counts(144) == []
    assert repr(Policy()) == "Policy: no reduction"
    assert not Policy((Reduction("projector", 1),)).is_empty


def test_repr_reads_as_a_description() -> None:
    policy = Policy(
        (
            Reduction("projector", 0.5, gain=1, mass_bias=1),
            Reduction("decoder.3", 9, scores={"novelty": 1, "text_attention": 3}, residual=True),
        ),
        name="mine",
        model=TINY,
    )
    assert repr(policy).splitlines() == [
        f"Policy 'mine' for {TINY}:",
        "  projector: keep 0.5, top_k by cls_attention, merge (gain 1, nearest by feature, "
        "mass_bias 1), positions keep",
        "  decoder.3: keep 9, top_k by 0.25 novelty + 0.75 text_attention, mixed (residual), "
        "positions keep",
    ]
    assert eval(repr(policy.reductions[0])) == policy.reductions[0]


def test_tiers_read_as_a_description() -> None:
    reduction = Reduction(
        "vision.22",
        64,
        keep_class=True,
        observe="next",
        tiers=(Tier(keep=10, selector="strided"), Tier(keep=0.1, scores={"random": 1})),
        order="tier",
        receivers="last",
        gain=1,
        average=True,
        position="compact",
    )
    assert str(reduction) == (
        "vision.22: keep 64, top_k by cls_attention of the next block then strided then top_k by "
        "random in the order of the tier, merge (gain 1, nearest by feature, average, keep class, "
        "into the last tier), positions compact"
    )
    assert repr(reduction) == (
        "Reduction(site='vision.22', keep=64, scores={'cls_attention': 1.0}, observe='next', "
        "order='tier', receivers='last', gain=1, average=True, keep_class=True, "
        "position='compact', tiers=(Tier(keep=10, selector='strided'), "
        "Tier(keep=0.1, scores={'random': 1.0})))"
    )
    assert eval(repr(reduction)) == reduction


@pytest.mark.parametrize(
    ("parameters", "regime"),
    [
        ({}, "prune"),
        ({"gain": 1}, "merge"),
        ({"gain": 1, "selector": "grid", "similarity": {"grid": 1}}, "pool"),
        ({"gain": 1, "temperature": 0.1}, "reweight"),
        ({"gain": 1, "temperature": math.inf}, "reweight"),
        ({"reweight": 0.5}, "reweight"),
        ({"gain": 1, "weighting": "score"}, "reweight"),
        ({"gain": 0.5}, "mixed"),
        ({"gain": 1, "exponent": 0.5}, "mixed"),
        ({"residual": True}, "mixed"),
    ],
)
def test_regimes(parameters: dict[str, Any], regime: str) -> None:
    reduction = Reduction("projector", 1, **parameters)
    assert reduction.regime == regime
    assert Policy((reduction,)).regime(reduction) == regime


def test_the_first_tier_takes_what_the_others_leave() -> None:
    tiers = (Tier(keep=0.3), Tier(keep=2))
    assert Reduction("projector", 10, tiers=tiers).tier_counts(10) == [5, 3, 2]
    # Rounded up, but not for the rounding error of a product.
    assert Reduction("projector", 100, tiers=(Tier(keep=0.07),)).tier_counts(100) == [93, 7]
    rest = Reduction("projector", 10, tiers=tiers, residual=True)
    assert rest.tier_counts(10) == [4, 3, 2]
    with pytest.raises(ValueError, match="keeps 2 tokens, of which .* take 2; keep more"):
        Reduction("projector", 2, tiers=tiers).tier_counts(2)
    flags = Reduction("projector", 4, selector="neighbourhood", tiers=(Tier(keep=1.0),))
    assert flags.tier_counts(4) == [0, 4]
    with pytest.raises(ValueError, match="take 2; let them take all"):
        replace(flags, tiers=(Tier(keep=2),)).tier_counts(4)


def test_of_few_tokens_shares_leave_one_to_the_first_tier() -> None:
    tiers = (Tier(keep=0.3), Tier(keep=0.2))
    several = Reduction("projector", 0.25, tiers=tiers)
    assert [several.tier_counts(n) for n in (1, 2, 3)] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert several.among(2).tiers == several.tiers[:1] and several.among(3) is several
    rest = Reduction("projector", 0.25, tiers=tiers, residual=True)
    assert [rest.tier_counts(n) for n in (1, 2, 3)] == [[1, 0, 0], [2, 0, 0], [1, 1, 0]]
    # Tokens that are not there can be in no tier that takes in others.
    one = Reduction("projector", 0.25, tiers=tiers, gain=1, receivers="last").among(1)
    assert one == Reduction("projector", 0.25, gain=1)


def test_options_at_their_defaults_are_not_data() -> None:
    plain = Reduction("projector", 18, selector="greedy")
    assert Reduction("projector", 18, selector="greedy", options={"at_once": 1}) == plain
    assert plain.selection[0].options == {"at_once": 1}
    assert "options" not in plain.to_dict()
    # So another selector can take its place.
    assert replace(plain, selector="top_k") == Reduction("projector", 18)


def test_counts_are_rounded_and_at_least_one() -> None:
    policy = Policy((Reduction("projector", 0.5), Reduction("decoder.1", 0.001)))
    assert policy.counts(145) == [72, 1]
    assert policy.count(Reduction("projector", 18), 144) == 18
    assert Reduction("projector", 1).count(144) == 1
    assert Reduction("projector", 1.0).count(144) == 144


def test_counts_name_both_numbers_when_there_are_too_few_tokens() -> None:
    with pytest.raises(ValueError, match="keeps 200 visual tokens, but .* only 144"):
        Policy((Reduction("projector", 200),)).counts(144)


def test_counts_may_not_grow_with_depth() -> None:
    policy = Policy((Reduction("projector", 18), Reduction("decoder.1", 0.5)))
    with pytest.raises(ValueError, match="decoder.1 keeps 72 .* projector leaves only 18"):
        policy.counts(144)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "encoder.1"}, "no site 'encoder.1'; a site is"),
        ({"site": "decoder"}, "no site"),
        ({"site": "decoder.-1"}, "no site"),
        ({"site": "projector.0"}, "no site"),
        ({"keep": 0}, "keep is 0"),
        ({"keep": -3}, "keep is -3"),
        ({"keep": True}, "keep is True"),
        ({"keep": 1.5}, "a float is a fraction"),
        ({"keep": math.nan}, "keep is nan"),
        ({"scores": {"beauty": 1}}, "no scores 'beauty'; choose from last_text_attention"),
        ({"scores": {"novelty": -1}}, "weight of novelty is -1"),
        ({"scores": {"novelty": 0}}, "sum to 0"),
        ({"similarity": {"colour": 1}}, "no similarity 'colour'"),
        ({"selector": "random"}, "selector is 'random'; choose from top_k, greedy, max_min"),
        ({"weighting": "two"}, "weighting is 'two'"),
        ({"position": "last"}, "position is 'last'; choose from keep, compact, grid"),
        ({"gain": 1.5}, r"gain is 1.5; give a number in \[0, 1\]"),
        ({"gain": math.nan}, "gain is nan"),
        ({"temperature": -1}, "temperature is -1"),
        ({"diversity": 0.5}, "no effect with the selector 'top_k'"),
        ({"mass_bias": "1"}, "mass_bias is '1'"),
        ({"options": {"at_once": 2}}, "no option 'at_once' of top_k .* choose from nothing"),
        ({"selector": "windows"}, "windows needs the option 'windows'"),
        ({"selector": "greedy", "options": {"at_once": 0}}, r"at_once is 0; .* in \[1, "),
        ({"selector": "greedy", "options": {"at_once": 1.5}}, "1.5; give a whole number"),
        ({"selector": "windows", "options": {"windows": [4]}}, r"option windows is \[4\]"),
        ({"scores": {"random": 1}, "options": {"seed": True}}, "option seed is True"),
        ({"selector": "bipartite", "options": {"first": 2}}, "option first is 2"),
        ({"order": "tier"}, "needs a site before the decoder and the position 'compact'"),
        ({"order": "tier", "position": "compact", "site": "decoder.1"}, "before the decoder"),
        ({"order": "tier", "position": "compact", "keep_class": True}, "works in the vision tower"),
        ({"site": "vision.1", "keep_class": True}, "with the order 'tier' or 'selection'"),
        ({"neighbours": 3}, "'similar' with 3 neighbours"),
        ({"assignment": "k_nearest"}, "'k_nearest' with 0 neighbours"),
        ({"neighbours": -1}, "'similar' with -1 neighbours"),
        ({"assignment": "window"}, "'window' needs the selector 'grid'"),
        ({"assignment": "far"}, "assignment is 'far'; choose from similar, k_nearest, window"),
        ({"receivers": "none"}, "receivers is 'none'; choose from all, last"),
        ({"weighting": "raw", "scores": {"novelty": 1, "key_norm": 1}}, "needs exactly one score"),
        ({"weighting": "raw", "scores": {"novelty": 1}}, "'novelty', which may be negative"),
        (
            {"weighting": "raw", "scores": {"novelty": 1}, "exponent": 0, "average": True},
            "only sums and no means",
        ),
        ({"keep": 10**40}, "keep is 1000.*; give at most 10000000 tokens"),
        ({"neighbours": 10**40, "assignment": "k_nearest"}, "together, at most 10000000"),
        ({"scores": {"novelty": 10**400}}, "weight of novelty is 1000"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"gain": True}, "gain is True"),
        ({"gain": len, "weighting": "raw", "scores": {"random": 1}}, "gain is <built-in"),
        ({"temperature": torch.ones(2)}, "temperature is tensor"),
        ({"order": torch.ones(2)}, "order is tensor"),
        ({"temperature": True}, "temperature is True"),
        ({"scores": {"novelty": True}}, "weight of novelty is True"),
        ({"site": "decoder.01"}, "no site 'decoder.01'"),
        ({"site": "decoder.٣"}, "no site"),
        ({"site": "decoder.1\n"}, "no site"),
        ({"site": "decoder." + "9" * 5000}, "no site"),
        ({"observe": "vision.01"}, "no site 'vision.01'"),
        ({"residual": True, "selector": "max_min"}, "residual needs a selector that ranks"),
        ({"residual": True, "selector": "bipartite"}, "residual needs a selector that ranks"),
        (
            {"selector": "bipartite", "order": "tier", "position": "compact"},
            "halves of 'bipartite' are one tier",
        ),
        ({"residual": True, "average": True}, "average and residual exclude each other"),
        ({"selector": "neighbourhood"}, r"'neighbourhood' only says .* add Tier\(keep=1.0\)"),
        ({"observe": "projector"}, "observe is 'projector'; give 'next' or a block's site"),
        ({"observe": "last"}, "no site 'last'"),
        ({"observe": None}, "observe is None"),
        ({"tiers": (Tier(keep=1, observe="projector"),)}, "observe is 'projector'"),
        ({"tiers": (Tier(keep=1, selector="best"),)}, "selector is 'best'; choose from top_k"),
        ({"tiers": (Tier(keep=4, selector="grid"),)}, "'grid' .* works in the first tier only"),
        ({"tiers": (Tier(keep=4, selector="bipartite"),)}, "'bipartite' .* first tier only"),
        ({"tiers": (Tier(),)}, "a tier of 'top_k' keeps 0; give it some tokens"),
        (
            {"tiers": (Tier(keep=2, selector="neighbourhood"), Tier(keep=1.0))},
            "a tier of 'neighbourhood' keeps 2; give 0",
        ),
        ({"tiers": (Tier(keep=-1),)}, "a tier: keep is -1"),
        ({"tiers": (Tier(keep=1, diversity=1.0),)}, "no effect with the selector 'top_k'"),
        ({"tiers": (Tier(keep=1, selector="greedy", diversity="x"),)}, "diversity is 'x'"),
        ({"tiers": (Tier(keep=1, scores={"beauty": 1}),)}, "no scores 'beauty'"),
        ({"tiers": (Tier(keep=1, options={"seed": 1}),)}, "no option 'seed'"),
    ],
)
def test_bad_reductions(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reduction(**({"site": "projector", "keep": 18} | arguments))


def test_wrong_types_in_a_reduction() -> None:
    with pytest.raises(TypeError, match="scores is"):
        Reduction("projector", 18, scores=["novelty"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="residual is"):
        Reduction("projector", 18, residual=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="neighbours is 1.5"):
        Reduction("projector", 18, neighbours=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="options is"):
        Reduction("projector", 18, options=[1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tiers has 3; give Tier\(keep="):
        Reduction("projector", 18, tiers=(3,))  # type: ignore[arg-type]


def test_a_site_takes_one_reduction() -> None:
    with pytest.raises(ValueError, match="two reductions at projector"):
        Policy((Reduction("projector", 18), Reduction("projector", 9)))


@pytest.mark.parametrize(
    "fields",
    [
        {"selector": "grid"},
        {"selector": "windows", "options": {"windows": 9}},
        {"tiers": (Tier(keep=3, selector="windows", options={"windows": 9}),)},
        {"selector": "neighbourhood", "tiers": (Tier(keep=1.0),)},
    ],
)
def test_some_selectors_need_a_complete_grid(fields: dict[str, Any]) -> None:
    second = Reduction("decoder.1", 9, **fields)
    with pytest.raises(ValueError, match="decoder.1 needs complete images .*, but projector"):
        Policy((Reduction("projector", 18), second))
    with pytest.raises(ValueError, match="decoder.1 needs complete images .*, but projector"):
        Policy((Reduction("projector", 18, selector="grid", tiers=(Tier(keep=2),)), second))
    Policy((Reduction("projector", 36, selector="grid"), second))


def test_a_signature_reads_as_a_description() -> None:
    assert str(TINY) == ("llava (4 vision layers, 10 decoder layers, 144 visual tokens per image)")


def test_check_against_a_model() -> None:
    Policy((Reduction("decoder.9", 18), Reduction("vision.3", 18)), model=TINY).check(TINY)
    with pytest.raises(
        ValueError, match="was made for llava .*10 decoder.* this model is .*12 dec"
    ):
        Policy(model=TINY, name="a").check(replace(TINY, decoder_layers=12))
    with pytest.raises(ValueError, match="has 10 decoder layers; the last site is decoder.9"):
        Policy((Reduction("decoder.10", 18),)).check(TINY)
    with pytest.raises(ValueError, match="only 144"):
        Policy((Reduction("decoder.1", 145),)).check(TINY)


def test_save_and_load(tmp_path: Path) -> None:
    policy = Policy((Reduction("projector", 18, gain=1, temperature=math.inf),), model=TINY)
    path = tmp_path / "policy.json"
    policy.save(path)
    policy.save(path)
    assert Policy.load(path) == policy
    assert Policy.load(str(path)) == policy
    assert [file.name for file in tmp_path.iterdir()] == ["policy.json"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o044


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.json"
    Policy().save(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Policy((Reduction("projector", 18),)).save(path)
    assert Policy.load(path) == Policy()
    assert [file.name for file in tmp_path.iterdir()] == ["policy.json"]


def test_saving_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Policy().save(tmp_path / "missing" / "policy.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("\x00\x01", "not JSON"),
        ("[]", 'it does not say "deos_fx": "policy"'),
        ('{"reductions": []}', 'it does not say "deos_fx"'),
        ('{"deos_fx": "policy", "reductions": []}', "version None"),
        ('{"deos_fx": "policy", "version": 2, "reductions": []}', "version 2, .* reads version 1"),
        ('{"deos_fx": "policy", "version": 1}', "lacks the field 'reductions'"),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": {}}',
            "reductions is {}; it should be a valid list",
        ),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": [1]}',
            r"reductions\[0\] is 1; it should be a valid dictionary",
        ),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": [], "budget": 1}',
            "it has no field 'budget'; the fields are deos_fx, version, name",
        ),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": [{"site": "projector"}]}',
            r"reductions\[0\]: it lacks the field 'keep', or 'share'",
        ),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": [{"site": "projector", "keep": 1,'
            ' "speed": 9}]}',
            r"reductions\[0\] has no field 'speed'; the fields are site, keep, share, scores",
        ),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": [{"site": "projector", "keep": 1,'
            ' "scores": [1]}]}',
            "scores is",
        ),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": [{"site": "projector", "keep": 1,'
            ' "options": [1]}]}',
            "options is",
        ),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": [{"site": "projector", "keep": 1,'
            ' "tiers": 1}]}',
            "tiers is 1; it should be a valid list",
        ),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": [{"site": "projector", "keep": 2,'
            ' "tiers": [{"selector": "top_k"}]}]}',
            r"tiers\[0\]: it lacks the field 'keep', or 'share'",
        ),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": [{"site": "projector",'
            ' "keep": "x"}]}',
            "keep is 'x'",
        ),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": [{"site": ["a"], "keep": 1}]}',
            "site is .*; it should be a valid string",
        ),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": [], "model": {"model_type": "a"}}',
            "model lacks the field",
        ),
        (
            '{"deos_fx": "policy", "version": 1, "reductions": [], "model": {"model_type": "llava",'
            ' "vision_layers": 1, "decoder_layers": "x", "visual_tokens": 1}}',
            "decoder_layers is 'x'",
        ),
    ],
)
def test_corrupt_files_name_the_file_and_the_fault(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.json is not a policy file: .*{message}"):
        Policy.load(path)


def test_a_binary_file_is_not_a_policy(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="bad.json is not a policy file"):
        Policy.load(path)


def test_corrupt_policy_file(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"deos_fx": "policy", "version": 1, "reduc')
    with pytest.raises(ValueError, match="policy.json is not a policy file: not JSON"):
        Policy.load(path)
