"""Which patches make which visual token: against tokens that are put together here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deos_fx.errors import NoGroups
from deos_fx.models.patch_tokens import tokens_of


def features_of(patches: Tensor, groups: list[list[int]]) -> Tensor:
    """A token of each group: a mixture of its patches, with positions and a norm after it."""
    norm = nn.LayerNorm(patches.shape[-1])
    mixed = [patches[group].mul(torch.rand(len(group), 1)).sum(dim=0) for group in groups]
    return norm(torch.stack(mixed) + torch.randn(patches.shape[-1]))


@pytest.mark.parametrize("count", [1, 2, 3, 11, 36, 64])
def test_every_patch_has_the_token_that_it_was_put_into(count: int) -> None:
    patches, order = torch.randn(3 * count + 2, 5, requires_grad=True), torch.randperm(3 * count)
    groups = order.view(count, 3).tolist()
    expected = torch.full((3 * count + 2,), -1)
    for token, group in enumerate(groups):
        expected[group] = token
    unread = torch.randn(4, 5, requires_grad=True)
    found = tokens_of(features_of(patches, groups), {0: unread, 3: patches})
    assert list(found) == [3] and torch.equal(found[3], expected)


@pytest.mark.parametrize("count", [2, 7, 20])
def test_a_patch_of_any_two_tokens_is_told(count: int) -> None:
    for first in range(count):
        for second in range(first):
            patches = torch.randn(2 * count, 5, requires_grad=True)
            groups = torch.arange(2 * count).view(count, 2).tolist()
            groups[first].append(2 * second)
            with pytest.raises(NoGroups, match="part of several visual tokens"):
                tokens_of(features_of(patches, groups), {0: patches})
