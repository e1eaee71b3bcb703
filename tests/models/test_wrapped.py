"""Models in wrappers: every door says what to give instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import inputs, shared_llava, tiny_llava
from torch import nn

import deos_fx
from deos_fx.cost.model import CostModel
from deos_fx.inputs.example import example_inputs
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

POLICY = Policy((Reduction("decoder.1", 0.5),))
HALF = deos_fx.Budget(visual_tokens=0.5)

DOORS: dict[str, Callable[[Any], object]] = {
    "transform": deos_fx.transform,
    "ReducedModel": lambda model: ReducedModel(model, POLICY),
    "search": lambda model: deos_fx.search(model, [inputs(shared_llava())], budget=HALF),
    "data": lambda model: deos_fx.transform(model, data=[inputs(shared_llava())]),
    "cost": lambda model: CostModel.of_images(model, 1, 4),
    "example": example_inputs,
}


def adapted() -> Any:
    settings = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    return get_peft_model(tiny_llava(), LoraConfig(**settings)).eval()


def with_prompt_tuning() -> Any:
    sizes = {"num_layers": 6, "token_dim": 64, "num_attention_heads": 4}
    settings = PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=4, **sizes)
    return get_peft_model(tiny_llava(), settings)


def with_another_forward() -> Any:
    model: Any = tiny_llava()
    model.forward = lambda **inputs: None
    return model


@pytest.fixture(autouse=True)
def forget_accelerator() -> Iterator[None]:
    """It is remembered in the process, where other tests run before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared() -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="bf16")


WRAPPED: dict[str, tuple[Callable[[], Any], str]] = {
    "peft": (adapted, r"PeftModel around .* give model\.get_base_model\(\), in which"),
    "peft of the prompt": (with_prompt_tuning, "tokens of its own in the prompt"),
    "torch.compile": (lambda: torch.compile(tiny_llava()), r"give model\._orig_mod\."),
    "devices": (lambda: nn.DataParallel(tiny_llava()), r"DataParallel .* give model\.module\."),
    "two": (lambda: nn.DataParallel(adapted()), r"give model\.module\.get_base_model\(\)"),
    "reduced": (lambda: ReducedModel(tiny_llava(), POLICY), r"give model\.model\."),
    "accelerate": (lambda: prepared().prepare(tiny_llava()), "unwrap_model.*autocast"),
    "forward": (with_another_forward, "whose forward was replaced.*del model.forward"),
    "no model": (lambda: nn.Linear(2, 2), "give a transformers vision-language model"),
}


# torch warns of its own modules when its compiler is first imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", WRAPPED)
def test_every_door_says_what_to_give(case: str) -> None:
    make, message = WRAPPED[case]
    model = make()
    for door in DOORS.values():
        with pytest.raises(TypeError, match=message):
            door(model)


def test_what_a_peft_model_is_told_to_give_has_its_adapters() -> None:
    model = adapted()
    batch = inputs(model.get_base_model(), 2)
    with torch.no_grad():
        ours = ReducedModel(model.get_base_model(), Policy())(**batch).logits
        assert torch.equal(ours, model(**batch).logits)
        assert not torch.equal(ours, shared_llava()(**batch).logits)


def test_what_accelerate_prepares_can_be_unwrapped() -> None:
    accelerator = prepared()
    model = accelerator.prepare(tiny_llava())
    batch = inputs(model)
    with torch.no_grad():
        right = model(**batch).logits
        whole = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        with accelerator.autocast():
            ours = ReducedModel(whole, Policy())(**batch).logits
    assert torch.equal(ours.float(), right)
