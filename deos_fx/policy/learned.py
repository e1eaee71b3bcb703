"""Learned parts of a reduction as plain data: named tensors that compare by value."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deos_fx.operator.learned import LEARNED
from deos_fx.words import counted

__all__ = ["Learned"]


class Learned(Mapping[str, Tensor]):
    """Named tensors of a reduction; equal if names and values are.

    Tensors are copied, in single precision and on the CPU, so that nobody changes a policy by
    training on.

    Args:
        given: Tensor by name of a part (a row of ``operator.LEARNED``).
        what: Where they are from, for errors.

    Raises:
        ValueError: If a name is unknown, or a tensor has a wrong number of axes or holds numbers
            that are not finite.
        TypeError: If one is not a tensor.
    """

    def __init__(self, given: Mapping[str, Tensor], what: str = "learned") -> None:
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} is {given!r}; give a tensor for each name")
        # In the order of the table, so that equal policies are written alike.
        for name in given:
            if name not in LEARNED:
                raise ValueError(f"{what}: no part {name!r}; choose from {', '.join(LEARNED)}")
        self._tensors = {
            name: _checked(what, name, given[name]) for name in LEARNED if name in given
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        same = self._tensors.keys() == other.keys()
        return same and all(torch.equal(value, other[name]) for name, value in self.items())

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(value.shape)}" for name, value in self.items())
        return f"{{{shapes}}}"

    @property
    def digest(self) -> str:
        """Return a hash of names, shapes and values."""
        total = hashlib.sha256()
        for name, value in self.items():
            total.update(f"{name}{tuple(value.shape)}".encode())
            total.update(value.numpy().tobytes())
        return total.hexdigest()

    @property
    def scores(self) -> list[str]:
        """Return the names of the parts that are scores."""
        return [name for name in self if LEARNED[name].scores]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return shape and dtype of every part, as a file of a policy shows them."""
        return {
            name: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in self.items()
        }


def _checked(what: str, name: str, value: object) -> Tensor:
    """Check a tensor, and return a copy."""
    if not isinstance(value, Tensor) or value.is_complex():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{what}: {name} is a {kind}; give a tensor of real numbers")
    copy = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if copy.dim() != LEARNED[name].axes or not copy.numel():
        raise ValueError(
            f"{what}: {name} has the shape {tuple(copy.shape)}; give a tensor with "
            + counted(LEARNED[name].axes, "axis", "axes")
        )
    if not copy.isfinite().all():
        raise ValueError(f"{what}: {name} holds numbers that are not finite; train it again")
    return copy
