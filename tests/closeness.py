"""One rule for how close two results must be: relative to their scale and their precision."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = 64
"""So many roundings, each of the largest value, may lie between two ways to the same result."""


def tolerance(expected: Tensor, roundings: float = ROUNDINGS) -> float:
    """The largest absolute difference that rounding explains.

    Args:
        expected: The right values; their precision is the coarser of the two that are compared.
        roundings: Units in the last place of the largest value.
    """
    return roundings * torch.finfo(expected.dtype).eps * expected.abs().max().item()


def assert_close(ours: Tensor, theirs: Tensor, roundings: float = ROUNDINGS) -> None:
    """Fail unless two tensors of one shape differ by rounding alone."""
    assert ours.shape == theirs.shape, f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    found, allowed = (ours - theirs).abs().max().item(), tolerance(theirs, roundings)
    assert found <= allowed, f"differ by {found:.2e}; rounding explains {allowed:.2e}"
