"""A key-value cache whose layers hold different numbers of tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

__all__ = ["ReducedCache", "TokenSpace", "in_rows"]


@dataclass
class TokenSpace:
    """What the layers behind a reduction still hold of the prompt.

    Attributes:
        first_layer: First decoder layer of the space.
        origin: [B, M] original prompt positions of the tokens that are left; -1 is padding.
        key_bias: [B, M] bias of their attention logits, or None.
        shift: [B, 1] how far later tokens move up; None for the number of dropped tokens.
    """

    first_layer: int
    origin: Tensor
    key_bias: Tensor | None = None
    shift: Tensor | None = None


class ReducedCache(DynamicCache):
    """transformers' dynamic cache, plus which prompt tokens each layer kept.

    The sequence length it reports is that of the *original* text, so that positions and the loop
    of `generate` continue as if nothing had been dropped; masks are sized by what a layer holds.

    Args:
        config: The text model's config.

    Attributes:
        rope_deltas: Where the model counts positions of images by their grid: how much the
            position of a new token differs from its index, [B, 1].
        images: The inputs that the images in the cache came from, by name.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.spaces: list[TokenSpace] = []
        self.prompt_length = 0
        self.rope_deltas: Tensor | None = None
        self.images: dict[str, Tensor] = {}

    def record(self, prompt_length: int, spaces: Sequence[TokenSpace]) -> None:
        """Remember what a prefill of `prompt_length` tokens left in each layer."""
        self.prompt_length = prompt_length
        self.spaces = list(spaces)

    @property
    def rows(self) -> int:
        """Texts in the cache; 0 for an empty one."""
        held = (getattr(layer, "keys", None) for layer in self.layers)
        return next((len(keys) for keys in held if keys is not None), 0)

    def join(self, parts: Sequence[ReducedCache], rows: Sequence[int]) -> None:
        """Take over what prefills of parts of a batch left, padded on the left to the longest.

        Args:
            parts: Their caches.
            rows: For every row of all parts in turn, its place in the batch.
        """
        self.layers = [
            _joined_layer(layers, rows)
            for layers in zip(*(part.layers for part in parts), strict=True)
        ]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, dropped ones included."""
        if layer_idx == 0:
            # Convolutions hold no keys: the length is that of the first layer that does.
            held = (i for i, layer in enumerate(self.layers) if hasattr(layer, "get_seq_length"))
            layer_idx = next(held, 0)
        return super().get_seq_length(layer_idx) + self._dropped(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Index of the next query among the keys that this layer holds."""
        return super().get_seq_length(layer_idx)

    def reset(self) -> None:
        """Forget everything, also what was kept of which prompt."""
        super().reset()
        self.record(0, [])
        self.rope_deltas, self.images = None, {}

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, as transformers' caches do (assisted decoding takes back).

        Args:
            tokens_to_remove: How many, as a negative number.

        Raises:
            ValueError: If they reach into the prompt that was reduced.
        """
        if self.spaces and self.get_seq_length() - abs(tokens_to_remove) < self.prompt_length:
            raise ValueError(
                f"crop({tokens_to_remove}) reaches into the prompt of {self.prompt_length} tokens, "
                "of which each layer holds others. Crop only what came behind it, or start with an "
                "empty cache."
            )
        super().crop(tokens_to_remove)

    def _dropped(self, layer_idx: int) -> int:
        behind = [space for space in self.spaces if space.first_layer <= layer_idx]
        return self.prompt_length - behind[-1].origin.shape[1] if behind else 0

    def decode_inputs(
        self, attention_mask: Tensor | None, position_ids: Tensor
    ) -> dict[str, Tensor]:
        """Extra inputs of a lowered decode graph (see `deos_fx.passes.lower.lower_decode`).

        Args:
            attention_mask: None or [B, T], over the original text and the new tokens.
            position_ids: [B or 1, t] original positions of the new tokens.

        Returns:
            ``key_positions_k``, ``attention_mask_k``, ``position_ids_k`` and ``key_bias_k`` of
            every space k; also ``attention_mask`` if there was none but rows are padded.
        """
        inputs = {}
        # A space is made where its layers are, which may be on another device than the inputs.
        self._change_spaces(lambda rows: rows.to(position_ids.device))
        new = position_ids.shape[-1] + self.get_seq_length() - self.prompt_length
        if attention_mask is None and any(bool((space.origin < 0).any()) for space in self.spaces):
            attention_mask = torch.ones(
                (len(self.spaces[0].origin), self.prompt_length + new),
                dtype=torch.int64,
                device=self.spaces[0].origin.device,
            )
            inputs["attention_mask"] = attention_mask
        for k, space in enumerate(self.spaces, start=1):
            dropped = self.prompt_length - space.origin.shape[1]
            shift = dropped if space.shift is None else space.shift
            inputs[f"position_ids_{k}"] = position_ids - shift
            index = torch.arange(new, device=space.origin.device) + self.prompt_length
            later = index.expand(len(space.origin), -1)
            inputs[f"key_positions_{k}"] = torch.cat([space.origin, later], dim=1)
            if attention_mask is not None:
                kept = torch.gather(attention_mask, 1, space.origin.clamp(min=0))
                kept = kept * (space.origin >= 0)
                later = attention_mask[:, self.prompt_length :]
                inputs[f"attention_mask_{k}"] = torch.cat([kept, later], dim=1)
            if space.key_bias is not None:
                inputs[f"key_bias_{k}"] = torch.nn.functional.pad(space.key_bias, (0, new))
        return inputs

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow beam search: select rows, also of what was kept."""
        super().reorder_cache(beam_idx)
        self._rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, also of what was kept."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, also of what was kept."""
        super().batch_select_indices(indices)
        self._rows(lambda rows: rows[indices.to(rows.device)])

    def _rows(self, change: Any) -> None:
        self._change_spaces(change)
        if self.rope_deltas is not None:
            self.rope_deltas = change(self.rope_deltas)

    def _change_spaces(self, change: Any) -> None:
        for space in self.spaces:
            space.origin = change(space.origin)
            if space.key_bias is not None:
                space.key_bias = change(space.key_bias)
            if space.shift is not None:
                space.shift = change(space.shift)


def in_rows(values: Sequence[Tensor], rows: Sequence[int], axis: int) -> Tensor:
    """Values of parts of a batch together, shorter ones with zeros in front.

    Args:
        values: [B_i, ...], of different sizes along one axis.
        rows: For every row of all parts in turn, its place in the batch.
        axis: The axis that is padded.

    Returns:
        [B, ...] in the order of the batch.
    """
    longest = max(value.shape[axis] for value in values)
    behind = [0, 0] * (values[0].ndim - 1 - axis)
    padded = [
        torch.nn.functional.pad(value, [*behind, longest - value.shape[axis], 0])
        for value in values
    ]
    order = torch.tensor(rows, device=values[0].device).argsort()
    return torch.cat(padded).index_select(0, order)


def _joined_layer(layers: Sequence[Any], rows: Sequence[int]) -> Any:
    """One layer's cache for a batch from those for its parts: keys and values, or a state."""
    joined = copy.copy(layers[0])
    for name in ("keys", "values"):
        if hasattr(joined, name):
            setattr(joined, name, in_rows([getattr(layer, name) for layer in layers], rows, axis=2))
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
        # A window counts what has come by, and the longest row is what it is as wide as.
        joined.cumulative_length = max(layer.cumulative_length for layer in layers)
    return joined
