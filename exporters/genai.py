"""Export a model that is reduced before the decoder for onnxruntime-genai, which runs it as it is.

The engine runs three graphs, see `deos_fx.exporters.graphs.parts`. It keeps the cache and counts
positions itself, one token after the other, so it takes policies

- without reductions in the decoder, since all layers are to hold the same tokens,
- with the position rule ``compact``, since positions are those of the shortened prompt,
- without a bias for masses, for which it has no place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deos_fx.contents import FILES, write_record
from deos_fx.exporters.fuse import fuse, of_one
from deos_fx.exporters.genai_check import check_genai
from deos_fx.exporters.genai_files import CONFIG, FORMAT, VERSION, genai_config
from deos_fx.exporters.graphs.example import Example, example_of
from deos_fx.exporters.graphs.parts import Parts, part_graphs
from deos_fx.exporters.graphs.prefill import least_text
from deos_fx.exporters.manifest import IMAGES, PACKAGES, POLICY, write_graphs
from deos_fx.exporters.models import check_model, device_of
from deos_fx.exporters.session import cuda_devices
from deos_fx.files import fresh_folder, write_tensors, write_text
from deos_fx.models.facts import facts_of
from deos_fx.passes.lower.lower_decode import decode_spaces
from deos_fx.policy.policy import Policy
from deos_fx.policy.site import split_site
from deos_fx.progress import Progress, shows_progress
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.tokens.cache import ReducedCache
from deos_fx.version import __version__

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["export_genai"]

# Text tokens of the traced prompt; the number does not matter.
_TEXT_TOKENS = 8

_INSTEAD = "Use deos_fx.export_onnx (on the command line, leave --genai out)."


@shows_progress
def export_genai(
    reduced: ReducedModel,
    dir: str | os.PathLike[str],
    example_inputs: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write a model that is reduced before the decoder as a folder that onnxruntime-genai loads.

    `deos_fx.exporters.genai_inputs.genai_inputs` makes the inputs of its `Generator`. The length of
    the text is dynamic; a call has one prompt, and the number of its images and their sizes are
    those of the example. The folder gets ``genai_config.json``, ``vision.onnx``,
    ``embedding.onnx``, ``decoder.onnx``, ``weights.data``, ``policy.json``, ``deos_fx.json``, the
    model's ``config.json`` and ``generation_config.json``, and if the image encoder reads the sizes
    of images, ``images.safetensors``. It is written whole or not at all.

    Args:
        reduced: The reduced model. Its reductions have ``position="compact"`` and ``mass_bias=0``.
        dir: The folder; it is made if it does not exist.
        example_inputs: A call of the model that ends in text. It sets the number of images in a
            prompt and their sizes. Left out, a prompt has one image and text after it.
        device: ``cpu`` or ``cuda``: where the engine is to run. Left out, it is CUDA if the model
            is there or in half precision.
        verify: Whether to compare the logits with those of the reduced model, in ONNX Runtime,
            before the folder appears; graphs for CUDA are compared only where there is a GPU.
        progress: Called with a stage, how much of it is done, and how much there is; by default, a
            bar on a terminal, and the logger ``deos_fx`` elsewhere.

    Returns:
        The folder.

    Raises:
        TypeError: If `reduced` is not a `ReducedModel`.
        ValueError: If the engine cannot run the policy or the model, the example has no image or
            ends in one, or the logits of ONNX Runtime and PyTorch differ.
        OSError: If the folder cannot be written; this is checked before the work starts.
    """
    if not isinstance(reduced, ReducedModel):
        raise TypeError(
            f"reduced is a {type(reduced).__name__}; give what deos_fx.transform(model) returns"
        )
    _check_policy(reduced.policy)
    check_model(reduced.model)
    if facts_of(reduced.model).in_front:
        raise ValueError(
            f"{type(reduced.model).__name__} puts images in front of the text itself, and the "
            f"engine writes them over placeholders in the prompt. {_INSTEAD}"
        )
    if ReducedCache(reduced.model.config.get_text_config()).has_states:
        raise ValueError(
            f"{type(reduced.model).__name__} has layers that keep the state of a convolution, and "
            f"the engine hands on keys and values alone. {_INSTEAD}"
        )
    device = device_of(reduced.model, device)
    tell = progress or (lambda stage, done, total: None)
    with torch.no_grad():
        example = example_of(
            reduced.model, example_inputs, least_text(reduced.policy) + _TEXT_TOKENS
        )
    if example.layout.ends:
        raise ValueError(
            "example_inputs ends in an image, and an engine goes on from text. Give a prompt with "
            "text after its images."
        )
    with fresh_folder(dir, FILES, whole=True) as folder:
        parts, programs = _traced(reduced, example, tell)
        tell("fuse", 0, 1)
        # The engine's own processors make one prompt, and attention over one row can be fused.
        programs["decoder"] = of_one(programs["decoder"], "batch")
        fuse(programs, device)
        tell("fuse", 1, 1)
        tell("write", 0, 1)
        _write(reduced, example, parts, programs, folder, device)
        tell("write", 1, 1)
        if verify and (device == "cpu" or cuda_devices() > 0):
            tell("check", 0, 1)
            check_genai(reduced, example, folder, device)
            tell("check", 1, 1)
    return Path(dir)


def _check_policy(policy: Policy) -> None:
    """Refuse a policy after which layers differ in their tokens, or need more than their order."""
    inside = [one.site for one in policy.reductions if split_site(one.site)[0] == "decoder"]
    if inside:
        raise ValueError(
            f"The policy reduces at {', '.join(inside)}, but onnxruntime-genai gives all layers of "
            f"the decoder the same tokens. Reduce before the decoder. Or: {_INSTEAD}"
        )
    for space in decode_spaces(policy):
        if space.position != "compact" or space.biased:
            wrong = "a mass_bias" if space.biased else f"the position rule {space.position!r}"
            raise ValueError(
                f"The policy has {wrong}, but onnxruntime-genai counts the tokens of the shortened "
                'prompt and weighs them alike. Give its reductions position="compact" and '
                f"mass_bias=0, and measure their answers again. Or: {_INSTEAD}"
            )


@torch.no_grad()
def _traced(
    reduced: ReducedModel, example: Example, tell: Progress
) -> tuple[Parts, dict[str, onnx_ir.Model]]:
    """Lower and trace every graph."""
    tell("trace", 0, 1)
    try:
        parts = part_graphs(reduced, example)
    except ValueError as error:
        raise ValueError(f"onnxruntime-genai cannot run this model: {error}. {_INSTEAD}") from error
    programs = {}
    for done, (name, graph) in enumerate(parts.graphs.items(), start=1):
        programs[name] = graph.export()
        tell("trace", done, len(parts.graphs))
    return parts, programs


def _write(
    reduced: ReducedModel,
    example: Example,
    parts: Parts,
    programs: Mapping[str, onnx_ir.Model],
    folder: Path,
    device: str,
) -> None:
    """Write all files."""
    model, images = reduced.model, example.images
    write_graphs(programs, folder)
    sizes = {name: value.cpu().clone() for name, value in images.items() if name != "pixel_values"}
    if sizes:
        write_tensors(folder / IMAGES, sizes)
    reduced.policy.save(folder / POLICY)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = genai_config(model, parts, device)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    manifest = {
        "deos_fx": FORMAT,
        "version": VERSION,
        "packages": {"deos_fx": __version__, **{name: version(name) for name in PACKAGES}},
        "image_token": facts_of(model).image_token,
        "pixels": list(images["pixel_values"].shape),
        "images": [{"placeholders": given, "left": left} for given, left in parts.images],
    }
    write_record(folder, manifest)
