"""Small constants of a model are kept by the exporter's optimiser."""

from __future__ import annotations

from typing import Any

import onnx_ir
import onnxruntime
import pytest
import torch
from onnxscript.rewriter.rules.common import _no_op
from torch import Tensor, nn
from torch.export import Dim

from deos_fx.exporters.fuse import fuse
from deos_fx.exporters.graphs.exportable import Exportable


class _Norm(nn.Module):
    """A norm that is defined where everything is 0, and a factor that is nearly 1."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8)
        return {"y": 1.000005 * x * root, "same": (x + 0.0) * 1.0}


def test_small_constants_are_kept(tmp_path: Any) -> None:
    x = torch.stack([torch.zeros(4), torch.arange(4.0)])
    program = Exportable(_Norm(), {"x": x}, {"x": {0: Dim("batch")}}).export()
    for value in (*program.graph.inputs, *program.graph.outputs):
        assert value.shape is not None and [*map(str, value.shape)] == ["batch", "4"]
    fuse({"norm": program}, "cpu")
    onnx_ir.save(program, tmp_path / "norm.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "norm.onnx", providers=["CPUExecutionProvider"]
    )
    given, expected = {"x": x.numpy()}, _Norm()(x)
    found = dict(zip(["y", "same"], session.run(["y", "same"], given), strict=True))
    # A factor of 1 would be 5e-6 off.
    assert found["y"] == pytest.approx(expected["y"].numpy(), rel=1e-6)
    assert found["same"] == pytest.approx(x.numpy())
    # The optimiser is as before for everybody else.
    patterns = (rule._target_pattern._nodes for rule in _no_op.rules.rules)
    inputs = [given for nodes in patterns for node in nodes for given in node.inputs]
    assert any(getattr(given, "_abs_tol", 0.0) > 0 for given in inputs)
