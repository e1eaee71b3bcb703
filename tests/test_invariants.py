"""What must hold for every policy, against oracles that are not our own code.

The oracles are the original model with dropped tokens masked, and the original model's layers run
one by one on one unpadded prompt without a cache (see oracle.py).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from closeness import assert_close, difference
from oracle import attention_cut, each_row, masked_keys
from test_families import outputs_of
from tiny import IMAGE, LAYOUTS, VISUAL, call_of, inputs, row_of, shared_llava, tiny_llava
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from deos_fx.errors import CaptureError
from deos_fx.models.upstream import CACHE
from deos_fx.passes.pipeline import capture_call
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier
from deos_fx.runtime.reduced_model import ReducedModel


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return shared_llava()


@pytest.fixture(scope="module")
def eager() -> LlavaForConditionalGeneration:
    return shared_llava(attn="eager")


def reduce(model: Any, *reductions: Reduction) -> ReducedModel:
    return ReducedModel(model, Policy(reductions))


FASTV = (Reduction("decoder.1", 16),)
PYRAMID = (Reduction("decoder.0", 32), Reduction("decoder.2", 16), Reduction("decoder.3", 8))
NEAREST = {"similarity": {"grid": 1.0}, "gain": 1.0}
REGIMES: dict[str, dict[str, Any]] = {
    "prune": {},
    "greedy": {"selector": "greedy", "diversity": 0.5},
    "merge": {"gain": 1.0, "mass_bias": 1.0},
    "pool": {"selector": "grid", **NEAREST},
    "soft": {"gain": 0.7, "temperature": 0.2, "exponent": 0.5, "mass_bias": 0.5},
    "uniform": {"gain": 1.0, "temperature": math.inf},
    "residual": {"gain": 0.4, "residual": True, "mass_bias": 1.0},
    "reweight": {"gain": 1.0, "temperature": 0.1, "weighting": "score", "reweight": 0.3},
    "compact": {"position": "compact"},
    "grid positions": {"position": "grid", "gain": 1.0},
    "mixed scores": {"scores": {"novelty": 1.0, "feature_norm": 2.0}},
}
SITES = ("vision.0", "projector", "decoder.1")


def pieces() -> dict[str, tuple[Reduction, ...]]:
    """Policies that together use every part of the operator at every kind of site."""
    single = {
        f"{site} {name}": (Reduction(site, 16, **regime),)
        for site in SITES
        for name, regime in REGIMES.items()
    }
    keys = {"similarity": {"key": 1.0, "grid": 0.2}, "scores": {"text_attention": 1, "key_norm": 1}}
    return single | {
        "keys": (Reduction("decoder.2", 16, gain=1.0, **keys),),
        "tower": (
            Reduction("vision.0", 32, scores={"key_norm": 1, "cls_attention": 1}, gain=1.0),
            Reduction("vision.1", 16, scores={"cls_attention": 1}),
        ),
        "everywhere": (
            Reduction("vision.0", 48, gain=1.0, similarity={"key": 1.0}, mass_bias=1.0),
            Reduction("vision.1", 32, scores={"key_norm": 1}),
            Reduction("projector", 16, gain=0.5, residual=True, mass_bias=0.5, position="compact"),
            Reduction("decoder.1", 8),
            Reduction("decoder.2", 4, gain=1.0, mass_bias=1.0),
        ),
        "tower, then decoder": (
            Reduction("vision.1", 32, gain=1.0, temperature=0.2, mass_bias=1.0, position="compact"),
            Reduction("decoder.2", 8, mass_bias=1.0),
        ),
        "out of order": (
            Reduction("vision.0", 40, gain=1.0, order="selection", position="compact"),
            Reduction("vision.1", 24, scores={"cls_attention": 1}, mass_bias=1.0),
            Reduction("projector", 10, order="selection", position="compact", mass_bias=1.0),
            Reduction("decoder.1", 4, gain=1.0, similarity={"grid": 1.0}),
        ),
        "pool in the tower": (
            Reduction("vision.0", 16, selector="grid", **NEAREST),
            Reduction("projector", 4, gain=1.0, similarity={"grid": 1, "feature": 1}),
            Reduction("decoder.1", 2, gain=1.0, similarity={"grid": 1}),
        ),
        "pyramid": PYRAMID,
        "images, then prompt": (Reduction("projector", 16), Reduction("decoder.1", 4)),
        "masses across": (
            Reduction("projector", 32, gain=1.0),
            Reduction("decoder.1", 16, mass_bias=0.5, position="compact"),
            Reduction("decoder.3", 4, gain=1.0, temperature=0.1, mass_bias=1.0),
        ),
        "pool, then merge": (
            Reduction("projector", 16, selector="grid", **NEAREST),
            Reduction("decoder.1", 4, gain=1.0, similarity={"grid": 1, "feature": 1}),
        ),
        "compact twice": (
            Reduction("decoder.0", 32, position="compact"),
            Reduction("decoder.2", 16),
            Reduction("decoder.3", 8, position="compact"),
        ),
        "grid, grid": (
            Reduction("vision.1", 40, position="grid"),
            Reduction("projector", 24),
            Reduction("decoder.1", 12),
            Reduction("decoder.2", 3, position="grid", gain=1.0),
        ),
        "grid, compact, grid": (
            Reduction("projector", 32, position="grid"),
            Reduction("decoder.1", 12, position="compact"),
            Reduction("decoder.3", 4, position="grid"),
        ),
        "compact after keep": (
            Reduction("projector", 32),
            Reduction("decoder.2", 16, position="compact"),
            Reduction("decoder.3", 8),
        ),
    }


def left(output: Any, batch: dict[str, Tensor], row: int) -> tuple[Tensor, list[int]]:
    """Logits of a row's real tokens, and where the tokens stood in the unpadded prompt."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[row]
    origin = output[CACHE].spaces[-1].origin[row]
    real = mask[origin].bool()
    return output.logits[row][real], (origin[real] - mask.argmax()).tolist()


# *** 1: the empty policy changes nothing ***


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right", None])
def test_the_empty_policy_is_bit_identical(attn: str, padding: str | None) -> None:
    model = shared_llava(attn=attn)
    empty = reduce(model)
    for layout in LAYOUTS:
        for images in (1, 2):
            batch = inputs(model, 2, images, layout=layout, padding=padding)
            assert torch.equal(empty(**batch).logits, model(**batch).logits)
    if padding != "right":
        for search in ({}, {"num_beams": 3}):
            new = {"max_new_tokens": 4, "do_sample": False, **search}
            assert torch.equal(empty.generate(**batch, **new), model.generate(**batch, **new))


def test_the_empty_policy_returns_what_the_model_returns(
    model: LlavaForConditionalGeneration,
) -> None:
    batch = inputs(model, 2, 2, layout="between")
    asked = {"labels": batch["input_ids"], "output_hidden_states": True, "logits_to_keep": 0}
    ours, theirs = reduce(model)(**batch, **asked), model(**batch, **asked)
    # What the encoder returned, which outputs have since transformers 5.24, is left out.
    names = [name for name in theirs if name != "image_outputs"]
    assert type(ours) is type(theirs) and list(ours) == names
    assert torch.equal(ours.loss, theirs.loss)
    if "image_hidden_states" in theirs:
        assert torch.equal(ours.image_hidden_states, theirs.image_hidden_states)
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    short = {"logits_to_keep": 3, "use_cache": False}
    ours, theirs = reduce(model)(**batch, **short), model(**batch, **short)
    assert torch.equal(ours.logits, theirs.logits) and ours.get(CACHE) is None


# *** 2: keeping everything changes nothing but rounding ***


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("regime", REGIMES)
def test_keeping_all_tokens_changes_nothing(
    model: LlavaForConditionalGeneration, site: str, regime: str
) -> None:
    batch = inputs(model, 2, 1)
    # Reweighting by score acts on kept tokens too: the one operator that is not the identity here.
    kept_all = reduce(model, Reduction(site, VISUAL, **REGIMES[regime] | {"reweight": 0.0}))
    real = batch["attention_mask"].bool()
    assert_close(kept_all(**batch).logits[real], model(**batch).logits[real])


# *** 3: pruning equals masking ***


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", [FASTV, PYRAMID], ids=["fastv", "pyramid"])
@pytest.mark.parametrize(
    ("images", "layout", "padding"),
    [(1, "first", None), (2, "between", "left"), (2, "middle", "right")],
)
def test_pruning_is_masking(
    attn: str,
    policy: tuple[Reduction, ...],
    images: int,
    layout: str,
    padding: str | None,
    eager: LlavaForConditionalGeneration,
) -> None:
    model = shared_llava(attn=attn)
    batch = inputs(model, 2, images, layout=layout, padding=padding)
    counts = {int(step.site[8:]): step.count(VISUAL) * images for step in policy}
    alive = attention_cut(eager, batch, counts)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    mask = batch.get("attention_mask", torch.ones_like(labels)).bool()
    # Nor is a prediction made at padding, whose rows mean nothing.
    labels[:, 1:][~mask[:, :-1] | ~mask[:, 1:]] = -100
    output = reduce(model, *policy)(**batch, labels=labels)
    # A token that is gone predicts nothing.
    labels[:, 1:][~alive[5][:, :-1]] = -100
    with masked_keys(model, alive):
        expected = model(**batch, labels=labels)
    for row in range(2):
        logits, origin = left(output, batch, row)
        there = alive[5][row] & mask[row]
        assert origin == (there.nonzero().flatten() - mask[row].int().argmax()).tolist()
        assert_close(logits, expected.logits[row][there])
    assert_close(output.loss, expected.loss)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("images", [1, 2])
def test_decoding_after_pruning_is_masking(
    model: LlavaForConditionalGeneration,
    eager: LlavaForConditionalGeneration,
    beams: int,
    images: int,
) -> None:
    batch = inputs(model, 2, images, layout="between")
    output = reduce(model, *PYRAMID).generate(
        **batch,
        max_new_tokens=5,
        do_sample=False,
        num_beams=beams,
        output_logits=True,
        return_dict_in_generate=True,
    )
    prompt = batch["input_ids"].shape[1]
    new = output.sequences.shape[1] - prompt
    ids = output.sequences
    mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, prompt:])], dim=1)
    longer = {**batch, "input_ids": ids, "attention_mask": mask}
    longer["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    counts = {0: 32 * images, 2: 16 * images, 3: 8 * images}
    alive = attention_cut(eager, longer, counts, prompt)
    with masked_keys(model, alive):
        expected = model(**longer).logits[:, prompt - 1 : -1]
    logits = torch.stack(output.logits, dim=1)
    if beams > 1:
        # Which beam of which prompt each returned token was chosen from.
        logits = torch.stack([logits[output.beam_indices[:, t], t] for t in range(new)], dim=1)
    assert_close(logits, expected)


# *** 3 and 5, all regimes: prefill and decode equal the operator written out as loops ***


@pytest.mark.parametrize("name", pieces())
def test_every_regime_equals_loops(
    model: LlavaForConditionalGeneration, eager: LlavaForConditionalGeneration, name: str
) -> None:
    policy = Policy(pieces()[name])
    batch = inputs(model, 2, 1 if "greedy" in name else 2, layout="between")
    reduced = ReducedModel(model, policy)
    output = reduced(**batch)
    new = reduced.generate(
        **batch,
        max_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    generated = new.sequences[:, batch["input_ids"].shape[1] :]
    rows = each_row(eager, batch, policy, generated)
    for row, expected in enumerate(rows):
        logits, origin = left(output, batch, row)
        assert origin == expected.origin[-1][:-3]
        assert_close(logits, expected.logits[:-3])
        steps = torch.stack(new.logits, dim=1)[row]
        assert_close(steps, expected.logits[-4:-1])
    explained = reduced.explain(**batch)
    spaces = output[CACHE].spaces
    assert torch.equal(explained[-1].remaining, spaces[-1].origin)
    for site, told in enumerate(explained):
        for row, expected in enumerate(rows):
            start = int(batch["attention_mask"][row].argmax())
            mass = torch.tensor(expected.mass[site])
            assert_close(told.mass[row], mass)
            visual = expected.kept[site]
            assert (told.kept[row] - start).tolist() == visual
            moved = torch.zeros(len(visual), told.positions_in.shape[1])
            came = (told.positions_in[row] - start).tolist()
            for (i, j), share in expected.moved[site].items():
                moved[visual.index(i), came.index(j)] = share
            destination = torch.zeros_like(moved)
            if told.destination is not None:
                destination = told.destination[row]
            # A softmax at a low temperature amplifies: the loops are 12 from float64.
            assert_close(destination, moved, 36)


@pytest.mark.parametrize("position", ["keep", "compact", "grid"])
def test_without_cache_and_mask_a_gap_is_no_border(
    model: LlavaForConditionalGeneration, eager: LlavaForConditionalGeneration, position: str
) -> None:
    # transformers takes gaps in position ids for packed sequences when it is given neither.
    policy = Policy((Reduction("projector", 16, position=position), Reduction("decoder.1", 4)))
    batch = inputs(model, 2, 2, layout="between", padding=None)
    logits = ReducedModel(model, policy)(**batch, use_cache=False).logits
    for row, expected in enumerate(each_row(eager, batch, policy)):
        assert_close(logits[row], expected.logits)


def test_hidden_states_are_those_of_the_kept_tokens(
    model: LlavaForConditionalGeneration, eager: LlavaForConditionalGeneration
) -> None:
    policy = Policy((Reduction("projector", 32, gain=1.0), *FASTV))
    batch = inputs(model, padding=None)
    (expected,) = each_row(eager, batch, policy)
    states = ReducedModel(model, policy)(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 7
    # A layer's output is what it returns, so the cut behind layer 1 shows in that of layer 2.
    for ours, theirs in zip(states, expected.hidden, strict=False):
        assert ours.shape[1:] == theirs.shape
        assert_close(ours[0], theirs)


# *** reductions inside the vision tower ***


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_reductions_all_along_a_deeper_tower(tower: str) -> None:
    scores = {"cls_attention": 1.0, "key_norm": 1.0} if tower == "clip" else {"key_norm": 1.0}
    keys = {"scores": scores, "similarity": {"key": 1.0}}
    policy = Policy(
        (
            Reduction("vision.0", 56, gain=1.0, mass_bias=1.0, **keys),
            Reduction("vision.1", 44, gain=1.0, mass_bias=1.0, **keys),
            # The end of the tower, where the projector's scores come from too.
            Reduction("vision.3", 20, scores=scores),
            Reduction("projector", 12, scores={**scores, "key_norm": 0, "novelty": 1}, gain=1.0),
            Reduction("decoder.1", 6),
            Reduction("decoder.3", 3, gain=1.0, mass_bias=1.0, position="compact"),
        )
    )
    # On 64 tokens without a mask the kernel of sdpa is inexact: with it the unreduced SigLIP is 38
    # roundings from float64, and 5 with eager attention.
    attn = {"clip": "sdpa", "siglip": "eager"}[tower]
    model, eager = (shared_llava(attn=kind, tower=tower, blocks=5) for kind in (attn, "eager"))
    for batch in (inputs(model, 1, 1, padding=None), inputs(model, 3, 2, layout="between")):
        reduced = ReducedModel(model, policy)
        output = reduced(**batch)
        for row, expected in enumerate(each_row(eager, batch, policy)):
            logits, origin = left(output, batch, row)
            assert origin == expected.origin[-1]
            assert_close(logits, expected.logits)
        assert len(output[CACHE].spaces) == 3, "one space for all that is before layer 0"


def test_pruning_in_the_tower_is_running_the_rest_on_what_is_left(
    model: LlavaForConditionalGeneration,
) -> None:
    batch = inputs(model, 2, 2, layout="between")
    reduced = reduce(model, Reduction("vision.0", 24))
    told = reduced.explain(**batch)[0]
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(batch["pixel_values"]))
    blocks = tower.encoder.layers
    first = blocks[0](hidden, None)
    where = (batch["input_ids"] == IMAGE).nonzero()[:, 1].reshape(2, -1)
    kept = (where[:, :, None] == told.kept[:, None]).any(-1).reshape(4, VISUAL)
    assert kept.sum(1).tolist() == [24] * 4, "as many of every image"
    rows = [torch.cat([first[i, :1], first[i, 1:][kept[i]]]) for i in range(4)]
    features = model.model.multi_modal_projector(blocks[1](torch.stack(rows), None)[:, 1:])
    with outputs_of(model.model.multi_modal_projector) as seen:
        reduced(**batch)
    assert_close(seen[0], features)


def test_features_of_several_blocks_leave_the_sites_that_all_of_them_pass() -> None:
    model = tiny_llava(2, blocks=5, feature_layer=[-4, -2])
    batch = inputs(model)
    listed = capture_call(model, call_of(model, batch).inputs).sites.sites
    reasons = {site.name: site.reason for site in listed if site.name.startswith("vision")}
    assert not reasons["vision.0"] and not reasons["vision.1"]
    assert "path around" in reasons["vision.2"] and "path around" in reasons["vision.3"]
    assert "not used" in reasons["vision.4"]
    assert reduce(model, Reduction("vision.1", 16))(**batch).logits.shape[1] == 16 + 11
    with pytest.raises(ValueError, match="vision.2 cannot be reduced: .* path around"):
        reduce(model, Reduction("vision.2", 16))(**batch)


def test_copies_of_the_class_token_come_from_no_position(
    model: LlavaForConditionalGeneration,
) -> None:
    batch = inputs(model, 2, 2, layout="between")
    tiers = (Tier(keep=4, selector="strided"),)
    zip_ = Reduction("vision.1", 16, tiers=tiers, order="tier", position="compact", keep_class=True)
    later = Reduction("decoder.1", 6, gain=1.0, similarity={"grid": 1.0})
    first, second = reduce(model, zip_, later).explain(**batch)
    copies = first.kept == -1
    assert copies.nonzero()[:, 1].tolist() == [0, 16, 0, 16], "the first of every image"
    assert first.kept.shape == (2, 32) and first.dropped.shape == (2, 2 * (VISUAL - 15))
    assert (first.mass[copies] == 1).all()
    ids = batch["input_ids"].gather(1, first.kept.clamp(min=0))
    assert (ids[~copies] == IMAGE).all()
    left_over = batch["input_ids"].shape[1] - 2 * (VISUAL - 16)
    assert first.remaining.shape[1] == left_over and second.remaining.shape[1] == left_over - 20
    assert torch.equal(second.positions_in, first.kept)
    kept = [set(row.tolist()) for row in second.kept]
    assert all(row <= set(before.tolist()) for row, before in zip(kept, first.kept, strict=True))


def test_a_tower_without_class_token_has_no_class_attention() -> None:
    model = shared_llava(tower="siglip")
    with pytest.raises(ValueError, match="vision.0 has no score 'cls_attention'; it has"):
        reduce(model, Reduction("vision.0", 16))(**inputs(model))


# *** 5: decoding ***


def test_decoding_equals_recomputing_where_nothing_later_votes(
    model: LlavaForConditionalGeneration,
) -> None:
    # use_cache=False reduces anew at every step: the same only if the scores are of the images.
    scores = {"scores": {"feature_norm": 1.0}}
    reduced = reduce(
        model,
        Reduction("vision.1", 48, **scores, position="grid"),
        Reduction("projector", 32, **scores),
        Reduction("decoder.2", 8, gain=1.0, **scores),
    )
    batch = inputs(model, 2, 2, layout="between")
    for search in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        new = {**batch, "max_new_tokens": 5, "do_sample": False, **search}
        assert torch.equal(reduced.generate(**new), reduced.generate(**new, use_cache=False))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_conversation_continues_from_the_cache(
    model: LlavaForConditionalGeneration, eager: LlavaForConditionalGeneration, batch: int
) -> None:
    reduced = reduce(model, Reduction("decoder.1", 16, gain=1.0, mass_bias=1.0, position="compact"))
    prompt = inputs(model, batch, padding="left" if batch > 1 else None)
    later = torch.randint(1, 100, (batch, 6), generator=torch.Generator().manual_seed(5))
    output = reduced(**prompt)
    mask = prompt.get("attention_mask")
    found = []
    for turn in (later[:, :4], later[:, 4:5], later[:, 5:]):
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(turn)], dim=1)
        output = reduced(input_ids=turn, attention_mask=mask, **{CACHE: output[CACHE]})
        found.append(output.logits)
    for row, expected in enumerate(each_row(eager, prompt, reduced.policy, later)):
        assert_close(torch.cat(found, dim=1)[row], expected.logits[-6:])


def test_generate_continues_a_conversation(model: LlavaForConditionalGeneration) -> None:
    reduced = reduce(model, *FASTV)
    batch = inputs(model, padding=None)
    new = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = reduced.generate(**batch, max_new_tokens=3, **new)
    again = reduced.generate(**batch, max_new_tokens=3, **new)
    assert torch.equal(first.sequences, again.sequences)
    ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    second = reduced.generate(input_ids=ids, **{CACHE: first[CACHE]}, max_new_tokens=3, **new)
    expected = each_row(
        shared_llava(attn="eager"),
        batch,
        reduced.policy,
        second.sequences[:, batch["input_ids"].shape[1] :],
    )[0]
    assert_close(torch.stack(second.logits, dim=1)[0], expected.logits[-4:-1])


def test_an_emptied_cache_starts_again(model: LlavaForConditionalGeneration) -> None:
    reduced = reduce(model, *PYRAMID)
    batch = inputs(model, 2)
    first = reduced(**batch)
    first[CACHE].reset()
    again = reduced(**batch, **{CACHE: first[CACHE]})
    assert torch.equal(again.logits, first.logits)


# *** 6: a batch is its rows ***


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("position", ["keep", "compact", "grid"])
def test_a_padded_batch_is_its_rows(
    model: LlavaForConditionalGeneration, padding: str, images: int, position: str
) -> None:
    scores = {"scores": {"text_attention": 1.0, "last_text_attention": 1.0}}
    reduced = reduce(
        model,
        Reduction("vision.0", 48, gain=1.0, mass_bias=1.0),
        Reduction("projector", 32, gain=1.0, mass_bias=0.5, position=position),
        Reduction("decoder.2", 16, gain=1.0, temperature=0.2, **scores, position=position),
    )
    batch = inputs(model, 3, images, layout="between", padding=padding)
    # The model itself numbers a row from its first real token only if told to.
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    together = reduced(**batch)
    for row in range(3):
        alone = reduced(**row_of(batch, row))
        logits, origin = left(together, batch, row)
        assert origin == left(alone, row_of(batch, row), 0)[1]
        assert_close(logits, alone.logits[0])


# *** capture: nothing of the example stays in the graph ***


def test_a_graph_holds_for_other_inputs(model: LlavaForConditionalGeneration) -> None:
    policy = (
        Reduction("projector", 32, gain=1.0, mass_bias=1.0),
        Reduction("decoder.2", 8, scores={"text_attention": 1.0}, gain=1.0),
    )
    reduced = reduce(model, *policy)
    reduced(**inputs(model, 2, 2, layout="between"))
    graph_module = reduced.graph_module
    for seed, (batch, text, layout, padding) in enumerate(
        [(2, 0, "between", "left"), (3, 5, "first", "right"), (1, 9, "middle", "left")], start=1
    ):
        other = inputs(model, batch, 2, layout=layout, padding=padding, text=text, seed=seed)
        fresh = reduce(model, *policy)
        assert torch.equal(reduced(**other).logits, fresh(**other).logits)
    assert reduced.graph_module is graph_module


def test_a_decode_graph_holds_for_other_lengths(model: LlavaForConditionalGeneration) -> None:
    reduced = reduce(model, *PYRAMID)
    reduced.generate(**inputs(model, 1), max_new_tokens=2)
    other = inputs(model, 3, text=4, seed=3)
    new = {"max_new_tokens": 4, "do_sample": False}
    fresh = reduce(model, *PYRAMID)
    assert torch.equal(reduced.generate(**other, **new), fresh.generate(**other, **new))


def test_weights_are_shared_and_the_model_stays_as_it_is() -> None:
    model = tiny_llava()
    batch = inputs(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(**batch).logits
    hidden, modules = dict(vars(model)), list(map(id, model.modules()))
    call, arange = nn.Module.__call__, torch.arange
    reduced = reduce(model, Reduction("projector", 32), *FASTV)
    reduced.generate(**batch, max_new_tokens=3)
    assert nn.Module.__call__ is call and torch.arange is arange
    assert list(map(id, model.modules())) == modules and dict(vars(model)).keys() == hidden.keys()
    assert model.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(model(**batch).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    known = {parameter.data_ptr() for parameter in model.parameters()}
    used = {parameter.data_ptr() for parameter in reduced.graph_module.parameters()}
    assert used and used <= known
    # A weight that changes, changes for both.
    model.lm_head.weight.mul_(2.0)
    assert torch.equal(reduce(model)(**batch).logits, 2 * expected)


def test_an_error_while_capturing_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()
    batch = inputs(model)
    expected = model(**batch).logits
    patched = [nn.Module.__call__, nn.Module.__getattr__, torch.arange, torch.zeros]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.language_model.norm, "forward", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            reduce(model, *FASTV)(**batch)
    assert [nn.Module.__call__, nn.Module.__getattr__, torch.arange, torch.zeros] == patched
    assert torch.equal(model(**batch).logits, expected)


def test_a_constant_made_from_an_input_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()
    projector = model.model.multi_modal_projector
    forward = model.model.get_image_features
    # Made before the run: what the run itself makes of nothing is a step of the graph.
    constant = torch.ones(VISUAL, 64)

    def frozen(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.pooler_output = (constant,)
        return output

    monkeypatch.setattr(model.model, "get_image_features", frozen)
    with pytest.raises(CaptureError, match="freeze|never join"):
        reduce(model, *FASTV)(**inputs(model))
    assert projector is model.model.multi_modal_projector


# *** the model's own switches ***


def test_attention_can_be_switched_after_capture() -> None:
    model = tiny_llava()
    batch = inputs(model, 2)
    merge = {"gain": 1.0, "mass_bias": 1.0}
    reduced = reduce(model, Reduction("vision.0", 40, **merge), Reduction("decoder.1", 16, **merge))
    first = reduced(**batch)
    model.set_attn_implementation("eager")
    second = reduced(**batch)
    for row in range(2):
        logits, origin = left(second, batch, row)
        assert origin == left(first, batch, row)[1]
        assert_close(logits, left(first, batch, row)[0])


def test_half_precision_also_after_capture() -> None:
    model = tiny_llava()
    batch = inputs(model)
    reduced = reduce(
        model,
        Reduction("vision.0", 48, gain=1.0, mass_bias=1.0),
        Reduction("projector", 32, gain=1.0, mass_bias=1.0),
        *FASTV,
    )
    exact = reduced(**batch).logits
    reduced.to(torch.bfloat16)
    rounded = reduced(**batch).logits
    assert rounded.dtype == torch.bfloat16
    with masked_keys(model, {}):
        noise = difference(model(**batch).logits.float(), tiny_llava()(**batch).logits)
    assert difference(rounded[:, -1].float(), exact[:, -1]) < 3 * noise
    assert reduced.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_weight_the_model_uses(checkpointing: bool) -> None:
    model = tiny_llava().requires_grad_(True)
    batch = inputs(model) | {"use_cache": False}
    into = {"gain": 1.0, "temperature": 0.1}
    soft = reduce(
        model,
        Reduction("vision.0", 48, **into, mass_bias=1.0),
        Reduction("projector", 32, **into),
        *FASTV,
    )
    model(**batch).logits.square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    if checkpointing:
        model.activation_checkpointing_enable()
        soft.train()
    soft(**batch).logits.square().mean().backward()
    assert {n for n, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_what_a_reduced_model_cannot_give_is_refused(model: LlavaForConditionalGeneration) -> None:
    reduced = reduce(model, *FASTV)
    batch = inputs(model, padding=None)
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        reduced(**batch, output_attentions=True)
    with pytest.raises(ValueError, match="logits_to_keep is a tensor"):
        reduced(**batch, logits_to_keep=torch.tensor([3]))
    assert reduced(**batch, logits_to_keep=2).logits.shape[1] == 2


# *** 9: round trips ***


@pytest.mark.parametrize("name", pieces())
def test_a_policy_survives_json(name: str) -> None:
    policy = Policy(pieces()[name], name=name)
    assert Policy.from_json(policy.to_json()) == policy


def test_a_saved_model_is_the_same(tmp_path: Any, model: LlavaForConditionalGeneration) -> None:
    reduced = reduce(model, Reduction("projector", 0.5, gain=1.0, mass_bias=1.0), *PYRAMID[1:])
    batch = inputs(model, 2)
    reduced.save_pretrained(tmp_path)
    again = ReducedModel.from_pretrained(tmp_path)
    assert again.policy == reduced.policy
    assert torch.equal(again(**batch).logits, reduced(**batch).logits)
    new = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(again.generate(**batch, **new), reduced.generate(**batch, **new))
