"""Which of the kept tokens receive, and how much."""

from __future__ import annotations

import torch

from deos_fx import operator


def test_nearest_gives_ties_to_the_first() -> None:
    similarity = torch.tensor([[[0.0, 1, 2], [0, 1, 3], [0, 0, 3]]])
    expected = torch.tensor([[[1.0, 1, 0], [0, 0, 1], [0, 0, 0]]])
    assert torch.equal(operator.nearest(similarity), expected)
