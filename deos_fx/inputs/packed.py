"""Recognise rows in which not every token sees all tokens before it, such as packed samples.

transformers keeps the samples of a row apart in two ways: where position ids start again, if there
is neither an attention mask nor a cache; or by an attention mask of queries and keys, which may
hide anything from anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from deos_fx.models.upstream import CACHE

__all__ = ["packed_by", "refuse_lengths"]

_LENGTHS = (*FlashAttentionKwargs.__annotations__, "seq_idx")
"""Inputs that tell layers how long packed samples are."""

_APART = "give every sample a row of its own"


def refuse_lengths(inputs: Mapping[str, Any]) -> None:
    """Refuse lengths of packed samples: they would still count tokens that reductions dropped.

    Args:
        inputs: Arguments of the model's forward.

    Raises:
        ValueError: If the inputs have such lengths.
    """
    given = [name for name in _LENGTHS if inputs.get(name) is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} say how long packed samples are, which reductions change. Leave "
            "them out: position_ids that start again, without attention_mask and with "
            f"use_cache=False, say the same; or {_APART}."
        )


def packed_by(inputs: Mapping[str, Any], visual: Tensor) -> str:
    """Describe in words what keeps the tokens of a row apart; empty where every row is one prompt.

    Args:
        inputs: Arguments of the model's forward.
        visual: Flags [B, N] of the placeholders.

    Raises:
        ValueError: If position ids separate samples that the model itself would not keep apart, the
            mask has a form that the model does not take, or a sample ends in an image and another
            one follows it.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim in (2, 4)):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {shape}; give flags of real tokens [B, N], or [B, 1, N, N] of what "
            "every token sees."
        )
    # Case: a mask of queries and keys.
    if mask is not None and mask.ndim == 4:
        return _by_mask(mask, visual)
    given = inputs.get("position_ids")
    if given is None:
        return ""
    # transformers looks for samples in the place in the text. Of several coordinates, only a first
    # one of four is that; with three there is none to look at.
    looks = given.ndim == 2 or len(given) == 4
    positions = (given if given.ndim == 2 else given[0]).expand(visual.shape)
    if not looks or mask is not None or inputs.get(CACHE) is not None:
        # Case: the model does not separate samples, so positions must not look like several. Two
        # steps back are fine: those of padding, and, where positions are times and not places, that
        # to the text after a long video, which may have an earlier time than its last frame.
        passes = torch.zeros_like(visual) if looks else visual
        _refuse_going_back(positions, passes if mask is None else passes | (mask == 0))
        return ""
    # Case: the model separates samples where positions start again.
    samples = find_packed_sequence_indices(positions)
    if samples is None:
        return ""
    _check_borders(samples.diff(dim=1) != 0, visual)
    return "position_ids that start again inside a row"


def _refuse_going_back(positions: Tensor, passes: Tensor) -> None:
    """Refuse positions [B, N] smaller than the one before, unless one of the two is flagged."""
    if bool(((positions.diff(dim=1) < 0) & ~passes[:, 1:] & ~passes[:, :-1]).any()):
        raise ValueError(
            "position_ids go back inside a row, as those of packed samples do, and the model keeps "
            "samples apart only if it is given neither an attention_mask nor a cache. Pass "
            f"use_cache=False and no attention_mask, or {_APART}."
        )


def _by_mask(mask: Tensor, visual: Tensor) -> str:
    length = visual.shape[1]
    if mask.shape[-2:] != (length, length) or not (
        mask.dtype == torch.bool or mask.is_floating_point()
    ):
        raise ValueError(
            f"attention_mask is {mask.dtype} {tuple(mask.shape)}; for {length} tokens give flags "
            f"(torch.bool) or numbers to add (floats) of shape [B, 1, {length}, {length}]."
        )
    # Numbers to add are 0 where a key is seen, and hugely negative where it is not.
    sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    sees = sees.all(dim=1).expand(len(visual), -1, -1)
    # Case: the last token sees everything, so the row is one prompt.
    if bool(sees[:, -1].all()):
        return ""
    # A border is before every token that does not see the one before it.
    _check_borders(~sees.diagonal(offset=-1, dim1=1, dim2=2), visual)
    return f"an attention_mask {list(mask.shape)} by which the last token does not see all others"


def _check_borders(borders: Tensor, visual: Tensor) -> None:
    """Refuse images right before a border [B, N - 1]: their last token is the last of a sample."""
    if bool((borders & visual[:, :-1]).any()):
        raise ValueError(
            "A sample ends in an image, with another sample after it in the same row. The last "
            f"token of a row alone is kept whatever is reduced: {_APART}."
        )
