"""Say which blocks of a vision tower are sites because groups of patches make visual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deos_fx.attention.observation import OBSERVED
from deos_fx.cost.tower import blocks_of_groups
from deos_fx.errors import NoGroups
from deos_fx.models.facts import ModelFacts

__all__ = ["OF_GROUPS", "UNUSED", "reasons_in_groups"]

OF_GROUPS = frozenset({"tokens", "grid", "keys", "joint_keys"}) | {
    name for name, (_, queries) in OBSERVED.items() if queries == "visual"
}
"""Features at a site whose tokens are groups of patches, if the attention of its block is seen."""

UNUSED = "its output is not used by the language model"
"""Reason of a block that nothing reads."""


def reasons_in_groups(facts: ModelFacts, inputs: Mapping[str, Any]) -> dict[int, str]:
    """Say why groups of patches cannot be reduced after each vision block; empty if they can.

    What holds for the images of one call is taken to hold for those of all others of the model, and
    is checked again for the sizes that a reduced model meets.

    Args:
        facts: The facts of the model.
        inputs: Arguments of its forward, with images.
    """
    blocks = range(len(facts.blocks.vision))
    try:
        fine, before = blocks_of_groups(facts, inputs)
    except NoGroups as reason:
        # Not remembered: it may be for the sizes of these images alone.
        return dict.fromkeys(blocks, str(reason))
    early = dict.fromkeys(range(fine.start), before)
    return {i: "" if i in fine else early.get(i, UNUSED) for i in blocks}
