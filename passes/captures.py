"""The captured calls of a model: which calls they serve, and how long they are kept.

A call has a *structure*: its inputs, their types, and every constant among them. One call of each
structure is captured. Where the model's code also branches on values, a structure has several
captures, which their guards tell apart.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deos_fx.errors import GuardError
from deos_fx.inputs.call import Call
from deos_fx.models.facts import ModelFacts
from deos_fx.models.shapes_only import without_missing_weights
from deos_fx.models.upstream import CACHE
from deos_fx.passes.pipeline import Captured, Runnable, capture_call, run_graph
from deos_fx.recent import Recent
from deos_fx.tokens.cache import ReducedCache
from deos_fx.tokens.turn import TurnCache

__all__ = ["CAPTURES", "Captures"]

_LOGGER = logging.getLogger(__name__)

CAPTURES = 32
"""Captured calls that are kept for a model."""


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
        # By identity: a parameter that was trained in place is still the same one.
        return all(getattr(module, name, None) is value for module, name, value in self.held)


class Captures:
    """Makes a capture at the first call of each kind; any number of threads may share one.

    At most `CAPTURES` stay; the least recently used are dropped. When modules of the model are
    replaced (adapters, another head, a resized vocabulary) or its config changes, all are made
    anew.

    Args:
        model: The unmodified model, in eval mode.
        in_tower: Whether calls will be reduced in the vision tower.
    """

    def __init__(self, model: PreTrainedModel, in_tower: bool = False) -> None:
        self.model = model
        self._in_tower = in_tower
        self.lock = threading.RLock()
        self._facts: ModelFacts | None = None
        self.forget()

    def forget(self) -> None:
        """Drop every capture."""
        self._captures: Recent[_Capture, None] = Recent(CAPTURES)

    def serve(
        self, call: Call, graph_of: Callable[[Captured], Runnable], *, step: bool = False
    ) -> tuple[Captured, dict[str, Any]]:
        """Find the capture that serves a call, and run the call in a graph made from it.

        Whether a capture serves a call is known only when its guards have run, so captures of the
        same structure are tried one after the other.

        Args:
            call: The call, completed.
            graph_of: Returns the graph to run, with the guards of the captured one.
            step: Whether it is a decode step.

        Returns:
            The capture, and the fields of the graph's output.
        """
        cache: Any = call.inputs.get(CACHE)
        seen = 0 if cache is None else cache.get_seq_length()
        tried: list[_Capture] = []
        while True:
            capture, new = self._next(call, step, tried)
            runnable = graph_of(capture.captured)
            try:
                fields = run_graph(runnable, call.inputs)
            except GuardError:
                # Case: these inputs take another branch through the model's code than was captured.
                if new or step and cache.get_seq_length() != seen:
                    # A capture of this very call has to serve it. And where layers before the guard
                    # have added to the cache of a decode step, no other graph can run on it.
                    raise
                # A prefill starts on an empty cache, which is easily emptied again.
                if cache is not None and not step:
                    cache.reset()
                tried.append(capture)
            else:
                # Looking it up marks the capture as the most recently used.
                self._captures.get(capture)
                return capture.captured, fields

    def serving(self, call: Call) -> Captured:
        """Return the capture that serves a prefill; only its guards run, not the model."""
        # Some guards are behind layers, which would write into the cache of the call.
        call = replace(call, inputs=_example(call, step=False))
        with torch.no_grad(), without_missing_weights(self.model):
            return self.serve(call, lambda captured: captured.guards)[0]

    def _next(self, call: Call, step: bool, tried: list[_Capture]) -> tuple[_Capture, bool]:
        """Return the most recently used untried capture, or a new one, and whether it is new."""
        # A prefill and a decode step of the same structure do not share a capture: they are lowered
        # differently.
        structure = ("decode" if step else "prefill", *call.structure)
        with self.lock:
            known = [capture for capture, _ in self._captures.items()]
            # Facts are inferred again when the config or a module has changed; parameters may also
            # be replaced one by one.
            if call.facts is not self._facts or not all(capture.holds() for capture in known):
                self._facts = call.facts
                self.forget()
                known = []
            for capture in known:
                if capture.structure == structure and capture not in tried:
                    return capture, False
            # Case: no capture is left to try. The lock is held, so that threads with the same new
            # call wait for one capture.
            captured = capture_call(self.model, _example(call, step), self._in_tower)
            _LOGGER.info("captured a call of the structure %s", structure)
            capture = _Capture(structure, captured, list(_attributes(self.model, captured)))
            self._captures.put(capture, None)
            return capture, True


def _attributes(model: nn.Module, captured: Captured) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield module, name and value of the parameters and buffers that glue code reads."""
    for node in captured.graph_module.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        module = model.get_submodule(path)
        yield module, name, getattr(module, name)


def _example(call: Call, step: bool) -> dict[str, Any]:
    """Return inputs of the same structure that the original model can run."""
    inputs = dict(call.inputs)
    if CACHE in inputs:
        # A later turn with images is captured as the prompt that it is, on an empty cache.
        kind = TurnCache if isinstance(inputs[CACHE], TurnCache) else ReducedCache
        inputs[CACHE] = kind(call.model.config.get_text_config())
    return _decode_example(inputs, call.inputs[CACHE]) if step else inputs


def _decode_example(inputs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Make a decode step that the original model can run: its layers hold equally many keys.

    The original model fails on the caches that reductions leave. Only the structure of the step
    matters, so two keys per layer are enough.
    """
    # Inputs of reduced spaces (attention_mask_1, ...) are for the lowered graph alone.
    example = {
        name: value for name, value in inputs.items() if not name.rpartition("_")[2].isdigit()
    }
    for layer, held in enumerate(cache.layers):
        index = getattr(held, "indexer_keys", None)
        keyless = getattr(held, "keys", None) is None
        if keyless and index is None:
            # Case: the state of a convolution, which is equally long in every space, or a layer
            # that shares the keys of another.
            example[CACHE].layers[layer] = copy.deepcopy(held)
        if not keyless:
            # Keys and values are [B, heads, tokens, D].
            short = [states[:, :, :2].clone() for states in (held.keys, held.values)]
            example[CACHE].update(*short, layer)
        if index is not None:
            # An index is [B, tokens, D].
            example[CACHE].update_indexer(index[:, :2].clone(), layer)
    # Angles are [2, B, tokens, D].
    example[CACHE].angles = cache.angles.changed(lambda angles: angles[:, :, :2].clone())
    # The mask covers the two keys and the new tokens.
    new = inputs["input_ids"].shape[1]
    if "attention_mask" in example:
        example["attention_mask"] = inputs["attention_mask"][:, -new - 2 :]
    return example
