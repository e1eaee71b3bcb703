"""The reductions of a policy as steps, and the tokens that each of them finds at its site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from deos_fx.passes.analyse.sites import Site
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import split_site

__all__ = ["Group", "Inside", "Place", "Step"]


@dataclass(frozen=True)
class Step:
    """One reduction of the walk.

    Attributes:
        reduction: The reduction; of a relaxed one, its start.
        site: Its site.
        needs: Names of the features that it reads.
        counts: Number of tokens that it keeps of each image; empty if it is relaxed.
    """

    reduction: Reduction
    site: Site
    needs: frozenset[str]
    counts: tuple[int, ...] = ()

    @property
    def stage(self) -> str:
        """Return the stage of its site: ``vision``, ``projector`` or ``decoder``."""
        return split_site(self.site.name)[0]


@dataclass(frozen=True)
class Place:
    """The visual tokens at a site, and what reads them.

    Attributes:
        whole: The hidden states that they are part of: those of images [I, c + V, d] with c class
            tokens before the decoder, those of prompts [B, N, d] in it.
        own: The visual tokens alone, [I, V, d] or [B, V, d].
        features: Their features.
    """

    whole: fx.Node
    own: fx.Node
    features: Mapping[str, Any]


@dataclass(frozen=True)
class Group(Place):
    """The visual tokens [I, V, d] of images of one size that are already in prompts [B, N, d].

    Attributes:
        images: Numbers of these images in a prompt.
        columns: Their places among the visual tokens of a prompt; None if they are all images.
        cells: Image, row and column of the tokens of one of them.
        mass: Their masses [I, V]; None while every mass is 1.
    """

    images: Sequence[int]
    columns: torch.Tensor | None
    cells: fx.Node | torch.Tensor
    mass: fx.Node | None


@dataclass(frozen=True)
class Inside:
    """What reductions of groups of patches in the tower have left of a prompt.

    Attributes:
        kept: Indices [B, K] of the tokens that are left among a prompt's visual tokens.
        mass: Their masses [B, K]; None while every mass is 1.
        sizes: Number of tokens that are left of each image.
    """

    kept: fx.Node
    mass: fx.Node | None
    sizes: tuple[int, ...]
