"""Graphs in ONNX Runtime, and the cache that keeps their results, on graphs built by hand."""

from __future__ import annotations

from pathlib import Path

import onnx_ir
import onnxruntime
import pytest
import torch
from tiny import shared_llava

from deos_fx.exporters import session as session_module
from deos_fx.exporters.session import SessionCache, as_tensor, open, ort_value

STATE = "past_key_values.0.key"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A graph that puts new keys behind those of the past, and returns their number of axes."""
    kind, number = (onnx_ir.TensorType(onnx_ir.DataType[x]) for x in ("FLOAT16", "INT64"))
    axes: list[object] = ["rows", 2, "past", 4]
    past = onnx_ir.Value(name=STATE, type=kind, shape=onnx_ir.Shape(axes))
    new = onnx_ir.Value(name="new", type=kind, shape=onnx_ir.Shape(["rows", 2, "new", 4]))
    joined = onnx_ir.node("Concat", [past, new], {"axis": 2})
    nodes = [joined, onnx_ir.node("Size", [new])]
    for node, name, of in zip(nodes, ("present.0.key", "size"), (kind, number), strict=True):
        node.outputs[0].name, node.outputs[0].type = name, of
    nodes[0].outputs[0].shape, nodes[1].outputs[0].shape = past.shape, onnx_ir.Shape([])
    outputs = [node.outputs[0] for node in nodes]
    graph = onnx_ir.Graph([past, new], outputs, nodes=nodes, opset_imports={"": 18}, name="g")
    onnx_ir.save(onnx_ir.Model(graph, ir_version=10), tmp_path / "decode.onnx")
    return tmp_path / "decode.onnx"


def test_a_session_goes_on_from_its_states(path: Path) -> None:
    session = open(path, "cpu")
    assert session.inputs == {STATE: torch.float16, "new": torch.float16}
    assert session.outputs == ["present.0.key", "size"]
    assert session.device == torch.device("cpu")
    cache = SessionCache(shared_llava(2).config.get_text_config())
    assert (cache.rows, cache.get_seq_length()) == (0, 0)
    cache.begin(session.empty_states(3))
    assert as_tensor(cache.states[STATE]).shape == (3, 2, 0, 4)
    # Inputs of any precision, and not contiguous; others are left alone.
    new = torch.randn(3, 2, 4, 5, dtype=torch.float64).mT
    for step in (1, 2):
        outputs = session({**cache.states, "new": new, "other": None})
        assert as_tensor(outputs["size"]).item() == new.numel()
        cache.take_states(outputs, 10 * step)
        assert cache.states.keys() == {STATE}
        assert (cache.rows, cache.get_seq_length(), cache.get_seq_length(1)) == (
            3,
            *[10 * step] * 2,
        )
    expected = torch.cat([new, new], dim=2).half()
    assert torch.equal(as_tensor(cache.states[STATE]), expected)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(as_tensor(cache.states[STATE]), expected[[2, 0, 0]])
    with pytest.raises(ValueError, match="Tokens cannot be taken back from an exported model's"):
        cache.crop(1)
    assert cache.why_no_images(3).startswith("an exported model reads images only in its prefill")


def test_a_session_has_as_many_threads_as_torch(path: Path) -> None:
    options = open(path, None).session.get_session_options()
    assert options.intra_op_num_threads == torch.get_num_threads()


@pytest.mark.parametrize("device", ["tpu", "meta", "no device", "cpu:x"])
def test_devices_that_there_are_not(path: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device is '{device}'; give 'cpu', 'cuda', 'cuda:<i>'"):
        open(path, device)


def test_cuda_that_does_not_work_is_an_error_where_it_was_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "cuda_devices", lambda: 0)
    message = r"device='cuda:1', but ONNX Runtime cannot use it: it finds 0 CUDA devices here"
    with pytest.raises(RuntimeError, match=message):
        open(path, "cuda:1")
    assert open(path, None).device == torch.device("cpu")


def test_a_graph_that_cannot_be_run_says_what_may_help(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("NOT_IMPLEMENTED:\nCould not find an implementation")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ValueError, match=f"^{path} cannot be run here: NOT_.*: Could .* float32"):
        open(path, "cpu")


def test_memory_is_shared_and_not_copied() -> None:
    tensor = torch.randn(2, 3, requires_grad=True)
    value = ort_value(tensor)
    assert value.data_ptr() == tensor.data_ptr() == as_tensor(value).data_ptr()
