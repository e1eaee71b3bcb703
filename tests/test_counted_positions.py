"""Layers that count positions themselves (Llama 4), and attend within chunks of the prompt."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from families import FAMILIES, alone, built, continued, prompts, shared
from shortened import assert_reduced_is_shortened
from test_families import PRUNED

from deos_fx import Policy, ReducedModel, Reduction

pytestmark = pytest.mark.skipif(
    "llama4" not in FAMILIES, reason="this version of transformers fails in Llama 4 itself"
)


def test_features_that_are_not_as_wide_as_the_text_are_not_compared_with_it() -> None:
    step = Reduction("projector", 0.5, scores={"text_relevance": 1.0}, position="compact")
    with pytest.raises(ValueError, match="no score 'text_relevance' .its tokens are not as wide"):
        ReducedModel(shared("llama4"), Policy((step,)))(**prompts("llama4"))


def test_temperatures_go_by_what_a_layer_has_read() -> None:
    config = FAMILIES["llama4"].config()
    # A step for every 16 tokens, where real models have one for 8192.
    config.text_config.floor_scale, config.text_config.attn_scale = 16, 1.0
    model, prompt = built(config), alone("llama4", prompts("llama4"), 0)
    steps = tuple(replace(step, position="compact") for step in PRUNED["both"])
    longer = functools.partial(continued, "llama4", prompt)
    assert_reduced_is_shortened(model, ReducedModel(model, Policy(steps)), prompt, longer)
