"""Latency as data: what each decoder layer takes at each length of the prompt, on one machine."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from deos_fx.files import write_text
from deos_fx.policy.policy import ModelSignature
from deos_fx.reading import read_record
from deos_fx.words import counted

__all__ = ["LatencyTable"]

VERSION = 1

LONGEST = 1e9
"""The longest time that a table may have, in milliseconds."""


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Measured times of the prefill of one prompt, layer by layer.

    Attributes:
        model: The model that was measured.
        machine: What it ran on, for people.
        lengths: Tokens of the prompt, text included, ascending.
        layers: Milliseconds of each decoder layer at each of these lengths. What is around the
            layers is shared out among them.
        encoder: Milliseconds of encoding the images.
        encoder_flops: FLOPs of encoding the same images: other images, and patches that a policy
            drops in the vision tower, count in proportion.

    Raises:
        ValueError: On construction, if there are fewer than two lengths, lengths do not ascend, or
            times are not as many as layers and lengths, from 0 to `LONGEST`.
    """

    model: ModelSignature
    machine: str
    lengths: tuple[int, ...]
    layers: tuple[tuple[float, ...], ...]
    encoder: float
    encoder_flops: int

    def __post_init__(self) -> None:
        lengths = self.lengths
        ascending = all(a < b for a, b in zip((0, *lengths), lengths, strict=False))
        if len(lengths) < 2 or not ascending:
            raise ValueError(f"lengths are {lengths}; give at least two, ascending from 1 on")
        rows = [len(row) for row in self.layers]
        if rows != [len(lengths)] * self.model.decoder_layers:
            raise ValueError(
                f"there are times for {counted(len(rows), 'layer')} at {sorted(set(rows))} "
                f"lengths; give {len(lengths)} for each decoder layer, of which there are "
                f"{self.model.decoder_layers}"
            )
        for time in (*(time for row in self.layers for time in row), self.encoder):
            if not 0 <= time <= LONGEST:
                raise ValueError(
                    f"{time} is no time of a layer in milliseconds; give 0 to {LONGEST:.0e}"
                )

    def decoder(self, lengths: Sequence[float | Tensor]) -> Tensor:
        """Predict the milliseconds of all decoder layers, 0-dim; differentiable in the lengths.

        Between measured lengths times are linear; beyond them, the outermost line goes on.

        Args:
            lengths: Tokens of the prompt that each decoder layer processes, text included.
        """
        # In float64, as long lengths that follow each other are the same number in float32.
        x = torch.stack([torch.as_tensor(length, dtype=torch.float64) for length in lengths])
        at = torch.tensor(self.lengths, dtype=torch.float64)
        times = torch.tensor(self.layers, dtype=torch.float64)
        # The two measured lengths around each x; the gradient comes from the slope alone.
        right = torch.searchsorted(at, x.detach()).clamp(1, len(at) - 1)
        left = right - 1
        low, high = (times.gather(1, index[:, None])[:, 0] for index in (left, right))
        slope = (high - low) / (at[right] - at[left])
        return (low + slope * (x - at[left])).sum().float()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a JSON file, completely or not at all.

        Raises:
            OSError: If the folder does not exist or cannot be written.
        """
        data = {"deos_fx": "latency", "version": VERSION} | asdict(self)
        write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table from a file.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it does not hold one; the message names it.
        """
        from deos_fx.policy.schema import LatencyFile

        cure = "Measure again with deos_fx.profile."
        table = read_record(path, LatencyFile, "a latency table", cure)
        try:
            return cls(
                model=ModelSignature(**table.model.model_dump()),
                machine=table.machine,
                lengths=tuple(table.lengths),
                layers=tuple(map(tuple, table.layers)),
                encoder=table.encoder,
                encoder_flops=table.encoder_flops,
            )
        except ValueError as error:
            raise ValueError(
                f"{os.fspath(path)} is not a latency table: {error}. {cure}"
            ) from error
