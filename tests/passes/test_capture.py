"""Captures of a model of a few lines: what is recorded, guarded and refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from deos_fx.errors import CaptureError, GuardError
from deos_fx.models.blocks import Block
from deos_fx.passes.capture.capture import capture
from deos_fx.passes.capture.leaves import check_guard, first_of
from deos_fx.passes.capture.proxy import ValueProxy, has_proxy, with_features
from deos_fx.passes.capture.replacements import TRACER
from deos_fx.passes.capture.tracer import Tracer
from deos_fx.passes.notes import note_of, note_of_graph

WIDTH = 4
Glue = Callable[[Tensor, Tensor], Tensor]


class _Config(PreTrainedConfig):
    model_type = "handmade"


class _Model(PreTrainedModel):
    """An embedding, two blocks with some glue before them, and a head."""

    config_class = _Config

    def __init__(self, glue: Glue) -> None:
        super().__init__(_Config())
        self.glue = glue
        self.embed = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(WIDTH, 10), nn.Tanh())
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        hidden = self.glue(self.embed(input_ids), input_ids)
        for block in self.blocks:
            hidden = block(hidden * self.scale)
        return CausalLMOutput(logits=self.head(hidden))


BLOCKS = {f"blocks.{i}": Block("decoder", i) for i in range(2)}
IDS = torch.tensor([[1, 2, 9, 9, 3]])
OTHER = torch.tensor([[9, 4, 5, 9, 6, 7], [1, 9, 2, 3, 9, 5]])


def captured(glue: Glue) -> tuple[_Model, fx.GraphModule]:
    model = _Model(glue).eval()
    return model, capture(model, {"input_ids": IDS}, BLOCKS)


def same(hidden: Tensor, ids: Tensor) -> Tensor:
    return hidden


def test_blocks_are_nodes_and_glue_is_recorded() -> None:
    model, graph_module = captured(same)
    calls = [node.name for node in graph_module.graph.find_nodes(op="call_module")]
    assert calls == ["embed", "decoder_0", "decoder_1", "head"]
    notes = map(note_of, graph_module.graph.find_nodes(op="call_module"))
    assert [note.block for note in notes] == [None, *BLOCKS.values(), None]
    assert note_of_graph(graph_module).blocks == dict(
        zip(BLOCKS.values(), model.blocks, strict=True)
    )
    assert graph_module.decoder_0 is model.blocks[0], "weights are shared"
    assert graph_module.get_parameter("scale") is model.scale
    assert torch.equal(graph_module(OTHER)["logits"], model(OTHER).logits)


def replaced_rows(hidden: Tensor, ids: Tensor) -> Tensor:
    hidden[ids == 9] = torch.ones(WIDTH)[0]
    return hidden


def shifted_features(hidden: Tensor, ids: Tensor) -> Tensor:
    hidden = hidden.clone()
    hidden[:, :, 0] = 2.0
    return hidden


def each_row(hidden: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([row * 2 for row in hidden])


@pytest.mark.parametrize("glue", [replaced_rows, shifted_features])
def test_values_written_in_place_are_new_values(glue: Glue) -> None:
    model, graph_module = captured(glue)
    assert torch.equal(graph_module(OTHER)["logits"], model(OTHER).logits)


def test_an_iteration_is_unrolled_and_marked() -> None:
    model, graph_module = captured(each_row)
    unrolled = {node.name: note_of(node).unrolled for node in graph_module.graph.nodes}
    assert unrolled["unbind"] == 1
    # The target is torch's own function, not what stands in for it during a capture.
    assert len(graph_module.graph.find_nodes(op="call_function", target=torch.unbind)) == 1
    assert torch.equal(graph_module(OTHER[:1])["logits"], model(OTHER[:1]).logits)


def longer(hidden: Tensor, ids: Tensor) -> Tensor:
    return hidden * 2 if ids.shape[1] > 5 else hidden


def if_present(hidden: Tensor, ids: Tensor) -> Tensor:
    return hidden * 2 if (ids == 4).any() else hidden


@pytest.mark.parametrize("glue", [longer, if_present])
def test_branches_are_guarded(glue: Glue) -> None:
    model, graph_module = captured(glue)
    fitting = IDS.flip(1)
    assert torch.equal(graph_module(fitting)["logits"], model(fitting).logits)
    with pytest.raises(GuardError, match="captured for False, called with .*True"):
        graph_module(OTHER)


def from_data(hidden: Tensor, ids: Tensor) -> Tensor:
    return hidden + torch.tensor([1.0, 2.0, 3.0, 4.0])


def one_row(hidden: Tensor, ids: Tensor) -> Tensor:
    hidden[0] = 1.0
    return hidden


@pytest.mark.parametrize(
    ("glue", "message"),
    [(from_data, "would become a constant"), (one_row, "a part of a tensor that no mask selects")],
)
def test_what_cannot_be_recorded_is_refused_and_nothing_stays_replaced(
    glue: Glue, message: str
) -> None:
    functions = torch.stack, torch.arange, nn.Module.__call__, nn.Module.__getattr__
    with pytest.raises(CaptureError, match=message):
        captured(glue)
    assert functions == (torch.stack, torch.arange, nn.Module.__call__, nn.Module.__getattr__)
    assert TRACER.get() is None


# *** the tracer and its proxies ***


def traced(value: Any) -> tuple[Tracer, Any]:
    tracer = Tracer(nn.Module(), {})
    return tracer, tracer.placeholder("x", value)


def test_a_proxy_looks_like_its_value() -> None:
    tracer, x = traced(torch.randn(2, 3))
    assert isinstance(x, torch.Tensor)
    assert x.dtype is torch.float32
    assert has_proxy([{"x": (1, x)}]) and not has_proxy([x.dtype])
    assert isinstance(x.shape[1], ValueProxy)
    assert [node.name for node in tracer.graph.nodes] == ["x", "getattr_1", "getitem"]


def test_what_is_read_into_python_leaves_a_guard() -> None:
    tracer, x = traced(torch.tensor([3]))
    assert int(x) == 3
    assert bool(x == 4) is False
    guards = tracer.graph.find_nodes(op="call_function", target=check_guard)
    assert [guard.args[1] for guard in guards] == [3, False]
    with pytest.raises(GuardError):
        check_guard(4, 3)


def test_a_table_that_is_read_into_python_leaves_guards() -> None:
    tracer, x = traced(torch.tensor([[1, 4, 8]]))
    assert x.tolist() == [[1, 4, 8]]
    guards = tracer.graph.find_nodes(op="call_function", target=check_guard)
    assert [guard.args[1] for guard in guards] == [1, 4, 8]
    with pytest.raises(CaptureError, match="reads a tensor of shape .100,. into Python"):
        traced(torch.zeros(100))[1].tolist()


def test_a_module_around_blocks_is_no_leaf() -> None:
    tracer = Tracer(_Model(same), BLOCKS)
    leaves = {path: tracer.is_leaf_module(tracer.root, path) for path in ("", "blocks", "head")}
    assert leaves == {"": False, "blocks": False, "head": True}


def test_features_are_written_into_a_copy() -> None:
    x = torch.zeros(1, 2, 3)
    key = (slice(None), slice(None), 1)
    assert with_features(x, key, 5.0).tolist() == [[[0, 5, 0], [0, 5, 0]]]
    assert not x.any()


def test_the_first_output_alone() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), None

    pair, x = Pair(3, 3), torch.randn(2, 3)
    view = first_of(pair)
    assert torch.equal(view(x), pair(x)[0])
    assert view.weight is pair.weight
