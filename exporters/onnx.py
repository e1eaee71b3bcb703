"""Export a reduced model to ONNX: a prefill and a decode graph with the reductions inside.

The exporter is transformers' own (`transformers.exporters`). What is added here: two graphs whose
layers hold different numbers of keys, everything a runtime has to know to continue after the
prefill, explicit dynamic axes, and one file of weights for both graphs.

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

    and key_positions_k [B, P_k + 1] (the prompt positions origin_k and then those of new tokens)
    for layers that see a window: all layers of a space hold all its keys, also these.

Image encoder. Where the encoder reads sizes of images, it is a graph of its own, for the images of
one prompt, which have the sizes in ``images.safetensors``:

    pixel_values (of one prompt) -> image_features_0, image_features_1, ..., read_0, ...

The prefill takes the features of all prompts, one after the other, in place of pixel_values. What
the encoder read of the pixels (an image that is all zeros is none) has to be as in that file.

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
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from deos_fx.exporters.graphs.example import BATCH, Example, example_of, words
from deos_fx.exporters.graphs.record import record
from deos_fx.files import fresh_folder
from deos_fx.inputs.complete import complete_inputs
from deos_fx.models.layers import has_codes
from deos_fx.passes.finish import finish
from deos_fx.passes.lower.lower_decode import DecodeSpace, decode_spaces
from deos_fx.passes.pipeline import capture_call, lower_call
from deos_fx.passes.rewrite.replace_placeholder_merge import replace_placeholder_merge
from deos_fx.passes.rewrite.split_encoder import split_encoder
from deos_fx.policy.policy import Policy
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.tokens.cache import ReducedCache
from deos_fx.tokens.index import take
from deos_fx.tokens.layout import PromptLayout, first_layer
from deos_fx.version import __version__

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["export_onnx"]

FORMAT, VERSION, MANIFEST = "onnx", 3, "deos_fx.json"
WEIGHTS, IMAGES = "weights.data", "images.safetensors"

# An export differs by 1e-6 of the largest logit; a wrong one by far more than this.
_ROUNDING = 1e-3
ATTENTION = ("sdpa", "eager")
PACKAGES = ("torch", "transformers", "onnx", "onnxscript")

# Text tokens of the prompt that is traced: any number, the axis is dynamic.
_TEXT_TOKENS = 8
# The fewest text tokens that a graph is for.
_LEAST_TEXT = 2
# Smaller constants stay in the graph; the others start on a page, so that they can be mapped.
_EXTERNAL_BYTES, _ALIGNMENT = 1024, 4096


def export_onnx(
    reduced: ReducedModel,
    dir: str | os.PathLike[str],
    example_inputs: Mapping[str, Any] | None = None,
) -> Path:
    """Write a reduced model as ONNX graphs that `deos_fx.OnnxModel` (or any runtime) can run.

    Batch size and text length are dynamic; the number of images in a prompt, their sizes and
    whether the prompt ends in one are not. The folder gets ``prefill.onnx``, ``decode.onnx``,
    ``weights.data`` (the weights of all graphs), ``policy.json``, ``deos_fx.json`` (what the graphs
    are for), and the model's own ``config.json`` and ``generation_config.json``; if the image
    encoder reads the sizes of images, also ``image_encoder.onnx`` and ``images.safetensors``. It is
    written whole or not at all.

    Of visual tokens whose scores are exactly equal, ONNX Runtime may keep others than PyTorch: both
    leave open which come first. That happens where tokens are equal themselves (Chameleon's are
    entries of a codebook), and where a layer with a window is asked how much the last token attends
    to what is outside of it; reduce behind a layer that sees everything instead.

    Args:
        reduced: What to export, in the dtype it has. ONNX Runtime runs float32 and float16 on any
            device, bfloat16 not on the CPU.
        dir: The folder; it is made if it does not exist.
        example_inputs: A call of the model, which says how many images its prompts have, of which
            sizes, whether they end in one, and which inputs there are. Left out, a prompt has one
            image and text behind it; models that take images of many sizes or kinds of tokens need
            an example.

    Returns:
        The folder.

    Raises:
        TypeError: If `reduced` is not a `ReducedModel`.
        ValueError: If the example has no image, or prompts that cannot share a graph, the model
            needs an example, its attention implementation cannot be exported, or ONNX Runtime
            says otherwise than PyTorch of the example (compared in float32).
        OSError: If the folder cannot be written; this is found out before the work starts.
    """
    if not isinstance(reduced, ReducedModel):
        raise TypeError(
            f"reduced is a {type(reduced).__name__}; give what deos_fx.transform(model) returns "
            "(with policy=deos_fx.Policy() for a model without reductions)"
        )
    _check_attention(reduced.model)
    least = _least_text(reduced.policy)
    with torch.no_grad():
        example = example_of(reduced.model, example_inputs, least + _TEXT_TOKENS)
    with fresh_folder(dir) as folder:
        _write(reduced, example, least, folder)
        if reduced.model.dtype == torch.float32:
            _check_export(reduced, example, folder)
    return Path(dir)


def _check_export(reduced: ReducedModel, example: Example, folder: Path) -> None:
    """Refuse an export that does not say what the reduced model says of the example."""
    from deos_fx.exporters.onnx_model import OnnxModel

    prompts = {name: value for name, value in example.inputs.items() if name != "position_ids"}
    with torch.no_grad():
        output: Any = reduced(**prompts)
    expected = output.logits[:, -1].cpu()
    on_cpu = {name: value.cpu() for name, value in prompts.items()}
    try:
        output = OnnxModel.from_pretrained(folder, "cpu")(**on_cpu)
    except Exception as error:
        # Whatever ONNX Runtime fails with, it is this model that it cannot run.
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(
            f"ONNX Runtime does not run {type(reduced.model).__name__} ({reason}). Run the reduced "
            "model in PyTorch."
        ) from error
    worst = ((output.logits[:, -1] - expected).abs().max() / expected.abs().max()).item()
    if not worst < _ROUNDING:
        raise ValueError(
            f"{type(reduced.model).__name__} is not the same in ONNX Runtime: logits of the "
            f"example differ by {worst:.1g} of the largest. Run the reduced model in PyTorch."
        )


def _check_attention(model: PreTrainedModel) -> None:
    for name in model.config.sub_configs:
        # A part that a model goes without has none.
        implementation = getattr(getattr(model.config, name), "_attn_implementation", None)
        if implementation not in (None, *ATTENTION):
            raise ValueError(
                f"the model's attention implementation is {implementation!r}, which "
                f"has no ONNX form; load the model with attn_implementation={ATTENTION[0]!r}"
            )


def _write(reduced: ReducedModel, example: Example, least: int, folder: Path) -> None:
    import onnx_ir

    model = reduced.model
    with torch.no_grad():
        decode = _decode(reduced, example)
        prefill = _prefill(reduced, example, least)
        graphs = {"prefill": prefill.graph, "decode": decode}
        if prefill.encoder is not None:
            graphs["image_encoder"] = prefill.encoder
        programs = {name: graph.export() for name, graph in graphs.items()}
    _write_weights(list(programs.values()), folder)
    for name, program in programs.items():
        onnx_ir.save(program, folder / f"{name}.onnx")
    if prefill.encoder is not None:
        save_file(prefill.constants, folder / IMAGES)
    reduced.policy.save(folder / "policy.json")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    manifest = _manifest(reduced, example, list(programs), programs["prefill"])
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _manifest(
    reduced: ReducedModel, example: Example, graphs: list[str], program: onnx_ir.Model
) -> dict[str, Any]:
    """What a runtime has to know of the graphs, and what made them."""
    layout, pixels = example.layout, example.images["pixel_values"]
    positions = example.inputs["position_ids"]
    counts = [reduced.policy.counts(size) for size in layout.sizes]
    # Of several reductions before the decoder, the last one counts.
    left = {
        first_layer(reduction.site): sum(of_image[i] for of_image in counts)
        for i, reduction in enumerate(reduced.policy.reductions)
    }
    return {
        "deos_fx": FORMAT,
        "version": VERSION,
        "packages": {"deos_fx": __version__, **{name: version(name) for name in PACKAGES}},
        "opset": program.opset_imports[""],
        "model": asdict(reduced.signature),
        "dtype": str(pixels.dtype).removeprefix("torch."),
        "graphs": graphs,
        "inputs": list(example.given),
        "image_token": layout.image_token,
        "images": layout.images,
        "image_tokens": example.placeholders,
        "ends_in_image": _ends(reduced, layout),
        "pixels": list(pixels.shape),
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
    """Whether prompts have to end in an image, whose last token stays; None if that is the same.

    Where rows have ends, one of these is the last token of an image, and it stays anyway.
    """
    return None if reduced.policy.is_empty or layout.separators else layout.ends


# *** the graphs ***


@dataclass(frozen=True)
class _Exportable:
    """A module with flat tensor inputs, an example of them, and which axes are dynamic."""

    module: nn.Module
    inputs: dict[str, Any]
    shapes: dict[str, Any]

    def export(self) -> onnx_ir.Model:
        """Run transformers' exporter.

        Raises:
            ValueError: If something in the graph has no ONNX form.
        """
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        config = OnnxConfig(
            dynamic_shapes=self.shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
        # The exporter takes any module; only its annotation asks for a whole model.
        module: Any = self.module
        try:
            with _without_noise():
                program, _ = OnnxExporter().export_program(module, dict(self.inputs), config)
        except Exception as error:
            # Whatever the exporters fail with, it is this model that they cannot export.
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            cure = "Run the reduced model in PyTorch."
            if any(map(has_codes, module.modules())):
                cure = (
                    "The kernels of its quantised layers may have no ONNX form: load the model "
                    "without quantization_config, transform it with the same policy and export "
                    "that, or run this one in PyTorch."
                )
            raise ValueError(
                f"{type(module).__name__.strip('_')} cannot be exported to ONNX ({reason}). {cure}"
            ) from error
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
        self.used, self.unused = _inputs_of(lowered)

    def forward(self, **inputs: Tensor) -> dict[str, Any]:
        cache = ReducedCache(self.text_config)
        taken = {name: inputs[name] for name in self.used}
        fields = self.lowered(**taken, **dict.fromkeys(self.unused), past_key_values=cache)
        mask = inputs["attention_mask"]
        positions = inputs["position_ids"]
        if positions.ndim == 3:
            positions = positions.amax(dim=0)
        outputs = {
            "logits": fields["logits"],
            "next_position": positions.amax(dim=1, keepdim=True) + 1,
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
        self.used, self.unused = _inputs_of(lowered)

    def forward(
        self, past_key_values: dict[str, dict[str, Tensor]], **inputs: Tensor
    ) -> dict[str, Any]:
        cache = _filled(ReducedCache(self.text_config), past_key_values)
        fields = self.lowered(**inputs, **dict.fromkeys(self.unused), past_key_values=cache)
        return {"logits": fields["logits"], "present": _states(cache)}


class _Encoder(nn.Module):
    """The image encoder of one prompt, recorded."""

    def __init__(self, recorded: fx.GraphModule) -> None:
        super().__init__()
        self.recorded = recorded

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        parts = zip(("image_features", "read"), self.recorded(pixel_values), strict=True)
        return {f"{part}_{i}": value for part, values in parts for i, value in enumerate(values)}


def _inputs_of(lowered: fx.GraphModule) -> tuple[list[str], list[str]]:
    """Names of the inputs that a graph reads, but for the cache, and of those it does not."""
    nodes = lowered.graph.find_nodes(op="placeholder")
    given = [node for node in nodes if node.name != "past_key_values"]
    return (
        [str(node.target) for node in given if node.users],
        [str(node.target) for node in given if not node.users],
    )


def _states(cache: ReducedCache) -> dict[str, dict[str, Tensor]]:
    layers: list[Any] = cache.layers
    return {
        str(layer): {"key": held.keys, "value": held.values} for layer, held in enumerate(layers)
    }


def _filled(cache: ReducedCache, states: Mapping[str, Mapping[str, Tensor]]) -> ReducedCache:
    for layer, held in states.items():
        cache.update(held["key"], held["value"], int(layer))
    return cache


@dataclass(frozen=True)
class _Prompts:
    """The prefill.

    Attributes:
        graph: Its graph.
        encoder: That of the image encoder, if it reads the sizes of images.
        constants: These sizes, and what the encoder reads of the pixels.
    """

    graph: _Exportable
    encoder: _Exportable | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)


def _prefill(reduced: ReducedModel, example: Example, least: int) -> _Prompts:
    inputs = complete_inputs(reduced.model, example.inputs | {"use_cache": True})
    lowered = lower_call(capture_call(reduced.model, inputs), reduced.policy, example.layout)
    _keep_outputs(lowered, ("logits", "spaces"))
    values = dict(example.inputs)
    encoder, constants = None, dict[str, Tensor]()
    if lowered.graph.find_nodes(op="call_module", target="image_encoder"):
        images = {name: values[name] for name in example.images}
        encode = split_encoder(lowered, images)
        for i, features in enumerate(pytree.tree_leaves(encode(**images))):
            values[f"image_features_{i}"] = features
        encoder, constants = _encoder(encode, example.images)
    lowered = replace_placeholder_merge(lowered)
    module = _Prefill(lowered, reduced)
    batch, sequence = Dim("batch"), Dim("sequence", min=example.placeholders + least)
    # What the wrapper reads itself is an input in any case.
    names = dict.fromkeys(["input_ids", "attention_mask", "position_ids", *module.used])
    taken, shapes = {name: values[name] for name in names}, {}
    for name, value in taken.items():
        if name == "position_ids":
            shapes[name] = {value.ndim - 2: batch, value.ndim - 1: sequence}
        elif value.shape == values["input_ids"].shape:
            shapes[name] = {0: batch, 1: sequence}
        else:
            each = len(value) // BATCH
            shapes[name] = {0: batch if each == 1 else each * batch}
    return _Prompts(_Exportable(module, taken, shapes), encoder, constants)


def _encoder(
    encode: fx.GraphModule, images: Mapping[str, Tensor]
) -> tuple[_Exportable, dict[str, Tensor]]:
    """The encoder of one prompt's images, and what it is constant for."""
    pixels = images["pixel_values"]
    sizes = {name: value for name, value in images.items() if name != "pixel_values"}
    recorded = record(
        lambda pixels: pytree.tree_leaves(encode(pixel_values=pixels, **sizes)), pixels
    )
    _, reads = recorded(pixels)
    constants = sizes | {f"read_{i}": value for i, value in enumerate(reads)}
    # Of their own memory: the file does not take parts of other tensors.
    constants = {name: value.cpu().clone() for name, value in constants.items()}
    given = {"pixel_values": pixels}
    return _Exportable(_Encoder(recorded), given, {"pixel_values": {}}), constants


def _keep_outputs(graph_module: fx.GraphModule, names: tuple[str, ...]) -> None:
    output = graph_module.graph.output_node()
    fields: Any = output.args[0]
    output.args = ({name: fields[name] for name in names if name in fields},)
    finish(graph_module)


def _least_text(policy: Policy) -> int:
    """The fewest text tokens of a prompt: a selector may need some to compare with."""
    tiers = (tier for reduction in policy.reductions for tier in reduction.selection)
    pivots = (tier.options.get("text_pivots") for tier in tiers)
    return max(
        [_LEAST_TEXT, *(int(number) for number in pivots if isinstance(number, int | float))]
    )


def _decode(reduced: ReducedModel, example: Example) -> _Exportable:
    """The graph is captured on a cache of equal lengths, which the original model can run."""
    model, spaces = reduced.model, decode_spaces(reduced.policy)
    cache = ReducedCache(model.config.get_text_config())
    model(input_ids=words(model, 2), past_key_values=cache)
    if not all(isinstance(getattr(held, "keys", None), Tensor) for held in cache.layers):
        raise ValueError(
            f"{type(model).__name__} has layers that keep a state instead of keys and values, "
            "which exported graphs do not hand over. Run the reduced model in PyTorch."
        )
    shapes = [state["key"].shape for state in _states(cache).values()]
    coordinates = example.inputs["position_ids"].shape[:-2]
    positions = words(model, 1).fill_(2).expand(*coordinates, BATCH, 1)
    inputs = {
        "input_ids": words(model, 1),
        "attention_mask": words(model, 3).fill_(1),
        "position_ids": positions,
        "past_key_values": cache,
        "use_cache": True,
    }
    captured = capture_call(model, complete_inputs(model, inputs))
    lowered = lower_call(captured, reduced.policy, None)
    return _decode_exportable(_Decode(lowered, reduced), model, shapes, spaces, positions)


def _decode_exportable(
    module: _Decode,
    model: PreTrainedModel,
    shapes: list[torch.Size],
    spaces: Sequence[DecodeSpace],
    positions: Tensor,
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
        state = torch.zeros(BATCH, heads, lengths[k], dim, dtype=model.dtype, device=model.device)
        inputs["past_key_values"][str(layer)] = {"key": state, "value": state.clone()}
        axes = {0: batch, 2: pasts[k]}
        dynamic["past_key_values"][str(layer)] = {"key": axes, "value": axes}
    for name in module.used:
        kind, k = _kind_and_space(name)
        if kind in ("attention_mask", "key_bias", "key_positions"):
            value = words(model, lengths[k] + 1).fill_(1)
            inputs[name] = value.to(model.dtype) if kind == "key_bias" else value
            dynamic[name] = {0: batch, 1: pasts[k] + 1}
        else:
            inputs[name] = positions.clone() if kind == "position_ids" else words(model, 1)
            dynamic[name] = {inputs[name].ndim - 2: batch}
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
