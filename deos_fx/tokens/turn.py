"""The cache of a later turn of a chat that brings images of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig

from deos_fx.tokens.cache import ReducedCache, TokenSpace

__all__ = ["TurnCache", "after_earlier", "append_turn"]


class TurnCache(ReducedCache):
    """A cache that is empty but for one turn, and whose layers see the turns before as well.

    A turn with images runs as a prompt of its own: positions in it, masks and reductions are about
    its own tokens, and the cache has none when it begins. What it sees of earlier turns is added
    where a layer attends: `update` returns their keys and values in front of the new ones,
    `update_indexer` their index of keys, and `widened` makes the mask of the new tokens one of all.
    Layers that keep a state begin with that of the turns before.

    Args:
        config: The text model's config.
        earlier: The cache of the turns before, which stays as it is.
        attention_mask: None or flags [B, T] of what is real in these and in the new turn.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        earlier: ReducedCache | None = None,
        attention_mask: Tensor | None = None,
    ) -> None:
        super().__init__(config)
        self.earlier = ReducedCache(config) if earlier is None else earlier
        self.attention_mask = attention_mask
        self.seen = self.earlier.get_seq_length()
        self._begin()

    def _begin(self) -> None:
        """Take over what layers go on with: states, and the angles of the keys that they hold."""
        for i, layer in enumerate(self.earlier.layers):
            if hasattr(layer, "recurrent_states"):
                # A layer writes into its state, and the earlier turns stay as they are.
                self.layers[i] = copy.deepcopy(layer)
        self.angles = self.earlier.angles.copied()

    def reset(self) -> None:
        """Forget the turn, and nothing of those before."""
        super().reset()
        self._begin()

    def part(self, rows: Sequence[int]) -> TurnCache:
        """Return an empty cache for some rows of the batch."""
        index = torch.tensor(rows)
        earlier = self.earlier.copied()
        earlier.batch_select_indices(index)
        mask = self.attention_mask
        mask = None if mask is None else mask.index_select(0, index.to(mask.device))
        return TurnCache(self._config, earlier, mask)

    def first_position(self) -> Tensor:
        """Return the position [B, 1] of the turn's first token, where positions count by grids."""
        deltas = self.earlier.rope_deltas
        if self.attention_mask is None:
            before = torch.full((1, 1), self.seen)
        else:
            before = self.attention_mask[:, : self.seen].sum(dim=1, keepdim=True)
        return before if deltas is None else before.to(deltas.device) + deltas

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens, and return those of all turns that the layer holds."""
        new = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not self.seen:
            # Case: the example run of a capture.
            return new
        held: Any = self.earlier.layers[layer_idx]
        keys, values = (
            torch.cat([old, own], dim=-2)
            for old, own in zip((held.keys, held.values), new, strict=True)
        )
        return keys, values

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Add new tokens to an index of keys, and return that of all turns [B, P + M, d]."""
        new = super().update_indexer(indexer_key_states, layer_idx)
        held: Any = self.earlier.layers[layer_idx] if self.seen else None
        return new if held is None else torch.cat([held.indexer_keys, new], dim=1)

    def widened(
        self,
        mask: Tensor | BlockMask | None,
        hidden: Tensor,
        layer: int,
        places: Tensor | None,
    ) -> Tensor | BlockMask | None:
        """Return the mask of a layer, made for the new tokens, for the keys of all turns.

        Args:
            mask: None (a token sees those before it), or [B or 1, 1, M, M], boolean or additive.
            hidden: [B, M, d] of the new tokens.
            layer: Index of the layer.
            places: [B, M] which of the turn's tokens these are; None if they are all of them.

        Returns:
            The mask [B, 1, M, P + M]; the P keys of earlier turns that the layer holds come first.
        """
        if not self.seen:
            return mask
        assert mask is None or isinstance(mask, Tensor) and mask.ndim == 4
        visible, bias = self._earlier_keys(hidden, layer, places)
        batch, new = hidden.shape[:2]
        if mask is None:
            mask = torch.ones(1, 1, new, new, dtype=torch.bool, device=hidden.device).tril()
        mask = mask.to(hidden.device)
        if mask.dtype == torch.bool and bias is None:
            return torch.cat([visible, mask.expand(batch, -1, -1, -1)], dim=-1)
        # Additive: where there is a bias, or where the new tokens' mask is additive.
        lowest = torch.finfo(hidden.dtype).min
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, lowest)
        logits = hidden.new_zeros(1) if bias is None else bias[:, None, None, :].to(hidden)
        before = torch.where(visible, logits, lowest)
        return torch.cat([before, mask.expand(batch, -1, -1, -1)], dim=-1)

    @cached_property
    def _known(self) -> dict[str, Tensor]:
        """What the layers of each token space know of the keys of earlier turns."""
        spaces, flags = self.earlier.spaces, {}
        device = spaces[0].origin.device if spaces else None
        if self.attention_mask is not None:
            flags = {"attention_mask": self.attention_mask[:, : self.seen].to(device)}
        none = torch.zeros(1, 0, device=device)
        return flags | self.earlier.decode_inputs(flags.get("attention_mask"), none)

    def _earlier_keys(
        self, hidden: Tensor, layer: int, places: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return which earlier keys are seen, [B, 1, M, P], and their bias [B, P] or None."""
        held: Any = self.earlier.layers[layer]
        count, window = held.keys.shape[2], getattr(held, "sliding_window", None)
        (batch, new), device = hidden.shape[:2], hidden.device
        begun = [space for space in self.earlier.spaces if space.first_layer <= layer]
        known, suffix = self._known, f"_{len(begun)}" if begun else ""
        real = known.get(f"attention_mask{suffix}")
        if real is None:
            real = torch.ones(batch, count, device=device)
        visible = (real[:, -count:] != 0).to(device)[:, None, None, :].expand(-1, 1, new, -1)
        if window is not None:
            # A window is a distance in the original text, as in `WindowMask`.
            origin = known.get(f"key_positions{suffix}")
            if origin is None:
                origin = torch.arange(self.seen, device=device)[None]
            if places is None:
                places = torch.arange(new, device=device)[None]
            distance = (places + self.seen)[:, :, None] - origin[:, None, -count:].to(device)
            visible = visible & (distance < window)[:, None]
        bias = known.get(f"key_bias{suffix}")
        return visible, None if bias is None else bias[:, -count:]


def after_earlier(position_ids: Tensor, cache: TurnCache, space: int) -> Tensor:
    """Lower position ids by what earlier turns have moved up in a token space.

    Args:
        position_ids: [B, M] as if nothing had been dropped before this turn.
        cache: The cache of the turn.
        space: Number of the space, from 1.

    Returns:
        [B, M].
    """
    # Case: the example run of a capture, or a first turn whose prompt was not reduced.
    spaces = cache.earlier.spaces
    if not spaces:
        return position_ids
    return position_ids - _shift(cache.earlier, spaces[space - 1]).to(position_ids.device)


def append_turn(cache: ReducedCache, turn: TurnCache) -> None:
    """Add what a turn with images has left in its own cache to the cache of the turns before.

    Args:
        cache: The cache of the turns before. Changed in place.
        turn: The cache of the turn, filled.
    """
    spaces = [
        _joined(cache, turn, old, new) for old, new in zip(cache.spaces, turn.spaces, strict=True)
    ]
    layers: list[tuple[Any, Any]] = list(zip(cache.layers, turn.layers, strict=True))
    cache.angles = turn.angles
    for i, (layer, own) in enumerate(layers):
        if hasattr(own, "recurrent_states"):
            # Case: a state, which has gone on from that of the turns before.
            cache.layers[i] = own
        if getattr(own, "keys", None) is None:
            continue
        layer.update(own.keys, own.values)
        if getattr(own, "indexer_keys", None) is not None:
            layer.update_indexer(own.indexer_keys)
        if hasattr(own, "cumulative_length"):
            # A layer with a window holds fewer tokens than it has seen.
            layer.cumulative_length += own.cumulative_length - own.keys.shape[2]
    if turn.rope_deltas is not None:
        before = 0 if cache.rope_deltas is None else cache.rope_deltas
        cache.rope_deltas = before + turn.rope_deltas
    turns = [*cache.turns, (turn.seen, turn.images)]
    cache.record(turn.seen + turn.prompt_length, spaces, {})
    cache.turns = turns


def _joined(cache: ReducedCache, turn: TurnCache, old: TokenSpace, new: TokenSpace) -> TokenSpace:
    """Return the space of all turns: earlier ones, the text after them, and the new one."""
    rows, device = len(new.origin), new.origin.device
    between = torch.arange(cache.prompt_length, turn.seen, device=device).expand(rows, -1)
    # -1 is padding, wherever it is.
    own = torch.where(new.origin < 0, new.origin, new.origin + turn.seen)
    origin = torch.cat([old.origin.to(device), between, own], dim=1)
    bias = None
    if new.key_bias is not None:
        assert old.key_bias is not None
        held = torch.nn.functional.pad(old.key_bias.to(device), (0, between.shape[1]))
        bias = torch.cat([held, new.key_bias], dim=1)
    shift = None
    if old.shift is not None or new.shift is not None:
        shift = _shift(cache, old).to(device) + _shift(turn, new)
    return TokenSpace(new.first_layer, origin, bias, shift)


def _shift(cache: ReducedCache, space: TokenSpace) -> Tensor:
    """Return how far [B, 1] or [1, 1] tokens after a prompt move up in a space."""
    if space.shift is not None:
        return space.shift
    return torch.full((1, 1), cache.prompt_length - space.origin.shape[1])
