"""Let a graph take the places whose logits it computes, instead of their number.

transformers' models cut hidden states to the last n tokens before the head: ``hidden[:, -n:]``. In
an exported graph n would be a constant. A list of places has a length that can change, and a head
that runs on few of them saves most of the memory of a prefill: logits are as wide as the
vocabulary.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from deos_fx.passes.finish import finish

__all__ = ["LOGITS", "places_of", "select_logits"]

LOGITS = "logits_to_keep"
"""Name of the input: a number for transformers, places for an exported graph."""


def places_of(hidden: Tensor, places: Tensor) -> Tensor:
    """Take hidden states at some places.

    Args:
        hidden: [B, M, d].
        places: [L], the same for all rows; negative ones count from the end.

    Returns:
        [B, L, d].
    """
    from_start = torch.where(places < 0, places + hidden.shape[1], places)
    return hidden.index_select(1, from_start)


def select_logits(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace ``hidden[:, -logits_to_keep:]`` by the hidden states at places.

    Args:
        graph_module: A captured or lowered graph of a call with a number of logits to keep, or
            without that argument; then nothing changes. Changed in place.

    Returns:
        The same graph module, whose input ``logits_to_keep`` is a tensor [L] of places.

    Raises:
        ValueError: If the graph uses the number for anything else.
    """
    graph = graph_module.graph
    for number in graph.find_nodes(op="placeholder", target=LOGITS):
        for negative in list(number.users):
            for cut in list(negative.users):
                if _cuts_tokens(negative, cut):
                    with graph.inserting_before(cut):
                        chosen = graph.call_function(places_of, (cut.args[0], number))
                    cut.replace_all_uses_with(chosen)
                    graph.erase_node(cut)
            if not negative.users and negative.target is not places_of:
                graph.erase_node(negative)
        # Some models hand every argument on to their layers, which have no use for this one.
        if any(user.target is not places_of and user.op != "call_module" for user in number.users):
            raise ValueError(
                f"{graph_module._get_name()} does more with {LOGITS} than cutting hidden states"
            )
    return finish(graph_module)


def _cuts_tokens(negative: fx.Node, cut: fx.Node) -> bool:
    """Return whether a node is ``hidden[:, -n:]``, perhaps with the other axes written out."""
    if negative.target is not operator.neg or cut.target is not operator.getitem:
        return False
    where: Any = cut.args[1]
    last = slice(negative, None, None)
    return isinstance(where, tuple) and where[:2] == (slice(None), last)
