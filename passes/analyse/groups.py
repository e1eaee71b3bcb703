"""Say which blocks of a vision tower are sites because groups of patches make visual tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from deos_fx.attention.mask import attention_modules
from deos_fx.attention.observation import OBSERVED
from deos_fx.cost.measure import once
from deos_fx.errors import NoGroups
from deos_fx.inputs.items import IMAGES, encoding
from deos_fx.models.facts import ModelFacts
from deos_fx.models.groups import find_groups

__all__ = ["OF_GROUPS", "UNUSED", "hands_on", "reasons_in_groups"]

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
        used = once(facts, "blocks of groups", lambda: _used(facts, inputs))
    except NoGroups as reason:
        # Not remembered: it may be for the sizes of these images alone.
        return dict.fromkeys(blocks, str(reason))
    return {i: "" if i < used else UNUSED for i in blocks}


def hands_on(block: nn.Module) -> bool:
    """Return whether a block has attention to observe, and hands further arguments on to it."""
    parameters = inspect.signature(type(block).forward).parameters.values()
    return bool(attention_modules(block)) and any(one.kind is one.VAR_KEYWORD for one in parameters)


def _used(facts: ModelFacts, inputs: Mapping[str, Any]) -> int:
    """Count the vision blocks up to the last that features are read from, in groups of patches."""
    model = facts.model
    core: Any = model.base_model
    method, given = encoding(facts, inputs, IMAGES)
    blocks = [model.get_submodule(path) for path in facts.blocks.vision]
    try:
        return find_groups(core, getattr(type(core), method), blocks, (), given).used
    except NoGroups:
        raise
    # How code of a family fails where gradients or made-up weights go through it is up to it.
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        (first, *_) = str(error).splitlines() or [""]
        raise NoGroups(
            f"its patches cannot be followed ({type(error).__name__}: {first})"
        ) from error
