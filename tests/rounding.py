"""How far rounding alone takes the oracle: the original model with dropped keys masked, in float32.

    python tests/rounding.py [family ...]

prints how far its logits are from those in float64, in the units of `closeness.py`, and how far
ours are from it. The numbers of `closeness.py` rest on these.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from families import CONVOLVING, FAMILIES, TWINS, prompts, shared
from masked import alive_of, generate, masked_from
from test_families import PRUNED, reduce
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deos_fx.models.upstream import CACHE


class _InDouble(TorchFunctionMode):
    """Turns what a model computes in float32 whatever its weights are into float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        named = {name: wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(wide, args), **named)


def roundings_between(ours: Tensor, theirs: Tensor) -> float:
    """Their difference in units of float32's epsilon times the largest value."""
    real = theirs.abs() < torch.finfo(torch.float32).max
    ours, theirs = ours[real].double(), theirs[real].double()
    unit = torch.finfo(torch.float32).eps * theirs.abs().max()
    return ((ours - theirs).abs().max() / unit).item()


def measure(name: str, policy: str) -> tuple[float, float]:
    """Roundings between the oracle in float32 and in float64, and between ours and the oracle.

    Args:
        name: A family.
        policy: A key of `test_families.PRUNED`.
    """
    model, reduced, batch = shared(name), reduce(name, PRUNED[policy]), prompts(name, 2)
    ours = generate(reduced, batch)[1]
    alive = alive_of(reduced(**batch)[CACHE], batch["input_ids"])
    with masked_from(model, alive):
        theirs = generate(model, batch)[1]
        prompt = model(**batch).logits
    exact = copy.deepcopy(model).double()
    # Grouped products of experts have no double precision.
    exact.set_experts_implementation("eager")
    wide = {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}
    with masked_from(exact, alive), _InDouble():
        exact_theirs = generate(exact, wide)[1]
        exact_prompt = exact(**wide).logits
    real = batch["attention_mask"].bool()
    pairs = (theirs, exact_theirs), (prompt[real], exact_prompt[real])
    return max(roundings_between(*pair) for pair in pairs), roundings_between(ours, theirs)


def main(names: list[str]) -> None:
    for name in names or [*FAMILIES, *TWINS]:
        if name not in CONVOLVING:
            figures = [measure(name, policy) for policy in PRUNED]
            oracle, ours = map(max, zip(*figures, strict=True))
            print(f"{name:24} oracle {oracle:6.1f}   ours {ours:6.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
