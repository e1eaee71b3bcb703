"""The cache of a reduced prompt: lengths, joined rows and what may be cropped."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Qwen3_5TextConfig

from deos_fx.tokens.cache import ReducedCache, TokenSpace, in_rows
from deos_fx.tokens.turn import TurnCache


def reduced(length: int, kept: int, rows: int = 1) -> ReducedCache:
    """A cache of two layers; the second holds a part of the prompt."""
    cache = ReducedCache(LlamaConfig(num_hidden_layers=2))
    for layer, held in enumerate((length, kept)):
        cache.update(*torch.randn(2, rows, 2, held, 4), layer)
    origin = torch.arange(length - kept, length).expand(rows, -1)
    cache.record(length, [TokenSpace(1, origin)], {})
    return cache


def test_the_text_and_what_has_reached_a_layer_have_lengths_of_their_own() -> None:
    cache = reduced(length=10, kept=6)
    assert cache.get_seq_length() == 10
    assert [cache.get_seq_length(layer) for layer in range(2)] == [10, 6]
    assert [cache.get_query_offset(layer) for layer in range(2)] == [10, 6]


def test_only_what_came_after_the_prompt_can_be_cropped() -> None:
    cache = reduced(length=10, kept=6)
    for layer in range(2):
        cache.update(*torch.randn(2, 1, 2, 3, 4), layer)
    cache.crop(-2)
    assert [cache.get_query_offset(layer) for layer in range(2)] == [11, 7]
    with pytest.raises(ValueError, match="reaches into the prompt of 10 tokens"):
        cache.crop(-2)
    cache.reset()
    assert (cache.spaces, cache.prompt_length) == ([], 0)


def test_new_tokens_follow_those_that_are_left() -> None:
    cache = reduced(length=10, kept=6)
    inputs = cache.decode_inputs(None, torch.tensor([[10]]))
    assert inputs["position_ids_1"].tolist() == [[6]]
    assert inputs["key_positions_1"].tolist() == [[4, 5, 6, 7, 8, 9, 10]]
    cache.spaces[0].shift = torch.tensor([[1]])
    assert cache.decode_inputs(None, torch.tensor([[10]]))["position_ids_1"].tolist() == [[9]]


def test_joined_rows_are_padded_in_front_and_in_the_order_of_the_batch() -> None:
    short, long = torch.ones(1, 2), torch.full((2, 3), 2.0)
    together = in_rows([short, long], [1, 0, 2], axis=1)
    assert together.tolist() == [[2, 2, 2], [0, 1, 1], [2, 2, 2]]
    parts = [reduced(4, 2), reduced(6, 3, rows=2)]
    cache = ReducedCache(LlamaConfig(num_hidden_layers=2))
    cache.join(parts, [1, 0, 2])
    assert cache.rows == 3
    assert torch.equal(cache.layers[1].keys[1, :, 1:], parts[0].layers[1].keys[0])
    assert not cache.layers[1].keys[1, :, 0].any()


def test_rows_of_states_are_repeated_and_selected() -> None:
    kinds = ["linear_attention", "full_attention"]
    cache = ReducedCache(Qwen3_5TextConfig(num_hidden_layers=2, layer_types=kinds))
    assert cache.has_states
    convolved, recurrent, keys = (
        torch.randn(2, 6, 4),
        torch.randn(2, 2, 4, 4),
        torch.randn(2, 2, 5, 4),
    )
    cache.update_conv_state(convolved, 0)
    cache.update_recurrent_state(recurrent, 0)
    cache.update(keys, keys, 1)
    cache.record(9, [TokenSpace(0, torch.arange(10).view(2, 5))], {})
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    cache.batch_select_indices(torch.tensor([1]))
    linear, full = cache.layers
    assert torch.equal(linear.conv_states[0], convolved[1:])
    assert torch.equal(linear.recurrent_states[0], recurrent[1:])
    assert torch.equal(full.keys, keys[1:])
    assert cache.spaces[0].origin.tolist() == [[5, 6, 7, 8, 9]]


def indexed(held: int, rows: int = 1) -> ReducedCache:
    """A cache of a layer with an index and its angles, and of one that has nothing else."""
    kinds = ["indexed_attention"] * 2
    cache = ReducedCache(LlamaConfig(num_hidden_layers=2, layer_types=kinds))
    cache.update(*torch.randn(2, rows, 1, held, 4), 0)
    for layer in range(2):
        cache.update_indexer(torch.randn(rows, held, 3), layer)
    cache.angles.update(0, tuple(torch.randn(2, rows, held, 6)))
    cache.record(held, [], {})
    return cache


def test_an_index_of_keys_goes_with_them() -> None:
    parts = [indexed(4), indexed(6, rows=2)]
    cache = ReducedCache(LlamaConfig(num_hidden_layers=2))
    cache.join(parts, [1, 0, 2])
    assert cache.has_index and "hold no keys of their own" in cache.why_no_images(2)
    for layer, short, long in zip(cache.layers, *(part.layers for part in parts), strict=True):
        assert torch.equal(layer.indexer_keys[1, 2:], short.indexer_keys[0])
        assert not layer.indexer_keys[1, :2].any()
        assert torch.equal(layer.indexer_keys[2], long.indexer_keys[1])
    # Angles of a new token, which all rows have in common, come last.
    new = tuple(torch.randn(2, 1, 1, 6))
    of_first, of_second = (part.angles.update(0, new) for part in parts)
    angles = cache.angles.update(0, new)
    for short, long, joined in zip(of_first, of_second, angles, strict=True):
        assert torch.equal(joined[1, 2:], short[0]) and torch.equal(joined[2], long[1])
    again = cache.copied()
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([2, 1, 1]))
    assert torch.equal(cache.angles.update(0, new)[0][0], angles[0][2])
    assert torch.equal(again.angles.update(0, new)[1][:, :-1], angles[1])
    assert torch.equal(cache.layers[1].indexer_keys[0], parts[1].layers[1].indexer_keys[1, :-1])
    assert cache.layers[1].keys is None
    cache.layers.pop()
    assert not cache.why_no_images(1)
    cache.reset()
    # Nothing is left in front of new angles.
    assert torch.equal(cache.angles.update(0, new)[0], new[0])


def test_a_turn_begins_with_the_states_of_earlier_ones_and_leaves_them_alone() -> None:
    config = LlamaConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    earlier = ReducedCache(config)
    earlier.update_recurrent_state(torch.ones(1, 2, 3), 0)
    earlier.update(*torch.randn(2, 1, 1, 5, 4), 1)
    turn = TurnCache(config, earlier)
    for _ in range(2):
        # A turn that is begun again, as where a guard has failed, begins the same.
        state = turn.layers[0].recurrent_states[0]
        assert torch.equal(state, torch.ones(1, 2, 3))
        turn.update_recurrent_state(torch.zeros(1, 2, 3), 0)
        turn.reset()
    assert torch.equal(earlier.layers[0].recurrent_states[0], torch.ones(1, 2, 3))
    assert not turn.get_seq_length() and earlier.get_seq_length() == 5
