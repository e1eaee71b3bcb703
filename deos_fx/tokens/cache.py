"""A key-value cache whose layers hold different numbers of tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NotRequired, Self, TypedDict, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import DynamicCache, PreTrainedConfig

from deos_fx.tokens.angles import KeyAngles

__all__ = ["ReducedCache", "SpaceFields", "TokenSpace", "in_rows", "tensors_of"]


@dataclass
class TokenSpace:
    """The part of the prompt that the layers after a reduction still hold.

    Attributes:
        first_layer: First decoder layer of the space.
        origin: [B, M] original prompt positions of the tokens that are left; -1 is padding.
        key_bias: [B, M] bias of their attention logits, or None.
        shift: [B, 1] number to subtract from the positions of later tokens; None for the number of
            dropped tokens.
    """

    first_layer: int
    origin: Tensor
    key_bias: Tensor | None = None
    shift: Tensor | None = None


class SpaceFields(TypedDict):
    """What a lowered prefill returns of each token space, in its output field ``spaces``.

    The entries are the tensors of a `TokenSpace`. Those that a policy does not need are left out,
    since every entry is a node of the graph.
    """

    origin: Tensor
    key_bias: NotRequired[Tensor]
    shift: NotRequired[Tensor]


class ReducedCache(DynamicCache):
    """transformers' dynamic cache that also knows which prompt tokens each layer kept.

    The sequence length it reports is that of the *original* text, so that positions and the loop
    of `generate` continue as if nothing had been dropped; masks are sized by the keys a layer
    holds.

    Args:
        config: The text model's config.

    Attributes:
        rope_deltas: Difference [B, 1] between the position of a new token and its index, for
            models that count positions of images by their grid; else None.
        angles: The rotary angles of keys, for layers that rotate what they hold in every call.
        turns: Of each turn with images, the number of tokens before it, and the inputs, by name,
            that its images came in.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self._config = config
        self.spaces: list[TokenSpace] = []
        self.prompt_length = 0
        self.rope_deltas: Tensor | None = None
        self.angles = KeyAngles()
        self.turns: list[tuple[int, dict[str, Tensor]]] = []

    def record(
        self, prompt_length: int, spaces: Sequence[TokenSpace], images: Mapping[str, Tensor]
    ) -> None:
        """Record what later turns need to know of a prefill, besides what `completed` left here.

        Args:
            prompt_length: Number of tokens of the prompt.
            spaces: The spaces that it left in the layers, in order of depth.
            images: Its inputs, by name, that images came in: a later turn may give them again.
        """
        self.prompt_length = prompt_length
        self.spaces = list(spaces)
        self.turns = [(0, dict(images))] if images else []

    @property
    def images(self) -> dict[str, Tensor]:
        """Return the inputs that the images of the latest turn with images came in."""
        return self.turns[-1][1] if self.turns else {}

    def part(self, rows: Sequence[int]) -> ReducedCache:
        """Return an empty cache of the same kind for some rows of a batch."""
        return ReducedCache(self._config)

    def copied(self) -> Self:
        """Return a copy that can be written to, while this cache stays as it is."""
        # Layers and spaces replace their tensors and do not write into them.
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        twin.spaces = [copy.copy(space) for space in self.spaces]
        twin.angles = self.angles.copied()
        return twin

    def why_no_images(self, layers: int) -> str:
        """Return why a later turn cannot bring images, in words; empty if it can.

        Args:
            layers: Number of decoder layers.
        """
        kept = [_kept(layer) for layer in self.layers]
        if len(kept) < layers or "keys of others" in kept:
            return "layers of this model hold no keys of their own"
        if "both" in kept:
            return "layers of this model keep keys and a state at once"
        return ""

    @property
    def rows(self) -> int:
        """Return the number of rows in the cache; 0 if it is empty."""
        # A layer has keys only once it was filled, and layers of convolutions never have.
        held = (getattr(layer, "keys", None) for layer in self.layers)
        return next((len(keys) for keys in held if keys is not None), 0)

    @property
    def has_states(self) -> bool:
        """Return whether layers keep a state: what they have read cannot be hidden any more."""
        return any(hasattr(layer, "recurrent_states") for layer in self.layers)

    @property
    def has_index(self) -> bool:
        """Return whether layers keep an index beside keys and values, by which they choose keys."""
        return any(hasattr(layer, "indexer_keys") for layer in self.layers)

    def join(self, parts: Sequence[ReducedCache], rows: Sequence[int]) -> None:
        """Take over the caches of a batch's parts, each padded on the left to the longest.

        Args:
            parts: The caches of the parts.
            rows: The place in the batch of every row of the parts, one part after the other.
        """
        # zip turns the layers of each part into the parts of each layer.
        self.layers = [
            _joined_layer(layers, rows)
            for layers in zip(*(part.layers for part in parts), strict=True)
        ]
        join = partial(in_rows, rows=rows, axis=1)
        self.angles = KeyAngles.joined([part.angles for part in parts], join)

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Return the number of tokens seen so far, including dropped ones.

        Args:
            layer_idx: A layer that counts positions itself, and gets the number of tokens that have
                reached it.
        """
        if layer_idx is not None:
            return self.get_query_offset(layer_idx)
        # Convolutions hold no keys, so the first layer that does gives the length.
        held = (i for i, layer in enumerate(self.layers) if hasattr(layer, "get_seq_length"))
        first = next(held, 0)
        return super().get_seq_length(first) + self._dropped(first)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the index of the next query among the keys that this layer holds.

        transformers places the queries in a mask by it, so dropped tokens do not count here.
        """
        held: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if hasattr(held, "get_seq_length"):
            return held.get_seq_length()
        # Case: a layer without keys, in whose place the first one that has some counts.
        return super().get_seq_length(layer_idx)

    def reset(self) -> None:
        """Forget everything, including which prompt tokens were kept."""
        super().reset()
        self.record(0, [], {})
        self.rope_deltas, self.angles = None, KeyAngles()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, as transformers' caches do (assisted decoding rejects some).

        Args:
            tokens_to_remove: How many, as a negative number.

        Raises:
            ValueError: If they reach into a prompt that was reduced.
        """
        # Layers hold different tokens of the prompt; only after it do they agree.
        if self.spaces and self.get_seq_length() - abs(tokens_to_remove) < self.prompt_length:
            raise ValueError(
                f"crop({tokens_to_remove}) reaches into the prompt of {self.prompt_length} tokens, "
                "of which each layer holds others. Crop only what came after it, or start with an "
                "empty cache."
            )
        super().crop(tokens_to_remove)
        self.angles = self.angles.changed(lambda x: x[:, :, : -abs(tokens_to_remove)])

    def _dropped(self, layer_idx: int) -> int:
        begun = [space for space in self.spaces if space.first_layer <= layer_idx]
        # A later reduction leaves a part of an earlier one's tokens, so the last space counts.
        return self.prompt_length - begun[-1].origin.shape[1] if begun else 0

    def decode_inputs(
        self, attention_mask: Tensor | None, position_ids: Tensor
    ) -> dict[str, Tensor]:
        """Return the extra inputs of a lowered decode graph, those of every space.

        Args:
            attention_mask: None or [B, T], over the original prompt and all tokens after it.
            position_ids: [B or 1, t] original positions of the new tokens.

        Returns:
            ``key_positions_k`` and ``position_ids_k`` of every space k, ``attention_mask_k`` if
            there is a mask and ``key_bias_k`` if it has a bias; also ``attention_mask`` if none was
            given but rows are padded.
        """
        inputs = {}
        # The tensors of a space are on the device of its layers, which the inputs may not be on.
        self._change_spaces(lambda rows: rows.to(position_ids.device))
        # All tokens after the prompt: those of earlier steps, and those of this one.
        new = position_ids.shape[-1] + self.get_seq_length() - self.prompt_length
        # Joined rows of different lengths are padded and need a mask, even if none was given.
        if attention_mask is None and any(bool((space.origin < 0).any()) for space in self.spaces):
            attention_mask = torch.ones(
                (len(self.spaces[0].origin), self.prompt_length + new),
                dtype=torch.int64,
                device=self.spaces[0].origin.device,
            )
            inputs["attention_mask"] = attention_mask
        for k, space in enumerate(self.spaces, start=1):
            # 1. Positions: new tokens follow the last one that is left.
            dropped = self.prompt_length - space.origin.shape[1]
            shift = dropped if space.shift is None else space.shift
            inputs[f"position_ids_{k}"] = position_ids - shift
            # 2. The original places of all keys, by which sliding windows measure distances.
            index = torch.arange(new, device=space.origin.device) + self.prompt_length
            later = index.expand(len(space.origin), -1)
            inputs[f"key_positions_{k}"] = torch.cat([space.origin, later], dim=1)
            # 3. The padding of the tokens that are left. Those with origin -1 are padding too.
            if attention_mask is not None:
                kept = torch.gather(attention_mask, 1, space.origin.clamp(min=0))
                kept = kept * (space.origin >= 0)
                later = attention_mask[:, self.prompt_length :]
                inputs[f"attention_mask_{k}"] = torch.cat([kept, later], dim=1)
            if space.key_bias is not None:
                # 4. The bias of merged tokens. New tokens get none.
                inputs[f"key_bias_{k}"] = torch.nn.functional.pad(space.key_bias, (0, new))
        return inputs

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beam search: select rows of the layers and of the spaces."""
        # `prompt_length` is the same for all rows, and `turns` are those of the calls: both stay.
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        self.angles = self.angles.of_rows(beam_idx)
        self._rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    # transformers' own two do not know the states of layers.

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the layers and of the spaces."""
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the layers and of the spaces."""
        self.reorder_cache(torch.arange(self.rows)[indices.cpu()])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change_spaces(change)
        if self.rope_deltas is not None:
            self.rope_deltas = change(self.rope_deltas)

    def _change_spaces(self, change: Callable[[Tensor], Tensor]) -> None:
        for space in self.spaces:
            space.origin = change(space.origin)
            if space.key_bias is not None:
                space.key_bias = change(space.key_bias)
            if space.shift is not None:
                space.shift = change(space.shift)


def _kept(layer: Any) -> str:
    """Return what a layer of a cache that has been filled keeps, in a word."""
    keys, state = getattr(layer, "keys", None) is not None, hasattr(layer, "recurrent_states")
    if keys:
        return "both" if state else "keys"
    # Layers that look at each token alone have a layer in the cache without any keys.
    return "state" if state else "keys of others" if hasattr(layer, "keys") else "nothing"


def tensors_of(layer: Any) -> list[Tensor]:
    """Return all tensors that the cache of a layer holds: keys and values, states, counters."""
    return [part for part in pytree.tree_leaves(vars(layer)) if isinstance(part, Tensor)]


def in_rows(values: Sequence[Tensor], rows: Sequence[int], axis: int) -> Tensor:
    """Join the values of a batch's parts into rows, with zeros in front of shorter ones.

    Args:
        values: [B_i, ...], of different sizes along one axis.
        rows: The place in the batch of every row of the parts, one part after the other.
        axis: The axis that is padded.

    Returns:
        [B, ...] in the order of the batch.
    """
    # New tokens are appended on the right, so the padding has to be on the left.
    longest = max(value.shape[axis] for value in values)
    # torch pads the last axis first: nothing on the axes after `axis`, zeros in front on `axis`.
    later_axes = [0, 0] * (values[0].ndim - 1 - axis)
    padded = [
        torch.nn.functional.pad(value, [*later_axes, longest - value.shape[axis], 0])
        for value in values
    ]
    # `rows` says where each row goes; its inverse says which row comes next.
    order = torch.tensor(rows, device=values[0].device).argsort()
    return torch.cat(padded).index_select(0, order)


def _joined_layer(layers: Sequence[Any], rows: Sequence[int]) -> Any:
    """Join the caches of one layer: keys and values, or a state."""
    joined = copy.copy(layers[0])
    # The axis of tokens is the one that is padded. Layers that share keys may hold only an index.
    for name, axis in (("keys", 2), ("values", 2), ("indexer_keys", 1)):
        if getattr(joined, name, None) is not None:
            values = [getattr(layer, name) for layer in layers]
            setattr(joined, name, in_rows(values, rows, axis))
    # States have no axis of tokens. Axis 1 has the same size in all parts, so nothing is padded.
    for name in ("conv_states", "recurrent_states"):
        states: dict[int, Any] = getattr(joined, name, {})
        together = {
            i: in_rows([getattr(layer, name)[i] for layer in layers], rows, axis=1)
            for i in states
            if states[i] is not None
        }
        if together:
            setattr(joined, name, {**states, **together})
    if hasattr(joined, "cumulative_length"):
        # Sliding layers count the tokens seen; after joining, the longest row's count applies.
        joined.cumulative_length = max(layer.cumulative_length for layer in layers)
    return joined
