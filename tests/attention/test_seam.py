"""Blocks that are looked into, and what they refuse."""

from __future__ import annotations

import pytest
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
