"""Optimizers that continue from named tensors as if they had not stopped."""

from __future__ import annotations

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
