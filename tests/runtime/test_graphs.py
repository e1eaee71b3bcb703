"""What captured graphs are kept for: they follow the model, and their number is bounded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from batches import batch_of, grid
from closeness import assert_close
from families import shared
from peft import LoraConfig, get_peft_model
from test_guards import Branching, of_class
from tiny import inputs, tiny_llava
from torch import nn
from transformers import Trainer, TrainingArguments

from deos_fx.passes.pipeline import capture_call
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.recent import Recent
from deos_fx.runtime import graphs
from deos_fx.runtime.reduced_model import ReducedModel

# It observes attention in the tower and in the decoder, so both have views of blocks in the graph.
POLICY = Policy(
    (
        Reduction("projector", 0.5, scores={"cls_attention": 1.0}),
        Reduction("decoder.1", 0.25, scores={"last_text_attention": 1.0}),
    )
)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an entry for every capture."""
    counted: list[int] = []
    monkeypatch.setattr(
        "deos_fx.passes.captures.capture_call",
        lambda *args: counted.append(0) or capture_call(*args),
    )
    return counted


# *** the model changes after a call ***


def head(model: Any) -> None:
    model.lm_head = copy.deepcopy(model.lm_head)
    model.lm_head.weight.data.mul_(-1)


def projector(model: Any) -> None:
    model.model.multi_modal_projector = copy.deepcopy(model.model.multi_modal_projector)
    model.model.multi_modal_projector.linear_2.weight.data.mul_(-1)


def query_in_a_layer(model: Any) -> None:
    attention = model.get_decoder().layers[1].self_attn
    attention.q_proj = copy.deepcopy(attention.q_proj)
    attention.q_proj.weight.data.mul_(-1)


def query_in_the_tower(model: Any) -> None:
    attention = model.model.vision_tower.encoder.layers[1].self_attn
    attention.q_proj = copy.deepcopy(attention.q_proj)
    attention.q_proj.weight.data.mul_(-1)


class Doubled(nn.Linear):
    """A linear layer of another class, as adapters and parametrisations make it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def other_class(model: Any) -> None:
    model.get_decoder().layers[2].mlp.down_proj.__class__ = Doubled


def vocabulary(model: Any) -> None:
    torch.manual_seed(0)
    model.resize_token_embeddings(150, mean_resizing=False)


def hooked(model: Any) -> None:
    class Negate(AlignDevicesHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return -output

    add_hook_to_module(model.get_decoder().layers[0].mlp, Negate())


def adapted(model: Any) -> None:
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    get_peft_model(model, config)
    model.eval()


def merged(model: Any) -> None:
    config = LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload()
    model.eval()


def setting(model: Any) -> None:
    model.config.vision_feature_layer = -1


def weights(model: Any) -> None:
    model.lm_head.weight.data.mul_(2)


CHANGES = [
    head,
    projector,
    query_in_a_layer,
    query_in_the_tower,
    other_class,
    vocabulary,
    hooked,
    adapted,
    merged,
    setting,
    weights,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_run_as_it_is_now(change: Callable[[Any], None]) -> None:
    model = tiny_llava(4)
    batch = inputs(model, 2)
    reduced = ReducedModel(model, POLICY)
    before = reduced(**batch).logits
    change(model)
    after = reduced(**batch).logits
    assert torch.equal(after, ReducedModel(model, POLICY)(**batch).logits)
    assert before.shape != after.shape or not torch.equal(before, after)
    tokens = [
        one.generate(**batch, max_new_tokens=3) for one in (reduced, ReducedModel(model, POLICY))
    ]
    assert torch.equal(*tokens)


def test_what_is_changed_in_place_needs_no_new_capture(captures: list[int]) -> None:
    model = tiny_llava(4)
    reduced = ReducedModel(model, POLICY)
    reduced(**inputs(model))
    weights(model)
    model.load_state_dict(tiny_llava(4, seed=2).state_dict())
    expected = ReducedModel(tiny_llava(4, seed=2), POLICY)(**inputs(model)).logits
    captures.clear()
    assert torch.equal(reduced(**inputs(model)).logits, expected) and not captures


def test_attention_can_be_set_to_and_fro(captures: list[int]) -> None:
    model = tiny_llava(4)
    reduced = ReducedModel(model, POLICY)
    batch = inputs(model, 2)
    for attention in ("sdpa", "eager", "sdpa", "eager"):
        model.set_attn_implementation(attention)
        logits = reduced(**batch).logits
        assert torch.equal(logits, ReducedModel(model, POLICY)(**batch).logits)
    # Four are of the models that are made anew.
    assert len(captures) == 4 + 2
    model.model.vision_tower.config._attn_implementation = "sdpa"
    assert_close(reduced(**batch).logits, logits)
    assert len(captures) == 4 + 3


# *** numbers, lists and what Trainer passes ***


def test_numbers_are_captured_once(captures: list[int]) -> None:
    model = tiny_llava(4)
    batch = inputs(model, 1)
    reduced = ReducedModel(model, POLICY)
    whole = reduced(**batch).logits
    captures.clear()
    for last in (1, 2, 5, 0, 3):
        assert_close(reduced(**batch, logits_to_keep=last).logits, whole[:, -last:])
    assert len(captures) == 1


@pytest.mark.parametrize(
    "items", [9, 9.0, torch.tensor(9), torch.tensor(9.0), torch.tensor([9])], ids=repr
)
def test_the_loss_of_a_share_of_a_batch(captures: list[int], items: Any) -> None:
    model = tiny_llava(4)
    batch = inputs(model, 2)
    batch["labels"] = torch.where(batch["input_ids"] == 120, -100, batch["input_ids"])
    everything = Policy((Reduction("decoder.1", 1.0),))
    reduced = ReducedModel(model, everything)
    for count in (items, items + 3):
        loss = reduced(**batch, num_items_in_batch=count).loss
        assert_close(loss, model(**batch, num_items_in_batch=count).loss)
    assert len(captures) == 1


def test_trainer_trains_a_reduced_model(tmp_path: Path) -> None:
    model = tiny_llava(3).requires_grad_(True)
    batch = inputs(model, 4)
    batch["labels"] = torch.where(batch["input_ids"] == 120, -100, batch["input_ids"])
    rows = [{name: value[row] for name, value in batch.items()} for row in range(4)]
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        gradient_accumulation_steps=2,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    reduced = ReducedModel(model, POLICY)
    trainer = Trainer(reduced, arguments, train_dataset=rows)
    trainer.train()
    changed = [name for name, value in model.state_dict().items() if not before[name].equal(value)]
    assert any("q_proj" in name for name in changed) and "lm_head.weight" in changed


def test_lists_are_constants(captures: list[int]) -> None:
    model = tiny_llava(4)
    batch = inputs(model, 1)
    reduced = ReducedModel(model, POLICY)
    for layers in ([-2], [-2], [-3], [-2]):
        found = reduced(**batch, vision_feature_layer=layers).logits
        assert torch.equal(
            found, ReducedModel(model, POLICY)(**batch, vision_feature_layer=layers).logits
        )
    assert len(captures) == 4 + 2


@pytest.mark.parametrize("value", [[torch.ones(2)], {"a": [torch.ones(2)]}, [{1, 2}]], ids=repr)
def test_what_cannot_be_told_apart_is_refused(value: Any) -> None:
    model = tiny_llava(2)
    with pytest.raises(TypeError, match="mystery is a (list|set).* Give (one|a) tensor"):
        ReducedModel(model, Policy())(**inputs(model), mystery=value)


# *** guards ***


@pytest.mark.parametrize("policy", [Policy(), Policy((Reduction("decoder.0", 64),))])
def test_inputs_that_alternate_are_captured_once_each(policy: Policy, captures: list[int]) -> None:
    model = of_class(Branching)
    reduced = ReducedModel(model, policy)
    short, long = inputs(model, 1), inputs(model, 1, text=30)
    for batch in (short, long) * 4:
        assert_close(reduced(**batch).logits, model(**batch).logits)
    assert len(captures) == 2


def test_a_call_captured_ahead_has_the_branch_of_its_inputs(captures: list[int]) -> None:
    model = of_class(Branching)
    reduced = ReducedModel(model, Policy((Reduction("decoder.0", 16),)))
    short, long = inputs(model, 1), inputs(model, 1, text=30)
    for batch in (short, long):
        reduced.capture(**batch)
    assert len(captures) == 2
    for batch in (short, long):
        kept = reduced.explain(**batch)[-1].remaining.shape[1]
        assert reduced(**batch).logits.shape[1] == kept
    assert len(captures) == 2


# *** how many stay ***


def test_the_least_recently_used_go() -> None:
    kept: Recent[str, int] = Recent(2)
    kept.put("a", 1), kept.put("b", 2)
    assert kept.get("a") == 1
    kept.put("c", 3)
    assert kept.get("b") is None and kept.items() == [("c", 3), ("a", 1)]
    assert kept.find("d", lambda: 4) == 4 and kept.find("c", lambda: 5) == 3
    assert len(kept) == 2


def test_graphs_of_ever_new_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "GRAPHS", 3)
    model = shared("qwen2_5_vl")
    policy = Policy((Reduction("projector", 0.5, selector="grid"),))
    reduced = ReducedModel(model, policy)
    for image in (grid(rows, columns) for rows in (2, 3) for columns in (2, 3, 4)):
        batch = batch_of("qwen2_5_vl", [[image]])
        logits = reduced(**batch).logits
        assert torch.equal(logits, ReducedModel(model, policy)(**batch).logits)
    assert len(reduced.graphs._lowered_graphs) == 3
