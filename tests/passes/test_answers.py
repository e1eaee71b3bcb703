"""Answers of the unreduced model, against a loop that runs it on one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import alone, prompts, shared
from tiny import inputs, tiny_llava

from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.models.facts import facts_of
from deos_fx.passes.search.answers import LONGEST, answered
from deos_fx.passes.search.batches import without_labels
from deos_fx.passes.search.search import search
from deos_fx.policy.budget import Budget


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(layers=2)


def greedy(model: Any, batch: dict[str, Any], row: int, image: int) -> list[int]:
    """Answer one prompt by whole forwards, without padding and without a cache."""
    real = batch["attention_mask"][row].bool()
    text = batch["input_ids"][row][real].tolist()
    start = len(text)
    for _ in range(LONGEST):
        ids = torch.tensor([text])
        logits = model(input_ids=ids, pixel_values=batch["pixel_values"][row : row + 1]).logits
        logits[0, -1, image] = -torch.inf
        text.append(logits[0, -1].argmax().item())
    return text[start:]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_answers_are_those_of_each_prompt_alone(model: Any, side: str) -> None:
    facts, batch = facts_of(model), inputs(model, batch=2, seed=1)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, slice(0, 1) if side == "left" else slice(-1, None)] = 0
    batch = {**batch, "attention_mask": mask}
    found = answered(Call.of(facts, dict(batch))).inputs
    assert facts.image_token is not None
    expected = [greedy(model, batch, row, facts.image_token) for row in range(2)]
    new = batch["input_ids"].shape[1]
    assert found["input_ids"][:, new:].tolist() == expected
    assert found["labels"][:, new:].tolist() == expected
    assert (found["labels"][:, :new] == -100).all()
    # Prompts are as they were, but for where the padding is.
    for row, own in enumerate(mask.bool()):
        left = found["attention_mask"][row, :new].bool()
        assert torch.equal(found["input_ids"][row, :new][left], batch["input_ids"][row][own])
    assert (found["attention_mask"][:, new:] == 1).all()


@pytest.mark.parametrize(("several", "pad"), [(False, None), (True, None), (True, 7)])
def test_what_follows_the_end_of_an_answer_has_no_label(
    model: Any, monkeypatch: pytest.MonkeyPatch, several: bool, pad: int | None
) -> None:
    batch = inputs(model, batch=2, seed=1)
    call = Call.of(facts_of(model), batch)
    # Answers are greedy, whatever the model would do by default.
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    free = answered(call).inputs["labels"][0]
    second = free[free != -100][1].item()
    ends = [second, 99] if several else second
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    monkeypatch.setattr(model.generation_config, "pad_token_id", pad)
    found = answered(call).inputs
    labels = found["labels"]
    # The end itself is a part of the answer.
    assert labels[0][labels[0] != -100].tolist() == free[free != -100][:2].tolist()
    assert all(row[row != -100].tolist().count(second) <= 1 for row in labels)
    new = batch["input_ids"].shape[1]
    after = found["input_ids"][:, new:][labels[:, new:] == -100]
    assert len(after) and {*after.tolist()} == {second if pad is None else pad}


def test_positions_that_do_not_go_on_are_refused(model: Any) -> None:
    batch = inputs(model, batch=1)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    with pytest.raises(ValueError, match="position_ids and no labels"):
        search(model, [batch], budget=Budget(flops=0.6))


# Positions of a grid, token types that say where images are, layers that keep a state.
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen3_5"])
@torch.no_grad()
def test_other_families_answer_each_prompt_alone(name: str) -> None:
    model, batch = shared(name), prompts(name, 2)
    call = answered(Call.of(facts_of(model), dict(batch)))
    for row in range(2):
        expected = answered(Call.of(facts_of(model), alone(name, batch, row))).inputs
        for field in ("input_ids", "labels"):
            assert (
                call.inputs[field][row, -LONGEST:].tolist()
                == expected[field][0, -LONGEST:].tolist()
            )
    # The call can be completed, and its answers are what the whole model says again.
    logits = model(**without_labels(call).inputs).logits
    for token in (call.facts.image_token, call.facts.video_token):
        if token is not None:
            logits[..., token] = -torch.inf
    assert torch.equal(
        logits[:, -LONGEST - 1 : -1].argmax(-1), call.inputs["input_ids"][:, -LONGEST:]
    )
    completed(call)
