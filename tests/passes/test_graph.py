"""Walking a graph, and notes that travel with it."""

from __future__ import annotations

import copy

import networkx as nx
import pytest
import torch
from handmade import Handmade
from torch import fx

from deos_fx.models.blocks import Block
from deos_fx.passes.analyse.flow import Sweep
from deos_fx.passes.graph import blocks_after, blocks_of, made_of, reached, users_after
from deos_fx.passes.notes import annotate, note_of, note_of_graph


def random_graph(seed: int, size: int = 30) -> tuple[fx.Graph, nx.DiGraph]:
    """A graph of sums of one or two earlier values, and the same for networkx."""
    generator = torch.Generator().manual_seed(seed)
    graph, same = fx.Graph(), nx.DiGraph()
    nodes = [graph.placeholder("x"), graph.placeholder("y")]
    for _ in range(size):
        first, second = torch.randint(len(nodes), (2,), generator=generator).tolist()
        node = graph.call_function(torch.add, (nodes[first], nodes[second]))
        same.add_edges_from([(nodes[first], node), (nodes[second], node)])
        nodes.append(node)
    graph.output(nodes[-1])
    same.add_nodes_from(nodes)
    return graph, same


@pytest.mark.parametrize("seed", range(5))
def test_ancestors_and_descendants(seed: int) -> None:
    graph, same = random_graph(seed)
    for node in list(graph.nodes)[:-1]:
        assert made_of(node) == nx.ancestors(same, node) | {node}
        after = reached([node]) - {graph.output_node()}
        assert after == nx.descendants(same, node) | {node}


@pytest.mark.parametrize("seed", range(5))
def test_a_sweep_finds_what_comes_after_each_value(seed: int) -> None:
    graph, same = random_graph(seed)
    nodes = list(graph.nodes)[:-1]
    values = nodes[5::4]
    sweep = Sweep(same.successors)
    for i, value in reversed(list(enumerate(values))):
        whole = sweep.back_to(value)
        after = nx.descendants(same, value)
        assert whole == after.issuperset(values[i + 1 :])
        if whole:
            assert sweep.after == after
            read = {source for node in after for source in node.all_input_nodes}
            assert sweep.beside.keys() == read - after - {value}
            assert all(source in node.all_input_nodes for source, node in sweep.beside.items())


def test_blocks_and_users_after_a_node() -> None:
    made = Handmade()
    graph_module = made.module()
    decoder = blocks_of(graph_module.graph, "decoder")
    assert {i: node.name for i, node in decoder.items()} == {0: "decoder_0", 1: "decoder_1"}
    assert blocks_after(decoder[0], "decoder") == [decoder[1]]
    assert blocks_after(decoder[0], "vision") == []
    embedding = made.node("embedding")
    late = graph_module.graph.output_node()
    assert users_after(embedding, embedding.next) == list(embedding.users)
    assert users_after(embedding, late) == []


def test_copies_of_a_graph_carry_its_notes() -> None:
    graph_module = Handmade().module()
    for twin in (copy.deepcopy(graph_module), copy.copy(graph_module)):
        assert note_of_graph(twin).blocks.keys() == note_of_graph(graph_module).blocks.keys()
        pairs = zip(twin.graph.nodes, graph_module.graph.nodes, strict=True)
        assert all(note_of(mine) == note_of(theirs) for mine, theirs in pairs)


def test_a_note_on_a_copy_leaves_the_original_as_it_is() -> None:
    graph_module = Handmade().module()
    first = blocks_of(graph_module.graph, "decoder")[0]
    graph = fx.Graph()
    graph.graph_copy(graph_module.graph, {})
    twin = blocks_of(graph, "decoder")[0]
    annotate(twin, axes=None, block=Block("decoder", 7))
    assert note_of(twin).shape == note_of(first).shape
    assert (note_of(first).axes, note_of(first).block) == (1, Block("decoder", 0))
