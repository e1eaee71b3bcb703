"""Record an image encoder at aten level, as a graph of its own for images of fixed sizes.

An encoder that packs images of any size reads these sizes into Python, which `torch.export` cannot
follow. Here the encoder runs once on real values. Everything that follows from the sizes alone
becomes a constant, and every operation on the pixels is recorded. Where the code reads values of
the pixels (to leave out an image that is all zeros), these values become outputs of the graph, so
that every later run can compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deos_fx.exporters.graphs.example import pixels_of
from deos_fx.exporters.graphs.exportable import Exportable
from deos_fx.passes.rewrite.split_encoder import features_of

__all__ = ["encoder_graph", "record"]


# *** the graph ***


def encoder_graph(
    encode: fx.GraphModule, images: Mapping[str, Tensor]
) -> tuple[Exportable, dict[str, Tensor]]:
    """Record the encoder of one prompt's images.

    Args:
        encode: The encoder that `split_encoder` took out of the prefill graph.
        images: The images of one prompt: ``pixel_values`` and the inputs with their sizes.

    Returns:
        The graph from the inputs with pixels to ``image_features_i`` and ``read_i``, and the values
        it holds for: the sizes by name, and ``read_i``, what the encoder read of the pixels.
    """
    pixels = pixels_of(images)
    sizes = {name: value for name, value in images.items() if name not in pixels}
    # Once as it is: a reduced encoder follows patches where it first sees images of these sizes.
    encode(**images)

    def features(*values: Tensor) -> list[Tensor]:
        # The sizes are closed over, so they become constants of the recording.
        return features_of(encode(**dict(zip(pixels, values, strict=True)), **sizes))

    recorded = record(features, *pixels.values())
    # What the recording read when it ran on the images of the export.
    _, reads = recorded(*pixels.values())
    constants = sizes | {f"read_{i}": value for i, value in enumerate(reads)}
    # Copies with memory of their own: safetensors refuses tensors that share memory.
    constants = {name: value.cpu().clone() for name, value in constants.items()}
    module = _Encoder(recorded, list(pixels))
    return Exportable(module, pixels, {name: {} for name in pixels}), constants


class _Encoder(nn.Module):
    """The recorded image encoder, for the images of one prompt."""

    def __init__(self, recorded: fx.GraphModule, names: Sequence[str]) -> None:
        super().__init__()
        self.recorded = recorded
        # Of the inputs with pixels, in the order of the recording.
        self.names = names

    def forward(self, **pixels: Tensor) -> dict[str, Tensor]:
        """Encode the images of one prompt; return ``image_features_i`` and ``read_i``."""
        results = self.recorded(*(pixels[name] for name in self.names))
        parts = zip(("image_features", "read"), results, strict=True)
        return {f"{part}_{i}": value for part, values in parts for i, value in enumerate(values)}


# *** the recording ***


def record(function: Callable[..., list[Tensor]], *pixels: Tensor) -> fx.GraphModule:
    """Run a function of pixels and record it.

    Args:
        function: Maps pixels to features; it may read values into Python.
        *pixels: The pixels to run it on.

    Returns:
        A graph from pixels to two lists: the features, and the values that were read of the pixels.
    """
    # Tensors whose values the code has read, in order.
    seen: list[Tensor] = []

    def run(*pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        seen.clear()
        # The fused attention kernels of a CPU have no ONNX form.
        with sdpa_kernel(SDPBackend.MATH), _Reads(seen), _Lists(seen):
            return function(*pixels), list(seen)

    with torch.no_grad():
        graph_module = make_fx(run)(*pixels)
    graph = graph_module.graph
    output = graph.output_node()
    made: Any = output.args[0]
    features, reads = made
    # Of the values that were read, only those made of the pixels can differ at a later run.
    from_pixels = {*graph.find_nodes(op="placeholder")}
    # In the order of the graph, so a single pass finds everything that is made of them.
    for node in graph.nodes:
        if from_pixels.intersection(node.all_input_nodes):
            from_pixels.add(node)
    output.args = ((features, [node for node in reads if node in from_pixels]),)
    # make_fx leaves constants as plain attributes; as buffers they move and export with the graph.
    for name, value in list(vars(graph_module).items()):
        if isinstance(value, Tensor):
            delattr(graph_module, name)
            graph_module.register_buffer(name, value)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


class _Reads(TorchDispatchMode):
    """Fixes values that are read, and the positions of set flags, to those of this run.

    1. A squeeze that does nothing is left out.
    2. Flags as an index become the positions where they are set.
    3. An operation whose result depends on values is not recorded: its result is a constant.
    """

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.squeeze.dim and args[0].shape[args[1]] != 1:
            # Case 1. ONNX has no squeeze for an axis longer than 1.
            return torch.ops.aten.alias(args[0])
        if func is torch.ops.aten.index.Tensor:
            # Case 2.
            return func(args[0], [self._positions(index) for index in args[1]])
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}:
            # Case 3.
            self.seen += [value for value in args if isinstance(value, Tensor)]
            with disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _positions(self, index: Tensor | None) -> Tensor | None:
        """Return the index; flags along one axis become the positions where they are set."""
        if index is None or index.dtype != torch.bool or index.ndim != 1:
            return index
        self.seen.append(index)
        with disable_proxy_modes_tracing():
            return index.nonzero()[:, 0]


class _Lists(TorchFunctionMode):
    """Notes tensors that are read as lists or arrays, in calls that never reach the dispatcher."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))
