"""Run a lowered graph under torch.compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from deos_fx.models.families import ENCODERS, WRITER
from deos_fx.passes.pipeline import Captured, copy_of, run_graph
from deos_fx.passes.rewrite.make_compilable import make_compilable
from deos_fx.passes.rewrite.split_encoder import features_of, split_encoder

__all__ = ["CompiledGraph"]


# Image encoders that are one node.
_ONE_NODE = (ENCODERS["get_image_features"], WRITER)


class CompiledGraph:
    """A lowered graph under torch.compile, called like the graph.

    Two things read values into Python. They run before it, as they are: the guards, and an image
    encoder that reads the sizes of images.

    Args:
        captured: The capture that the graph was lowered from.
        lowered: The lowered graph; it is left as it is.
        images: The images of a call that it serves.
        options: Arguments of torch.compile.

    Attributes:
        graph: The graph that is compiled, with the inputs of the lowered one.
    """

    def __init__(
        self,
        captured: Captured,
        lowered: fx.GraphModule,
        images: Mapping[str, Tensor],
        options: Mapping[str, Any],
    ) -> None:
        self.graph = lowered.graph
        self._guards = captured.guards
        rest = copy_of(lowered)
        self._encode: fx.GraphModule | None = None
        if any(rest.graph.find_nodes(op="call_module", target=name) for name in _ONE_NODE):
            self._encode = split_encoder(rest, images)
        self._rest = make_compilable(rest)
        self._rest.compile(**options)

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """Run the graph.

        Raises:
            GuardError: If the graph does not serve these inputs; nothing has run then.
        """
        run_graph(self._guards, inputs)
        if self._encode is not None:
            features = features_of(run_graph(self._encode, inputs))
            inputs |= {f"image_features_{i}": value for i, value in enumerate(features)}
        return run_graph(self._rest, inputs)
