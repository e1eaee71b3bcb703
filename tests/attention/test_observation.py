"""What is observed of attention, against weights computed in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deos_fx.attention.observation import AttentionView, Observation, received_attention


def test_no_n_by_n_attention_is_held() -> None:
    """Asking all of many tokens keeps a few rows at a time."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _: Any, args: Any, kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    length, heads, dim = 1024, 4, 16
    query, key = torch.randn(2, 1, heads, length, dim).unbind()
    view = AttentionView(query, key, None, dim**-0.5, causal=True)
    with Sizes():
        seen = received_attention(view, Observation(), (None, None, None))
    whole = torch.nn.functional.scaled_dot_product_attention(
        query, key, torch.eye(length).expand(1, heads, -1, -1), is_causal=True
    )
    assert_close(seen, whole.mean(dim=(1, 2)))
    assert largest <= heads * length * 64


def test_a_padding_mask_of_two_axes_is_read_like_one_of_four() -> None:
    query, key = torch.randn(2, 2, 4, 12, 8).unbind()
    real = torch.ones(2, 12, dtype=torch.int64)
    real[1, :3] = 0
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    four = causal & real[:, None, None, :].bool()
    asked = (torch.tensor([[5, 11], [4, 11]]), None, None)
    seen = [
        received_attention(AttentionView(query, key, mask, 0.3, causal=True), Observation(), asked)
        for mask in (real, four, torch.where(four, 0.0, torch.finfo(torch.float32).min))
    ]
    assert_close(seen[0], seen[1])
    assert_close(seen[0], seen[2])


def test_a_bias_of_the_block_is_in_what_is_observed() -> None:
    query, key = torch.randn(2, 2, 4, 12, 8).unbind()
    bias, causal = torch.randn(2, 4, 12, 12), torch.ones(12, 12, dtype=torch.bool).tril()
    asked = torch.tensor([[5, 11], [4, 11]])
    view = AttentionView(query, key, None, 0.3, causal=True, bias=bias)
    seen = received_attention(view, Observation(), (asked, None, None))
    logits = (query @ key.mT * 0.3 + bias).masked_fill(~causal, -torch.inf)
    weights = logits.softmax(dim=-1).mean(dim=1)
    assert_close(seen, torch.stack([weights[row, asked[row]].mean(dim=0) for row in range(2)]))


def test_gravity_needs_rotary_tables() -> None:
    view = AttentionView(*torch.randn(2, 1, 4, 8, 8).unbind(), None, 1.0, causal=False)
    with pytest.raises(ValueError, match="position_embeddings"):
        received_attention(view, Observation(gravity=True), (None, None, None))
