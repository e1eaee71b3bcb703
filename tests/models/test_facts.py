"""Facts of a model: inferred once, again when it changes, and without keeping it alive."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from tiny import call_of, inputs, tiny_llava

from deos_fx.models import facts
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel


def test_facts_are_inferred_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava(2)
    known = facts_of(model)
    assert (known.grid, known.sizes_vary, known.has_class_token) == ((8, 8), False, True)
    assert known.image_token == model.config.image_token_id and known.video_token is None
    monkeypatch.setattr(facts, "find_blocks", None)
    monkeypatch.setattr(facts, "_visual_tokens", None)
    reduced = ReducedModel(model, Policy((Reduction("projector", 16),)))
    cache = reduced(**inputs(model, 2))[CACHE]
    reduced(input_ids=torch.ones(2, 1, dtype=torch.int64), **{CACHE: cache})
    assert facts_of(model) is known


def new_head(model: Any) -> None:
    model.lm_head = copy.deepcopy(model.lm_head)


def other_placeholder(model: Any) -> None:
    model.config.image_token_id = 121


def own_forward(model: Any) -> None:
    part = model.get_decoder().layers[0].mlp
    part.forward = type(part).forward.__get__(part)


@pytest.mark.parametrize("change", [new_head, other_placeholder, own_forward])
def test_a_changed_model_has_new_facts(change: Any) -> None:
    model = tiny_llava(1)
    known = facts_of(model)
    change(model)
    found = facts_of(model)
    assert found is not known and found is facts_of(model)
    assert found.image_token == model.config.image_token_id


def test_weights_are_no_facts() -> None:
    model = tiny_llava(1)
    known = facts_of(model)
    model.lm_head.weight.data.mul_(2)
    assert facts_of(model.double()) is known


def test_facts_do_not_keep_a_model_alive() -> None:
    model = tiny_llava(1)
    # As accelerate does: a forward of its own, which is bound to the model.
    model.forward = type(model).forward.__get__(model)
    known, alive = facts_of(model), weakref.ref(model)
    assert known.grid == (8, 8) and len(call_of(model, inputs(model, 1)).prompts) == 1
    del model
    gc.collect()
    assert alive() is None


def test_images_of_a_call_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(tiny_llava(1), inputs(tiny_llava(1), 2))
    first = call.prompts
    monkeypatch.setattr("deos_fx.inputs.call.images_of_prompts", None)
    assert call.prompts is first and call.layout == first[0].layout
