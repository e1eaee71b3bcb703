"""The pass `replace_placeholder_merge`, on graphs built by hand."""

import torch
from torch import fx

from deos_fx.passes.rewrite.replace_placeholder_merge import (
    merge_placeholders,
    replace_placeholder_merge,
)
from deos_fx.tokens.index import take

IMAGE = 7


def _graph(mask_of):
    """embeddings.masked_scatter(mask_of(input_ids), features), as models write it."""
    graph = fx.Graph()
    ids, embeddings, features = map(graph.placeholder, ("ids", "embeddings", "features"))
    mask = mask_of(graph, ids, embeddings)
    graph.output(graph.call_method("masked_scatter", (embeddings, mask, features)))
    return fx.GraphModule({}, graph)


def _flags(graph, ids):
    return graph.call_method("unsqueeze", (graph.call_function(torch.eq, (ids, IMAGE)), -1))


def _per_token(graph, ids, embeddings):
    return graph.call_method("to", (_flags(graph, ids), "cpu"))


def _expanded(graph, ids, embeddings):
    return graph.call_method("expand_as", (_flags(graph, ids), embeddings))


def _after_a_reduction(graph, ids, embeddings):
    index = graph.call_function(torch.tensor, ([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],))
    return graph.call_function(take, (_flags(graph, ids), index))


def _per_element(graph, ids, embeddings):
    return graph.call_function(torch.gt, (embeddings, 0))


def _inputs():
    ids = torch.tensor([[1, IMAGE, 2, IMAGE, 3], [IMAGE, 4, 5, 6, IMAGE]])
    return ids, torch.randn(2, 5, 3), torch.randn(4, 3)


def _targets(graph_module):
    return {node.target for node in graph_module.graph.nodes}


def test_the_merge_is_replaced_and_equal():
    for mask in (_per_token, _expanded, _after_a_reduction):
        graph_module = _graph(mask)
        expected = graph_module(*_inputs_at(0))
        assert replace_placeholder_merge(graph_module) is graph_module
        assert merge_placeholders in _targets(graph_module)
        assert "masked_scatter" not in _targets(graph_module)
        assert "expand_as" not in _targets(graph_module)
        assert torch.equal(graph_module(*_inputs_at(0)), expected)


def _inputs_at(seed):
    torch.manual_seed(seed)
    return _inputs()


def test_a_mask_of_elements_is_left_alone():
    graph_module = replace_placeholder_merge(_graph(_per_element))
    assert "masked_scatter" in _targets(graph_module)
    assert merge_placeholders not in _targets(graph_module)


def test_a_graph_without_a_merge_is_left_alone():
    graph = fx.Graph()
    graph.output(graph.call_method("relu", (graph.placeholder("x"),)))
    graph_module = replace_placeholder_merge(fx.GraphModule({}, graph))
    assert _targets(graph_module) == {"x", "relu", "output"}


def test_features_are_cast_to_the_embeddings():
    ids, embeddings, features = _inputs_at(1)
    mask = (ids == IMAGE)[..., None]
    merged = merge_placeholders(embeddings.half(), mask, features)
    assert merged.dtype == torch.float16
    assert torch.equal(merged, embeddings.half().masked_scatter(mask, features.half()))
