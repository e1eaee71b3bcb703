"""The schema of the state of a search's steps: the record beside its tensors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from deos_fx.contents import own_hash
from deos_fx.schema import Count, Hash, Strict, Text
from deos_fx.words import counted

__all__ = ["SearchFile", "StepEntry"]

Loss = Annotated[float, Field(allow_inf_nan=True)]
"""A loss, which may be no number where data is damaged."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A fraction."""


class StepEntry(Strict):
    """What happened in a step: its losses, its costs, and the multipliers after it."""

    step: Annotated[int, Field(ge=1)]
    task: Loss
    finite: bool
    """Whether it moved the parameters."""
    not_finite: list[Count]
    """Numbers of the batches whose losses or gradients were no numbers."""
    gate_temperature: Annotated[float, Field(ge=0)]
    visual_tokens: float | None = None
    flops: float | None = None
    kv_cache: float | None = None
    latency_ms: float | None = None
    multiplier_visual_tokens: float | None = None
    multiplier_flops: float | None = None
    multiplier_kv_cache: float | None = None
    multiplier_latency_ms: float | None = None
    keep: dict[Text, Share]
    """Fraction of the visual tokens after each site."""
    static: Loss = 0.0
    """The loss of what would be deployed, of the steps after which it was measured."""


class SearchFile(Strict):
    """The state of a search's steps; its tensors are in the file that it names."""

    deos_fx: Literal["search"]
    version: Literal[2]
    tensors: Annotated[str, Field(pattern=r"^step-[0-9]{1,9}\.safetensors$")]
    """The file of its tensors, in the same folder."""
    sha256: Hash | None = None
    """Of that file; earlier versions wrote none."""
    settings: dict[str, Any]
    """What a search must have in common with this one to continue it."""
    multipliers: dict[Text, float]
    best_loss: float | None
    """None if no loss was a number."""
    best_step: Count
    history: list[StepEntry]
    record: Hash | None = None
    """Of this file without this entry; earlier versions wrote none."""

    @model_validator(mode="wrap")
    @classmethod
    def _is_as_written(cls, data: Any, check: ModelWrapValidatorHandler[SearchFile]) -> SearchFile:
        found = check(data)
        if found.record not in (None, own_hash(data, "record")):
            raise ValueError("its entries are not those that were written")
        return found

    @model_validator(mode="after")
    def _is_whole(self) -> SearchFile:
        steps = len(self.history)
        if [entry.step for entry in self.history] != [*range(1, steps + 1)]:
            raise ValueError(f"the steps of its history are not those from 1 to {steps}")
        if self.tensors != f"step-{steps}.safetensors" or self.best_step > steps:
            raise ValueError(
                f"its history has {counted(steps, 'step')}, but its tensors are {self.tensors}, "
                f"and its best loss is that of step {self.best_step}"
            )
        return self
