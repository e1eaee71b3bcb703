"""Layers that count positions themselves (Llama 4), and attend within chunks of the prompt."""

from __future__ import annotations

import functools
from dataclasses import replace

from families import FAMILIES, alone, built, continued, prompts
from shortened import assert_reduced_is_shortened
from test_families import PRUNED

from deos_fx import Policy, ReducedModel


def test_temperatures_go_by_what_a_layer_has_read() -> None:
    config = FAMILIES["llama4"].config()
    # A step for every 16 tokens, where real models have one for 8192.
    config.text_config.floor_scale, config.text_config.attn_scale = 16, 1.0
    model, prompt = built(config), alone("llama4", prompts("llama4"), 0)
    steps = tuple(replace(step, position="compact") for step in PRUNED["both"])
    longer = functools.partial(continued, "llama4", prompt)
    assert_reduced_is_shortened(model, ReducedModel(model, Policy(steps)), prompt, longer)
