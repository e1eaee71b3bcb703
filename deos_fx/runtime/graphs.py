"""The graphs of a reduced model: which calls they serve, and how long they are kept.

A call has a *structure*: its inputs, their types, and every constant among them. One call of each
structure is captured. Where the model's code also branches on values, a structure has several
captures, which their guards tell apart. A capture is lowered for each layout of images.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from deos_fx.errors import GuardError
from deos_fx.inputs.structure import configs_of, structure_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.notes import note_of_graph
from deos_fx.passes.pipeline import Captured, capture_call, lower_call, run_graph
from deos_fx.policy.policy import Policy
from deos_fx.recent import Recent
from deos_fx.tokens.cache import ReducedCache
from deos_fx.tokens.layout import PromptLayout

__all__ = ["CAPTURES", "GRAPHS", "Graphs"]

_LOGGER = logging.getLogger(__name__)

CAPTURES = 32
"""Captured calls that a reduced model keeps."""

GRAPHS = 128
"""Lowered graphs that a reduced model keeps."""


@dataclass(eq=False)
class _Capture:
    """One captured call, and the parameters of the model that its graph holds.

    Attributes:
        structure: The structure of the call.
        captured: The analysed graph.
        held: Module, name and value of every parameter and buffer in the graph.
    """

    structure: Hashable
    captured: Captured
    held: list[tuple[nn.Module, str, Any]] = field(default_factory=list)

    def holds(self) -> bool:
        """Return whether the model still has the parameters that are in the graph."""
        return all(getattr(module, name, None) is value for module, name, value in self.held)


class Graphs:
    """Graphs that are made at the first call of each kind, for any number of threads.

    At most `CAPTURES` captures and `GRAPHS` lowered graphs stay; the least recently used are
    dropped. When modules of the model are replaced (adapters, another head, a resized vocabulary)
    or its config changes, all are made anew.

    Args:
        model: The model, whose weights the graphs share.
        policy: The reductions and their sites.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy) -> None:
        self._model = model
        self._policy = policy
        self._forget()
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        # A copy of a reduced model makes its own graphs from its own weights.
        return Graphs, (self._model, self._policy)

    def run(
        self, inputs: Mapping[str, Any], layout: PromptLayout | None
    ) -> tuple[dict[str, Any], type[ModelOutput]]:
        """Run a call.

        Args:
            inputs: Arguments of the model's forward, completed.
            layout: The prompts of a prefill; None for a decode step.

        Returns:
            Fields of the output, with ``spaces`` where anything was reduced, and its class.
        """
        tried: list[_Capture] = []
        while True:
            capture, new = self._next(inputs, layout, tried)
            graph_module = self._lowered(capture, layout)
            cache: Any = inputs.get(CACHE)
            seen = 0 if cache is None else cache.get_seq_length()
            try:
                fields = run_graph(graph_module, inputs)
            except GuardError:
                # Case: the model's code takes another branch for these inputs than was captured.
                if new or layout is None and cache.get_seq_length() != seen:
                    # Layers before the guard may have added to the cache, so it cannot run again.
                    raise
                if layout is not None and cache is not None:
                    cache.reset()
                tried.append(capture)
            else:
                # Marks the capture as the most recently used.
                self._captures.get(capture)
                return fields, note_of_graph(graph_module).output_class

    def prefill(self, inputs: Mapping[str, Any], layout: PromptLayout) -> fx.GraphModule:
        """Return the lowered graph of a prefill of these inputs, captured if need be."""
        return self._lowered(self._next(inputs, layout, [])[0], layout)

    @property
    def latest(self) -> fx.GraphModule | None:
        """Return the lowered prefill graph that was used last."""
        used = (graph for (_, layout), graph in self._lowered_graphs.items() if layout is not None)
        return next(used, None)

    def _forget(self) -> None:
        self._state = _ModelState(self._model)
        self._captures: Recent[_Capture, None] = Recent(CAPTURES)
        self._lowered_graphs: Recent[tuple[_Capture, PromptLayout | None], fx.GraphModule]
        self._lowered_graphs = Recent(GRAPHS)

    def _next(
        self, inputs: Mapping[str, Any], layout: PromptLayout | None, tried: list[_Capture]
    ) -> tuple[_Capture, bool]:
        """Return the most recently used untried capture, or a new one, and whether it is new."""
        structure = ("decode" if layout is None else "prefill", *structure_of(self._model, inputs))
        with self._lock:
            known = [capture for capture, _ in self._captures.items()]
            if not self._state.holds() or not all(capture.holds() for capture in known):
                self._forget()
                known = []
            for capture in known:
                if capture.structure == structure and capture not in tried:
                    return capture, False
            captured = self._capture(inputs, layout)
            _LOGGER.info("captured a call of the structure %s", structure)
            capture = _Capture(structure, captured, list(_attributes(self._model, captured)))
            self._captures.put(capture, None)
            return capture, True

    def _capture(self, inputs: Mapping[str, Any], layout: PromptLayout | None) -> Captured:
        example = {**inputs}
        if CACHE in inputs:
            example[CACHE] = ReducedCache(self._model.config.get_text_config())
        if layout is None:
            example = _decode_example(example, inputs[CACHE])
        return capture_call(self._model, example)

    def _lowered(self, capture: _Capture, layout: PromptLayout | None) -> fx.GraphModule:
        with self._lock:
            known = self._lowered_graphs.get((capture, layout))
            if known is not None:
                return known
            _LOGGER.info("lowered a captured call for %s", layout)
            graph_module = lower_call(capture.captured.copy(), self._policy, layout)
            return self._lowered_graphs.put((capture, layout), graph_module)


def _attributes(model: nn.Module, captured: Captured) -> Iterator[tuple[nn.Module, str, Any]]:
    for node in captured.graph_module.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        module = model.get_submodule(path)
        yield module, name, getattr(module, name)


def _decode_example(inputs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Make a decode step on a short cache of equal lengths, which the original model can run.

    Only its structure matters; on the caches that reductions leave, the original model fails.
    """
    example = {
        name: value for name, value in inputs.items() if not name.rpartition("_")[2].isdigit()
    }
    for layer, held in enumerate(cache.layers):
        if getattr(held, "keys", None) is None:
            # Case: a convolution's state, equally long in every space, or a layer that shares
            # another's keys.
            example[CACHE].layers[layer] = copy.deepcopy(held)
            continue
        short = [states[:, :, :2].clone() for states in (held.keys, held.values)]
        example[CACHE].update(*short, layer)
    new = inputs["input_ids"].shape[1]
    if "attention_mask" in example:
        example["attention_mask"] = inputs["attention_mask"][:, -new - 2 :]
    return example


# *** the state of the model that graphs are captured for ***


class _ModelState:
    """The state of a model that captured graphs depend on: modules, their forwards, and config.

    Weights that are changed in place, moved or loaded are no part of it: graphs share them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        modules = list(model.modules())
        self._children = [(one._modules, dict(one._modules)) for one in modules if one._modules]
        self._classes = [(module, type(module)) for module in modules]
        # accelerate sets a forward of its own on a module.
        self._forwards = [(vars(module), vars(module).get("forward")) for module in modules]
        # A value that does not equal its own copy is left out: it would always seem changed.
        self._settings = [
            (vars(config), name, copied)
            for config in configs_of(model.config)
            for name, value in vars(config).items()
            if _is_setting(name, value) and (copied := copy.deepcopy(value)) == value
        ]

    def holds(self) -> bool:
        """Return whether nothing has changed; every call checks thousands of values here."""
        return (
            all(now == before for now, before in self._children)
            and all(type(module) is kind for module, kind in self._classes)
            and all(now.get("forward") is own for now, own in self._forwards)
            and all(now.get(name, now) == value for now, name, value in self._settings)
        )


_PLAIN = (bool, int, float, str, list, tuple, dict, type(None), torch.dtype)


def _is_setting(name: str, value: Any) -> bool:
    """Return whether this is a config entry that a model's code may read.

    Names with an underscore are left out, such as the implementation of attention, which is a part
    of the structure of a call.
    """
    return isinstance(value, _PLAIN) and not name.startswith("_")
