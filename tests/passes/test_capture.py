"""Captures of a model of a few lines: what is recorded, guarded and refused."""

from __future__ import annotations

import operator
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
from deos_fx.passes.capture.handed_on import HandedOn
from deos_fx.passes.capture.leaves import check_guard, first_of
from deos_fx.passes.capture.proxy import ValueProxy, has_proxy, with_features
from deos_fx.passes.capture.replacements import TRACER
from deos_fx.passes.capture.tracer import Tracer
from deos_fx.passes.graph import blocks_of
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
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
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


def doubled_rows(hidden: Tensor, ids: Tensor) -> Tensor:
    hidden[ids == 9] = (hidden * 2)[ids == 9]
    return hidden


def rows_of_another_type(hidden: Tensor, ids: Tensor) -> Tensor:
    hidden[ids == 9, :] = hidden.double().sum()
    return hidden


def flagged_places(hidden: Tensor, ids: Tensor) -> Tensor:
    flags, other = torch.zeros_like(ids), ids.clone()
    flags[0, 1:3] = 2
    other[ids == 9] = 4
    return hidden * flags[..., None] + other[..., None]


def each_row(hidden: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([row * 2 for row in hidden])


@pytest.mark.parametrize(
    "glue",
    [replaced_rows, shifted_features, doubled_rows, rows_of_another_type, flagged_places],
)
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


def with_places(hidden: Tensor, ids: Tensor) -> Tensor:
    rows, length = ids.shape
    places = torch.arange(length)[:, None] + torch.full((rows, 1, 1), 3.0)
    return hidden * torch.ones(rows, length, 1) + places + torch.zeros(length, WIDTH)


def with_constants(hidden: Tensor, ids: Tensor) -> Tensor:
    made = torch.arange(WIDTH) + torch.ones(WIDTH) + torch.full((WIDTH,), 2.0) + torch.zeros(WIDTH)
    return hidden + made + torch.eye(WIDTH)[0] + torch.linspace(0, 1, WIDTH)


@pytest.mark.parametrize("glue", [with_places, with_constants])
def test_tensors_that_are_made_of_sizes_follow_them(glue: Glue) -> None:
    model, graph_module = captured(glue)
    assert torch.equal(graph_module(OTHER)["logits"], model(OTHER).logits)


TWO = torch.tensor(2.0, dtype=torch.float64)


def test_a_number_is_a_constant_of_the_graph() -> None:
    model, graph_module = captured(lambda hidden, ids: hidden * TWO)
    (node,) = (node for node in graph_module.graph.nodes if node.args == (2.0,))
    assert node.kwargs == {"dtype": torch.float64, "device": torch.device("cpu")}
    assert torch.equal(graph_module(OTHER)["logits"], model(OTHER).logits)


def test_leaves_of_one_name_are_told_apart() -> None:
    model = _Model(lambda hidden, ids: model.more.other(model.more.embed(hidden))).eval()
    model.more = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("embed", "other")})
    graph_module = capture(model, {"input_ids": IDS}, BLOCKS)
    calls = [node.name for node in graph_module.graph.find_nodes(op="call_module")]
    assert calls == ["embed", "more_embed", "other", "decoder_0", "decoder_1", "head"]
    assert torch.equal(graph_module(OTHER)["logits"], model(OTHER).logits)


class Several(nn.Linear):
    """A block that hands on something else, too."""

    def __init__(self, more: Any) -> None:
        super().__init__(WIDTH, WIDTH)
        self.more = more

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.more(x)


class Alone(nn.Linear):
    """A block that hands on hidden states in a tuple."""

    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


def test_outputs_that_are_none_leave_hidden_states_alone() -> None:
    model = _Model(same).eval()
    model.blocks = nn.ModuleList([Several(lambda x: None), Alone(WIDTH, WIDTH)])
    graph_module = capture(model, {"input_ids": IDS}, BLOCKS)
    nodes = blocks_of(graph_module.graph, "decoder").values()
    assert all(note_of(node).keeps_shape for node in nodes)
    assert torch.equal(graph_module(OTHER)["logits"], model(OTHER).logits)
    model.blocks[0] = Several(lambda x: [x])
    with pytest.raises(CaptureError, match="decoder_0 hands more to the next layers than hidden"):
        capture(model, {"input_ids": IDS}, BLOCKS)


class Link(nn.Linear):
    """A block that hands on something else, too, and may read what it is given of it."""

    def __init__(self, reads: bool) -> None:
        super().__init__(WIDTH, WIDTH)
        self.reads = reads

    def forward(self, x: Tensor, handed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(x + handed if self.reads and handed is not None else x), x.abs()


class _Chain(_Model):
    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        hidden, handed = self.embed(input_ids), None
        for block in self.blocks:
            hidden, handed = block(hidden, handed=handed)
            handed = self.glue(handed, input_ids)
        return CausalLMOutput(logits=self.head(hidden))


@pytest.mark.parametrize("reads", [False, True])
def test_what_blocks_hand_on_goes_beside_hidden_states(reads: bool) -> None:
    model = _Chain(same).eval()
    model.blocks = nn.ModuleList(Link(reads) for _ in range(2))
    graph_module = capture(model, {"input_ids": IDS}, BLOCKS)
    for ids in (IDS, OTHER):
        assert torch.equal(graph_module(ids)["logits"], model(ids).logits)
    (beside,) = graph_module.graph.find_nodes(op="call_function", target=HandedOn)
    assert note_of(beside).shared == ({tuple(BLOCKS.values())} if reads else set())
    computing: list[Glue] = [lambda x, ids: x + 1, lambda x, ids: x.sum(), lambda x, ids: x[0]]
    for glue in [*computing, lambda x, ids: torch.relu(x), lambda x, ids: [x]]:
        model.glue = glue
        with pytest.raises(CaptureError, match="hands more to the next layers than hidden states"):
            capture(model, {"input_ids": IDS}, BLOCKS)


def longer(hidden: Tensor, ids: Tensor) -> Tensor:
    return hidden * 2 if ids.shape[1] > 5 else hidden


def if_present(hidden: Tensor, ids: Tensor) -> Tensor:
    return hidden * 2 if (ids == 4).any() else hidden


def by_rows(hidden: Tensor, ids: Tensor) -> Tensor:
    return hidden * 2 if len(ids) > 1 else hidden


@pytest.mark.parametrize("glue", [longer, if_present, by_rows])
def test_branches_are_guarded(glue: Glue) -> None:
    model, graph_module = captured(glue)
    fitting = IDS.flip(1)
    assert torch.equal(graph_module(fitting)["logits"], model(fitting).logits)
    with pytest.raises(GuardError, match="captured for (False|1), called with .*(True|2)"):
        graph_module(OTHER)


def from_data(hidden: Tensor, ids: Tensor) -> Tensor:
    return hidden + torch.tensor([1.0, 2.0, 3.0, 4.0])


def one_row(hidden: Tensor, ids: Tensor) -> Tensor:
    hidden[0] = 1.0
    return hidden


def counted_by_data(hidden: Tensor, ids: Tensor) -> Tensor:
    flags = torch.zeros_like(ids)
    flags[0, 1:3] = ids[0, :2]
    return hidden + flags[..., None]


def counted_where_data_says(hidden: Tensor, ids: Tensor) -> Tensor:
    flags = torch.zeros_like(ids)
    flags[0, ids[0, 0]] = 1
    return hidden + flags[..., None]


def noted(hidden: Tensor, ids: Tensor) -> Tensor:
    hidden.mark = ids  # type: ignore[attr-defined]
    return hidden


NO_MASK = "a part of a tensor that no mask selects"


@pytest.mark.parametrize(
    ("glue", "message"),
    [
        (from_data, "would become a constant"),
        (one_row, NO_MASK),
        (counted_by_data, NO_MASK),
        (counted_where_data_says, NO_MASK),
        (noted, "sets mark of a Tensor, which a graph cannot follow"),
    ],
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
    # A tensor is a key by itself, a number by its value.
    assert {x: 1}[x] == 1 and x.shape[1] in {3}


def test_what_is_read_into_python_leaves_a_guard() -> None:
    tracer, x = traced(torch.tensor([3]))
    assert int(x) == 3
    assert bool(x == 4) is False
    assert repr(float(x)) == "3.0" and list(range(5))[x] == 3
    guards = tracer.graph.find_nodes(op="call_function", target=check_guard)
    assert [guard.args[1] for guard in guards] == [3, False, 3.0, 3]
    assert not tracer.graph.find_nodes(op="call_function", target=operator.truth)
    assert bool(x.shape) and len(tracer.graph.find_nodes(op="call_function", target=operator.truth))
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
