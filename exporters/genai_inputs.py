"""Make the inputs of onnxruntime-genai from those of the model.

The engine's own processors write prompts of the families that they are for, and count placeholders
by rules of these (256 for ``gemma3``, by the size of an image for ``phi3v``, ``mistral3`` and
Qwen-VL). So prompts are made by the model's own processor, and here they lose as many placeholders
as visual tokens are dropped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deos_fx.contents import GENAI_FILES, RECORD, record_of, verify
from deos_fx.exporters.manifest import AGAIN, IMAGES
from deos_fx.reading import as_record, read_tensors
from deos_fx.words import counted

if TYPE_CHECKING:
    import numpy

__all__ = ["genai_inputs"]


def genai_inputs(
    dir: str | os.PathLike[str], inputs: Mapping[str, Any]
) -> dict[str, numpy.ndarray[Any, Any]]:
    """Turn the inputs of a model's call into those of an engine that runs its export.

    Each value goes into an `onnxruntime_genai.NamedTensors` under its name, which goes to
    `Generator.set_inputs`.

    Args:
        dir: A folder that `deos_fx.export_genai` wrote.
        inputs: A call of the model as its processor makes it, of one prompt.

    Returns:
        ``input_ids`` int32 [1, M] with a placeholder for each visual token that is left,
        ``pixel_values`` in float32, and ``num_image_tokens`` int64 [1], how many are left.

    Raises:
        FileNotFoundError: If the folder holds no such export.
        ValueError: If the folder is damaged, or the prompt is not like those it was exported for.
    """
    folder = Path(dir)
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(
            f"{folder} has no {RECORD}: it is not a folder that deos_fx.export_genai wrote"
        )
    from deos_fx.exporters.schema import GenaiFile

    record = record_of(folder)
    cure = "Export the model again, or use the release that wrote it."
    manifest = as_record(
        folder / RECORD, record, GenaiFile, "the manifest of an export for onnxruntime-genai", cure
    )
    verify(folder, record, GENAI_FILES)
    ids, pixels, mask = (inputs.get(n) for n in ("input_ids", "pixel_values", "attention_mask"))
    if ids is None or len(ids) != 1 or (mask is not None and not bool(mask.all())):
        raise ValueError("onnxruntime-genai takes one prompt without padding: give them one by one")
    visual = ids[0] == manifest.image_token
    places = visual.nonzero()[:, 0]
    counts = [image.placeholders for image in manifest.images]
    shape = None if pixels is None else list(pixels.shape)
    if len(places) != sum(counts) or pixels is None or shape != manifest.pixels:
        raise ValueError(
            f"The prompt has {counted(len(places), 'image placeholder')} and pixel_values {shape}, "
            f"but this model was exported for {sum(counts)} and {manifest.pixels}. "
            f"{AGAIN}"
        )
    if (folder / IMAGES).is_file():
        _check_sizes(read_tensors(folder / IMAGES), inputs)
    # All placeholders are equal, so the first ones of an image can stand for those that are left.
    stays = ~visual
    for image, own in zip(manifest.images, places.split(counts), strict=True):
        stays[own[: image.left]] = True
    left = ids[:, stays].to(torch.int32)
    total = sum(image.left for image in manifest.images)
    return {
        "input_ids": left.numpy(),
        "pixel_values": pixels.float().numpy(),
        "num_image_tokens": torch.tensor([total]).numpy(),
    }


def _check_sizes(sizes: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> None:
    """Refuse images of other sizes than those that the vision graph was exported for."""
    for name, value in sizes.items():
        given = inputs.get(name)
        if given is None or not torch.equal(given.to(value.dtype), value):
            raise ValueError(
                f"{name} is not that of the images this model was exported for. {AGAIN}"
            )
