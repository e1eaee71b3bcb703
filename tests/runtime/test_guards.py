"""A branch on an input is guarded: another input takes its own branch, never the captured one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny import inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from deos_fx.errors import CaptureError
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel


class Branching(LlavaForConditionalGeneration):
    """Doubles the logits of long prompts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if kwargs["input_ids"].shape[1] > 80:
            output.logits = output.logits * 2
        return output


class Constant(LlavaForConditionalGeneration):
    """Computes a table from the data of an input outside the graph."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        table = torch.tensor([float(value) for value in range(len(kwargs["input_ids"]) + 1)])
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.sum() * table
        return output


def of_class(kind: type[LlavaForConditionalGeneration]) -> LlavaForConditionalGeneration:
    model = tiny_llava(layers=2)
    model.__class__ = kind
    return model


@pytest.mark.parametrize("policy", [Policy(), Policy((Reduction("decoder.0", 64),))])
def test_another_branch_is_captured_again(policy: Policy) -> None:
    model = of_class(Branching)
    reduced = ReducedModel(model, policy)
    short, long = inputs(model, batch=1), inputs(model, batch=1, text=30)
    assert short["input_ids"].shape[1] <= 80 < long["input_ids"].shape[1]
    for batch in (short, long, short):
        assert_close(reduced(**batch).logits, model(**batch).logits)


def test_data_computed_outside_the_graph_is_refused() -> None:
    model = of_class(Constant)
    with pytest.raises(CaptureError, match="would become a constant"):
        ReducedModel(model, Policy())(**inputs(model))
