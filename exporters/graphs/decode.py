"""Build the decode graph: new tokens of every row, with the cache as inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from transformers import PreTrainedModel

from deos_fx.exporters.graphs.example import BATCH, Example, words
from deos_fx.exporters.graphs.exportable import (
    CONV,
    Exportable,
    filled,
    inputs_of,
    last_logits,
    places,
    states_of,
)
from deos_fx.inputs.call import Call, batch_axis
from deos_fx.inputs.complete import completed
from deos_fx.models.facts import ModelFacts, facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.lower.lower_decode import DecodeSpace, decode_spaces
from deos_fx.passes.pipeline import copy_of
from deos_fx.passes.rewrite.select_logits import LOGITS, select_logits
from deos_fx.passes.rewrite.split_embeddings import EMBEDDINGS
from deos_fx.passes.verify import verify
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.tokens.cache import ReducedCache

__all__ = ["NEW", "Decode", "decode_exportable", "decode_graph", "decode_step"]

NEW = "new"
"""The name of the axis of new tokens."""
# New tokens of the traced call.
_NEW = 4


def decode_graph(reduced: ReducedModel, example: Example) -> Exportable:
    """Lower a decode step of the policy for an export.

    Args:
        reduced: The reduced model.
        example: The prompts of the export; the number of coordinates of a position is read from
            them.

    Returns:
        The decode graph, with example inputs in which the spaces' caches differ in length.
    """
    lowered, cache, positions = decode_step(reduced, example)
    module = Decode(lowered, reduced.model)
    spaces = decode_spaces(reduced.policy)
    return decode_exportable(module, facts_of(reduced.model), cache, spaces, positions)


def decode_step(
    reduced: ReducedModel, example: Example
) -> tuple[fx.GraphModule, ReducedCache, Tensor]:
    """Lower a decode step.

    Args:
        reduced: The reduced model.
        example: As for `decode_graph`.

    Returns:
        The graph, the cache that it was captured with, and the positions of its new tokens.
    """
    model = reduced.model
    facts = facts_of(model)
    # A prefill fills the cache: its layers have as many keys as the policy leaves them.
    cache = reduced(**example.inputs, use_cache=True, **last_logits(facts))[CACHE]
    # Position ids are [B, t], or [coordinates, B, t].
    coordinates = example.inputs["position_ids"].shape[:-2]
    _check_states(reduced.model, cache)
    seen = cache.get_seq_length()
    positions = torch.arange(seen, seen + _NEW, device=model.device)
    positions = positions.expand(*coordinates, BATCH, _NEW).clone()
    mask = words(facts, seen + _NEW).fill_(1)
    inputs = {
        "input_ids": words(facts, _NEW),
        "attention_mask": mask,
        "position_ids": positions,
        CACHE: cache,
        **last_logits(facts),
    }
    call = completed(Call.of(facts, inputs)).having(**cache.decode_inputs(mask, positions))
    lowered = verify(select_logits(copy_of(reduced.graphs.step(call))), "exported")
    return lowered, cache, positions


def _check_states(model: PreTrainedModel, cache: ReducedCache) -> None:
    """Refuse layers with a state that is more than what a short convolution reads again.

    Raises:
        ValueError: If there is one.
    """
    states = (getattr(layer, "recurrent_states", {}) for layer in cache.layers)
    if any(state is not None for of_layer in states for state in of_layer.values()):
        raise ValueError(
            f"{type(model).__name__} has layers with a recurrent state. Their code loops over the "
            "prompt, and torch.export takes the number of turns of a loop for a constant, so the "
            "graph would serve prompts of one length. Run the reduced model in PyTorch."
        )


class Decode(nn.Module):
    """The lowered decode graph with tensors as inputs and outputs instead of a cache object."""

    def __init__(self, lowered: fx.GraphModule, model: PreTrainedModel) -> None:
        super().__init__()
        self.lowered = lowered
        self.text_config = model.config.get_text_config()
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


def decode_exportable(
    module: Decode,
    facts: ModelFacts,
    cache: ReducedCache,
    spaces: Sequence[DecodeSpace],
    positions: Tensor,
) -> Exportable:
    """Make the example inputs and dynamic axes of a decode graph.

    All layers of a space have equally many keys, so a space has one dynamic axis.

    Args:
        module: The graph.
        facts: Facts about the model.
        cache: A filled cache, for the shapes of keys and values.
        spaces: The token spaces after the original one.
        positions: Positions [..., B, t] of new tokens.
    """
    model, batch, new = facts.model, Dim("batch"), Dim(NEW)
    # Every axis has another length, since torch.export would take equal lengths for one axis.
    lengths = [4 * _NEW * (k + 1) for k in range(len(spaces) + 1)]
    pasts = [Dim("past" if k == 0 else f"past_{k}") for k in range(len(spaces) + 1)]
    # Past and new ones together. torch.export takes every axis for 2 or longer while it traces; an
    # exported graph has no such limit.
    seen = [Dim("seen" if k == 0 else f"seen_{k}", min=4) for k in range(len(spaces) + 1)]
    inputs: dict[str, Any] = {"past_key_values": {}}
    dynamic: dict[str, Any] = {"past_key_values": {}}
    for layer, held in states_of(cache).items():
        # The space of a layer is the last one that has begun, or 0 before the first of them.
        k = sum(space.first_layer <= int(layer) for space in spaces)
        # Keys and values [B, heads, tokens, D] may differ in D (multi-head latent attention).
        inputs["past_key_values"][layer] = {
            name: torch.zeros_like(state)
            if name.startswith(CONV)
            else state.new_zeros(BATCH, state.shape[1], lengths[k], state.shape[3])
            for name, state in held.items()
        }
        # A state has no axis of tokens.
        dynamic["past_key_values"][layer] = {
            name: {0: batch} if name.startswith(CONV) else {0: batch, 2: pasts[k]} for name in held
        }
    for name in module.used:
        kind, k = _kind_and_space(name)
        if kind in ("attention_mask", "key_bias", "key_positions"):
            # Case: one value for every key of the space, and for every new token.
            value = words(facts, lengths[k] + _NEW).fill_(1)
            inputs[name] = value.to(model.dtype) if kind == "key_bias" else value
            dynamic[name] = {0: batch, 1: seen[k]}
        elif name == LOGITS:
            inputs[name], dynamic[name] = places(model.device)
        elif name == EMBEDDINGS:
            # Case: the layers alone.
            width = model.config.get_text_config().hidden_size
            inputs[name] = torch.zeros(BATCH, _NEW, width, dtype=model.dtype, device=model.device)
            dynamic[name] = {0: batch, 1: new}
        else:
            # Case: ids or position ids of the new tokens alone.
            inputs[name] = positions.clone() if kind == "position_ids" else words(facts, _NEW)
            first = batch_axis(kind, inputs[name])
            dynamic[name] = {first: batch, first + 1: new}
    return Exportable(module, inputs, dynamic)


def _kind_and_space(name: str) -> tuple[str, int]:
    """Split a name: ``attention_mask_2`` -> (``attention_mask``, 2); without a number, 0."""
    kind, _, number = name.rpartition("_")
    return (kind, int(number)) if number.isdigit() else (name, 0)
