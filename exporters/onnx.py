"""Export a reduced model to ONNX: graphs of prefill and decode with the reductions inside.

The exporter and the fusions into ONNX Runtime's own operators are transformers'
(`transformers.exporters`). This file adds graphs whose layers hold different numbers of keys,
everything a runtime has to know to continue after the prefill, explicit dynamic axes, and one file
of weights for all graphs.

Prefill. B prompts of N tokens, I images each; M_k tokens are left in token space k (from 1):

    input_ids, attention_mask, position_ids [B, N] (or [3, B, N], where the model counts images by
    time, row and column), other inputs with a number per token such as token_type_ids [B, N],
    pixel_values [B * I, C, H, W] (and other inputs, if an image comes in several resolutions),
    logits_to_keep [L] (places among those that are left, of which logits are wanted; negative ones
    count from the end)
    -> logits [B, L, vocabulary], next_position [B, 1],
       present.<layer>.key / .value [B, heads, M_k, D] (of a short convolution .conv_0 [B, d,
       kernel], what it reads of the last tokens) and, for each space k,
       origin_k [B, M_k] (which prompt positions are left), attention_mask_k [B, M_k],
       if masses bias attention key_bias_k [B, M_k]
       and under the position rule grid shift_k [B, 1] (how far later tokens move up)

    An elastic export also takes keep_k [1] for each reduction k (from 1): how many tokens it keeps
    of an image before the decoder, and of all images of a prompt in it.

Extend. t new tokens, at least one; P_k keys are in the layers of space k (no keys at all for a text
without images). The decode graph is the same for t = 1, which ONNX Runtime runs faster:

    input_ids [B, t], past_key_values.<layer>.key / .value [B, heads, P_k, D] (or .conv_0),
    position_ids [B, t] (of the unreduced text; ``position_ids_k`` where tokens have moved: minus
    the number of dropped tokens under the rule compact, minus shift_k under grid),
    attention_mask [B, P_0 + t], attention_mask_k [B, P_k + t], key_bias_k [B, P_k + t],
    logits_to_keep [L] (places among the new tokens)
    -> logits [B, L, vocabulary], present.<layer>.key / .value [B, heads, P_k + t, D]

    and, where a layer sees a window, key_positions_k [B, P_k + t] (the prompt positions origin_k,
    then those of new tokens): every layer of a space holds all keys, also one with a window.

Image encoder. An encoder that reads the sizes of images is a graph of its own, for the images of
one prompt, with the sizes that ``images.safetensors`` holds:

    pixel_values (of one prompt) -> image_features_0, image_features_1, ..., read_0, ...

The prefill takes the features of all prompts, one after the other, in place of pixel_values. The
values read_i, which the encoder read from the pixels (an all-zero image counts as absent), must
equal those in that file.

Guards. A model may branch on its inputs, and a graph has one of the branches: the prefill is right
if each of its outputs guard_0, guard_1, ... [] is what ``guards`` in ``deos_fx.json`` says.

A graph has only the inputs that it reads.
"""

from __future__ import annotations

import copy
import functools
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from deos_fx.contents import FILES, write_record
from deos_fx.exporters.check import check_export
from deos_fx.exporters.elastic import check_elastic, take_counts, traced_counts, trials
from deos_fx.exporters.fuse import fuse, of_one
from deos_fx.exporters.graphs.decode import NEW, decode_graph
from deos_fx.exporters.graphs.example import Example, example_of, pixels_of
from deos_fx.exporters.graphs.prefill import least_text, prefill_graph
from deos_fx.exporters.manifest import (
    FORMAT,
    IMAGES,
    PACKAGES,
    POLICY,
    VERSION,
    dropped_tokens,
    write_graphs,
)
from deos_fx.exporters.models import check_model, device_of
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.exporters.quantise import WEIGHTS, quantise
from deos_fx.exporters.session import cuda_devices
from deos_fx.files import fresh_folder, write_tensors
from deos_fx.passes.lower.lower_decode import decode_spaces
from deos_fx.policy.policy import Policy
from deos_fx.progress import shows_progress
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.tokens.layout import PromptLayout
from deos_fx.version import __version__

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["export_onnx"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""

# Text tokens of the traced prompt; the number does not matter, since the axis is dynamic.
_TEXT_TOKENS = 8


@shows_progress
def export_onnx(
    reduced: ReducedModel,
    dir: str | os.PathLike[str],
    example_inputs: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    weights: str | None = None,
    elastic: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write a reduced model as ONNX graphs that `deos_fx.OnnxModel` (or any runtime) can run.

    Batch size and text length are dynamic; the number of images in a prompt, their sizes and
    whether the prompt ends in one are not. The folder gets ``prefill.onnx``, ``decode.onnx`` (for
    one new token), ``extend.onnx`` (for any number), ``weights.data`` (the weights of all graphs),
    ``policy.json``, ``deos_fx.json`` (the calls that the graphs accept), and the model's own
    ``config.json`` and ``generation_config.json``; if the image encoder reads the sizes of images,
    also ``image_encoder.onnx`` and ``images.safetensors``.
    The folder is written whole or not at all; ``deos_fx.json`` has the hashes of all files.

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
        device: ``cpu`` or ``cuda``: where ONNX Runtime is to be fast. Attention, norms and rotary
            embeddings become operators that suit this device; on the other one they are slow, and
            a few do not run. Left out, it is CUDA if the model is there or in half precision.
        weights: ``int8`` or ``int4``: what matrices of weights are rounded to, by ONNX Runtime's
            own quantiser (see `deos_fx.exporters.quantise`); activations keep the dtype of the
            model. Left out, weights stay as they are. Answers change, least with ``int8``.
        elastic: Whether the counts of the reductions are inputs: one folder then serves many
            budgets, chosen by `OnnxModel.keeping`. Reductions have to pick by ``top_k``, and the
            images of a prompt to have one size.
        verify: Whether to compare the logits with those of the reduced model before the folder
            appears, in ONNX Runtime on the device; without a GPU, graphs for CUDA are compared
            on the CPU before they are fused. With `weights`, the graphs are compared before and
            after these are rounded, which takes the disk space of both.
        progress: Called with a stage, how much of it is done, and how much there is; by default, a
            bar on a terminal, and the logger ``deos_fx`` elsewhere.

    Returns:
        The folder.

    Raises:
        TypeError: If `reduced` is not a `ReducedModel`.
        ValueError: If the example has no image, or prompts that cannot share a graph, the model
            needs an example, its attention implementation cannot be exported, a layer keeps a
            recurrent state, the device or the type of weights is none of these,
            counts cannot be inputs, or the logits of ONNX Runtime and PyTorch differ (compared for
            models in float32 and float16).
        OSError: If the folder cannot be written; this is checked before the work starts.
    """
    if not isinstance(reduced, ReducedModel):
        raise TypeError(
            f"reduced is a {type(reduced).__name__}; give what deos_fx.transform(model) returns "
            "(with policy=deos_fx.Policy() for a model without reductions)"
        )
    # Cheap checks first.
    check_model(reduced.model)
    device = device_of(reduced.model, device)
    if weights is not None and weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; give {' or '.join(map(repr, WEIGHTS))} or None")
    tell = progress or (lambda stage, done, total: None)
    least = least_text(reduced.policy)
    with torch.no_grad():
        example = example_of(reduced.model, example_inputs, least + _TEXT_TOKENS)
    if elastic:
        check_elastic(reduced.policy, example.layout.sizes)
    # The folder appears under its name only after the check.
    with (
        fresh_folder(dir, FILES, whole=True) as folder,
        # Beside the folder, which is recorded as a whole.
        tempfile.TemporaryDirectory(dir=folder.parent) as aside,
    ):
        export = _Export.of(reduced, example, least, device, elastic, tell)
        if verify and not export.runs_here:
            # Case: operators for CUDA, and no GPU. The graphs in standard operators, of which these
            # are made, run on the CPU.
            export.write(Path(aside), "cpu")
            export.check(Path(aside), "cpu")
        export.fuse()
        if weights is not None:
            if verify and export.runs_here:
                # Rounding would hide what is wrong with the graphs.
                export.write(Path(aside), device)
                export.check(Path(aside), device)
            export = export.quantised(weights)
        export.write(folder, device)
        if verify and export.runs_here:
            export.check(folder, device)
    return Path(dir)


@dataclass(frozen=True)
class _Export:
    """The graphs of an export, and what else its folder gets.

    Attributes:
        reduced: The reduced model.
        example: What the graphs were traced with.
        device: Where they are to be fast.
        programs: Name -> graph.
        constants: What ``images.safetensors`` gets; empty if there is no such file.
        guards: What the outputs ``guard_i`` of the prefill have to be.
        elastic: Whether the counts of the reductions are inputs.
        tell: Called with the progress.
        weights: What their weights are rounded to; None if they are as in the model.
    """

    reduced: ReducedModel
    example: Example
    device: str
    programs: dict[str, onnx_ir.Model]
    constants: dict[str, Tensor]
    guards: tuple[bool | float, ...]
    elastic: bool
    tell: Progress
    weights: str | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        reduced: ReducedModel,
        example: Example,
        least: int,
        device: str,
        elastic: bool,
        tell: Progress,
    ) -> _Export:
        """Lower and trace every graph."""
        tell("trace", 0, 1)
        extend = decode_graph(reduced, example)
        counts = traced_counts(reduced.policy, example.layout.sizes) if elastic else ()
        prefill = prefill_graph(reduced, example, least, counts)
        graphs = {"prefill": prefill.graph, "extend": extend}
        if prefill.encoder is not None:
            graphs["image_encoder"] = prefill.encoder
        # Each is exported on its own; equal weights are found afterwards.
        programs = {}
        for done, (name, graph) in enumerate(graphs.items(), start=1):
            programs[name] = graph.export()
            tell("trace", done, len(graphs))
        if elastic:
            take_counts(programs["prefill"])
        programs["decode"] = of_one(programs["extend"], NEW)
        constants, guards = prefill.constants, prefill.guards
        return cls(reduced, example, device, programs, constants, guards, elastic, tell)

    @property
    def runs_here(self) -> bool:
        """Return whether operators for the device run on this machine."""
        return self.device == "cpu" or cuda_devices() > 0

    def fuse(self) -> None:
        """Fuse the graphs for the device."""
        self.tell("fuse", 0, 1)
        fuse(self.programs, self.device)
        self.tell("fuse", 1, 1)

    def quantised(self, weights: str) -> _Export:
        """Round the weights, and return the same export with a note of it."""
        self.tell("quantise", 0, 1)
        quantise(self.programs, weights)
        self.tell("quantise", 1, 1)
        return replace(self, weights=weights)

    def check(self, folder: Path, device: str) -> None:
        """Compare what was written with the reduced model, on a device."""
        reduced, example = self.reduced, self.example
        load = functools.cache(lambda: OnnxModel.from_pretrained(folder, device))
        runs: list[tuple[ReducedModel, Callable[[], OnnxModel]]] = [(reduced, load)]
        if self.elastic:
            # Case: counts are inputs, so the same graphs are compared with several policies.
            runs = [
                (ReducedModel(reduced.model, policy), partial(_of_policy, load, policy, example))
                for policy in trials(reduced.policy, example.layout.sizes)
            ]
        for done, (right, run) in enumerate(runs):
            self.tell("check", done, len(runs))
            check_export(right, example, "ONNX Runtime", torch.device(device), run, self.weights)
        self.tell("check", len(runs), len(runs))

    def write(self, folder: Path, device: str) -> None:
        """Write all files, for a device."""
        reduced, model = self.reduced, self.reduced.model
        self.tell("write", 0, 1)
        write_graphs(self.programs, folder)
        if "image_encoder" in self.programs:
            write_tensors(folder / IMAGES, self.constants)
        reduced.policy.save(folder / POLICY)
        # A loaded folder finds the model's class in ``architectures``.
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        write_record(folder, self._manifest(device))
        self.tell("write", 1, 1)

    def _manifest(self, device: str) -> dict[str, Any]:
        """Return what a runtime has to know of the graphs, and the versions that made them."""
        reduced, example = self.reduced, self.example
        layout, pixels = example.layout, example.images["pixel_values"]
        positions = example.inputs["position_ids"]
        # How many visual tokens each layer gets: a runtime subtracts what was dropped from
        # positions.
        spaces = decode_spaces(reduced.policy)
        dropped = dropped_tokens(reduced.policy, layout.sizes, reduced.signature.decoder_layers)
        return {
            "deos_fx": FORMAT,
            "version": VERSION,
            "packages": {"deos_fx": __version__, **{name: version(name) for name in PACKAGES}},
            "opset": self.programs["prefill"].opset_imports[""],
            "model": asdict(reduced.signature),
            "device": device,
            "dtype": str(pixels.dtype).removeprefix("torch."),
            # What matrices were rounded to; null if nothing was.
            "weights": self.weights,
            "graphs": list(self.programs),
            # What a call may have, though a graph may not read all of it.
            "inputs": list(example.given),
            "image_token": layout.image_token,
            "images": layout.images,
            "image_tokens": example.placeholders,
            "ends_in_image": _ends(reduced, layout),
            "pixels": list(pixels.shape),
            # An image may be taken in several resolutions.
            "further_pixels": {
                name: list(value.shape)
                for name, value in pixels_of(example.images).items()
                if name != "pixel_values"
            },
            # The graphs have the branches of the model that belong to these values.
            "guards": list(self.guards),
            # Of a position: time, row and column; 0 where a position is one number.
            "coordinates": len(positions) if positions.ndim == 3 else 0,
            "elastic": list(layout.sizes) if self.elastic else None,
            "spaces": [
                {**asdict(space), "dropped": gone}
                for space, gone in zip(spaces, dropped, strict=True)
            ],
        }


def _of_policy(load: Callable[[], OnnxModel], policy: Policy, example: Example) -> OnnxModel:
    """Load an elastic export, with the counts of a policy."""
    return load().keeping(*policy.counts(example.layout.sizes[0]))


def _ends(reduced: ReducedModel, layout: PromptLayout) -> bool | None:
    """Return whether prompts have to end in an image; None if the graphs accept both.

    The graphs differ because the last visual token of a prompt that ends in an image must not be
    dropped. They are the same without reductions, and where image rows end in separators: the last
    token of an image is then a separator, which is never dropped.
    """
    return None if reduced.policy.is_empty or layout.separators else layout.ends
