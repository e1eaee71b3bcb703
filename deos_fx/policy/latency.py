"""Latency as data: what each decoder layer takes at each length of the prompt, on one machine."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deos_fx.files import write_text
from deos_fx.policy.policy import ModelSignature
from deos_fx.policy.tier import check_fields

__all__ = ["LatencyTable"]

VERSION = 1


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
            times are not as many as layers and lengths, finite, and 0 or more.
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
                f"there are times for {len(rows)} layers at {sorted(set(rows))} lengths; give "
                f"{len(lengths)} for each of the {self.model.decoder_layers} decoder layers"
            )
        for time in (*(time for row in self.layers for time in row), self.encoder):
            if not 0 <= time < math.inf:
                raise ValueError(f"{time} is not a time in milliseconds; give a finite number >= 0")

    def decoder(self, lengths: Sequence[float | Tensor]) -> Tensor:
        """Predict the milliseconds of all decoder layers, 0-dim; differentiable in the lengths.

        Between measured lengths times are linear; beyond them, the outermost line goes on.

        Args:
            lengths: Tokens of the prompt that each decoder layer processes, text included.
        """
        x = torch.stack([torch.as_tensor(length, dtype=torch.float32) for length in lengths])
        at, times = torch.tensor(self.lengths).float(), torch.tensor(self.layers)
        # The two measured lengths around each x; the gradient comes from the slope alone.
        right = torch.searchsorted(at, x.detach()).clamp(1, len(at) - 1)
        left = right - 1
        low, high = (times.gather(1, index[:, None])[:, 0] for index in (left, right))
        slope = (high - low) / (at[right] - at[left])
        return (low + slope * (x - at[left])).sum()

    def to_json(self) -> str:
        """Return the table as JSON."""
        head = {"deos_fx": "latency", "version": VERSION}
        return json.dumps(head | asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Read a table from the JSON that ``to_json`` wrote.

        Raises:
            ValueError: If the text is not a table, or is one of another version.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from error
        if not isinstance(data, dict) or data.pop("deos_fx", None) != "latency":
            raise ValueError('not a latency table: the entry "deos_fx": "latency" is missing')
        version = data.pop("version", None)
        if version != VERSION:
            raise ValueError(f"version {version!r}; this release reads version {VERSION}")
        names = {item.name for item in fields(cls)}
        check_fields(data, names, names, "a latency table")
        try:
            return cls._from_dict(data)
        except TypeError as error:
            raise ValueError(f"a value has the wrong type: {error}") from error

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> LatencyTable:
        return cls(
            model=ModelSignature(**data["model"]),
            machine=str(data["machine"]),
            lengths=tuple(int(length) for length in data["lengths"]),
            layers=tuple(tuple(float(time) for time in row) for row in data["layers"]),
            encoder=float(data["encoder"]),
            encoder_flops=int(data["encoder_flops"]),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a JSON file, completely or not at all.

        Raises:
            OSError: If the folder does not exist or cannot be written.
        """
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table from a file.

        Raises:
            ValueError: If the file does not hold one; the message names it.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is not a latency table: {error}") from error
