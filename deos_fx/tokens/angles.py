"""The rotary angles of keys, for layers that rotate what they hold anew in every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

__all__ = ["KeyAngles"]


class KeyAngles:
    """Cosines and sines of the keys that each layer holds, [2, B, M, D] by layer.

    Most layers cache keys as they have rotated them. A layer whose index averages neighbouring keys
    caches them as they are, and rotates the averages in every call, so it needs the angles of all
    tokens that it holds. In a model's own cache one list of positions serves all layers; with
    reductions between them, every layer holds other tokens.
    """

    def __init__(self, by_layer: Mapping[int, Tensor] | None = None) -> None:
        self._by_layer = dict(by_layer or {})

    def copied(self) -> Self:
        """Return a copy that can be added to, while these stay as they are."""
        return type(self)(self._by_layer)

    def update(self, layer: int, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Add the angles of new tokens, and return those of all that a layer holds.

        Args:
            layer: Its index.
            new: Cosines and sines [B or 1, t, D] of the new tokens.

        Returns:
            Cosines and sines [B, M + t, D].
        """
        angles = torch.stack(new)
        held = self._by_layer.get(layer)
        if held is not None:
            # All rows may be given the same positions.
            rows = max(held.shape[1], angles.shape[1])
            both = (held, angles.to(held))
            angles = torch.cat([part.expand(-1, rows, -1, -1) for part in both], dim=2)
        self._by_layer[layer] = angles
        cosines, sines = angles
        return cosines, sines

    def changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the angles of other tokens or rows.

        Args:
            change: Makes them from those of a layer [2, B, M, D].
        """
        return type(self)({layer: change(angles) for layer, angles in self._by_layer.items()})

    def of_rows(self, index: Tensor) -> Self:
        """Return the angles of some rows [K] of a batch."""
        return self.changed(lambda x: x if x.shape[1] == 1 else x[:, index.to(x.device)])

    @classmethod
    def joined(
        cls, parts: Sequence[KeyAngles], join: Callable[[Sequence[Tensor]], Tensor]
    ) -> KeyAngles:
        """Join those of the parts of a batch.

        Args:
            parts: The angles of the parts, which have the same layers.
            join: Makes the values of a batch of those of its parts [B_i, M_i, ...], in which
                tokens are the second axis.
        """
        return cls(
            {
                layer: join([part._by_layer[layer].movedim(0, 3) for part in parts]).movedim(3, 0)
                for layer in parts[0]._by_layer
            }
        )
