"""The weights of an export in memory: one copy for the graphs of all sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deos_fx.exporters.manifest import WEIGHTS

__all__ = ["SharedWeights", "ort_value"]

# Names of ONNX's types -> torch's. Constants of other types are left to each session.
_DTYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FLOAT": torch.float32,
    "DOUBLE": torch.float64,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
}


class SharedWeights:
    """The file of weights as values of ONNX Runtime, which sessions use in place.

    On the CPU the file is mapped into memory, so that the system may drop pages and read them
    again. On CUDA each weight is copied to the device once.

    Args:
        folder: The folder of the export.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / WEIGHTS
        size = path.stat().st_size
        self._file = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        # Place in the file, type, shape and device -> value.
        self._values: dict[tuple[int, int, tuple[int, ...], torch.device], Any] = {}

    def of(self, graph: Path, device: torch.device) -> dict[str, Any]:
        """Return the constants of a graph that are in the file.

        Args:
            graph: The ``.onnx`` file.
            device: The device of the session.

        Returns:
            Name -> OrtValue.
        """
        import onnx

        found = {}
        for constant in onnx.load(graph, load_external_data=False).graph.initializer:
            kind = onnx.TensorProto.DataType.Name(constant.data_type)
            place = {entry.key: entry.value for entry in constant.external_data}
            if place and kind in _DTYPES:
                start, shape = int(place["offset"]), tuple(constant.dims)
                key = (start, constant.data_type, shape, device)
                if key not in self._values:
                    part = self._file[start : start + int(place["length"])]
                    tensor = part.view(_DTYPES[kind]).view(shape)
                    self._values[key] = _value(tensor, constant.data_type, device)
                found[constant.name] = self._values[key]
        return found


def _value(tensor: Tensor, kind: int, device: torch.device) -> Any:
    """Return a tensor as a value on a device, which on the CPU is the tensor itself."""
    import onnxruntime

    if device.type == "cpu":
        return ort_value(tensor)
    value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
        tensor.shape, kind, device.type, device.index or 0
    )
    # numpy has no bfloat16; only the bytes count.
    value.update_inplace(
        (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    )
    return value


def ort_value(tensor: Tensor) -> Any:
    """Return a tensor's memory as an OrtValue, copied only if it is not contiguous."""
    import onnxruntime

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bool:
        # Case: ONNX Runtime 1.31 does not know how torch writes flags in DLPack.
        return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
    return onnxruntime.OrtValue.from_dlpack(tensor)
