"""A graph as a module that transformers' ONNX exporter takes."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from deos_fx.exporters.graphs.axes import forget_sources, name_axes
from deos_fx.models.layers import has_codes

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["Exportable"]


@dataclass(frozen=True)
class Exportable:
    """A module to export.

    Attributes:
        module: Takes tensors, or nested dicts of tensors, by name.
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
            with _without_noise():
                program, _ = OnnxExporter().export_program(module, dict(self.inputs), config)
        except Exception as error:
            # The exporters raise errors of many types; each means that this model is refused.
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
        name_axes(program.graph, self.shapes)
        forget_sources(program.graph)
        return program


# Messages of the exporters on every run, whatever is exported: logger -> pattern of the messages
# to hide. Anything else is shown.
_NOISE = {
    # Being experimental is no risk here: our dependencies are pinned to tested versions.
    "transformers.exporters.utils": "OnnxExporter is experimental",
    "torch.onnx._internal.exporter._registration": (
        "Failed to infer the signature|torchvision is not installed"
    ),
}


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Hide the messages of `_NOISE` and the progress that is printed to stdout."""
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
