"""What a lowered graph looks like, and what `verify` finds in a damaged one.

The texts under tests/goldens are the code of lowered graphs. After a change that is meant, write
them again with UPDATE_GOLDENS=1 and read the difference.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import inputs, shared_llava
from torch import fx

from deos_fx import presets, tokens
from deos_fx.attention.seam import ObservedBlock
from deos_fx.errors import PassError, VerificationError
from deos_fx.forms.soft_top_k import soft_top_k
from deos_fx.models.upstream import FORMER_CACHE
from deos_fx.operator import top_k
from deos_fx.passes.rewrite.replace_placeholder_merge import replace_placeholder_merge
from deos_fx.passes.verify import verify
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

GOLDENS = Path(__file__).parent / "goldens"


def lowered(*reductions: Reduction, decode: bool = False) -> fx.GraphModule:
    model = shared_llava()
    reduced = ReducedModel(model, Policy(reductions))
    batch = inputs(model)
    if not decode:
        reduced(**batch)
        return reduced.graph_module
    reduced.generate(**batch, max_new_tokens=2)
    lowered = reduced.graphs._lowered_graphs.items()
    return next(graph for (_, layout), graph in lowered if layout is None)


def targets(graph_module: fx.GraphModule) -> set[str]:
    return {getattr(node.target, "__name__", node.target) for node in graph_module.graph.nodes}


# *** lowering ***


def test_pruning_has_neither_assignment_nor_matmul() -> None:
    graph_module = lowered(Reduction("projector", 32), Reduction("decoder.1", 8))
    unwanted = {"matmul", "similarity", "nearest", "soft", "uniform", "merge", "merged_mass", "put"}
    assert not targets(graph_module) & unwanted
    assert {"top_k", "last_text_attention", "cls_attention"} <= targets(graph_module)


def test_what_a_policy_does_not_use_leaves_no_node() -> None:
    graph_module = lowered(Reduction("decoder.1", 16, scores={"feature_norm": 1.0}))
    unwanted = {"standardize", "combine", "last_token", "text_tokens", "mass_bias", "key_norm"}
    assert not targets(graph_module) & unwanted
    observed = [m for m in graph_module.modules() if isinstance(m, ObservedBlock)]
    assert not observed, "a score of the hidden states needs no look into attention"
    assert not [n for n in graph_module.graph.nodes if n.op == "get_attr"]


def test_only_the_block_that_is_looked_into_is_replaced() -> None:
    layers = shared_llava().model.language_model.layers
    graph_module = lowered(Reduction("decoder.2", 16))
    for i, layer in enumerate(layers):
        block = graph_module.get_submodule(f"decoder_{i}")
        assert (block is layer) == (i != 2)
    own = dict(graph_module.decoder_2.named_parameters())
    assert {p.data_ptr() for p in own.values()} == {p.data_ptr() for p in layers[2].parameters()}


def test_a_graph_has_one_selection_for_each_reduction() -> None:
    steps = [Reduction("projector", 32), Reduction("decoder.0", 16), Reduction("decoder.3", 4)]
    graph_module = lowered(*steps)
    picks = [node for node in graph_module.graph.nodes if node.target is top_k]
    names = [f"top_k_{step.site.replace('.', '')}" for step in steps]
    assert [node.name for node in picks] == names
    assert [node.args[2] for node in picks] == [32, 16, 4]
    assert len(graph_module.graph.output_node().args[0]["spaces"]) == 3


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("fastv", presets.fastv(layer=2, keep=0.25)),
        ("merge", presets.merge(site="projector", keep=0.25)),
        ("pyramid_drop", presets.pyramid_drop(layers=(2, 4), keep=(0.5, 0.25))),
        ("tome", presets.tome(merged=8, blocks=2, visual_tokens=64)),
        ("visionzip", presets.visionzip(dominant=10, contextual=6, block=1)),
        ("prumerge", presets.prumerge(keep=17, block=1)),
        ("vispruner", presets.vispruner(keep=16, block=1)),
        ("empty", Policy()),
    ],
)
def test_lowered_code_reads_as_before(name: str, policy: Policy) -> None:
    path = GOLDENS / f"{name}.txt"
    code = lowered(*policy.reductions).code.strip() + "\n"
    if os.environ.get("UPDATE_GOLDENS"):
        path.write_text(code, encoding="utf-8")
    expected = path.read_text(encoding="utf-8")
    assert of_any_version(code) == of_any_version(expected), "see the docstring of this file"


def of_any_version(code: str) -> str:
    """Leave out what transformers 5.23 and 5.24 write differently for the same computation."""
    code = re.sub(rf"\b{FORMER_CACHE}\b", "cache", code)
    # 5.24 returns no features of images but what the encoder returned, which graphs leave out.
    code = re.sub(r", 'image_hidden_states': \w+", "", code)
    # So the last use of the features, after which they are freed, is another one.
    code = re.sub(r";  [\w = ]+ = None$", "", code, flags=re.MULTILINE)
    # 5.24 hands arguments of the language model to the blocks of the vision tower as well.
    return re.sub(r"(= self\.vision_.*), use_cache = True", r"\1", code)


# *** verify ***


def test_verify_accepts_every_stage() -> None:
    merge = Reduction("decoder.1", 16, gain=1.0, mass_bias=1.0, position="compact")
    assert verify(lowered(merge), "lowered")
    assert verify(lowered(merge, decode=True), "decode")
    assert verify(lowered(), "captured")
    assert verify(lowered(), "relaxed")
    assert verify(replace_placeholder_merge(lowered(merge)), "exported")


def test_a_pass_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fold_unstack(graph_module: fx.GraphModule) -> fx.GraphModule:
        raise LookupError("no such node")

    monkeypatch.setattr("deos_fx.passes.pipeline.fold_unstack", fold_unstack)
    model = shared_llava()
    with pytest.raises(PassError, match="pass fold_unstack failed .*LookupError: no such node"):
        ReducedModel(model, Policy())(**inputs(model))


def test_a_graph_is_not_of_another_stage() -> None:
    merge = Reduction("decoder.1", 16, gain=1.0)
    with pytest.raises(VerificationError, match="'relaxed': .* drops tokens"):
        verify(lowered(merge), "relaxed")
    with pytest.raises(VerificationError, match="'exported': masked_scatter fills placeholders"):
        verify(lowered(merge), "exported")
    graph_module = lowered(merge)
    head = graph_module.graph.find_nodes(op="call_module", target="lm_head")[0]
    with graph_module.graph.inserting_after(head):
        graph_module.graph.call_function(tokens.gate_bias, (head, head, head, 1.0))
    with pytest.raises(VerificationError, match="gate_bias is not a static operator"):
        verify(graph_module, "lowered")


def frozen(graph_module: fx.GraphModule) -> None:
    graph_module.graph.find_nodes(op="call_module", target="lm_head")[0].kwargs = {
        "bias": torch.ones(3)
    }


def twice(graph_module: fx.GraphModule) -> None:
    (layer,) = graph_module.graph.find_nodes(op="call_module", target="decoder_3")
    with graph_module.graph.inserting_after(layer):
        graph_module.graph.node_copy(layer)


def counted(graph_module: fx.GraphModule) -> None:
    head = graph_module.graph.output_node().args[0]["logits"]
    with graph_module.graph.inserting_after(head):
        graph_module.graph.call_method("nonzero", (head,))


def softened(graph_module: fx.GraphModule) -> None:
    head = graph_module.graph.output_node().args[0]["logits"]
    with graph_module.graph.inserting_after(head):
        graph_module.graph.call_function(soft_top_k, (head, 3, 1.0, head))


def forgotten(graph_module: fx.GraphModule) -> None:
    output = graph_module.graph.output_node()
    output.args = ({**output.args[0], "spaces": output.args[0]["spaces"][:1]},)


def grown(graph_module: fx.GraphModule) -> None:
    last = [node for node in graph_module.graph.nodes if node.target is top_k][-1]
    last.args = (*last.args[:2], 60)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (frozen, "lm_head has a tensor as an argument"),
        (twice, "decoder layers run in the order"),
        (counted, "nonzero calls nonzero"),
        (softened, "soft_top_k is not a static operator"),
        (forgotten, "2 cuts report 1 spaces"),
        (grown, r"keep \[16, 60\] visual tokens"),
    ],
)
def test_verify_finds_damage(damage: Any, message: str) -> None:
    graph_module = lowered(Reduction("decoder.1", 16), Reduction("decoder.3", 8))
    damage(graph_module)
    with pytest.raises(VerificationError, match=message):
        verify(graph_module, "lowered")


def test_verify_finds_a_reduction_in_decoding() -> None:
    with pytest.raises(VerificationError, match="reduces tokens"):
        verify(lowered(Reduction("decoder.1", 16)), "decode")
