"""Blocks that are looked into, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from families import NEWER, prompts, shared
from masked import layers_of
from tiny import shared_llava, tiny_llava

from deos_fx.attention.mask import is_causal
from deos_fx.attention.observation import Observation
from deos_fx.attention.seam import ObservedBlock


def test_joint_attention_needs_as_many_key_heads() -> None:
    block = shared_llava().model.language_model.layers[0]
    with pytest.raises(ValueError, match="2 and 4. Use attention_cls"):
        ObservedBlock(block, (Observation(heads="joint"),))


def test_flash_attention_takes_no_bias() -> None:
    block = tiny_llava().model.language_model.layers[0]
    block.self_attn.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no bias"):
        is_causal(block)


@pytest.mark.skipif(not NEWER, reason="transformers 5.23 does not have this family")
def test_attention_is_that_to_chosen_keys_beside_sinks() -> None:
    # The last layer sees the keys that the one before has chosen.
    model, given, seen = shared("hy_v4_vl"), dict[int, Any](), dict[int, Any]()
    layers, handles = layers_of(model), []
    for i in (3, 4):
        before = lambda _, args, kwargs, i=i: given.update({i: (args, kwargs)})  # noqa: E731
        after = lambda _, args, output, i=i: seen.update({i: output[1]})  # noqa: E731
        handles.append(layers[i].register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layers[i].self_attn.register_forward_hook(after))
    whole = model(**prompts("hy_v4_vl", 2), use_cache=False, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    last = torch.full((2, 1), seen[3].shape[-1] - 1)
    for i, ((hidden,), kwargs) in given.items():
        observed = ObservedBlock(layers[i], (Observation(),))
        (output, _), received = observed(hidden, asked=((last, None, None),), **kwargs)
        weights = seen[i][:, :, -1]
        assert_close(received, weights.mean(dim=1))
        assert (weights > 0).sum(dim=-1).max() <= 8
        assert weights.sum(dim=-1).max() < 1
        assert i == 4 or torch.equal(output, whole.hidden_states[4])
