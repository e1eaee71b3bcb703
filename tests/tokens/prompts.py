"""Prompts of random ids, for functions on the tokens of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

B, N, V, K = 3, 12, 6, 2
IMAGE = 99


def prompt(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids [B, N] with V placeholders at random places, and these places [B, V]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (B, N), generator=generator)
    places = torch.stack([torch.randperm(N, generator=generator)[:V].sort().values for _ in ids])
    return ids.scatter(1, places, IMAGE), places


def choice(seed: int = 1) -> Tensor:
    """K of V tokens for every row, ascending: [B, K]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(V, generator=generator)[:K].sort().values for _ in range(B)])
