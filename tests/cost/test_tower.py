"""Which blocks of a tower the features are read from: what capture finds, without a capture."""

from __future__ import annotations

from families import shared
from tiny import shared_llava

from deos_fx.cost.tower import blocks_read
from deos_fx.models.facts import facts_of


def test_blocks_that_features_are_read_from() -> None:
    # LLaVA reads the last but one of three blocks; vipllava those before the last.
    assert blocks_read(facts_of(shared_llava())) == (1,)
    assert blocks_read(facts_of(shared("vipllava"))) == (0, 1)
    assert blocks_read(facts_of(shared("paligemma"))) == (1,)


def test_patches_that_are_mixed_are_no_features() -> None:
    # Pixel shuffling, and a pool, even of windows of one patch.
    assert blocks_read(facts_of(shared("internvl"))) == ()
    assert blocks_read(facts_of(shared("gemma3"))) == ()
    # Queries, whose number a table gives for numbers of patches.
    assert blocks_read(facts_of(shared("aria"))) == ()
