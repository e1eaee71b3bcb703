"""One file of weights for all graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deos_fx.exporters.manifest import WEIGHTS

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["write_weights"]

# Smaller constants stay in the graph; the others start on a page, so that they can be mapped.
_EXTERNAL_BYTES, _ALIGNMENT = 1024, 4096


def write_weights(programs: Sequence[onnx_ir.Model], folder: Path) -> None:
    """Write every large constant once, for both graphs; the graphs then refer to the file.

    Constants are equal if their bytes are: the exporter folds transposes into new constants, so
    names and identities say nothing.
    """
    import onnx_ir

    places: dict[bytes, int] = {}
    with open(folder / WEIGHTS, "wb") as file:
        for value in (v for program in programs for v in program.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _EXTERNAL_BYTES:
                continue
            data = tensor.tobytes()
            key = hashlib.sha256(data).digest()
            if key not in places:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                places[key] = file.tell()
                file.write(data)
            value.const_value = onnx_ir.ExternalTensor(
                WEIGHTS,
                places[key],
                len(data),
                tensor.dtype,
                shape=onnx_ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=folder,
            )
