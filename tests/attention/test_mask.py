"""Masks with a bias: what attention makes of them."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from torch import Tensor
from torch.nn import functional as F

from deos_fx.attention.mask import attention_of, biased_mask

B, N, D = 2, 6, 4
HIDDEN, BIAS = torch.randn(B, N, D), torch.randn(B, N)
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()
PADDED = CAUSAL & (torch.arange(N) > 1)
PADDED[:2, 0] = True


def attended(mask: Tensor, queries: int = N) -> Tensor:
    return F.scaled_dot_product_attention(HIDDEN[:, -queries:], HIDDEN, HIDDEN, mask[:, 0])


def expected(visible: Tensor, queries: int = N) -> Tensor:
    logits = HIDDEN[:, -queries:] @ HIDDEN.mT / D**0.5 + BIAS[:, None]
    return logits.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ HIDDEN


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask(causal: bool) -> None:
    visible = CAUSAL if causal else torch.ones_like(CAUSAL)
    assert_close(attended(biased_mask(None, BIAS, HIDDEN, causal)), expected(visible))


def test_the_last_query_belongs_to_the_last_key() -> None:
    mask = biased_mask(None, BIAS, HIDDEN[:, -2:], True)
    assert_close(attended(mask, 2), expected(CAUSAL[-2:], 2))


@pytest.mark.parametrize("additive", [False, True])
def test_with_a_mask(additive: bool) -> None:
    lowest = torch.finfo(torch.float32).min
    mask = torch.where(PADDED, 0.0, lowest) if additive else PADDED
    assert_close(attended(biased_mask(mask[None, None], BIAS, HIDDEN, True)), expected(PADDED))


def test_a_cache_of_fewer_keys_takes_the_last_of_the_bias() -> None:
    mask = biased_mask(CAUSAL[None, None, -1:, -3:], BIAS, HIDDEN[:, -1:], True)
    assert_close(mask[:, 0, 0], BIAS[:, -3:])


def test_half_precision_does_not_overflow() -> None:
    half = HIDDEN.half()
    lowest = torch.full((1, 1, N, N), torch.finfo(torch.float16).min, dtype=torch.float16)
    mask = biased_mask(lowest, BIAS.half() - 100, half, True)
    assert mask.dtype == torch.float16 and mask.isfinite().all()


def test_blocks_without_attention_are_named() -> None:
    with pytest.raises(ValueError, match="Linear has no submodule whose config names an attention"):
        attention_of(torch.nn.Linear(2, 2))
