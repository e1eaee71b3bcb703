"""Write the state of an optimizer as named tensors, so that checkpoints need no pickle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["load_optimizer", "optimizer_tensors"]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return moments and step counts by name: ``<parameter>/<moment>``."""
    return {
        f"{i}/{name}": value
        for i, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state that `optimizer_tensors` returned.

    Args:
        optimizer: An optimizer over the same parameters; its settings stay as they are.
        tensors: The named tensors.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        i, _, moment = name.partition("/")
        state.setdefault(int(i), {})[moment] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
