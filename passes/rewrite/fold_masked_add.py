"""Fold ``x[mask] = x[mask] + rows`` into the sum of two tensors with a row for every position.

Model code that adds image features to some rows of the hidden states (DeepStack) reads these rows.
Their number depends on the mask, so they cannot be followed when tokens are dropped. A sum over all
rows has a row for every token, and is re-indexed like any other value.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx

from deos_fx.errors import CaptureError
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import made_of
from deos_fx.passes.notes import note_of

__all__ = ["fold_masked_add", "visual_rows"]


def visual_rows(visual: Tensor, features: Tensor) -> Tensor:
    """Return one row for every prompt position: the features at visual ones, zeros elsewhere.

    Args:
        visual: Flags [B, N, 1].
        features: [T, d], one for every flag that is set, row after row.

    Returns:
        [B, N, d].
    """
    rows = features.new_zeros(*visual.shape[:-1], features.shape[-1])
    return rows.masked_scatter(visual, features)


def fold_masked_add(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace ``masked_scatter(x, mask, x[mask] + rows)`` by ``x + visual_rows(mask, rows)``.

    Args:
        graph_module: A captured graph; the tracer has marked reads by a mask. Changed in place.

    Returns:
        The same graph module.

    Raises:
        CaptureError: If rows of the prompt that a mask selects are read for something else.
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_method", target="masked_scatter"):
        hidden: Any = node.args[0]
        # masked_scatter(x, mask, total): `total` is the sum, perhaps flattened.
        total = _past(node.args[2], "view", "reshape", "flatten")
        terms: Any = total.args if total.target in (operator.add, torch.add) else ()
        # Other scatters stay as they are (features that take the places of embeddings), and so do
        # rows with more than one axis.
        read = next((term for term in terms if _is_read(term, hidden)), None)
        # How many axes a row has: 0 if the mask has one flag for every element.
        if read is None or (added := note_of(read).masked or 0) > 1:
            continue
        (features,) = (term for term in terms if term is not read)
        with graph.inserting_before(node):
            mask = read.args[1][0] if isinstance(read.args[1], tuple) else read.args[1]
            mask = _past(mask, "expand_as", "expand")
            if added:
                # Case: the mask selects whole rows. It gets the axis of features.
                mask = graph.call_method("unsqueeze", (mask, -1))
            # `visual_rows` puts features at flags row after row, so their shape does not matter.
            features = _past(features, "view", "reshape", "flatten")
            rows = graph.call_function(visual_rows, (mask, features))
            node.replace_all_uses_with(graph.call_function(operator.add, (hidden, rows)))
    graph_module = finish(graph_module)
    # Guards may read the number of rows: the output does not depend on them.
    used = made_of(graph_module.graph.output_node())
    left = next((node.name for node in used if _selects(node) and _of_prompt(node)), None)
    if left is not None:
        raise CaptureError(
            f"The model's code reads the rows of a tensor that a mask selects ({left}) and does "
            "not just add to them, so they cannot be followed when tokens are dropped: their "
            "number depends on the prompt. Use a model that keeps a row for every prompt token."
        )
    return graph_module


def _past(node: Any, *methods: str) -> fx.Node:
    """Return the node before a chain of methods that keep the elements and their order."""
    while node.op == "call_method" and node.target in methods:
        node = node.args[0]
    return cast(fx.Node, node)


def _of_prompt(node: fx.Node) -> bool:
    """Return whether a node depends on the prompt; rows of image features alone may be selected."""
    return any(part.target in ("input_ids", "attention_mask") for part in made_of(node))


def _selects(node: fx.Node) -> bool:
    """Return whether a node reads the rows that a mask selects."""
    return note_of(node).masked is not None


def _is_read(node: Any, hidden: fx.Node) -> bool:
    """Return whether a node reads the rows of `hidden` that a mask selects."""
    # The code may clone the hidden states before it reads or writes them.
    selects = isinstance(node, fx.Node) and _selects(node)
    return selects and _past(node.args[0], "clone") is _past(hidden, "clone")
