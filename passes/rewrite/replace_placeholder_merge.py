"""Write visual features into the prompt by an index instead of ``masked_scatter``.

`masked_scatter` walks over the elements of a mask. ONNX can express that only as NonZero, as a loop
over data-dependent shapes, or with an index for every single element. Counting the placeholders
gives an index for every token: ``where(mask, features[cumsum(mask) - 1], embeddings)``.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from deos_fx.passes.finish import finish
from deos_fx.passes.rewrite.fold_masked_add import visual_rows
from deos_fx.tokens.index import take

__all__ = ["merge_placeholders", "replace_placeholder_merge"]

# Operations on the mask of the placeholders, before the merge, after which all flags of a token are
# still equal.
_KEEPS_FLAGS = ("to", "bool", "expand", "expand_as")


def merge_placeholders(embeddings: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """Put the n-th feature at the n-th set flag of the mask, row after row.

    Args:
        embeddings: [B, N, d].
        mask: [B, N, 1], set at the placeholders.
        features: [..., d] with one vector for every flag that is set.

    Returns:
        [B, N, d].
    """
    index = mask.flatten().to(torch.int64).cumsum(0) - 1
    # Before the first placeholder the index is -1. Any feature will do there: it is not used.
    rows = features.flatten(0, -2).index_select(0, index.clamp(min=0))
    return torch.where(mask, rows.reshape(embeddings.shape).to(embeddings.dtype), embeddings)


def rows_of_placeholders(mask: Tensor, features: Tensor) -> Tensor:
    """Compute `visual_rows` by an index: the n-th feature at the n-th set flag, else zeros.

    Args:
        mask: [B, N, 1].
        features: [T, d].

    Returns:
        [B, N, d].
    """
    return merge_placeholders(
        features.new_zeros(*mask.shape[:-1], features.shape[-1]), mask, features
    )


def replace_placeholder_merge(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace every ``masked_scatter`` whose mask has one flag per token, and `visual_rows`.

    Any other ``masked_scatter`` is left as it is: its mask selects elements, not tokens.

    Args:
        graph_module: A captured or lowered graph. Changed in place.

    Returns:
        The same graph module.
    """
    for node in list(graph_module.graph.nodes):
        if node.target is visual_rows:
            # It takes the same arguments.
            node.target = rows_of_placeholders
        if node.target not in ("masked_scatter", torch.masked_scatter):
            continue
        # masked_scatter(embeddings, mask, features)
        embeddings, mask, features = node.all_input_nodes
        flags = _flag_per_token(mask)
        if flags is not None:
            with graph_module.graph.inserting_before(node):
                merged = graph_module.graph.call_function(
                    merge_placeholders, (embeddings, flags, features)
                )
            node.replace_all_uses_with(merged)
    return finish(graph_module)


def _flag_per_token(mask: fx.Node) -> fx.Node | None:
    """Return the mask [B, N, 1] that a mask is expanded from; None if there is no such mask."""
    # Back through the mask's history, past re-indexing (`take`), to the node that added the axis of
    # features. `unexpanded` is the mask before the earliest expansion.
    node = unexpanded = mask
    while node.target in _KEEPS_FLAGS or node.target is take:
        node, source = node.all_input_nodes[0], node
        if source.target in ("expand", "expand_as"):
            unexpanded = node
    added = node.target in ("unsqueeze", torch.unsqueeze) and node.args[1:] == (-1,)
    # x[mask] = value is recorded so.
    indexed = node.target is operator.getitem and node.args[1] == (Ellipsis, None)
    return unexpanded if added or indexed else None
