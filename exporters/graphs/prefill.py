"""Build the prefill graph and, where the model needs it, the graph of the image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from deos_fx.exporters.graphs.example import BATCH, Example
from deos_fx.exporters.graphs.exportable import (
    Exportable,
    inputs_of,
    last_logits,
    places,
    states_of,
)
from deos_fx.exporters.graphs.image_encoder import encoder_graph
from deos_fx.inputs.call import Call, batch_axis
from deos_fx.inputs.complete import completed
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.finish import finish
from deos_fx.passes.lower.reduced_encoder import ReducedEncoder
from deos_fx.passes.pipeline import copy_of
from deos_fx.passes.rewrite.free_counts import KEEP, free_counts
from deos_fx.passes.rewrite.replace_placeholder_merge import replace_placeholder_merge
from deos_fx.passes.rewrite.return_guards import return_guards
from deos_fx.passes.rewrite.select_logits import LOGITS, select_logits
from deos_fx.passes.rewrite.split_encoder import features_of, split_encoder
from deos_fx.passes.verify import verify
from deos_fx.policy.policy import Policy
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.tokens.cache import ReducedCache, SpaceFields
from deos_fx.tokens.index import take

__all__ = ["least_text", "let_export", "prefill_graph"]

# The smallest number of text tokens in a prompt that a graph accepts.
_LEAST_TEXT = 2


@dataclass(frozen=True)
class _Prompts:
    """The graphs that turn a prompt into logits and a cache.

    Attributes:
        graph: The prefill graph.
        encoder: The graph of the image encoder, if it reads the sizes of images; else None.
        constants: These sizes, and what the encoder reads of the pixels.
        guards: What the prefill graph read of its inputs when the model chose its branches, in the
            order of its outputs ``guard_0``, ``guard_1``, ...
    """

    graph: Exportable
    encoder: Exportable | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)
    guards: tuple[bool | float, ...] = ()


def prefill_graph(
    reduced: ReducedModel, example: Example, least: int, counts: Sequence[tuple[int, int]] = ()
) -> _Prompts:
    """Lower the prefill for an export.

    Args:
        reduced: The reduced model.
        example: The prompts to trace with.
        least: The smallest number of text tokens in a prompt.
        counts: A number of tokens that each reduction may pick in a row, and the largest, if these
            numbers are to be inputs.

    Returns:
        The prefill graph, and the image encoder's if it is a graph of its own.
    """
    facts = facts_of(reduced.model)
    given = {**example.inputs, "use_cache": True, **last_logits(facts)}
    call = completed(Call.of(facts, given))
    # A copy: the reduced model goes on using its own graph.
    lowered = copy_of(reduced.graphs.prefill(call, example.layout))
    _keep_outputs(lowered, ("logits", "spaces"))
    let_export(lowered, bool(counts))
    if counts:
        lowered = free_counts(lowered, len(counts))
    # What the inputs of the graph are traced with.
    values = dict(example.inputs)
    encoder, constants = None, dict[str, Tensor]()
    if lowered.graph.find_nodes(op="call_module", target="image_encoder"):
        # Case: the encoder reads sizes of images. Its features become inputs of the prefill.
        images = {name: values[name] for name in example.images}
        encode = split_encoder(lowered, images)
        for i, features in enumerate(features_of(encode(**images))):
            values[f"image_features_{i}"] = features
        encoder, constants = encoder_graph(encode, example.images)
    # Features enter the prompt by an index, which has an ONNX form that runtimes agree on.
    lowered = select_logits(replace_placeholder_merge(lowered))
    guards = return_guards(lowered)
    lowered = verify(lowered, "exported")
    module = _Prefill(lowered, reduced)
    # The placeholders are part of the prompt, so it is at least this long.
    batch, sequence = Dim("batch"), Dim("sequence", min=example.placeholders + least)
    # `_Prefill` itself reads the mask and the positions, whatever the lowered graph reads.
    names = dict.fromkeys(["input_ids", "attention_mask", "position_ids", *module.used])
    taken, shapes = dict[str, Tensor](), dict[str, dict[int, Any]]()
    for name in names:
        if name == LOGITS:
            taken[name], shapes[name] = places(reduced.model.device)
            continue
        if name.startswith(KEEP):
            # Case: a count, which is the length of the input.
            count, most = counts[int(name.removeprefix(KEEP)) - 1]
            taken[name], shapes[name] = torch.zeros(count), {0: Dim(name, min=1, max=most)}
            continue
        taken[name] = value = values[name]
        first = batch_axis(name, value)
        if name == "position_ids" or value.shape == values["input_ids"].shape:
            # Case: one value for every token, or one for each coordinate of its position.
            shapes[name] = {first: batch, first + 1: sequence}
        else:
            # Case: images or their features, with a fixed number of rows for each prompt.
            each = len(value) // BATCH
            shapes[name] = {0: batch if each == 1 else each * batch}
    return _Prompts(Exportable(module, taken, shapes), encoder, constants, guards)


def let_export(lowered: fx.GraphModule, elastic: bool) -> None:
    """Replace an encoder in which groups of patches are reduced by one that can be exported.

    Args:
        lowered: The graph of a prefill. Changed in place.
        elastic: Whether the counts of the reductions are to be inputs.

    Raises:
        ValueError: If the counts are to be inputs.
    """
    for node in lowered.graph.find_nodes(op="call_module", target="image_encoder"):
        inside = lowered.get_submodule(str(node.target))
        if not isinstance(inside, ReducedEncoder):
            continue
        if elastic:
            raise ValueError(
                "elastic=True, but the policy reduces groups of patches in the vision tower, whose "
                "counts cannot be inputs of a graph. Leave elastic out."
            )
        lowered.set_submodule(str(node.target), inside.exportable())


def least_text(policy: Policy) -> int:
    """Return the smallest number of text tokens in a prompt with which the policy works.

    A selector may compare the visual tokens with some text tokens, so there must be that many.
    """
    tiers = (tier for reduction in policy.reductions for tier in reduction.selection)
    pivots = (tier.options.get("text_pivots") for tier in tiers)
    return max(
        [_LEAST_TEXT, *(int(number) for number in pivots if isinstance(number, int | float))]
    )


class _Prefill(nn.Module):
    """The lowered prefill graph with tensors as inputs and outputs instead of a cache object."""

    def __init__(self, lowered: fx.GraphModule, reduced: ReducedModel) -> None:
        super().__init__()
        self.lowered = lowered
        self.text_config = reduced.model.config.get_text_config()
        self.dtype = reduced.model.dtype
        self.used, self.unused = inputs_of(lowered)

    def forward(self, **inputs: Tensor) -> dict[str, Any]:
        """Run the prefill, and return the outputs that `deos_fx.exporters.onnx` lists."""
        # An empty cache, which the layers fill.
        cache = ReducedCache(self.text_config)
        taken = {name: inputs[name] for name in self.used}
        fields = self.lowered(**taken, **dict.fromkeys(self.unused), **{CACHE: cache})
        mask = inputs["attention_mask"]
        positions = inputs["position_ids"]
        if positions.ndim == 3:
            # Case: several coordinates. Text goes on after the largest of them.
            positions = positions.amax(dim=0)
        outputs = {
            "logits": fields["logits"],
            "next_position": positions.amax(dim=1, keepdim=True) + 1,
            "present": states_of(cache),
            **{f"guard_{i}": value for i, value in enumerate(fields.get("guards", ()))},
        }
        spaces: Sequence[SpaceFields] = fields.get("spaces", ())
        for k, space in enumerate(spaces, start=1):
            outputs[f"origin_{k}"] = space["origin"]
            outputs[f"attention_mask_{k}"] = take(mask, space["origin"])
            if "key_bias" in space:
                # In the dtype of the model, in which attention adds it anyway.
                outputs[f"key_bias_{k}"] = space["key_bias"].to(self.dtype)
            if "shift" in space:
                outputs[f"shift_{k}"] = space["shift"]
        return outputs


def _keep_outputs(graph_module: fx.GraphModule, names: tuple[str, ...]) -> None:
    """Drop all output fields but these."""
    output = graph_module.graph.output_node()
    fields: Any = output.args[0]
    output.args = ({name: fields[name] for name in names if name in fields},)
    finish(graph_module)
