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


class _Decode(nn.Module):
    """The lowered decode graph with tensors, not a cache object, as inputs and outputs."""

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
        fields = self.lowered(**inputs, **dict.fromkeys(self.unused), **{CACHE: cache})
        return {"logits": fields["logits"], "present": states_of(cache)}


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
    cache = reduced(**example.inputs, use_cache=True)[CACHE]
    if not all(isinstance(getattr(held, "keys", None), Tensor) for held in cache.layers):
        raise ValueError(
            f"{type(model).__name__} has layers that keep a state instead of keys and values, "
            "which exported graphs do not hand over. Run the reduced model in PyTorch."
        )
    shapes = [state["key"].shape for state in states_of(cache).values()]
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


def _decode_exportable(
    module: _Decode,
    facts: ModelFacts,
    shapes: list[torch.Size],
    spaces: Sequence[DecodeSpace],
    positions: Tensor,
) -> Exportable:
    """Make the example inputs and dynamic axes; the layers of a space have equally many keys."""
    model, batch = facts.model, Dim("batch")
    # The lengths differ: torch.export would take equal ones for one axis.
    lengths = [2 * k + 3 for k in range(len(spaces) + 1)]
    pasts = [Dim("past" if k == 0 else f"past_{k}") for k in range(len(spaces) + 1)]
    inputs: dict[str, Any] = {"past_key_values": {}}
    dynamic: dict[str, Any] = {"past_key_values": {}}
    for layer, (_, heads, _, dim) in enumerate(shapes):
        # The layer's space is the last one that has begun; before all of them it is 0.
        k = sum(space.first_layer <= layer for space in spaces)
        state = torch.zeros(BATCH, heads, lengths[k], dim, dtype=model.dtype, device=model.device)
        inputs["past_key_values"][str(layer)] = {"key": state, "value": state.clone()}
        axes = {0: batch, 2: pasts[k]}
        dynamic["past_key_values"][str(layer)] = {"key": axes, "value": axes}
    for name in module.used:
        kind, k = _kind_and_space(name)
        if kind in ("attention_mask", "key_bias", "key_positions"):
            # One value for every key of the space, and one for the new token.
            value = words(facts, lengths[k] + 1).fill_(1)
            inputs[name] = value.to(model.dtype) if kind == "key_bias" else value
            dynamic[name] = {0: batch, 1: pasts[k] + 1}
        else:
            # Ids or position ids of the new token alone.
            inputs[name] = positions.clone() if kind == "position_ids" else words(facts, 1)
            dynamic[name] = {batch_axis(kind, inputs[name]): batch}
    return Exportable(module, inputs, dynamic)


def _kind_and_space(name: str) -> tuple[str, int]:
    """Split a name: ``attention_mask_2`` -> (``attention_mask``, 2); without a number, space 0."""
    kind, _, number = name.rpartition("_")
    return (kind, int(number)) if number.isdigit() else (name, 0)
