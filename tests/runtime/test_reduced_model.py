"""What a reduced model says about itself, and that it survives being saved."""

import copy
import json

import pytest
import torch
from closeness import assert_close
from tiny import VISUAL, inputs, row_of, shared_llava, tiny_llava

from deos_fx.models.upstream import CACHE
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

MIXED = Policy(
    (
        Reduction("projector", 40, scores={"feature_norm": 1}, gain=1.0, mass_bias=1.0),
        Reduction("decoder.1", 12, gain=0.5, temperature=0.2),
        Reduction("decoder.3", 5, residual=True),
    ),
    name="mixed",
)


# *** cost ***


def test_cost_of_a_call():
    model = shared_llava()
    batch = inputs(model, batch=2, images=2)
    reduced = ReducedModel(model, MIXED)
    report = reduced.cost(**batch)
    assert report.before.visual_tokens_per_layer == (2 * VISUAL,) * 6
    assert report.after.visual_tokens_per_layer == (80, 80, 24, 24, 10, 10)
    assert reduced.cost(**batch, logits_to_keep=1).after.flops < report.after.flops
    cache = reduced(**batch)[CACHE]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert report.after.kv_bytes == held


# *** capture ***


def test_capture_makes_the_graph_that_a_call_uses():
    model = shared_llava(2)
    batch = inputs(model)
    reduced = ReducedModel(model, Policy((Reduction("decoder.0", 9),)))
    with pytest.raises(RuntimeError, match="call the model once"):
        _ = reduced.graph_module
    reduced.capture(**batch)
    graph_module = reduced.graph_module
    reduced(**batch)
    assert reduced.graph_module is graph_module


def test_constant_scores_rank_every_row():
    """A score that does not depend on the input still selects in each prompt and image."""
    model = shared_llava(2)
    batch = inputs(model, batch=2, images=2, layout="between")
    for site in ("projector", "decoder.0"):
        reduced = ReducedModel(model, Policy((Reduction(site, 9, scores={"grid_coverage": 1}),)))
        together = reduced(**batch).logits
        for row in range(2):
            alone = reduced(**row_of(batch, row)).logits[0]
            assert_close(together[row, -len(alone) :], alone)


def test_repr_names_model_and_policy():
    text = repr(ReducedModel(shared_llava(), MIXED))
    assert "LlavaForConditionalGeneration" in text
    assert "64 visual tokens" in text
    assert "decoder.1: keep 12" in text


def test_copy_is_independent():
    model = tiny_llava(2)
    batch = inputs(model)
    reduced = ReducedModel(model, Policy((Reduction("decoder.0", 9),)))
    before = reduced.generate(**batch, max_new_tokens=3, do_sample=False)
    twin = copy.deepcopy(reduced)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(twin.generate(**batch, max_new_tokens=3, do_sample=False), before)


# *** saving ***


@pytest.mark.parametrize("policy", [Policy(), MIXED], ids=["empty", "mixed"])
def test_saved_model_gives_identical_outputs(tmp_path, policy):
    model = tiny_llava(5)
    batch = inputs(model, batch=2)
    reduced = ReducedModel(model, policy)
    reduced.save_pretrained(tmp_path / "new" / "folder")
    again = ReducedModel.from_pretrained(tmp_path / "new" / "folder")
    assert again.policy == reduced.policy
    assert torch.equal(again(**batch).logits, reduced(**batch).logits)
    tokens = [r.generate(**batch, max_new_tokens=4, do_sample=False) for r in (reduced, again)]
    assert torch.equal(*tokens)
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


def test_saving_keeps_other_files_and_the_type(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("an earlier model")
    ReducedModel(tiny_llava(2).bfloat16(), Policy()).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert [entry.name for entry in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert ReducedModel.from_pretrained(tmp_path).model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "deos_fx.json").read_text())["version"] == 1


def test_options_reach_transformers(tmp_path):
    ReducedModel(tiny_llava(2), Policy()).save_pretrained(tmp_path)
    loaded = ReducedModel.from_pretrained(tmp_path, dtype=torch.float16)
    assert loaded.model.dtype == torch.float16
