"""Say what presets need of a model, and what a model lacks that does not have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deos_fx.presets.shape import Shape

__all__ = ["ATTENTION", "BLOCKS", "EARLIER", "PLACES", "TOWER", "WINDOWS", "Need"]


@dataclass(frozen=True)
class Need:
    """What a method needs of a model.

    Attributes:
        met: Whether a model has it.
        lacking: Says what a model lacks that does not have it.
    """

    met: Callable[[Shape], bool]
    lacking: str


TOWER = Need(
    lambda shape: shape.used_blocks > 0 and not shape.unseen,
    "it reads the attention of the vision tower, and in this model visual tokens are not made of "
    "the patches of its blocks, or the blocks' attention cannot be observed, or only a call shows "
    "it (in Python, give example_inputs)",
)
EARLIER = Need(
    lambda shape: not shape.in_groups,
    "it reads the attention of an earlier block of the vision tower, and where groups of patches "
    "make a visual token only the block before a site is observed",
)
BLOCKS = Need(
    lambda shape: shape.tower_sites > 0,
    "it reduces after blocks of the vision tower, and this model's features are read from the "
    "first of them as well",
)
ATTENTION = Need(
    lambda shape: any(i not in shape.without_attention for i in range(shape.decoder_sites)),
    "it reads the attention of decoder layers, and no layer with a site has any",
)
PLACES = Need(
    lambda shape: shape.placed,
    "it needs rows and columns of the visual tokens, which are not known for this model's images",
)
WINDOWS = Need(
    lambda shape: 1 not in shape.grid or shape.visual_tokens == 1,
    "it needs a grid of visual tokens, and these are no square, or their rows and columns are not "
    "known",
)
