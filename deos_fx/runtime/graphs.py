"""Keep the graphs of a reduced model: captures, lowered for each layout of images.

One capture serves all layouts; a lowered graph has the counts of one layout as constants.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any

from torch import fx
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from deos_fx.inputs.call import Call
from deos_fx.passes.captures import Captures
from deos_fx.passes.notes import note_of_graph
from deos_fx.passes.pipeline import Captured, Runnable, lower_call
from deos_fx.policy.policy import Policy
from deos_fx.policy.site import split_site
from deos_fx.recent import Recent
from deos_fx.runtime.compiled import CompiledGraph
from deos_fx.tokens.layout import PromptLayout

__all__ = ["GRAPHS", "Graphs"]

_LOGGER = logging.getLogger(__name__)

GRAPHS = 128
"""Lowered graphs that a reduced model keeps."""


class Graphs(Captures):
    """Captures that are lowered for a policy, at most `GRAPHS` at a time.

    Args:
        model: The model, whose weights the graphs share.
        policy: The reductions and their sites.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy) -> None:
        stages = {split_site(reduction.site)[0] for reduction in policy.reductions}
        super().__init__(model, "vision" in stages)
        self._policy = policy
        self._options: Mapping[str, Any] | None = None

    def __reduce__(self) -> Any:
        # A copy of a reduced model makes its own graphs from its own weights.
        return Graphs, (self.model, self._policy)

    def forget(self) -> None:
        """Drop every capture and every lowered graph."""
        super().forget()
        self._lowered_graphs: Recent[tuple[Captured, PromptLayout | None], fx.GraphModule]
        self._lowered_graphs = Recent(GRAPHS)
        # Kept as long as the lowered graph.
        self._compiled: weakref.WeakKeyDictionary[fx.GraphModule, CompiledGraph]
        self._compiled = weakref.WeakKeyDictionary()

    def compile(self, options: Mapping[str, Any]) -> None:
        """Run every graph under torch.compile from now on.

        Args:
            options: Arguments of torch.compile.
        """
        with self.lock:
            self._options = options
            self._compiled.clear()

    def run(
        self, call: Call, layout: PromptLayout | None
    ) -> tuple[dict[str, Any], type[ModelOutput]]:
        """Run a call.

        Args:
            call: The call, completed.
            layout: The prompts of a prefill; None for a decode step.

        Returns:
            Fields of the output, with ``spaces`` where anything was reduced, and its class.
        """
        captured, fields = self._serve(call, layout)
        return fields, note_of_graph(captured.graph_module).output_class

    def step(self, call: Call) -> fx.GraphModule:
        """Run a decode step, and return its lowered graph."""
        return self._lowered(self._serve(call, None)[0], None)

    def prefill(self, call: Call, layout: PromptLayout) -> fx.GraphModule:
        """Return the lowered graph of a prefill, captured if need be."""
        return self._lowered(self.serving(call), layout)

    @property
    def latest(self) -> fx.GraphModule | None:
        """Return the lowered prefill graph that was used last."""
        used = (graph for (_, layout), graph in self._lowered_graphs.items() if layout is not None)
        return next(used, None)

    def _serve(self, call: Call, layout: PromptLayout | None) -> tuple[Captured, dict[str, Any]]:
        step = layout is None
        return self.serve(call, lambda captured: self._run_by(captured, layout, call), step=step)

    def _run_by(self, captured: Captured, layout: PromptLayout | None, call: Call) -> Runnable:
        """Return what runs a call: the lowered graph, compiled if that was asked for."""
        with self.lock:
            lowered = self._lowered(captured, layout)
            if self._options is None:
                return lowered
            if lowered not in self._compiled:
                compiled = CompiledGraph(captured, lowered, call.images, self._options)
                self._compiled[lowered] = compiled
            return self._compiled[lowered]

    def _lowered(self, captured: Captured, layout: PromptLayout | None) -> fx.GraphModule:
        # Two threads with the same new layout: the second waits, and finds the first one's graph.
        with self.lock:
            known = self._lowered_graphs.get((captured, layout))
            if known is not None:
                return known
            _LOGGER.info("lowered a captured call for %s", layout)
            # Lowering changes a graph in place, and other layouts need the captured one again.
            graph_module = lower_call(captured.copy(), self._policy, layout)
            return self._lowered_graphs.put((captured, layout), graph_module)
