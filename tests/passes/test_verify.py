"""What `verify` accepts at every stage, and what it finds in a damaged graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from handmade import Handmade
from lowered import lowered
from torch import fx

from deos_fx import tokens
from deos_fx.errors import VerificationError
from deos_fx.forms.soft_top_k import soft_top_k
from deos_fx.models.blocks import Block
from deos_fx.operator import in_order, strided, take, top_k, with_last
from deos_fx.passes.notes import annotate
from deos_fx.passes.rewrite.replace_placeholder_merge import replace_placeholder_merge
from deos_fx.passes.verify import verify
from deos_fx.policy.reduction import Reduction


def test_verify_accepts_every_stage() -> None:
    merge = Reduction("decoder.1", 16, gain=1.0, mass_bias=1.0, position="compact")
    assert verify(lowered(merge), "lowered")
    assert verify(lowered(merge, decode=True), "decode")
    assert verify(lowered(), "captured")
    assert verify(lowered(), "relaxed")
    assert verify(replace_placeholder_merge(lowered(merge)), "exported")


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


@pytest.mark.parametrize(
    "method",
    [
        "index_add",
        "index_add_",
        "item",
        "masked_select",
        "nonzero",
        "scatter_add",
        "scatter_add_",
        "tolist",
        "unique",
    ],
)
def test_verify_finds_shapes_that_depend_on_data(method: str) -> None:
    graph_module = lowered(Reduction("decoder.1", 16))
    head = graph_module.graph.output_node().args[0]["logits"]
    with graph_module.graph.inserting_after(head):
        graph_module.graph.call_method(method, (head,))
    with pytest.raises(VerificationError, match=f"{method} calls {method}"):
        verify(graph_module, "lowered")


def test_verify_finds_a_reduction_in_decoding() -> None:
    with pytest.raises(VerificationError, match="reduces tokens"):
        verify(lowered(Reduction("decoder.1", 16)), "decode")


# *** rules on a graph built by hand ***


def unknown_user(made: Handmade, graph_module: fx.GraphModule) -> None:
    made.node("decoder_0").users.clear()


def stored(made: Handmade, graph_module: fx.GraphModule) -> None:
    graph_module.register_buffer("_tensor_constant0", torch.ones(3))
    head = made.node("head")
    with made.graph.inserting_before(head):
        constant = made.graph.get_attr("_tensor_constant0")
        made.graph.call_function(torch.mul, (constant, 2))


def swapped(made: Handmade, graph_module: fx.GraphModule) -> None:
    for name, index in (("decoder_0", 1), ("decoder_1", 0)):
        annotate(made.node(name), block=Block("decoder", index))


def nothing(made: Handmade, graph_module: fx.GraphModule) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "stage", "message"),
    [
        (unknown_user, "captured", "decoder_0 does not know its user decoder_1"),
        (stored, "captured", "is a constant of 3 values from an example"),
        (swapped, "captured", r"decoder layers run in the order \[1, 0\]"),
        (nothing, "exported", "masked_scatter fills placeholders by a mask"),
    ],
)
def test_rules_by_hand(damage: Any, stage: Any, message: str) -> None:
    made = Handmade()
    graph_module = made.module()
    assert verify(graph_module, "captured") is graph_module
    damage(made, graph_module)
    with pytest.raises(VerificationError, match=message):
        verify(graph_module, stage)


def kept(made: Handmade, function: Any, *args: Any) -> fx.Node:
    """A selection of visual tokens in front of the head."""
    with made.graph.inserting_before(made.node("head")):
        return made.graph.call_function(function, args)


def best(made: Handmade, count: object) -> fx.Node:
    return kept(made, top_k, made.merged, None, count)


COUNTS: dict[str, tuple[Any, int | None]] = {
    "a selector": (lambda made: best(made, 5), 5),
    "a selector without scores": (lambda made: kept(made, strided, made.merged, None, 0, 5), 5),
    "of a prompt": (lambda made: kept(made, tokens.kept_of_prompt, best(made, 5), 3, 9), 15),
    "in order": (lambda made: kept(made, in_order, best(made, 5)), 5),
    "the last one": (lambda made: kept(made, with_last, best(made, 5), 9), 5),
    "taken": (lambda made: kept(made, take, best(made, 5), made.merged), 5),
    "a part": (lambda made: kept(made, torch.narrow, best(made, 5), 1, 2, 3), 3),
    "tiers": (lambda made: kept(made, torch.cat, [best(made, 5), best(made, 6)], 1), 11),
    "an input": (lambda made: best(made, made.merged), None),
    "a tier with an input": (
        lambda made: kept(made, torch.cat, [best(made, 5), best(made, made.merged)], 1),
        None,
    ),
    "a tier of a prompt with an input": (
        lambda made: kept(made, tokens.kept_of_prompt, best(made, made.merged), 3, 9),
        None,
    ),
    "something else": (lambda made: kept(made, torch.neg, best(made, 5)), None),
}


@pytest.mark.parametrize("stage", ["lowered", "exported"])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_every_selection_are_compared(name: str, stage: Any) -> None:
    made = Handmade()
    selection, count = COUNTS[name]
    one, more = selection(made), best(made, (count or 99) + 1)
    cuts = [kept(made, tokens.kept_in_prompt, made.merged, x, made.merged) for x in (one, more)]
    graph_module = fx.GraphModule(made.modules, made.graph)
    output = made.graph.output_node()
    output.args = ({"logits": made.node("head"), "spaces": cuts},)
    if stage == "exported":
        # What would break the rule of this stage.
        merge, features = made.merged, made.merged.args[2]
        merge.replace_all_uses_with(features)
        made.graph.erase_node(merge)
    if count is None:
        assert verify(graph_module, stage)
        return
    message = rf"'{stage}': the reductions keep \[{count}, {count + 1}\] visual tokens"
    with pytest.raises(VerificationError, match=message):
        verify(graph_module, stage)
    output.args = ({"logits": made.node("head"), "spaces": cuts[:1]},)
    with pytest.raises(VerificationError, match=f"'{stage}': 2 cuts report 1 spaces"):
        verify(graph_module, stage)


def test_a_decode_layer_reads_no_mask_of_a_later_one() -> None:
    made = Handmade()
    graph_module = made.module()
    layer = made.node("decoder_0")
    with made.graph.inserting_before(layer):
        mask = made.graph.call_function(torch.ones, (3,))
        mask.kwargs = {"layer_idx": 1}
    layer.kwargs = {"attention_mask": mask}
    with pytest.raises(VerificationError, match="decoder_0 reads ones, made for layer 1"):
        verify(graph_module, "decode")
    layer.kwargs, made.node("decoder_1").kwargs = {}, layer.kwargs
    assert verify(graph_module, "decode")
