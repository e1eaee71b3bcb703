"""Export a reduced model to ONNX: a prefill and a decode graph with the reductions inside.

The exporter is transformers' own (`transformers.exporters`). This file adds two graphs whose layers
hold different numbers of keys, everything a runtime has to know to continue after the prefill,
explicit dynamic axes, and one file of weights for all graphs.

Prefill. B prompts of N tokens, I images each; M_k tokens are left in token space k (from 1):

    input_ids, attention_mask, position_ids [B, N] (or [3, B, N], where the model counts images by
    time, row and column), other inputs with a number per token such as token_type_ids [B, N],
    pixel_values [B * I, C, H, W]
    -> logits [B, M, vocabulary] at every position that is left, next_position [B, 1],
       present.<layer>.key / .value [B, heads, M_k, D] and, for each space k,
       origin_k [B, M_k] (which prompt positions are left), attention_mask_k [B, M_k],
       if masses bias attention key_bias_k [B, M_k]
       and under the position rule grid shift_k [B, 1] (how far later tokens move up)

Decode. One new token; P_k keys are in the layers of space k:

    input_ids [B, 1], past_key_values.<layer>.key / .value [B, heads, P_k, D],
    position_ids [B, 1] (of the unreduced text; ``position_ids_k`` where tokens have moved: minus
    the number of dropped tokens under the rule compact, minus shift_k under grid),
    attention_mask [B, P_0 + 1], attention_mask_k [B, P_k + 1], key_bias_k [B, P_k + 1]
    -> logits [B, 1, vocabulary], present.<layer>.key / .value [B, heads, P_k + 1, D]

    and, where a layer sees a window, key_positions_k [B, P_k + 1] (the prompt positions origin_k,
    then those of new tokens): every layer of a space holds all keys, also one with a window.

Image encoder. An encoder that reads the sizes of images is a graph of its own, for the images of
one prompt, with the sizes that ``images.safetensors`` holds:

    pixel_values (of one prompt) -> image_features_0, image_features_1, ..., read_0, ...

The prefill takes the features of all prompts, one after the other, in place of pixel_values. The
values read_i, which the encoder read from the pixels (an all-zero image counts as absent), must
equal those in that file.

A graph has only the inputs that it reads.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from deos_fx.exporters.check import check_export
from deos_fx.exporters.graphs.decode import decode_graph
from deos_fx.exporters.graphs.example import Example, example_of
from deos_fx.exporters.graphs.prefill import least_text, prefill_graph
from deos_fx.exporters.manifest import FORMAT, IMAGES, MANIFEST, PACKAGES, VERSION, write_weights
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.files import fresh_folder
from deos_fx.passes.lower.lower_decode import decode_spaces
from deos_fx.policy.counts import tokens_per_layer
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.tokens.layout import PromptLayout
from deos_fx.version import __version__

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["export_onnx"]

# Attention implementations with an ONNX form.
ATTENTION = ("sdpa", "eager")

# Text tokens of the traced prompt; the number does not matter, since the axis is dynamic.
_TEXT_TOKENS = 8


def export_onnx(
    reduced: ReducedModel,
    dir: str | os.PathLike[str],
    example_inputs: Mapping[str, Any] | None = None,
) -> Path:
    """Write a reduced model as ONNX graphs that `deos_fx.OnnxModel` (or any runtime) can run.

    Batch size and text length are dynamic; the number of images in a prompt, their sizes and
    whether the prompt ends in one are not. The folder gets ``prefill.onnx``, ``decode.onnx``,
    ``weights.data`` (the weights of all graphs), ``policy.json``, ``deos_fx.json`` (the calls that
    the graphs accept), and the model's own ``config.json`` and ``generation_config.json``; if the
    image encoder reads the sizes of images, also ``image_encoder.onnx`` and ``images.safetensors``.
    The folder is written whole or not at all.

    Where visual tokens have exactly equal scores, ONNX Runtime may keep others than PyTorch: both
    leave the order of equal scores open. That happens where the tokens themselves are equal
    (Chameleon's are entries of a codebook). It also happens where a layer with a window is asked
    how much the last token attends to tokens outside the window: reduce after a layer that sees
    everything instead.

    Args:
        reduced: The reduced model, exported in the dtype it has. ONNX Runtime runs float32 and
            float16 on any device, but bfloat16 not on the CPU.
        dir: The folder; it is made if it does not exist.
        example_inputs: A call of the model. It sets the number of images in a prompt, their sizes,
            whether a prompt ends in one, and the inputs of a call. Left out, a prompt has one image
            and text after it; models that take images of many sizes or kinds of tokens need an
            example.

    Returns:
        The folder.

    Raises:
        TypeError: If `reduced` is not a `ReducedModel`.
        ValueError: If the example has no image, or prompts that cannot share a graph, the model
            needs an example, its attention implementation cannot be exported, or the logits of
            ONNX Runtime and PyTorch differ (compared for models in float32 and float16).
        OSError: If the folder cannot be written; this is checked before the work starts.
    """
    if not isinstance(reduced, ReducedModel):
        raise TypeError(
            f"reduced is a {type(reduced).__name__}; give what deos_fx.transform(model) returns "
            "(with policy=deos_fx.Policy() for a model without reductions)"
        )
    # Cheap checks first.
    _check_attention(reduced.model)
    least = least_text(reduced.policy)
    with torch.no_grad():
        example = example_of(reduced.model, example_inputs, least + _TEXT_TOKENS)
    # The folder appears under its name only after the check.
    with fresh_folder(dir) as folder:
        _write(reduced, example, least, folder)
        check_export(
            reduced, example, "ONNX Runtime", lambda: OnnxModel.from_pretrained(folder, "cpu")
        )
    return Path(dir)


def _check_attention(model: PreTrainedModel) -> None:
    """Refuse attention implementations that have no ONNX form."""
    for name in model.config.sub_configs:
        # The config of a part that the model does not have is None.
        implementation = getattr(getattr(model.config, name), "_attn_implementation", None)
        if implementation not in (None, *ATTENTION):
            raise ValueError(
                f"the model's attention implementation is {implementation!r}, which "
                f"has no ONNX form; load the model with attn_implementation={ATTENTION[0]!r}"
            )


def _write(reduced: ReducedModel, example: Example, least: int, folder: Path) -> None:
    """Export every graph and write all files of the folder."""
    import onnx_ir

    model = reduced.model
    with torch.no_grad():
        decode = decode_graph(reduced, example)
        prefill = prefill_graph(reduced, example, least)
        graphs = {"prefill": prefill.graph, "decode": decode}
        if prefill.encoder is not None:
            graphs["image_encoder"] = prefill.encoder
        # Each is exported on its own; equal weights are found afterwards.
        programs = {name: graph.export() for name, graph in graphs.items()}
    # Weights before graphs, which refer to the file.
    write_weights(list(programs.values()), folder)
    for name, program in programs.items():
        onnx_ir.save(program, folder / f"{name}.onnx")
    if prefill.encoder is not None:
        save_file(prefill.constants, folder / IMAGES)
    reduced.policy.save(folder / "policy.json")
    # A loaded folder finds the model's class in ``architectures``.
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    manifest = _manifest(reduced, example, list(programs), programs["prefill"])
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _manifest(
    reduced: ReducedModel, example: Example, graphs: list[str], program: onnx_ir.Model
) -> dict[str, Any]:
    """Return what a runtime has to know of the graphs, and the versions that made them."""
    layout, pixels = example.layout, example.images["pixel_values"]
    positions = example.inputs["position_ids"]
    # A reduction after the last layer leaves a space without layers.
    layers = reduced.signature.decoder_layers + 1
    # How many visual tokens each layer gets: a runtime subtracts what was dropped from positions.
    left = tokens_per_layer(reduced.policy, layout.sizes, layers)
    return {
        "deos_fx": FORMAT,
        "version": VERSION,
        "packages": {"deos_fx": __version__, **{name: version(name) for name in PACKAGES}},
        "opset": program.opset_imports[""],
        "model": asdict(reduced.signature),
        "dtype": str(pixels.dtype).removeprefix("torch."),
        "graphs": graphs,
        # What a call may have, though a graph may not read all of it.
        "inputs": list(example.given),
        "image_token": layout.image_token,
        "images": layout.images,
        "image_tokens": example.placeholders,
        "ends_in_image": _ends(reduced, layout),
        "pixels": list(pixels.shape),
        # Of a position: time, row and column; 0 where a position is one number.
        "coordinates": len(positions) if positions.ndim == 3 else 0,
        "spaces": [
            {
                **asdict(space),
                "dropped": sum(layout.sizes) - left[space.first_layer],
            }
            for space in decode_spaces(reduced.policy)
        ],
    }


def _ends(reduced: ReducedModel, layout: PromptLayout) -> bool | None:
    """Return whether prompts have to end in an image; None if the graphs accept both.

    The graphs differ because the last visual token of a prompt that ends in an image must not be
    dropped. They are the same without reductions, and where image rows end in separators: the last
    token of an image is then a separator, which is never dropped.
    """
    return None if reduced.policy.is_empty or layout.separators else layout.ends
