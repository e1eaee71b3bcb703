"""Check a graph after each stage; a failure is a bug in a pass.

Every graph:

1. lints, and its nodes and their users agree;
2. has no tensor as an argument of a node: that would freeze values of the example run;
3. runs every decoder layer exactly once, in order.

After lowering, also:

4. every operator of this package is in the static list, and no shape depends on data;
5. every reduction reports the space it leaves, and the counts never grow.

Each of the other stages has one more rule:

6. in a relaxed graph, modules choose the tokens that stay, and no static selector does;
7. in a graph that is exported, features fill their placeholders by an index and not by a mask, on
   whose ONNX form runtimes differ;
8. a decode graph reduces nothing, and no layer reads a mask that was made for a later one.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from deos_fx import operator, tokens
from deos_fx.errors import VerificationError
from deos_fx.operator import SCORES, SELECTORS
from deos_fx.operator.learned import LEARNED
from deos_fx.passes.notes import note_of

__all__ = ["Stage", "verify"]

Stage = Literal["captured", "relaxed", "lowered", "decode", "exported"]


# Functions whose results have shapes that depend on data, and the two that add at an index, on
# whose results runtimes differ.
_DYNAMIC = {"index_add", "item", "masked_select", "nonzero", "scatter_add", "tolist", "unique"}


def verify(graph_module: fx.GraphModule, stage: Stage) -> fx.GraphModule:
    """Check a graph after a stage of the pipeline.

    Args:
        graph_module: A captured or relaxed graph, a lowered prefill or decode graph, or a lowered
            prefill that is rewritten for an export. Not changed.
        stage: The stage that the graph comes from.

    Returns:
        The same graph module.

    Raises:
        VerificationError: If it breaks a rule of its stage.
    """
    graph = graph_module.graph
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"after stage {stage!r}: {error}") from error
    for node in graph.nodes:
        _check_edges(node, stage)
        _check_constants(graph_module, node, stage)
    _check_layers(graph, stage)
    if stage == "relaxed":
        # Rule 6.
        selectors = {selector.function for selector in SELECTORS.values()}
        cuts = [node.name for node in graph.nodes if node.target in selectors]
        _require(not cuts, stage, f"{', '.join(cuts)} drops tokens")
    if stage in ("lowered", "decode", "exported"):
        allowed = _static_operators()
        for node in graph.nodes:
            _check_operator(node, allowed, stage)
    if stage in ("lowered", "exported"):
        _check_spaces(graph, stage)
    if stage == "exported":
        # Rule 7.
        masked = [node.name for node in graph.nodes if node.target == "masked_scatter"]
        _require(not masked, stage, f"{', '.join(masked)} fills placeholders by a mask")
    if stage == "decode":
        _check_decode(graph)
    return graph_module


def _require(condition: bool, stage: Stage, what: str) -> None:
    """Raise `VerificationError` unless a condition holds."""
    if not condition:
        raise VerificationError(f"after stage {stage!r}: {what}")


def _check_edges(node: fx.Node, stage: Stage) -> None:
    """Rule 1: a node and the nodes it reads, and its users, know each other."""
    for source in node.all_input_nodes:
        _require(node in source.users, stage, f"{source.name} does not know its user {node.name}")
    for user in node.users:
        known = node in user.all_input_nodes and user.graph is node.graph
        _require(known, stage, f"{node.name} has a user {user.name} that does not read it")


def _check_constants(graph_module: fx.GraphModule, node: fx.Node, stage: Stage) -> None:
    """Rule 2; fx may also store such a tensor as an attribute ``_tensor_constant<i>``."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    frozen = any(isinstance(leaf, torch.Tensor) for leaf in leaves)
    _require(not frozen, stage, f"{node.name} has a tensor as an argument")
    # A single number is no data of an example: a guard covers every number that was read.
    if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
        size = getattr(graph_module, str(node.target)).numel()
        _require(size == 1, stage, f"{node.name} is a constant of {size} values from an example")


def _check_layers(graph: fx.Graph, stage: Stage) -> None:
    """Rule 3: decoder layers run exactly once, in order."""
    blocks = (note_of(node).block for node in graph.nodes)
    layers = [block.index for block in blocks if block is not None and block.stage == "decoder"]
    in_order = layers == list(range(len(layers)))
    _require(in_order, stage, f"decoder layers run in the order {layers}")


# The functions on tokens that only a relaxed graph may call.
_RELAXED = {"gate_bias", "patch_gate_bias", "prompt_gates", "are_open", "relaxed_positions"}


def _static_operators() -> set[Any]:
    """Return our functions that a lowered graph may call.

    The tables are read at every call, so rows that were added to them count.
    """
    return {
        *(getattr(tokens, name) for name in tokens.__all__ if name not in _RELAXED),
        *(function for name in operator.__all__ if callable(function := getattr(operator, name))),
        *(score.function for score in SCORES.values()),
        *(part.function for part in LEARNED.values()),
        *(selector.function for selector in SELECTORS.values()),
    }


def _check_operator(node: fx.Node, allowed: set[Any], stage: Stage) -> None:
    """Rule 4: our functions are on the static list, and no shape depends on data."""
    if node.op not in ("call_function", "call_method"):
        return
    # The name of a method is its target; `strip` finds in-place forms (index_add_) as well.
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    _require(name.strip("_") not in _DYNAMIC, stage, f"{node.name} calls {name}")
    ours = getattr(node.target, "__module__", None) or ""
    if ours.startswith(("deos_fx.tokens", "deos_fx.operator", "deos_fx.forms")):
        known = node.target in allowed
        _require(known, stage, f"{node.name}: {name} is not a static operator")


def _check_spaces(graph: fx.Graph, stage: Stage) -> None:
    """Rule 5: every cut reports the space it leaves, and counts never grow.

    Counts that the graph does not state are left out of the comparison.
    """
    cuts = [node for node in graph.nodes if node.target is tokens.kept_in_prompt]
    output = cast(dict[str, Any], graph.output_node().args[0])
    spaces = output.get("spaces", [])
    _require(len(cuts) == len(spaces), stage, f"{len(cuts)} cuts report {len(spaces)} spaces")
    # In the order of the graph.
    counts = [count for cut in cuts if (count := _count(cut.args[1])) is not None]
    falling = counts == sorted(counts, reverse=True)
    _require(falling, stage, f"the reductions keep {counts} visual tokens, in this order")


def _count(kept: Any) -> int | None:
    """Return the number of tokens that a selection keeps of a prompt; None if it is not stated."""
    if kept.target is tokens.kept_of_prompt:
        # Case: indices into each image become indices into the prompt.
        per_image = _count(kept.args[0])
        return None if per_image is None else per_image * kept.args[1]
    if kept.target in (operator.in_order, operator.take, operator.with_last):
        # Case: functions that change indices or their order, but not their number.
        return _count(kept.args[0])
    if kept.target is torch.narrow:
        # Case: a part of the tiers: narrow(kept, dim, start, length).
        return kept.args[3]
    if kept.target is torch.cat:
        # Case: several tiers.
        parts = [_count(part) for part in kept.args[0]]
        return None if None in parts else sum(cast(list[int], parts))
    # Case: a selector. Its count is the argument after those that its row says it needs. Selectors
    # that flag tokens do not keep any by themselves.
    places = {row.function: len(row.needs) for row in SELECTORS.values() if not row.flags}
    place = places.get(kept.target)
    count = None if place is None else kept.args[place]
    # A count that is an input is not stated.
    return None if isinstance(count, fx.Node) else count


def _check_decode(graph: fx.Graph) -> None:
    """Rule 8: a decode graph reduces nothing, and layers read masks of their space."""
    ours = _static_operators()
    for node in graph.nodes:
        reduces = node.op == "call_function" and node.target in ours
        _require(not reduces, "decode", f"{node.name} reduces tokens")
        # A mask that names a layer is as wide as the cache of that layer, the first one in its
        # space.
        first = node.kwargs.get("layer_idx")
        for user in node.users:
            block = note_of(user).block
            if first is None or note_of(user).stateful:
                # A layer with a state is given masks that it does not read.
                continue
            if block is not None and block.stage == "decoder":
                fits = block.index >= int(first)
                _require(fits, "decode", f"{user.name} reads {node.name}, made for layer {first}")
