"""Graphs in ONNX Runtime, and the cache that keeps their results, on graphs built by hand."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import torch
from tiny import shared_llava

from deos_fx.errors import DeviceError
from deos_fx.exporters import session as session_module
from deos_fx.exporters.session import Session, as_tensor, cuda_devices, open
from deos_fx.exporters.session_cache import SessionCache
from deos_fx.exporters.shared import ort_value

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
        outputs = session({**cache.states_for(session), "new": new, "other": None})
        assert as_tensor(outputs["size"]).item() == new.numel()
        cache.take_states(outputs, 10 * step, session)
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
    with pytest.raises(DeviceError, match=message):
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


@pytest.mark.parametrize("kind", ["BOOL", "INT32", "INT64", "FLOAT", "DOUBLE", "FLOAT16"])
def test_inputs_have_the_types_of_the_graph(tmp_path: Path, kind: str) -> None:
    of = onnx_ir.DataType[kind]
    x = onnx_ir.val("x", of, [2])
    node = onnx_ir.node("Identity", [x])
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    graph = onnx_ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18}, name="g")
    onnx_ir.save(onnx_ir.Model(graph, ir_version=10), tmp_path / "a.onnx")
    session = open(tmp_path / "a.onnx", "cpu")
    assert torch.empty(0, dtype=session.inputs["x"]).numpy().dtype == of.numpy()
    assert session.session.get_inputs()[0].name == "x"


def test_memory_is_shared_and_not_copied() -> None:
    tensor = torch.randn(2, 3, requires_grad=True)
    value = ort_value(tensor)
    assert value.data_ptr() == tensor.data_ptr() == as_tensor(value).data_ptr()
    flags = torch.tensor([True, False])
    assert ort_value(flags).data_ptr() == flags.data_ptr()
    assert ort_value(flags).data_type() == "tensor(bool)"


# *** CUDA, where there is none: what is asked of ONNX Runtime ***

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
DISABLED = "session.disable_prepacking"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with two CUDA devices, which may not work; how the last session was opened."""
    seen = SimpleNamespace(works=True)

    class Stand:
        def __init__(self, path: Path, options: Any, providers: list[Any]) -> None:
            seen.path, seen.options, seen.providers = path, options, providers

        def get_providers(self) -> list[str]:
            return [CUDA, CPU] if seen.works and len(seen.providers) > 1 else [CPU]

        def get_inputs(self) -> list[Any]:
            return []

        get_outputs = get_inputs

    monkeypatch.setattr(onnxruntime, "InferenceSession", Stand)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: setattr(seen, "libraries", True))
    monkeypatch.setattr(session_module, "cuda_devices", lambda: 2)
    return seen


@pytest.mark.parametrize(
    ("device", "index", "used"),
    [(None, 0, "cuda:0"), ("cuda", 0, "cuda"), ("cuda:1", 1, "cuda:1"), ("cpu", None, "cpu")],
)
def test_cuda_is_used_where_it_is_wanted(
    opened: SimpleNamespace, path: Path, device: str | None, index: int | None, used: str
) -> None:
    assert open(path, device).device == torch.device(used)
    first = [] if index is None else [(CUDA, {"device_id": index, "use_tf32": 0})]
    assert (opened.path, opened.providers) == (path, [*first, CPU])
    # The libraries of CUDA are loaded only for it.
    assert hasattr(opened, "libraries") == bool(first)


def test_products_are_rounded_only_where_torch_rounds_them(
    opened: SimpleNamespace, path: Path
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        open(path, None)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert opened.providers[0][1]["use_tf32"] == 1


@pytest.mark.parametrize(("device", "works"), [("cuda:2", True), ("cuda", False)])
def test_cuda_that_is_not_there_is_an_error(
    opened: SimpleNamespace, path: Path, device: str, works: bool
) -> None:
    opened.works = works
    with pytest.raises(RuntimeError, match=f"'{device}'.*: it finds 2 CUDA devices .* {CUDA}, CPU"):
        open(path, device)
    assert open(path, None).device.type == ("cuda" if works else "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_weights_are_shared_on_the_device(opened: SimpleNamespace, path: Path, device: str) -> None:
    shared = SimpleNamespace(of=lambda *given: setattr(shared, "given", given) or {"w": value})
    value = ort_value(torch.ones(3))
    # They are not owned by the session, so they have to live as long.
    assert open(path, device, shared)._weights == {"w": value}
    assert shared.given == (path, torch.device(device))
    # Only the CPU would rearrange a copy of them.
    if device == "cpu":
        assert opened.options.get_session_config_entry(DISABLED) == "1"
    else:
        with pytest.raises(RuntimeError):
            opened.options.get_session_config_entry(DISABLED)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_states_stay_on_the_device_and_other_results_do_not(device: str) -> None:
    bound: list[tuple[Any, ...]] = []
    binding = SimpleNamespace(
        bind_output=lambda *given: bound.append(given),
        synchronize_outputs=lambda: bound.append(("synchronized",)),
        get_outputs=lambda: ["states", "logits"],
    )
    outputs = [SimpleNamespace(name=name) for name in ("present.0.key", "logits")]
    stand = SimpleNamespace(
        get_inputs=lambda: [],
        get_outputs=lambda: outputs,
        io_binding=lambda: binding,
        run_with_iobinding=lambda given: bound.append((given,)),
    )
    found = Session(stand, torch.device(device), {})({})
    assert found == {"present.0.key": "states", "logits": "logits"}
    place = ("cuda", 1) if device == "cuda:1" else ("cpu", 0)
    assert bound[:2] == [("present.0.key", *place), ("logits", "cpu", 0)]
    # Results may only be read when they are there.
    assert bound[2:] == [(binding,), ("synchronized",)]


@pytest.mark.parametrize(
    ("init", "count", "platform", "library", "found"),
    [
        (0, 0, "linux", "libcuda.so.1", 3),
        (0, 0, "win32", "nvcuda.dll", 3),
        (100, 0, "linux", "libcuda.so.1", 0),
        (0, 100, "linux", "libcuda.so.1", 0),
        (0, 0, "linux", None, 0),
    ],
)
def test_devices_are_counted_by_the_driver(
    init: int,
    count: int,
    platform: str,
    library: str | None,
    found: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def counted(place: Any) -> int:
        place._obj.value = 3
        return count

    def load(name: str) -> Any:
        if library is None:
            raise OSError("no such library")
        assert name == library
        return SimpleNamespace(cuInit={0: init}.__getitem__, cuDeviceGetCount=counted)

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(sys, "platform", platform)
    assert cuda_devices() == found
