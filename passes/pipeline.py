"""Run the pipelines: each is a literal list of passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

from torch import fx
from transformers import PreTrainedModel

from deos_fx.errors import PassError
from deos_fx.models.facts import ModelFacts, facts_of
from deos_fx.models.families import PIXELS
from deos_fx.models.upstream import CACHE
from deos_fx.passes.analyse.annotate_token_spaces import annotate_token_spaces
from deos_fx.passes.analyse.find_sites import find_sites
from deos_fx.passes.analyse.groups import reasons_in_groups
from deos_fx.passes.analyse.sites import Encoder, Sites
from deos_fx.passes.capture.capture import capture
from deos_fx.passes.finish import finish
from deos_fx.passes.lower.lower_decode import decode_spaces, lower_decode
from deos_fx.passes.lower.lower_reductions import lower_reductions
from deos_fx.passes.rewrite.continue_text import continue_text
from deos_fx.passes.rewrite.fold_masked_add import fold_masked_add
from deos_fx.passes.rewrite.fold_unstack import fold_unstack
from deos_fx.passes.rewrite.read_text_first import read_text_first
from deos_fx.passes.rewrite.streams_last import streams_last
from deos_fx.passes.verify import verify
from deos_fx.policy.policy import Policy
from deos_fx.tokens.layout import PromptLayout
from deos_fx.tokens.turn import TurnCache

_T = TypeVar("_T")

__all__ = ["Captured", "Runnable", "capture_call", "copy_of", "lower_call", "run_graph"]


@dataclass(frozen=True, eq=False)
class Captured:
    """A captured and analysed call, before any reduction.

    Attributes:
        graph_module: The annotated graph.
        sites: Where its visual tokens can be reduced; None for a call without images.
    """

    graph_module: fx.GraphModule
    sites: Sites | None

    def copy(self) -> Captured:
        """Return a copy whose graph can be changed; modules and weights are shared."""
        return replace(self, graph_module=copy_of(self.graph_module))

    @cached_property
    def guards(self) -> fx.GraphModule:
        """Return a graph of the guards alone, which tells whether the capture serves a call."""
        guards = copy_of(self.graph_module)
        # Guards have side effects, so they and what they read stay when everything else is dead.
        guards.graph.output_node().args = ({},)
        return finish(guards)


def copy_of(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy whose graph can be changed; modules and weights are shared."""
    # Nodes are copied with their notes; modules are shared.
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    twin = fx.GraphModule(graph_module, graph, graph_module._get_name())
    twin.meta = dict(graph_module.meta)
    return twin


def capture_call(
    model: PreTrainedModel, inputs: Mapping[str, Any], in_tower: bool = False
) -> Captured:
    """Capture -> fold -> fold -> annotate -> streams -> (continue) -> verify -> sites -> order.

    Args:
        model: The unmodified model.
        inputs: Arguments of the call to capture; a cache among them is used up.
        in_tower: Whether the call will be reduced in the vision tower.

    Returns:
        The graph and its analysis.

    Raises:
        CaptureError: If the model cannot be captured.
    """
    facts = facts_of(model)
    # An opaque encoder is recorded as one node, because it reads sizes into Python.
    captured = _captured(facts, inputs, facts.encodes_as_one(inputs))
    if in_tower and captured.sites is not None and captured.sites.encoder is Encoder.MIXING:
        # Groups of patches are reduced in an encoder that is one node.
        if inputs.get(CACHE) is not None:
            inputs[CACHE].reset()
        captured = _captured(facts, inputs, True)
    return captured


def _captured(facts: ModelFacts, inputs: Mapping[str, Any], opaque: bool) -> Captured:
    """Run the passes of `capture_call`.

    Args:
        facts: The facts of the model.
        inputs: Arguments of the call.
        opaque: Whether the image encoder is recorded as one node.
    """
    model, blocks = facts.model, facts.blocks
    # Not every model runs without an image.
    part = None if any(name in inputs for name in PIXELS) else facts.text_model
    graph_module = capture(model, inputs, blocks.by_path(), part=part, opaque_encoder=opaque)
    # Folds come first: shapes do not tell how many rows a mask selects.
    graph_module = _run(fold_unstack, graph_module)
    graph_module = _run(fold_masked_add, graph_module)
    graph_module = _run(annotate_token_spaces, graph_module, inputs)
    graph_module = _run(streams_last, graph_module)
    if isinstance(inputs.get(CACHE), TurnCache):
        graph_module = _run(continue_text, graph_module)
    graph_module = verify(graph_module, "captured")
    # Only a prefill with images has sites; other calls are captured for their guards and for
    # decoding.
    sites = None
    if any(name in inputs for name in PIXELS):
        sites = _run(find_sites, graph_module, lambda: reasons_in_groups(facts, inputs))
        graph_module = _run(read_text_first, graph_module, sites)
    return Captured(graph_module, sites)


def lower_call(captured: Captured, policy: Policy, layout: PromptLayout | None) -> fx.GraphModule:
    """Lower a policy onto a captured call, a prefill with images or a decode step, and verify it.

    Args:
        captured: The call. Its graph is changed in place.
        policy: The reductions and their sites.
        layout: The prompts of a prefill; None for a decode step.

    Returns:
        The lowered graph.

    Raises:
        ValueError: If the policy does not fit the call; see `lower_reductions`.
    """
    if captured.sites is None or layout is None:
        # Case: a decode step.
        graph_module = _run(lower_decode, captured.graph_module, decode_spaces(policy))
        return verify(graph_module, "decode")
    graph_module = captured.graph_module
    graph_module = _run(lower_reductions, graph_module, captured.sites, policy, layout)
    return verify(graph_module, "lowered")


def _run(step: Callable[..., _T], graph_module: fx.GraphModule, *arguments: Any) -> _T:
    """Run a pass, and name it in every error that comes out of it."""
    try:
        return step(graph_module, *arguments)
    except (TypeError, ValueError) as error:
        # Case: a user's mistake, which the message explains. A mistake of ours may look the same,
        # so the traceback says where it happened.
        error.add_note(f"Raised by the pass {step.__name__}.")
        raise
    except Exception as error:
        # Case: a mistake of ours. Without the name of the pass, such an error is hard to place.
        raise PassError(
            f"The pass {step.__name__} failed on {graph_module._get_name()} "
            f"({type(error).__name__}: {error}). This is a fault of deos_fx: please report it, "
            "with the model's config and the shapes of its inputs."
        ) from error


class Runnable(Protocol):
    """A graph module, or what runs one."""

    @property
    def graph(self) -> fx.Graph:
        """Return the graph, whose placeholders are the inputs."""

    def __call__(self, **inputs: Any) -> Any:
        """Run it."""


def run_graph(runnable: Runnable, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Call a graph with the inputs that it takes, and leave out all others.

    Args:
        runnable: The graph.
        inputs: At least the graph's inputs, by name.

    Returns:
        The fields of its output.
    """
    names = [str(node.target) for node in runnable.graph.find_nodes(op="placeholder")]
    return runnable(**{name: inputs[name] for name in names})
