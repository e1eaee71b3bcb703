"""Graphs as modules that transformers' ONNX exporter takes."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from deos_fx.exporters.graphs.decompose import quick_decompositions
from deos_fx.exporters.graphs.exact import exact_constants
from deos_fx.exporters.graphs.quick import quick_rules
from deos_fx.models.facts import ModelFacts
from deos_fx.models.upstream import CACHE
from deos_fx.models.views import has_codes
from deos_fx.passes.rewrite.select_logits import LOGITS
from deos_fx.tokens.cache import ReducedCache

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "CONV",
    "Exportable",
    "filled",
    "inputs_of",
    "last_logits",
    "places",
    "states_of",
    "without_noise",
]

CONV = "conv_"
"""With its number, the name of a state [B, d, kernel]: what a short convolution reads again."""

# Places whose logits are traced; no other axis has this length.
_PLACES = 3


# *** exporting ***

# What torch.export raises where a size depends on the contents of tensors, as of experts that get
# the tokens that a mask selects (https://github.com/pytorch/pytorch/issues/157355).
_BY_CONTENTS = "GuardOnDataDependentSymNode"


@dataclass(frozen=True)
class Exportable:
    """A module to export.

    Attributes:
        module: The module; it takes tensors, or nested dicts of tensors, by name.
        inputs: Example inputs.
        shapes: Dynamic axes of the inputs, nested like them.
    """

    module: nn.Module
    inputs: dict[str, Any]
    shapes: dict[str, Any]

    def export(self) -> onnx_ir.Model:
        """Run transformers' exporter.

        Returns:
            The ONNX graph, with its dynamic axes named.

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
            with without_noise(), exact_constants(), quick_rules(), quick_decompositions():
                program, _ = OnnxExporter().export_program(module, dict(self.inputs), config)
        except Exception as error:
            # The exporters raise errors of many types; each means that this model is refused. That
            # of a conversion was raised from one that names the operator.
            found: BaseException = error
            while type(found).__name__ == "ConversionError" and found.__cause__ is not None:
                found = found.__cause__
            reason = f"{type(found).__name__}: {found}".partition("\n")[0]
            if type(error).__name__ == _BY_CONTENTS:
                reason = (
                    "how many tokens a part of the model gets depends on what they are, which "
                    "torch.export cannot follow"
                )
            cure = "Run the reduced model in PyTorch."
            if any(map(has_codes, module.modules())):
                # Case: quantised weights. These have a cure of their own.
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


# Messages that the exporters log at every run, whatever is exported: logger -> pattern of the
# messages to hide. All others are shown.
_NOISE = {
    # Being experimental is no risk here: our dependencies are pinned to tested versions.
    "transformers.exporters.utils": "OnnxExporter is experimental",
    "torch.onnx._internal.exporter._registration": (
        "Failed to infer the signature|torchvision is not installed"
    ),
    # Indices that follow from the example alone are computed at each run, which is cheap.
    "onnxscript.optimizer._constant_folding": "Skipping constant folding for op",
}


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Hide the messages of `_NOISE` and the progress that is printed to stdout."""
    with contextlib.ExitStack() as stack:
        for name, pattern in _NOISE.items():
            logger = logging.getLogger(name)

            # The default binds the pattern of this turn of the loop.
            def is_news(record: logging.LogRecord, pattern: str = pattern) -> bool:
                return re.match(pattern, record.getMessage()) is None

            logger.addFilter(is_news)
            stack.callback(logger.removeFilter, is_news)
        # torch.onnx prints its progress.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        # torch.onnx copies pytree specs, and copying one warns (torch 2.13).
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)
        yield


# *** axes of the result ***


def _name_axes(graph: onnx_ir.Graph, shapes: Mapping[str, Any]) -> None:
    """Replace the exporter's symbols (``s43``) by the names of the dynamic axes (``batch``).

    Args:
        graph: The exported graph. Changed in place.
        shapes: Dynamic axes of every input, nested like the inputs: axis -> `torch.export.Dim`.
    """
    import onnx_ir

    # The inputs tell which symbol stands for which dynamic axis.
    axes = dict(_leaves(shapes))
    names = {
        str(symbol): dim.__name__
        for value in graph.inputs
        for axis, symbol in enumerate(_axes(value))
        if (dim := axes[str(value.name)].get(axis)) is not None
    }
    # Everything else has axes that are expressions of these symbols.
    nodes = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*graph.inputs, *nodes):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                _renamed(axis, names) if isinstance(axis, str) else axis for axis in _axes(value)
            )


def _forget_sources(graph: onnx_ir.Graph) -> None:
    """Drop the notes on the Python line each node comes from: they are larger than the graph."""
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _axes(value: onnx_ir.Value) -> list[int | str | None]:
    """Return each axis: a length, an expression of symbols (``2*s43``), or None if unknown."""
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]


def _renamed(axis: str, names: Mapping[str, str]) -> str:
    """Rename the symbols in the expression of an axis."""
    # A symbol starts with a letter or an underscore; numbers and operators stay.
    return re.sub(r"[^\W\d]\w*", lambda found: names.get(found[0], found[0]), axis)


def _leaves(shapes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[int, Any]]]:
    """Yield every input's dynamic axes with its name in the graph (``past_key_values.0.key``)."""
    for name, axes in shapes.items():
        # Keys are axes at a tensor, and names at a dict of tensors.
        if all(isinstance(axis, int) for axis in axes):
            yield prefix + name, axes
        else:
            yield from _leaves(axes, f"{prefix}{name}.")


# *** places of logits ***


def last_logits(facts: ModelFacts) -> dict[str, int]:
    """Return the argument that asks a model for the last logits alone, if it has that argument."""
    return {LOGITS: 1} if LOGITS in facts.arguments.parameters else {}


def places(device: torch.device) -> tuple[Tensor, dict[int, Any]]:
    """Return an example of the places [L] whose logits an exported graph computes, and its axes."""
    return torch.arange(-_PLACES, 0, device=device), {0: Dim("logits")}


# *** caches as named tensors ***


def inputs_of(lowered: fx.GraphModule) -> tuple[list[str], list[str]]:
    """Return the names of the inputs that a graph reads and of those that it ignores.

    The cache is in neither list.
    """
    nodes = lowered.graph.find_nodes(op="placeholder")
    given = [node for node in nodes if node.target != CACHE]
    return (
        [str(node.target) for node in given if node.users],
        [str(node.target) for node in given if not node.users],
    )


def states_of(cache: ReducedCache) -> dict[str, dict[str, Tensor]]:
    """Return what every layer holds, by layer and name: keys and values, `CONV` states, or both."""
    layers: list[Any] = cache.layers
    return {str(layer): _held(each) for layer, each in enumerate(layers)}


def _held(layer: Any) -> dict[str, Tensor]:
    attends = getattr(layer, "keys", None) is not None
    held = {"key": layer.keys, "value": layer.values} if attends else {}
    states = getattr(layer, "conv_states", {})
    return held | {f"{CONV}{i}": state for i, state in states.items() if state is not None}


def filled(cache: ReducedCache, states: Mapping[str, Mapping[str, Tensor]]) -> ReducedCache:
    """Put what every layer holds into a cache, and return the cache."""
    for layer, held in states.items():
        if "key" in held:
            cache.update(held["key"], held["value"], int(layer))
        for name, state in held.items():
            if name.startswith(CONV):
                number, kernel = int(name.removeprefix(CONV)), state.shape[-1]
                cache.update_conv_state(state, int(layer), number, conv_kernel_size=kernel)
    return cache
