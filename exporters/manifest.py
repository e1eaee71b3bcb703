"""The files of an export and the version of their format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "IMAGES", "MANIFEST", "PACKAGES", "VERSION", "WEIGHTS", "read_manifest"]

FORMAT, VERSION, MANIFEST = "onnx", 3, "deos_fx.json"

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
        ValueError: If it is damaged or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: it is not a folder that deos_fx.export_onnx wrote"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); export the model again") from error
    if not isinstance(manifest, dict) or manifest.get("deos_fx") != FORMAT:
        raise ValueError(f'{path} does not say "deos_fx": "{FORMAT}"; export the model again')
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {manifest.get('version')!r} and this release reads version "
            f"{VERSION}. Export the model again, or use the release that wrote it."
        )
    return manifest
