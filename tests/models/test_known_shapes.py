"""What operations on the meta device make is remembered, and is what they would make again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from deos_fx.models.known_shapes import on_meta

WIDE, TALL, WHOLE = (
    torch.empty(2, 6, 4, device="meta"),
    torch.empty(4, 3, device="meta").t(),
    torch.empty(2, 6, dtype=torch.int64, device="meta"),
)


class _Remembered(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_meta(func, args, kwargs or {})


def of(result: Any) -> list[Any]:
    return [(x.shape, x.stride(), x.dtype, x.device) for x in pytree.tree_leaves(result)]


@pytest.mark.parametrize(
    "operation",
    [
        lambda: WIDE * 2 + WIDE[0],
        lambda: (WHOLE * 1, WHOLE * 1.0, WHOLE * True, WHOLE.half() * 1),
        lambda: torch.cat([WIDE, WIDE.transpose(0, 1).contiguous().view(2, 6, 4)], dim=1),
        lambda: F.layer_norm(WIDE, (4,)),
        lambda: torch.native_layer_norm(WIDE, (4,), None, None, 1e-5),
        lambda: (
            WIDE.softmax(-1),
            WIDE.softmax(-1, torch.float64),
            WIDE.sum(1),
            WIDE.amax(-1, True),
        ),
        lambda: (TALL.clone(), TALL + 1, TALL.contiguous(), torch.empty_like(TALL)),
        lambda: WIDE.topk(3, dim=1),
        lambda: (WIDE.split(2, dim=1), WIDE.unbind(0)),
        lambda: F.conv1d(WIDE, torch.empty(5, 6, 2, device="meta")),
        lambda: torch.zeros_like(WIDE, device="cpu"),
        lambda: WIDE.new_zeros(2, device="cpu"),
    ],
)
def test_a_result_is_the_same_again(operation: Callable[[], Any]) -> None:
    expected = of(operation())
    for _ in range(2):
        with _Remembered():
            found = operation()
        assert of(found) == expected


def test_views_and_changes_in_place_are_not_remembered() -> None:
    for _ in range(2):
        base = torch.empty(3, 4, device="meta")
        with _Remembered():
            row = base[1]
            row.add_(1)
        assert row._is_view() and base._version == 1


def test_gradients_go_through_what_is_remembered() -> None:
    for _ in range(2):
        leaf = torch.empty(3, 4, device="meta", requires_grad=True)
        with _Remembered():
            (leaf.exp() @ TALL.t().new_empty(4, 2)).sum().backward()
        assert isinstance(leaf.grad, Tensor)
