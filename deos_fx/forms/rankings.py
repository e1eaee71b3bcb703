"""Rankings of relaxed reductions that do not follow from scores alone."""

from __future__ import annotations

import torch
from torch import Tensor

from deos_fx.operator import grid

__all__ = ["grid_ranking", "last_first"]

AHEAD = 10.0
"""A lead, in deviations of the score, that is certain to open a gate first."""


def grid_ranking(places: Tensor, count: int, alive: Tensor) -> Tensor:
    """Rank the tokens by the grid's preference among those that are left in every row."""
    left = (alive.amin(dim=0) > 0.5).nonzero().squeeze(-1)
    ranking = torch.full_like(alive, -1.0)
    ranking[:, left] = grid.grid_preference(places[left], count).to(alive.dtype)
    return ranking


def last_first(ranking: Tensor, images: int, *, by_grid: bool) -> Tensor:
    """Return the ranking [R, V] with the last token of a prompt's last image before all others.

    All anchors of a grid rank alike, so the last of them makes way for it.
    """
    place = torch.arange(ranking.shape[-1], device=ranking.device)
    row = torch.arange(ranking.shape[0], device=ranking.device).unsqueeze(-1)
    ending = row % images == images - 1
    if by_grid:
        last_anchor = torch.where(ranking >= 1, place, -1).amax(dim=-1, keepdim=True)
        ranking = torch.where(ending & (place == last_anchor), ranking.detach().amin(), ranking)
    first = ranking.detach().amax(dim=-1, keepdim=True) + AHEAD
    return torch.where(ending & (place == place[-1]), first, ranking)
