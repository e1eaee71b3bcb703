"""Decomposed node by node, a program gives the graph that torch.onnx makes of it by itself."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.export import Dim
from torch.onnx._internal.exporter import _fx_passes

from deos_fx.exporters.graphs.decompose import quick_decompositions
from deos_fx.exporters.graphs.exportable import Exportable


def _casts(x: Tensor) -> Tensor:
    mask = (x > 0) & (x < 1) | (x < -1)
    return x.to(torch.float32) + mask.to(torch.int64).float() + torch.eye(12)[0]


def _views(x: Tensor) -> Tensor:
    rows = x.reshape(x.shape[0], 3, 4).movedim(0, 2).movedim((0, 1), (1, 0))
    return rows.flatten(0, 1).contiguous().reshape(12, x.shape[0]).expand_as(rows.flatten(0, 1))


def _several(x: Tensor) -> tuple[Tensor, ...]:
    first, _, last = x.tensor_split(3, dim=1)
    return first + last, *x.split([5, 7], dim=1)


def _nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.detach(), x.reshape(x.shape[0], 12) + 1


def _loops(x: Tensor) -> tuple[Tensor, ...]:
    """Choose the largest value of each row three times, as a greedy selector does."""

    def step(left: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        chosen = left.argmax(dim=-1, keepdim=True)
        cell = nn.functional.one_hot(chosen, 12).to(torch.float32).flatten(1)
        return left - 9 * cell, (chosen + number).unflatten(0, (-1, 1))

    numbers = torch.arange(3)
    return scan(step, x + 1, numbers)


def _branches(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def _writes(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 0
    return y.reshape(-1)


def _inverse(x: Tensor) -> Tensor:
    return torch.erfinv(x)


PURE: dict[str, Callable[[Tensor], Any]] = {
    "casts": _casts,
    "views": _views,
    "several results": _several,
    "nothing": _nothing,
    "loops": _loops,
}
OTHERS: dict[str, Callable[[Tensor], Any]] = {"branches": _branches, "writes": _writes}


class _Module(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _traced_whole(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that gets a program each time that torch.onnx traces one."""
    traced = []
    by_itself = _fx_passes.decompose_with_registry

    def spy(program: Any, registry: Any) -> Any:
        traced.append(program)
        return by_itself(program, registry)

    monkeypatch.setattr(_fx_passes, "decompose_with_registry", spy)
    return traced


def _program(function: Callable[[Tensor], Any]) -> Any:
    x = torch.randn(2, 12)
    return torch.export.export(_Module(function), (x,), dynamic_shapes={"x": {0: Dim("rows")}})


def _exported(function: Callable[[Tensor], Any]) -> Any:
    program = _program(function)
    with contextlib.redirect_stdout(io.StringIO()):
        return torch.onnx.export(program, dynamo=True).model_proto


@pytest.mark.parametrize("name", PURE | OTHERS)
def test_graphs_are_those_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = (PURE | OTHERS)[name]
    traced = _traced_whole(monkeypatch)
    expected = _exported(function)
    with quick_decompositions():
        found = _exported(function)
    # Branches, and what writes into tensors, are left to torch.onnx.
    assert len(traced) == (2 if name in OTHERS else 1)

    kinds = [Counter(node.op_type for node in model.graph.node) for model in (expected, found)]
    assert kinds[0] == kinds[1]
    x = torch.randn(5, 12)
    right = function(x)
    session = ort.InferenceSession(found.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for value, one in zip(values, right if isinstance(right, tuple) else (right,), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), one)


def test_nodes_without_a_value_are_those_of_transformers() -> None:
    kinds = []
    for keep in (True, False):
        program = _program(lambda x: x.sort(-1)[0].reshape(-1, 3, 4) + 1)
        for node in program.graph.nodes:
            if node.op == "call_function" and not keep:
                del node.meta["val"]
        with quick_decompositions(), contextlib.redirect_stdout(io.StringIO()):
            model = torch.onnx.export(program, dynamo=True).model_proto
        kinds.append(Counter(node.op_type for node in model.graph.node))
    assert kinds[0] == kinds[1] and "TopK" in kinds[0]


class _Written(nn.Module):
    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.copied = copied
        self.layer = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.layer(x)
        if self.copied:
            logits = logits.clone()
        logits[:, [3, 5, 9]] = -1.0
        return {"logits": logits}


@pytest.mark.parametrize("copied", [True, False])
def test_what_is_returned_may_have_been_written_into(copied: bool, tmp_path: Path) -> None:
    """Chameleon does that; transformers puts other nodes in the place of those that write."""
    x, module = torch.randn(2, 12), _Written(copied).eval()
    onnx_ir.save(Exportable(module, {"x": x}, {"x": {}}).export(), tmp_path / "graph.onnx")
    session = ort.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(x)["logits"])


def test_what_onnx_has_no_operator_for() -> None:
    with quick_decompositions():
        model = _exported(_inverse)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    # From the middle to both ends, where another polynomial begins.
    x = torch.linspace(-0.99999, 0.99999, 1200).reshape(100, 12)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    right = torch.erfinv(x.double()).float()
    torch.testing.assert_close(torch.from_numpy(found), right, rtol=2e-6, atol=1e-7)


def test_it_is_put_back() -> None:
    own = _fx_passes.decompose_with_registry
    with quick_decompositions():
        assert _fx_passes.decompose_with_registry is not own
    assert _fx_passes.decompose_with_registry is own
