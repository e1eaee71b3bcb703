"""ONNX Runtime sessions."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deos_fx.errors import DeviceError
from deos_fx.exporters.graphs.in_place import BUFFER
from deos_fx.exporters.shared import SharedWeights, ort_value
from deos_fx.words import counted

__all__ = [
    "HOST",
    "Session",
    "as_tensor",
    "cuda_devices",
    "open",
    "past_name",
]

HOST = torch.device("cpu")
"""Where inputs come from and results go to."""

# ONNX Runtime's names of input types -> torch dtypes.
_DTYPES = {
    "tensor(bool)": torch.bool,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
}


class Session:
    """One graph in ONNX Runtime. Keys and values stay on its device, other outputs go to the CPU.

    Args:
        session: The `onnxruntime.InferenceSession`.
        device: The device that it runs on.
        weights: Values that the session uses in place, and does not own.

    Attributes:
        inputs: Names of the graph's inputs -> dtype.
        outputs: Names of the graph's outputs.
        buffers: Names of keys and values that the graph writes into in place, if the present is the
            memory of the past; that may be longer than what it holds.
    """

    def __init__(self, session: Any, device: torch.device, weights: Mapping[str, Any]) -> None:
        self.session = session
        self.device = device
        self._weights = weights
        self.inputs = {spec.name: _DTYPES[spec.type] for spec in session.get_inputs()}
        self.outputs = [spec.name for spec in session.get_outputs()]
        # Only the kernels of the CPU have been tried.
        self.buffers = frozenset(
            spec.name
            for spec in session.get_inputs()
            if device == HOST and any(str(axis).startswith(BUFFER) for axis in spec.shape)
        )

    def empty_states(self, rows: int) -> dict[str, Any]:
        """Return keys and values of no tokens, for a graph that continues a text.

        Args:
            rows: Rows of the batch.

        Returns:
            ``past_key_values.<layer>.key`` and ``.value`` -> OrtValue on the CPU; the state of a
            convolution, ``.conv_0``, is that behind zeros.
        """
        shapes = {spec.name: spec.shape for spec in self.session.get_inputs()}
        return {
            name: ort_value(torch.zeros(rows, *_none_of(shape), dtype=self.inputs[name]))
            for name, shape in shapes.items()
            if name.startswith("past_key_values.")
        }

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run the graph.

        Args:
            values: Tensors on the CPU, of any precision, or OrtValues; those the graph does not
                read are ignored. Buffers have room for a new token.

        Returns:
            OrtValues by name.
        """
        # A binding says where each output goes, so that keys and values need not leave the device.
        binding = self.session.io_binding()
        for name, dtype in self.inputs.items():
            # A tensor is an input on the CPU, in any precision. An OrtValue is the state of an
            # earlier run, already in place.
            value = values[name]
            binding.bind_ortvalue_input(
                name, ort_value(value.to(dtype)) if isinstance(value, Tensor) else value
            )
        for name in self.outputs:
            past = past_name(name)
            if past in self.buffers:
                binding.bind_ortvalue_output(name, values[past])
                continue
            # Keys and values stay; logits and positions are read on the CPU.
            device = self.device if past else HOST
            binding.bind_output(name, device.type, device.index or 0)
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))


def past_name(output: str) -> str:
    """Return under which name the next run takes an output; empty if it takes none."""
    state = output.removeprefix("present.")
    return "" if state == output else f"past_key_values.{state}"


def _none_of(shape: Sequence[int | str]) -> list[int]:
    """Return the axes behind the batch of a state that has seen no token."""
    return [axis if isinstance(axis, int) else 0 for axis in shape[1:]]


def as_tensor(value: Any) -> Tensor:
    """Return an OrtValue's memory as a tensor, without a copy."""
    return torch.from_dlpack(value)


def open(
    path: Path, device: str | torch.device | None, shared: SharedWeights | None = None
) -> Session:
    """Open a graph on a device.

    ONNX Runtime falls back to the CPU silently, so this checks that the session has the device.

    Args:
        path: The ``.onnx`` file.
        device: ``cpu``, ``cuda`` or ``cuda:<i>``; None for CUDA if it works here, else the CPU.
        shared: Weights that the session shares with others. Left out, it has its own, which on the
            CPU are rearranged for the fastest products.

    Returns:
        The session.

    Raises:
        ValueError: If the device is none of these, or ONNX Runtime cannot load the graph.
        DeviceError: If CUDA is asked for and cannot be used.
    """
    import onnxruntime

    # 1. CUDA is tried if it is asked for, or if no device is given and it is there.
    wanted = None if device is None else _device(device)
    cuda = wanted or torch.device("cuda", 0)
    # How many CUDA devices there are; False if this ONNX Runtime is not built for CUDA.
    found = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and cuda_devices()
    # The CPU stays in the list for operators that CUDA lacks.
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda.type == "cuda" and (cuda.index or 0) < found:
        onnxruntime.preload_dlls()
        # torch, too, multiplies in less than float32 only if it is told to.
        tf32 = int(torch.backends.cuda.matmul.allow_tf32)
        settings = {"device_id": cuda.index or 0, "use_tf32": tf32}
        providers.insert(0, ("CUDAExecutionProvider", settings))
    # 2. Open the graph, with as many threads as torch has.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    weights = {}
    if shared is not None:
        place = cuda if len(providers) > 1 else HOST
        weights = shared.of(path, place)
        for name, value in weights.items():
            options.add_initializer(name, value)
        if place == HOST:
            # What is rearranged is a copy.
            options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:
        hint = ""
        if "NOT_IMPLEMENTED" in str(error):
            # Case: an operator that this device lacks in the dtype of the graph.
            hint = ". If the model is in bfloat16, export it in float32 or float16"
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be run here: {reason}{hint}") from error
    unknown = {spec.type for spec in session.get_inputs()} - _DTYPES.keys()
    if unknown:
        raise ValueError(f"{path} takes {min(unknown)}, as no export does; export the model again")
    # 3. A session that has fallen back to the CPU does not list CUDA first.
    works = session.get_providers()[0] == "CUDAExecutionProvider"
    if wanted is not None and wanted.type == "cuda" and not works:
        raise DeviceError(
            f"device={str(device)!r}, but ONNX Runtime cannot use it: it finds "
            f"{counted(found or 0, 'CUDA device')} here and its providers are "
            f"{', '.join(onnxruntime.get_available_providers())}. Leave device out to run on the "
            "CPU, or install onnxruntime-gpu with the CUDA and cuDNN libraries it needs."
        )
    return Session(session, cuda if works else HOST, weights)


def _device(device: str | torch.device) -> torch.device:
    """Parse a device, and refuse all but the CPU and CUDA."""
    try:
        parsed = torch.device(device)
    except RuntimeError:
        # Case: not the name of a device. It is refused below like any other kind.
        parsed = torch.device("meta")
    if parsed.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; give 'cpu', 'cuda', 'cuda:<i>' or None")
    return parsed


def cuda_devices() -> int:
    """Count the CUDA devices of this machine.

    The driver is asked, because torch may be built without CUDA. Opening a session to see whether
    it works would print errors of ONNX Runtime on every machine without a GPU.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    # Both return 0 if they succeed.
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value
