"""How far rounding alone takes the oracles of `masked.py` and `shortened.py` in float32.

    python tests/rounding.py [family ...]

prints how far its logits are from those in float64, in the units of `closeness.py`, and how far
ours are from it. The numbers of `closeness.py` rest on these.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from families import FAMILIES, IMAGE, STATEFUL, TWINS, VIDEO, alone, continued, prompts, shared
from masked import STEPS, alive_of, generate, masked_from
from shortened import kept_of, shortened_from
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
    if name in STATEFUL:
        return _measure_shortened(name, policy)
    model, reduced, batch = shared(name), reduce(name, PRUNED[policy]), prompts(name, 2)
    ours = generate(reduced, batch)[1]
    alive = alive_of(reduced(**batch)[CACHE], batch["input_ids"])
    with masked_from(model, alive):
        theirs = generate(model, batch)[1]
        prompt = model(**batch).logits
    exact, wide = _in_double(model, batch)
    with masked_from(exact, alive), _InDouble():
        exact_theirs = generate(exact, wide)[1]
        exact_prompt = exact(**wide).logits
    real = batch["attention_mask"].bool()
    pairs = (theirs, exact_theirs), (prompt[real], exact_prompt[real])
    return max(roundings_between(*pair) for pair in pairs), roundings_between(ours, theirs)


def _measure_shortened(name: str, policy: str) -> tuple[float, float]:
    model, reduced = shared(name), reduce(name, PRUNED[policy])
    prompt = alone(name, prompts(name, 1), 0)
    tokens, ours = generate(reduced, prompt, suppress_tokens=[IMAGE, VIDEO])
    longer = continued(name, prompt, tokens)
    held = kept_of(reduced(**prompt)[CACHE], longer["input_ids"].shape[1])
    kept = {first: left[0] for first, left in held.items()}
    exact, wide = _in_double(model, longer)
    with shortened_from(model, kept), shortened_from(exact, kept):
        theirs = model(**longer, use_cache=False).logits
        with _InDouble():
            exact_theirs = exact(**wide, use_cache=False).logits
    new = theirs[:, -STEPS - 1 : -1]
    return roundings_between(theirs, exact_theirs), roundings_between(ours, new)


def _in_double(model: Any, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    exact = copy.deepcopy(model).double()
    # Grouped products of experts have no double precision.
    exact.set_experts_implementation("eager")
    return exact, {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}


def main(names: list[str]) -> None:
    for name in names or [*FAMILIES, *TWINS]:
        figures = [measure(name, policy) for policy in PRUNED]
        oracle, ours = map(max, zip(*figures, strict=True))
        print(f"{name:24} oracle {oracle:6.1f}   ours {ours:6.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
