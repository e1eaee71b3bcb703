"""Sites in towers of which groups of patches make a visual token each."""

from __future__ import annotations

import pytest
from families import prompts, shared
from tiny import call_of

from deos_fx.models.facts import facts_of
from deos_fx.passes.analyse.groups import UNUSED, reasons_in_groups
from deos_fx.passes.analyse.sites import Encoder
from deos_fx.passes.pipeline import capture_call


def reasons(name: str) -> dict[int, str]:
    model = shared(name)
    return reasons_in_groups(facts_of(model), call_of(model, prompts(name)).inputs)


def test_blocks_that_features_depend_on_are_sites() -> None:
    assert reasons("qwen2_vl") == {0: "", 1: ""}
    # The features are read from the last block but one.
    assert reasons("llava_next") == {0: "", 1: "", 2: UNUSED}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("got_ocr2", "convolutions make"), ("idefics2", "queries read"), ("blip-2", "queries read")],
)
def test_patches_in_several_tokens_are_no_groups(name: str, reason: str) -> None:
    assert reason in reasons(name)[0]


@pytest.mark.parametrize("in_tower", [False, True])
def test_reductions_in_the_tower_are_captured_as_one_node(in_tower: bool) -> None:
    model = shared("internvl")
    inputs = call_of(model, prompts("internvl") | {"use_cache": False}).inputs
    sites = capture_call(model, inputs, in_tower).sites
    assert sites is not None and sites["vision.1"].available
    assert sites.encoder is (Encoder.OPAQUE if in_tower else Encoder.MIXING)
