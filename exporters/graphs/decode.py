"""Build the decode graph: one new token per row, with the cache as inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from deos_fx.exporters.graphs.example import BATCH, Example, words
from deos_fx.exporters.graphs.exportable import Exportable, filled, inputs_of, states_of
from deos_fx.inputs.call import Call, batch_axis
from deos_fx.inputs.complete import completed
from deos_fx.models.facts import ModelFacts, facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.lower.lower_decode import DecodeSpace, decode_spaces
from deos_fx.passes.pipeline import copy_of
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.tokens.cache import ReducedCache

__all__ = ["decode_graph"]


def decode_graph(reduced: ReducedModel, example: Example) -> Exportable:
    """Lower a decode step of the policy for an export.

    Args:
        reduced: The reduced model.
        example: The prompts of the export; the number of coordinates of a position is read from
            them.

    Returns:
        The decode graph, with example inputs in which the spaces' caches differ in length.

    Raises:
        ValueError: If a layer keeps a state instead of keys and values.
    """
    model, spaces = reduced.model, decode_spaces(reduced.policy)
    facts = facts_of(model)
    # A prefill fills the cache: its layers have as many keys as the policy leaves them.
    cache = reduced(**example.inputs, use_cache=True)[CACHE]
    # A convolution, for instance, has no keys.
    if not all(isinstance(getattr(held, "keys", None), Tensor) for held in cache.layers):
        raise ValueError(
            f"{type(model).__name__} has layers that keep a state instead of keys and values, "
            "which exported graphs do not hand over. Run the reduced model in PyTorch."
        )
    # [B, heads, tokens, D] of each layer.
    shapes = [state["key"].shape for state in states_of(cache).values()]
    # Position ids are [B, 1], or [coordinates, B, 1].
    coordinates = example.inputs["position_ids"].shape[:-2]
    positions = words(facts, 1).fill_(cache.get_seq_length()).expand(*coordinates, BATCH, 1)
    mask = words(facts, cache.get_seq_length() + 1).fill_(1)
    inputs = {
        "input_ids": words(facts, 1),
        "attention_mask": mask,
        "position_ids": positions,
        CACHE: cache,
    }
    call = completed(Call.of(facts, inputs)).having(**cache.decode_inputs(mask, positions))
    lowered = copy_of(reduced.graphs.step(call))
    return _decode_exportable(_Decode(lowered, reduced), facts, shapes, spaces, positions)


class _Decode(nn.Module):
    """The lowered decode graph with tensors as inputs and outputs instead of a cache object."""

    def __init__(self, lowered: fx.GraphModule, reduced: ReducedModel) -> None:
        super().__init__()
        self.lowered = lowered
        self.text_config = reduced.model.config.get_text_config()
        self.used, self.unused = inputs_of(lowered)

    def forward(
        self, past_key_values: dict[str, dict[str, Tensor]], **inputs: Tensor
    ) -> dict[str, Any]:
        """Run one step on keys and values by layer, and return logits and the new ones."""
        cache = filled(ReducedCache(self.text_config), past_key_values)
        # The lowered graph also has inputs that it does not read; these are no inputs of the
        # export.
        fields = self.lowered(**inputs, **dict.fromkeys(self.unused), **{CACHE: cache})
        return {"logits": fields["logits"], "present": states_of(cache)}


def _decode_exportable(
    module: _Decode,
    facts: ModelFacts,
    shapes: list[torch.Size],
    spaces: Sequence[DecodeSpace],
    positions: Tensor,
) -> Exportable:
    """Make the example inputs and dynamic axes.

    All layers of a space have equally many keys, so a space has one dynamic axis.
    """
    model, batch = facts.model, Dim("batch")
    # Every space has another length, since torch.export would take equal lengths for one axis.
    lengths = [2 * k + 3 for k in range(len(spaces) + 1)]
    pasts = [Dim("past" if k == 0 else f"past_{k}") for k in range(len(spaces) + 1)]
    inputs: dict[str, Any] = {"past_key_values": {}}
    dynamic: dict[str, Any] = {"past_key_values": {}}
    for layer, (_, heads, _, dim) in enumerate(shapes):
        # The space of a layer is the last one that has begun, or 0 before the first of them.
        k = sum(space.first_layer <= layer for space in spaces)
        state = torch.zeros(BATCH, heads, lengths[k], dim, dtype=model.dtype, device=model.device)
        inputs["past_key_values"][str(layer)] = {"key": state, "value": state.clone()}
        axes = {0: batch, 2: pasts[k]}
        dynamic["past_key_values"][str(layer)] = {"key": axes, "value": axes}
    for name in module.used:
        kind, k = _kind_and_space(name)
        if kind in ("attention_mask", "key_bias", "key_positions"):
            # Case: one value for every key of the space, and one for the new token.
            value = words(facts, lengths[k] + 1).fill_(1)
            inputs[name] = value.to(model.dtype) if kind == "key_bias" else value
            dynamic[name] = {0: batch, 1: pasts[k] + 1}
        else:
            # Case: ids or position ids of the new token alone.
            inputs[name] = positions.clone() if kind == "position_ids" else words(facts, 1)
            dynamic[name] = {batch_axis(kind, inputs[name]): batch}
    return Exportable(module, inputs, dynamic)


def _kind_and_space(name: str) -> tuple[str, int]:
    """Split a name: ``attention_mask_2`` -> (``attention_mask``, 2); without a number, 0."""
    kind, _, number = name.rpartition("_")
    return (kind, int(number)) if number.isdigit() else (name, 0)
