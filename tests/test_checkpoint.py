"""Optimizers that continue from named tensors as if they had not stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deos_fx.checkpoint import load_optimizer, optimizer_tensors


def test_adam_continues() -> None:
    def start() -> tuple[torch.nn.Linear, torch.optim.Adam]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.Adam(layer.parameters(), lr=0.1)

    def step(layer: torch.nn.Linear, optimizer: torch.optim.Adam) -> None:
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, steady = start(), start()
    for _ in range(4):
        step(*whole)
    for _ in range(2):
        step(*steady)
    tensors = optimizer_tensors(steady[1])
    assert set(tensors) == {f"{i}/{m}" for i in (0, 1) for m in ("step", "exp_avg", "exp_avg_sq")}
    again = torch.optim.Adam(steady[0].parameters(), lr=0.1)
    load_optimizer(again, {name: value.clone() for name, value in tensors.items()})
    for _ in range(2):
        step(steady[0], again)
    assert torch.equal(whole[0].weight, steady[0].weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0/exp_avg": torch.zeros(3)}, r"'0/exp_avg' of shape \(3,\)"),
        ({"1/exp_avg": torch.full((2,), torch.nan)}, "not finite in '1/exp_avg'"),
        ({"2/exp_avg": torch.zeros(3)}, "has '2/exp_avg'"),
        ({"1/exp_avg": None}, "lacks '1/exp_avg'"),
    ],
)
def test_states_of_other_optimizers_are_refused(change: dict[str, Any], message: str) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(optimizer) | change
    given = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(ValueError, match=f"the state of the optimizer .*{message}"):
        load_optimizer(torch.optim.Adam(layer.parameters()), given)


def test_a_parameter_may_have_had_no_gradient_yet() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([unused, used])
    used.sum().backward()
    optimizer.step()
    again = torch.optim.Adam([unused, used])
    load_optimizer(again, optimizer_tensors(optimizer))
    assert optimizer_tensors(again).keys() == {"1/step", "1/exp_avg", "1/exp_avg_sq"}
