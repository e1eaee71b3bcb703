"""Export a reduced model to ONNX: a prefill and a decode graph with the reductions inside.

The exporter is transformers' own (`transformers.exporters`). What is added here: two graphs whose
layers hold different numbers of keys, everything a runtime has to know to continue after the
prefill, explicit dynamic axes, and one file of weights for both graphs.

Prefill. B prompts of N tokens, I images each; M_k tokens are left in token space k (from 1):

    input_ids, attention_mask, position_ids [B, N], pixel_values [B * I, C, H, W]
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

A graph has only those of the inputs that it reads.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from transformers import PreTrainedModel

from deos_fx import __version__
from deos_fx.cache import ReducedCache
from deos_fx.files import fresh_folder
from deos_fx.inputs import complete_inputs, prompt_layout
from deos_fx.passes.layout import PromptLayout, first_layer
from deos_fx.passes.lower_decode import DecodeSpace, decode_spaces
from deos_fx.passes.pipeline import capture_call, lower_call
from deos_fx.passes.replace_placeholder_merge import replace_placeholder_merge
from deos_fx.policy import Policy
from deos_fx.reduced_model import ReducedModel
from deos_fx.signature import check_verified, signature_of
from deos_fx.tokens import take

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["FORMAT", "MANIFEST", "VERSION", "export_onnx"]

FORMAT, VERSION, MANIFEST = "onnx", 2, "deos_fx.json"
WEIGHTS = "weights.data"
ATTENTION = ("sdpa", "eager")
PACKAGES = ("torch", "transformers", "onnx", "onnxscript")

# Text tokens of the prompt that is traced: any number, the axis is dynamic.
_TEXT_TOKENS = 8
# The fewest text tokens that a graph is for.
_LEAST_TEXT = 2
# Rows that are traced: torch.export takes an axis of length 1 for a constant.
_BATCH = 2
# Smaller constants stay in the graph; the others start on a page, so that they can be mapped.
_EXTERNAL_BYTES, _ALIGNMENT = 1024, 4096


def export_onnx(
    reduced: ReducedModel,
    dir: str | os.PathLike[str],
    example_inputs: Mapping[str, Any] | None = None,
) -> Path:
    """Write a reduced model as ONNX graphs that `deos_fx.OnnxModel` (or any runtime) can run.

    Batch size and text length are dynamic; the number of images in a prompt and their size are
    not. The folder gets ``prefill.onnx``, ``decode.onnx``, ``weights.data`` (the weights of both),
    ``policy.json``, ``deos_fx.json`` (what the graphs are for), and the model's own ``config.json``
    and ``generation_config.json``. It is written whole or not at all.

    Args:
        reduced: What to export, in the dtype it has. ONNX Runtime runs float32 and float16 on any
            device, bfloat16 not on the CPU.
        dir: The folder; it is made if it does not exist.
        example_inputs: A call of the model, which says how many images its prompts have. Left out,
            a prompt has one image.

    Returns:
        The folder.

    Raises:
        TypeError: If `reduced` is not a `ReducedModel`.
        ValueError: If the example has no image, or prompts that cannot share a graph, the model's
            attention implementation cannot be exported, or it is no LLaVA with images of one size.
        OSError: If the folder cannot be written; this is found out before the work starts.
    """
    if not isinstance(reduced, ReducedModel):
        raise TypeError(
            f"reduced is a {type(reduced).__name__}; give what deos_fx.transform(model) returns "
            "(with policy=deos_fx.Policy() for a model without reductions)"
        )
    check_verified(reduced.model, "Export to ONNX")
    _check_attention(reduced.model)
    images = 1
    if example_inputs is not None:
        images = prompt_layout(reduced.model, complete_inputs(reduced.model, example_inputs)).images
    with fresh_folder(dir) as folder:
        _write(reduced, images, folder)
    return Path(dir)


def _check_attention(model: PreTrainedModel) -> None:
    for config in (model.config.get_text_config(), model.config.vision_config):
        if config._attn_implementation not in ATTENTION:
            raise ValueError(
                f"the model's attention implementation is {config._attn_implementation!r}, which "
                f"has no ONNX form; load the model with attn_implementation={ATTENTION[0]!r}"
            )


def _write(reduced: ReducedModel, images: int, folder: Path) -> None:
    import onnx_ir

    model = reduced.model
    with torch.no_grad():
        least = _least_text(reduced.policy)
        example = _prefill_example(model, images, least + _TEXT_TOKENS)
        layout = prompt_layout(model, example)
        graphs = {
            "prefill": _prefill(reduced, layout, example, least),
            "decode": _decode(reduced),
        }
        programs = {name: graph.export() for name, graph in graphs.items()}
    _write_weights(list(programs.values()), folder)
    for name, program in programs.items():
        onnx_ir.save(program, folder / f"{name}.onnx")
    reduced.policy.save(folder / "policy.json")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    manifest = _manifest(reduced, layout, example["pixel_values"], programs["prefill"])
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _manifest(
    reduced: ReducedModel, layout: PromptLayout, pixels: Tensor, program: onnx_ir.Model
) -> dict[str, Any]:
    """What a runtime has to know of the graphs, and what made them."""
    per_image = layout.tokens_per_image
    # Of several reductions before the decoder, the last one counts.
    left = {
        first_layer(reduction.site): count
        for reduction, count in zip(
            reduced.policy.reductions, reduced.policy.counts(per_image), strict=True
        )
    }
    return {
        "deos_fx": FORMAT,
        "version": VERSION,
        "packages": {"deos_fx": __version__, **{name: version(name) for name in PACKAGES}},
        "opset": program.opset_imports[""],
        "model": asdict(reduced.signature),
        "dtype": str(pixels.dtype).removeprefix("torch."),
        "image_token": layout.image_token,
        "images": layout.images,
        "image_shape": list(pixels.shape[1:]),
        "spaces": [
            {
                **asdict(space),
                "dropped": layout.images * (per_image - left[space.first_layer]),
            }
            for space in decode_spaces(reduced.policy)
        ],
    }


# *** the two graphs ***


@dataclass(frozen=True)
class _Exportable:
    """A module with flat tensor inputs, an example of them, and which axes are dynamic."""

    module: nn.Module
    inputs: dict[str, Any]
    shapes: dict[str, Any]

    def export(self) -> onnx_ir.Model:
        """Run transformers' exporter."""
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        config = OnnxConfig(
            dynamic_shapes=self.shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
        # The exporter takes any module; only its annotation asks for a whole model.
        module: Any = self.module
        with _without_noise():
            program, _ = OnnxExporter().export_program(module, dict(self.inputs), config)
        _name_axes(program.graph, self.shapes)
        _forget_sources(program.graph)
        return program


class _Prefill(nn.Module):
    """The lowered prefill graph, as tensors in and tensors out."""

    def __init__(self, lowered: fx.GraphModule, reduced: ReducedModel) -> None:
        super().__init__()
        self.lowered = lowered
        self.text_config = reduced.model.config.get_text_config()
        self.dtype = reduced.model.dtype

    def forward(self, **inputs: Tensor) -> dict[str, Any]:
        cache = ReducedCache(self.text_config)
        fields = self.lowered(**inputs, past_key_values=cache)
        mask = inputs["attention_mask"]
        outputs = {
            "logits": fields["logits"],
            "next_position": inputs["position_ids"].amax(dim=1, keepdim=True) + 1,
            "present": _states(cache),
        }
        for k, space in enumerate(fields.get("spaces", ()), start=1):
            outputs[f"origin_{k}"] = space["origin"]
            outputs[f"attention_mask_{k}"] = take(mask, space["origin"])
            if "key_bias" in space:
                # Attention adds it in the model's dtype anyway.
                outputs[f"key_bias_{k}"] = space["key_bias"].to(self.dtype)
            if "shift" in space:
                outputs[f"shift_{k}"] = space["shift"]
        return outputs


class _Decode(nn.Module):
    """The lowered decode graph, as tensors in and tensors out."""

    def __init__(self, lowered: fx.GraphModule, reduced: ReducedModel) -> None:
        super().__init__()
        self.lowered = lowered
        self.text_config = reduced.model.config.get_text_config()
        placeholders = lowered.graph.find_nodes(op="placeholder")
        given = [node for node in placeholders if node.name != "past_key_values"]
        self.used = [str(node.target) for node in given if node.users]
        self.unused = [str(node.target) for node in given if not node.users]

    def forward(
        self, past_key_values: dict[str, dict[str, Tensor]], **inputs: Tensor
    ) -> dict[str, Any]:
        cache = _filled(ReducedCache(self.text_config), past_key_values)
        fields = self.lowered(**inputs, **dict.fromkeys(self.unused), past_key_values=cache)
        return {"logits": fields["logits"], "present": _states(cache)}


def _states(cache: ReducedCache) -> dict[str, dict[str, Tensor]]:
    layers: list[Any] = cache.layers
    return {
        str(layer): {"key": held.keys, "value": held.values} for layer, held in enumerate(layers)
    }


def _filled(cache: ReducedCache, states: Mapping[str, Mapping[str, Tensor]]) -> ReducedCache:
    for layer, held in states.items():
        cache.update(held["key"], held["value"], int(layer))
    return cache


def _prefill(
    reduced: ReducedModel, layout: PromptLayout, example: dict[str, Tensor], least: int
) -> _Exportable:
    inputs = complete_inputs(reduced.model, example | {"use_cache": True})
    lowered = lower_call(capture_call(reduced.model, inputs), reduced.policy, layout)
    lowered = replace_placeholder_merge(lowered)
    visual = layout.images * layout.tokens_per_image
    batch, sequence = Dim("batch"), Dim("sequence", min=visual + least)
    shapes = dict.fromkeys(example, {0: batch, 1: sequence})
    shapes["pixel_values"] = {0: batch if layout.images == 1 else layout.images * batch}
    return _Exportable(_Prefill(lowered, reduced), example, shapes)


def _least_text(policy: Policy) -> int:
    """The fewest text tokens of a prompt: a selector may need some to compare with."""
    tiers = (tier for reduction in policy.reductions for tier in reduction.selection)
    pivots = (tier.options.get("text_pivots") for tier in tiers)
    return max(
        [_LEAST_TEXT, *(int(number) for number in pivots if isinstance(number, int | float))]
    )


def _prefill_example(model: PreTrainedModel, images: int, text: int) -> dict[str, Tensor]:
    """Prompts of images and text. What they say does not matter, only how long they are."""
    config = model.config
    visual = images * signature_of(model).visual_tokens
    input_ids = _words(model, visual + text)
    input_ids[:, 1 : visual + 1] = config.image_token_id
    side = config.vision_config.image_size
    pixels = (_BATCH * images, config.vision_config.num_channels, side, side)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "position_ids": torch.arange(input_ids.shape[1]).repeat(_BATCH, 1).to(model.device),
        "pixel_values": torch.zeros(pixels, dtype=model.dtype, device=model.device),
    }


def _words(model: PreTrainedModel, length: int) -> Tensor:
    """[2, length] tokens that are no images."""
    word = next(token for token in range(2) if token != model.config.image_token_id)
    return torch.full((_BATCH, length), word, device=model.device)


def _decode(reduced: ReducedModel) -> _Exportable:
    """The graph is captured on a cache of equal lengths, which the original model can run."""
    model, spaces = reduced.model, decode_spaces(reduced.policy)
    cache = ReducedCache(model.config.get_text_config())
    model(input_ids=_words(model, 2), past_key_values=cache)
    shapes = [state["key"].shape for state in _states(cache).values()]
    inputs = {
        "input_ids": _words(model, 1),
        "attention_mask": _words(model, 3).fill_(1),
        "position_ids": _words(model, 1).fill_(2),
        "past_key_values": cache,
        "use_cache": True,
    }
    captured = capture_call(model, complete_inputs(model, inputs))
    lowered = lower_call(captured, reduced.policy, None)
    return _decode_exportable(_Decode(lowered, reduced), model, shapes, spaces)


def _decode_exportable(
    module: _Decode, model: PreTrainedModel, shapes: list[torch.Size], spaces: Sequence[DecodeSpace]
) -> _Exportable:
    """Inputs of the decode graph: the layers of each space share one number of keys."""
    batch = Dim("batch")
    # Equal lengths would be taken for one length.
    lengths = [2 * k + 3 for k in range(len(spaces) + 1)]
    pasts = [Dim("past" if k == 0 else f"past_{k}") for k in range(len(spaces) + 1)]
    inputs: dict[str, Any] = {"past_key_values": {}}
    dynamic: dict[str, Any] = {"past_key_values": {}}
    for layer, (_, heads, _, dim) in enumerate(shapes):
        k = sum(space.first_layer <= layer for space in spaces)
        state = torch.zeros(_BATCH, heads, lengths[k], dim, dtype=model.dtype, device=model.device)
        inputs["past_key_values"][str(layer)] = {"key": state, "value": state.clone()}
        axes = {0: batch, 2: pasts[k]}
        dynamic["past_key_values"][str(layer)] = {"key": axes, "value": axes}
    for name in module.used:
        kind, k = _kind_and_space(name)
        if kind in ("attention_mask", "key_bias"):
            value = _words(model, lengths[k] + 1).fill_(1)
            inputs[name] = value.to(model.dtype) if kind == "key_bias" else value
            dynamic[name] = {0: batch, 1: pasts[k] + 1}
        else:
            inputs[name] = _words(model, 1)
            dynamic[name] = {0: batch}
    return _Exportable(module, inputs, dynamic)


def _kind_and_space(name: str) -> tuple[str, int]:
    """``attention_mask_2`` -> (``attention_mask``, 2); names without a number are of space 0."""
    kind, _, number = name.rpartition("_")
    return (kind, int(number)) if number.isdigit() else (name, 0)


# *** writing ***


def _write_weights(programs: Sequence[onnx_ir.Model], folder: Path) -> None:
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


def _name_axes(graph: onnx_ir.Graph, shapes: Mapping[str, Any]) -> None:
    """Call dynamic axes what they are (``batch``), not by the exporter's symbols (``s43``)."""
    import onnx_ir

    axes = dict(_leaves(shapes))
    names = {
        str(symbol): dim.__name__
        for value in graph.inputs
        for axis, symbol in enumerate(_axes(value))
        if (dim := axes[str(value.name)].get(axis)) is not None
    }
    nodes = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*graph.inputs, *nodes):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                _renamed(axis, names) if isinstance(axis, str) else axis for axis in _axes(value)
            )


def _forget_sources(graph: onnx_ir.Graph) -> None:
    """Drop the notes on which line of Python a node comes from: larger than the graph itself."""
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _axes(value: onnx_ir.Value) -> list[int | str | None]:
    """The axes of a value: a length, an expression of symbols (``2*s43``), or None if unknown."""
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]


def _renamed(axis: str, names: Mapping[str, str]) -> str:
    """An axis with its symbols renamed."""
    return re.sub(r"[^\W\d]\w*", lambda found: names.get(found[0], found[0]), axis)


def _leaves(shapes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[int, Any]]]:
    """Dynamic axes of every input by its name in the graph (``past_key_values.0.key``)."""
    for name, axes in shapes.items():
        if all(isinstance(axis, int) for axis in axes):
            yield prefix + name, axes
        else:
            yield from _leaves(axes, f"{prefix}{name}.")


# *** quiet ***


# What the exporters say on every run, whatever is exported; anything else is shown.
_NOISE = {
    # Our dependencies are pinned to what these tests pass with.
    "transformers.exporters.utils": "OnnxExporter is experimental",
    "torch.onnx._internal.exporter._registration": (
        "Failed to infer the signature|torchvision is not installed"
    ),
}


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Hide messages that are known to mean nothing here, and the progress printed to stdout."""
    with contextlib.ExitStack() as stack:
        for name, pattern in _NOISE.items():
            logger = logging.getLogger(name)

            def is_news(record: logging.LogRecord, pattern: str = pattern) -> bool:
                return re.match(pattern, record.getMessage()) is None

            logger.addFilter(is_news)
            stack.callback(logger.removeFilter, is_news)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        # torch.onnx copies pytree specs, and copying one warns (torch 2.13).
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)
        yield
