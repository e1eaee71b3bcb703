"""One rule for how close two results must be: relative to their scale and their precision.

How far rounding alone takes a result is measured by `rounding.py`, with the oracle of the tests:
the original model without the dropped tokens, in float32 and in float64, in the prompt and while
decoding. In units of float32's epsilon times the largest logit, the two are 6 to 13 apart in nearly
every family. Two runs in float32 that add in another order may both be that far off, in opposite
directions, and another machine adds in an order of its own: that is 32, of which the tests of
families use up 12 here. Models that amplify rounding are listed with what they need: their oracle
itself is farther from its exact values.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = 32
"""So many roundings, each of the largest value, may lie between two ways to the same result."""

# What rounding.py says of the oracle is beside them.
AMPLIFIED = {
    "granite4_vision": 128,  # 79
    "gemma4": 128,  # 160
    "gemma4_unified": 128,  # 67
    "muse_glimmer": 128,  # 65
    "muse_spark": 256,  # 208
    "glm5_next": 128,  # 82
    "granite_vision": 64,  # 43
    "qwen3_5_moe": 64,  # 43
    "minicpm_ocr": 48,  # 39
    "dots3_note": 48,  # 39
    "glm5_next_shared": 48,  # 20
    "glm_ocr": 48,  # 18
    "glm4v_moe": 48,  # 17
}


def roundings_of(name: str) -> int:
    """How many roundings may lie between two ways to the same result of a family's model."""
    return AMPLIFIED.get(name, ROUNDINGS)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference of two tensors of one shape."""
    assert ours.shape == theirs.shape, f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    return _scale(ours - theirs)


def tolerance(expected: Tensor, roundings: float = ROUNDINGS) -> float:
    """The largest absolute difference that rounding explains.

    Args:
        expected: The right values; their precision is the coarser of the two that are compared.
        roundings: Units in the last place of the largest value.
    """
    return roundings * torch.finfo(expected.dtype).eps * _scale(expected)


def _scale(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def assert_close(ours: Tensor, theirs: Tensor, roundings: float = ROUNDINGS) -> None:
    """Fail unless two tensors of one shape differ by rounding alone.

    What is masked, that is infinite or the largest number there is, must be the same in both and
    says nothing about the scale.
    """
    masked = theirs.abs() >= torch.finfo(theirs.dtype).max
    assert ours.shape == theirs.shape, f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    assert torch.equal(ours[masked], theirs[masked]), "other values are masked"
    ours, theirs = ours.masked_fill(masked, 0.0), theirs.masked_fill(masked, 0.0)
    found, allowed = difference(ours, theirs), tolerance(theirs, roundings)
    assert found <= allowed, f"differ by {found:.2e}; rounding explains {allowed:.2e}"


def assert_onnx_close(ours: Tensor, theirs: Tensor) -> None:
    """Fail unless ONNX Runtime gives what PyTorch gives, as close as an export is checked for.

    Its kernels add in another order and fuse steps: up to 1e-4 of the largest value.
    """
    found, allowed = difference(ours, theirs), 1e-4 * _scale(theirs)
    assert found <= allowed, f"differ by {found:.2e}; ONNX Runtime may by {allowed:.2e}"
