"""The files of an export: names and version of the format, the manifest, and the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deos_fx.reading import read_record

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "FORMAT",
    "IMAGES",
    "MANIFEST",
    "PACKAGES",
    "VERSION",
    "WEIGHTS",
    "read_manifest",
    "write_weights",
]


# *** the manifest ***

# What a manifest says of itself, and its name.
FORMAT, VERSION, MANIFEST = "onnx", 4, "deos_fx.json"

# The weights of all graphs; the values of images that the image encoder was exported for.
WEIGHTS, IMAGES = "weights.data", "images.safetensors"

# Packages whose versions the manifest records.
PACKAGES = ("torch", "transformers", "onnx", "onnxscript")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of an export.

    Args:
        folder: The folder of the export.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: If the folder has no manifest.
        ValueError: If it does not fit its schema.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: it is not a folder that deos_fx.export_onnx wrote"
        )
    from deos_fx.exporters.schema import ManifestFile

    cure = "Export the model again, or use the release that wrote it."
    return read_record(path, ManifestFile, "the manifest of an export", cure).model_dump()


# *** the weights ***

# Smaller constants stay in the graph. The others start at a multiple of the page size, so that a
# runtime can map them into memory.
_EXTERNAL_BYTES, _ALIGNMENT = 1024, 4096


def write_weights(programs: Sequence[onnx_ir.Model], folder: Path) -> None:
    """Write every large constant of all graphs once, and let the graphs refer to the file.

    Two constants are the same if their bytes are equal. Neither names nor object identities tell
    this, since the exporter folds transposes into new constants.

    Args:
        programs: The graphs. Changed in place.
        folder: The folder to write the file to.
    """
    import onnx_ir

    # Hash of the bytes -> where they are in the file.
    places: dict[bytes, int] = {}
    with open(folder / WEIGHTS, "wb") as file:
        for value in (v for program in programs for v in program.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _EXTERNAL_BYTES:
                continue
            data = tensor.tobytes()
            key = hashlib.sha256(data).digest()
            if key not in places:
                # Fill up with zeros to the next page.
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
