"""What a reduced model says of the tokens it keeps, against loops and recomputed values."""

import math
from dataclasses import replace

import pytest
import torch
from closeness import assert_close
from families import prompts, shared
from test_reduced_model import MIXED
from tiny import IMAGE, VISUAL, inputs, shared_llava

from deos_fx.models.upstream import CACHE
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel


def test_positions_are_those_of_the_original_prompt():
    model = shared_llava()
    batch = inputs(model, batch=2, images=2, layout="between")
    first, second, third = ReducedModel(model, MIXED).explain(**batch)
    placeholders = [torch.nonzero(row == IMAGE).flatten() for row in batch["input_ids"]]
    assert torch.equal(first.positions_in, torch.stack(placeholders))
    assert torch.equal(second.positions_in, first.kept)
    assert torch.equal(third.positions_in, second.kept)
    text = batch["input_ids"] != IMAGE
    for site, count in ((first, 40), (second, 12), (third, 5)):
        assert site.kept.shape == (2, 2 * count)
        for row in range(2):
            kept, gone = set(site.kept[row].tolist()), set(site.dropped[row].tolist())
            assert kept | gone == set(site.positions_in[row].tolist())
            assert not kept & gone
            left = kept | set(torch.nonzero(text[row]).flatten().tolist())
            assert site.remaining[row].tolist() == sorted(left)


def test_projector_explained_by_a_loop_over_images():
    """Feature norms, nearest kept token of the same image and masses, recomputed from pixels."""
    model = shared_llava()
    batch = inputs(model, batch=2, images=2, layout="between")
    (site,) = ReducedModel(model, replace(MIXED, reductions=MIXED.reductions[:1])).explain(**batch)
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    for row in range(2):
        start = [0, VISUAL]
        for image, tokens in enumerate(features[2 * row : 2 * row + 2]):
            place = site.positions_in[row, start[image] : start[image] + VISUAL].tolist()
            norms = tokens.norm(dim=-1)
            kept = sorted(norms.topk(40).indices.tolist())
            slots = slice(40 * image, 40 * image + 40)
            assert site.kept[row, slots].tolist() == [place[i] for i in kept]
            assert_close(site.scores[row, start[image] :][:VISUAL], norms)
            masses = [1.0] * 40
            for j in set(range(VISUAL)) - set(kept):
                cosines = torch.cosine_similarity(tokens[j], tokens[kept], dim=-1)
                slot = int(cosines.argmax())
                masses[slot] += 1
                column = site.destination[row, :, start[image] + j]
                assert torch.nonzero(column).flatten().tolist() == [40 * image + slot]
                assert column.sum() == 1
            assert site.mass[row, slots].tolist() == masses
            assert not site.destination[row, slots, start[1 - image] :][:, :VISUAL].any()


def test_decoder_scores_are_the_attention_of_the_last_token():
    eager = shared_llava(attn="eager")
    batch = inputs(eager)
    (site,) = ReducedModel(eager, Policy((Reduction("decoder.2", 9),))).explain(**batch)
    attention = eager(**batch, output_attentions=True).attentions[2].mean(dim=1)[0, -1]
    received = attention[batch["input_ids"][0] == IMAGE]
    assert_close(site.scores[0], received)
    best = sorted(site.positions_in[0, received.topk(9).indices].tolist())
    assert site.kept[0].tolist() == best
    assert site.destination is None
    assert site.mass.tolist() == [[1.0] * 9]


def test_masses_are_conserved_by_a_full_merge_and_known_where_the_graph_has_none():
    model = shared_llava()
    merge = Policy(
        (
            Reduction("decoder.0", 30, gain=1.0, temperature=0.5),
            Reduction("decoder.2", 7, gain=1.0, temperature=math.inf),
        )
    )
    for site in ReducedModel(model, merge).explain(**inputs(model, images=2)):
        assert site.mass.sum().item() == pytest.approx(2 * VISUAL, rel=1e-5)
    biased = Policy(tuple(replace(r, mass_bias=1.0) for r in merge.reductions[:1]))
    plain = Policy(merge.reductions[:1])
    (tracked,), (computed,) = (
        ReducedModel(model, policy).explain(**inputs(model)) for policy in (biased, plain)
    )
    assert_close(tracked.mass, computed.mass)


def test_weights_leave_a_share_behind():
    """Half of every dropped token is transferred, and weighted by its score."""
    model = shared_llava()
    reduction = Reduction("projector", 8, gain=0.5, temperature=0.3, weighting="score")
    (site,) = ReducedModel(model, Policy((reduction,))).explain(**inputs(model))
    sent = site.destination[0].sum(dim=0)
    gone = torch.isin(site.positions_in[0], site.dropped[0])
    assert_close(sent[gone], 0.5 * torch.sigmoid(site.scores[0][gone]))
    assert not sent[~gone].any()


@pytest.mark.parametrize("selector", ["top_k", "greedy"])
def test_raw_weights_are_those_of_the_graph(selector):
    """A reweight, or a greedy choice, reads standardized scores; a raw weight stays as it is."""
    model = shared_llava()
    raw = {"scores": {"random": 1.0}, "gain": 1.0, "weighting": "raw", "exponent": 0.0}
    reduction = Reduction("projector", 8, selector=selector, reweight=1e-7, **raw)
    (site,) = ReducedModel(model, Policy((reduction,))).explain(**inputs(model))
    plain = Reduction("projector", VISUAL, scores={"random": 1.0})
    (every,) = ReducedModel(model, Policy((plain,))).explain(**inputs(model))
    sent = site.destination[0].sum(dim=0)
    gone = torch.isin(site.positions_in[0], site.dropped[0])
    assert_close(sent[gone], every.scores[0][gone])
    assert (site.scores[0] < 0).any()


def test_steep_weights_are_those_of_the_graph():
    model = shared_llava()
    steep = {"weighting": "score", "sharpness": 5.0}
    reduction = Reduction("projector", 8, gain=1.0, **steep)
    (site,) = ReducedModel(model, Policy((reduction,))).explain(**inputs(model))
    gone = torch.isin(site.positions_in[0], site.dropped[0])
    assert_close(site.destination[0].sum(dim=0)[gone], torch.sigmoid(5 * site.scores[0][gone]))


def test_explanation_of_an_unreduced_model_is_empty():
    model = shared_llava(2)
    assert ReducedModel(model, Policy()).explain(**inputs(model)) == []


def test_explaining_changes_nothing():
    model = shared_llava(3)
    batch = inputs(model)
    reduced = ReducedModel(model, Policy((Reduction("decoder.0", 9),)))
    before = reduced(**batch)
    text = repr(reduced.explain(**batch, **{CACHE: before[CACHE]})[0])
    assert "decoder.0: 9 of 64" in text
    assert torch.equal(reduced(**batch).logits, before.logits)


def test_guards_that_run_layers_leave_no_keys_behind() -> None:
    # Whether layers share keys shows when they have run.
    reduced = ReducedModel(shared("gemma4"), Policy((Reduction("decoder.0", 0.25),)))
    batch = prompts("gemma4", 1)
    first, again = (reduced.explain(**batch)[0].kept for _ in range(2))
    assert first.shape == (1, 8)
    assert torch.equal(first, again)
