"""Write one file of weights for all graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deos_fx.exporters.manifest import WEIGHTS

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["write_weights"]

# Smaller constants stay in the graph. The others start at a multiple of the page size, so that a
# runtime can map them into memory.
_EXTERNAL_BYTES, _ALIGNMENT = 1024, 4096


def write_weights(programs: Sequence[onnx_ir.Model], folder: Path) -> None:
    """Write every large constant of all graphs once, and let the graphs refer to the file.

    Two constants are the same if their bytes are equal. Names and object identities do not tell:
    the exporter folds transposes into new constants.

    Args:
        programs: The graphs. Changed in place.
        folder: The folder to write the file to.
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
                # Zeros up to the next page.
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
