"""Write the state of an optimizer as named tensors, so that checkpoints need no pickle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["check_tensors", "load_optimizer", "optimizer_tensors"]


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
        optimizer: An Adam over the same parameters; its settings stay as they are.
        tensors: The named tensors; none of parameters that have not had a gradient yet.

    Raises:
        ValueError: If they are not those of such an optimizer.
    """
    # `load_state_dict` takes tensors of any names and shapes, and fails at the next step.
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    like: dict[str, Tensor] = {}
    named = {name.partition("/")[0] for name in tensors}
    for i, parameter in enumerate(parameters):
        if str(i) in named:
            like |= {f"{i}/exp_avg": parameter, f"{i}/exp_avg_sq": parameter}
            like[f"{i}/step"] = torch.zeros((), dtype=torch.float32)
    check_tensors("the state of the optimizer", tensors, like)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, moment = name.split("/")
        state.setdefault(int(number), {})[moment] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_tensors(what: str, given: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Check that tensors have the names, shapes and dtypes of others, and finite values.

    Raises:
        ValueError: If one differs; `what` names what they are.
    """
    for names, word in ((like.keys() - given.keys(), "lacks"), (given.keys() - like.keys(), "has")):
        if names:
            raise ValueError(f"{what} {word} {min(names)!r}")
    for name, value in given.items():
        form, wanted = (value.shape, value.dtype), (like[name].shape, like[name].dtype)
        if form != wanted:
            raise ValueError(
                f"{what} has {name!r} of shape {tuple(form[0])} in {form[1]}, and not of shape "
                f"{tuple(wanted[0])} in {wanted[1]}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{what} has numbers that are not finite in {name!r}")
