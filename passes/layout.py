"""What is constant about the prompts a graph is lowered for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deos_fx.reduction import Reduction, split_site

__all__ = ["PromptLayout", "rule_before_decoder"]


@dataclass(frozen=True)
class PromptLayout:
    """Where and how many the visual tokens of a prompt are.

    Attributes:
        image_token: Id of the image placeholder.
        images: Images per prompt.
        grid: Rows and columns of one image's tokens.
    """

    image_token: int
    images: int
    grid: tuple[int, int]

    @property
    def tokens_per_image(self) -> int:
        """V of one image."""
        return self.grid[0] * self.grid[1]

    def grid_tensor(self, images: int) -> Tensor:
        """Image, row and column of every token of `images` images: int64 [images * V, 3]."""
        axes = [torch.arange(side) for side in (images, *self.grid)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def rule_before_decoder(reductions: Iterable[Reduction]) -> str:
    """How positions follow the reductions before the decoder, which shorten the prompt at once.

    The rule that moves tokens furthest holds for all of them: ``compact`` before ``keep``.
    """
    rules = {step.position for step in reductions if split_site(step.site)[0] != "decoder"}
    return "compact" if "compact" in rules else "keep"
