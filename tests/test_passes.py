"""The passes on small graphs built by hand, and what a lowered graph looks like.

The texts under tests/goldens are the code of lowered graphs. After a change that is meant, write
them again with UPDATE_GOLDENS=1 and read the difference.
"""

from __future__ import annotations

import gc
import linecache
import operator
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import inputs, shared_llava
from torch import fx, nn
from torch.fx.graph_module import _loader

from deos_fx import presets, tokens
from deos_fx.attention.seam import ObservedBlock
from deos_fx.errors import GuardError, PassError, VerificationError
from deos_fx.forms import relaxed
from deos_fx.operator import top_k
from deos_fx.passes.analyse.annotate_token_spaces import MASK
from deos_fx.passes.finish import finish
from deos_fx.passes.lower.open_space import open_space
from deos_fx.passes.rewrite.fold_unstack import fold_unstack
from deos_fx.passes.rewrite.replace_placeholder_merge import replace_placeholder_merge
from deos_fx.passes.verify import verify
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

GOLDENS = Path(__file__).parent / "goldens"


def module(graph: fx.Graph, **attributes: Any) -> fx.GraphModule:
    return fx.GraphModule(attributes, graph)


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


# *** fold_unstack ***


def unrolled(rows: int) -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    parts = graph.call_function(torch.unbind, (graph.placeholder("x"),))
    parts.meta["unrolled"] = rows
    return graph, [graph.call_function(operator.getitem, (parts, i)) for i in range(rows)]


def test_unrolled_rows_that_are_joined_again_become_a_reshape() -> None:
    graph, rows = unrolled(2)
    graph.output(graph.call_function(torch.cat, (rows,), {"dim": 0}))
    folded = fold_unstack(module(graph))
    assert [node.target for node in folded.graph.nodes] == ["x", "flatten", "output"]
    x = torch.randn(3, 4, 5)
    assert torch.equal(folded(x), x.flatten(0, 1))


def test_unrolled_rows_that_are_flattened_and_joined_become_a_reshape() -> None:
    graph, rows = unrolled(2)
    flat = [graph.call_method("flatten", (row, 0, 1)) for row in rows]
    graph.output(graph.call_function(torch.cat, (flat,), {"dim": 0}))
    folded = fold_unstack(module(graph))
    assert [node.target for node in folded.graph.nodes] == ["x", "flatten", "output"]
    x = torch.randn(3, 4, 5)
    assert torch.equal(folded(x), x.flatten(0, 2))


@pytest.mark.parametrize("how", ["added", "turned", "joined elsewhere"])
def test_what_cannot_be_folded_is_guarded(how: str) -> None:
    graph, rows = unrolled(2)
    if how == "added":
        result = graph.call_function(torch.add, tuple(rows))
    elif how == "turned":
        result = graph.call_function(torch.cat, (rows[::-1],))
    else:
        result = graph.call_function(torch.cat, (rows,), {"dim": 1})
    graph.output(result)
    guarded = fold_unstack(module(graph))
    guarded(torch.randn(2, 4, 5))
    with pytest.raises(GuardError, match="captured for 2, called with 3"):
        guarded(torch.randn(3, 4, 5))


# *** finish ***


def test_finish_drops_what_nothing_reads() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_module("unused", (x,))
    graph.output(graph.call_module("used", (x,)))
    used = nn.ReLU()
    done = finish(module(graph, used=used, unused=nn.Linear(2, 2)))
    assert done.used is used and not hasattr(done, "unused")
    assert "unused" not in done.code


def test_finish_refuses_a_malformed_graph() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.neg, (x,))
    second = graph.call_function(torch.abs, (first,))
    graph.output(second)
    broken = module(graph)
    second.append(first)
    with pytest.raises(RuntimeError, match="before it has been defined"):
        finish(broken)


# *** open_space ***


def test_a_new_space_reindexes_what_is_read_behind_the_cut() -> None:
    graph = fx.Graph()
    names = ("x", "table", "mask", "labels", "index")
    x, table, mask, labels, index = map(graph.placeholder, names)
    cut = graph.call_function(torch.tanh, (x,))
    before = graph.call_function(torch.mul, (cut, table))
    flat = graph.call_method("flatten", (labels,))
    reduced = graph.call_function(tokens.take, (cut, index))
    behind = graph.call_function(torch.add, (cut, table))
    masked = graph.call_function(torch.mul, (behind, mask))
    again = graph.call_function(torch.sub, (masked, table))
    loss = graph.call_function(torch.mul, (graph.call_method("flatten", (again,)), flat))
    graph.output((before, again, loss))
    axes = {table: 1, mask: MASK, labels: 1, flat: 0, cut: 1, x: 1}
    for node in graph.nodes:
        node.meta["prompt_axes"] = axes.get(node)
    replaced: dict[fx.Node, fx.Node] = {}
    open_space(graph, cut, reduced, index, replaced, "space")
    result = module(graph)
    result.graph.lint()
    assert before.args == (cut, table), "what comes before the cut stays in the old space"
    assert behind.args == (reduced, replaced[table]), "everything behind it is in the new one"
    assert again.args[1] is replaced[table], "a value is re-indexed once"
    assert replaced[table].name == "table_space"

    x, mask, labels = torch.randn(3, 3, 7)
    table = torch.randn(1, 7)
    kept = torch.stack([torch.randperm(7)[:4].sort().values for _ in range(3)])
    old, new, loss = result(x, table, mask, labels, kept)
    assert torch.equal(old, x.tanh() * table)
    expected = ((x.tanh() + table) * mask - table).gather(1, kept)
    assert torch.equal(new, expected)
    assert torch.equal(loss, (expected * labels.gather(1, kept)).flatten())


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
    assert code == path.read_text(encoding="utf-8"), "see the docstring of this file"


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
        graph_module.graph.call_function(relaxed.soft_top_k, (head, 3, 1.0, head))


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


def test_the_source_of_a_graph_goes_with_it() -> None:
    graph_module = lowered(Reduction("decoder.0", 16))
    source = type(graph_module).forward.__code__.co_filename
    assert source in _loader.eval_cache and linecache.getline(source, 1)
    finish(graph_module)
    assert source not in _loader.eval_cache
    source = type(graph_module).forward.__code__.co_filename
    del graph_module
    gc.collect()
    assert source not in _loader.eval_cache and source not in linecache.cache
