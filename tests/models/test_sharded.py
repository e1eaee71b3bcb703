"""Models that FSDP shards, over one process: classes, hooks and shapes are those of many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import inputs, shard, tiny_llava
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlavaForConditionalGeneration

import deos_fx
from deos_fx.models.sharded import (
    class_of,
    gather_own,
    gathered,
    has_shards,
    is_sharded,
    shards,
    without_shards,
)


@pytest.fixture
def sharded() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield shard(tiny_llava(layers=2))
    dist.destroy_process_group()


def test_a_view_without_shards_is_as_the_model_was(sharded: Any) -> None:
    model, view = tiny_llava(layers=2), without_shards(sharded)
    assert type(view) is class_of(sharded) is LlavaForConditionalGeneration
    assert [type(part) for part in view.modules()] == [type(part) for part in model.modules()]
    shapes = {name: weight.shape for name, weight in view.named_parameters()}
    assert shapes == {name: weight.shape for name, weight in model.named_parameters()}
    assert all(weight.is_meta for weight in view.parameters())
    assert not any(map(shards, view._forward_hooks.values()))
    assert has_shards(sharded) and is_sharded(sharded) and not has_shards(view)
    # The model itself is left as it is, and one without shards is returned.
    assert any(map(shards, sharded._forward_hooks.values()))
    assert without_shards(model) is model


def test_weights_are_gathered_while_they_are_needed(sharded: Any) -> None:
    layer = sharded.model.language_model.layers[0]
    norm = sharded.model.language_model.norm
    gather_own(sharded)
    assert isinstance(layer.self_attn.q_proj.weight, DTensor)
    assert not isinstance(norm.weight, DTensor)
    with gathered(layer):
        assert not isinstance(layer.self_attn.q_proj.weight, DTensor)
    assert isinstance(layer.self_attn.q_proj.weight, DTensor)


def test_a_sharded_model_is_reduced_as_the_whole_one(sharded: Any) -> None:
    model = tiny_llava(layers=2)
    batch = inputs(model)
    reduction = deos_fx.Reduction("decoder.0", 4, scores={"last_text_attention": 1.0})
    policy = deos_fx.Policy((reduction,))
    expected = deos_fx.transform(model, policy=policy)(**batch).logits
    reduced = deos_fx.transform(sharded, policy=policy)
    with torch.no_grad():
        assert torch.equal(reduced(**batch).logits, expected)
    assert reduced.cost(**batch) == deos_fx.transform(model, policy=policy).cost(**batch)
