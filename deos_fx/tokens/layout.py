"""The layout of images that all prompts of a lowered graph share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deos_fx.operator import grid_anchors
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import split_site

__all__ = ["PromptLayout", "grid_after", "grid_of_prompt", "rule_before_decoder"]


@dataclass(frozen=True)
class PromptLayout:
    """The images of a prompt, and the number and arrangement of their visual tokens.

    Attributes:
        image_token: Id of the image placeholder, or the ids of all kinds of placeholders.
        images: Images per prompt; each frame of a video counts as one.
        grid: Rows and columns of one image's tokens.
        separators: Number of placeholders in a prompt that are not part of an image (ends of rows);
            they are never reduced.
        placed: Whether the grid is known; otherwise all tokens of an image count as one row.
        grids: Rows and columns of every image, if they differ; ``grid`` is then the first.
        ends: Whether the prompt ends in a visual token. The next token is predicted from it, so it
            is always kept.
        pictures: Rows and columns of the pictures that the tokens of a prompt lie on, one behind
            the other, where an image has several: the whole image, and its tiles put together.
        packed: Reason, in words, why not every token of a row sees all before it (packed samples);
            empty where every row is one prompt.
    """

    image_token: int | tuple[int, ...]
    images: int
    grid: tuple[int, int]
    separators: int = 0
    placed: bool = True
    grids: tuple[tuple[int, int], ...] = ()
    ends: bool = False
    pictures: tuple[tuple[int, int], ...] = ()
    packed: str = ""

    @property
    def tokens_per_image(self) -> int:
        """Return V of one image.

        Raises:
            ValueError: If images have different numbers of tokens.
        """
        if len(set(self.sizes)) > 1:
            raise ValueError(
                f"The images of a prompt have {', '.join(map(str, self.sizes))} visual tokens. "
                "This works for images of one size: pass images one by one."
            )
        return self.sizes[0]

    @property
    def each_grid(self) -> tuple[tuple[int, int], ...]:
        """Return rows and columns of every image."""
        return self.grids or (self.grid,) * self.images

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return V of every image."""
        return tuple(rows * columns for rows, columns in self.each_grid)

    def alike(self) -> list[list[int]]:
        """Return the indices of the images of each size, in groups."""
        # In the order of the first image of each size.
        grids = self.each_grid
        return [[i for i, grid in enumerate(grids) if grid == one] for one in dict.fromkeys(grids)]

    def grid_tensor(self, images: int) -> Tensor:
        """Return image, row and column of every token of `images` images: int64 [images * V, 3]."""
        grids = self.grids[:images] or (self.grid,) * images
        return torch.cat([_cells(image, *grid) for image, grid in enumerate(grids)])


def _cells(image: int, rows: int, columns: int) -> Tensor:
    axes = [torch.tensor([image]), torch.arange(rows), torch.arange(columns)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def grid_after(reduction: Reduction, count: int, grid: Tensor) -> Tensor | None:
    """Return the part of a grid that a reduction keeps, if it is the same for all inputs.

    Args:
        reduction: The reduction.
        count: K, the number of tokens that it keeps.
        grid: [V, 3], image, row and column of the incoming tokens, the same in all rows.

    Returns:
        [K, 3], or None if the kept tokens depend on the input.
    """
    # Anchors of the grid are chosen by place alone; everything else reads the tokens.
    if reduction.selector != "grid" or reduction.tiers:
        return None
    return grid[grid_anchors(grid, count)[0]]


def grid_of_prompt(grid: Tensor, images: int) -> Tensor:
    """Return the grid [images * K, 3] of a prompt whose images all have the grid [K, 3]."""
    # The first coordinate is the number of the image.
    return torch.cat([grid + torch.tensor([image, 0, 0]) for image in range(images)])


def rule_before_decoder(reductions: Iterable[Reduction]) -> str:
    """Return the one position rule of all reductions before the decoder.

    Together they shorten the prompt once. The rule that moves tokens furthest holds for all of
    them: ``compact`` before ``grid`` before ``keep``.
    """
    rules = {step.position for step in reductions if split_site(step.site)[0] != "decoder"}
    return next((rule for rule in ("compact", "grid") if rule in rules), "keep")
