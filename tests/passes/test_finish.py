"""What every pass that changes a graph ends with."""

from __future__ import annotations

import gc
import linecache

import pytest
import torch
from handmade import Handmade
from torch import fx, nn
from torch.fx.graph_module import _loader

from deos_fx.passes.finish import finish


def test_finish_drops_what_nothing_reads() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_module("unused", (x,))
    graph.output(graph.call_module("used", (x,)))
    used = nn.ReLU()
    done = finish(fx.GraphModule({"used": used, "unused": nn.Linear(2, 2)}, graph))
    assert done.used is used and not hasattr(done, "unused")
    assert "unused" not in done.code


def test_finish_refuses_a_malformed_graph() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.neg, (x,))
    second = graph.call_function(torch.abs, (first,))
    graph.output(second)
    broken = fx.GraphModule(nn.Module(), graph)
    second.append(first)
    with pytest.raises(RuntimeError, match="before it has been defined"):
        finish(broken)


def test_the_source_of_a_graph_goes_with_it() -> None:
    graph_module = Handmade().module()
    source = type(graph_module).forward.__code__.co_filename
    assert source in _loader.eval_cache and linecache.getline(source, 1)
    finish(graph_module)
    assert source not in _loader.eval_cache
    source = type(graph_module).forward.__code__.co_filename
    del graph_module
    gc.collect()
    assert source not in _loader.eval_cache and source not in linecache.cache
