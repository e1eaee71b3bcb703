"""A profile measures every length once, in either runtime."""

from __future__ import annotations

from typing import Any

import pytest
from families import prompts, shared
from tiny import VISUAL, inputs, shared_llava, tiny_llava

from deos_fx.cost.model import CostModel
from deos_fx.exporters import profile as profile_module
from deos_fx.exporters.profile import profile
from deos_fx.inputs.call import Call
from deos_fx.models.facts import facts_of
from deos_fx.policy.policy import Policy


def test_lengths_are_those_that_layers_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is exchanged for one that counts the tokens in the cache of every layer."""
    model = shared_llava()
    given = inputs(model, batch=2, images=2)
    words = given["input_ids"].shape[1] - 2 * VISUAL

    def tokens(calls: Any, device: Any) -> list[float]:
        caches = [call().past_key_values for call in calls]
        held = [{layer.keys.shape[-2] for layer in cache.layers} for cache in caches]
        assert all(len(lengths) == 1 for lengths in held)
        return [float(lengths.pop()) for lengths in held]

    monkeypatch.setattr(profile_module, "in_turns", tokens)
    table = profile(model, given)
    # From one token of each image to the whole prompt.
    assert (table.lengths[0], table.lengths[-1]) == (words + 2, words + 2 * VISUAL)
    for length, times in zip(table.lengths, zip(*table.layers, strict=True), strict=True):
        assert abs(sum(times) - length) < 1e-6
    # A text of as many tokens as the shortest prompt takes the same time without images.
    assert table.encoder == 0
    assert table.machine.startswith("torch ")


def test_images_of_any_size() -> None:
    model = shared("qwen2_5_vl")
    call = Call.of(facts_of(model), prompts("qwen2_5_vl")).first_prompt()
    table = profile(model, call.inputs)
    cost = CostModel.of_call(call).with_latency(table)
    assert cost.amounts(Policy(), ["latency_ms"])["latency_ms"] > 0


@pytest.mark.slow
def test_onnxruntime() -> None:
    model = tiny_llava(layers=2)
    table = profile(model, runtime="onnxruntime", device="cpu")
    assert table.machine.startswith("onnxruntime ") and len(table.layers) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorrt"}, "runtime is 'tensorrt'; give 'torch' or 'onnxruntime'"),
        ({"device": "cuda"}, "move the model"),
        ({"runtime": "onnxruntime", "device": "npu"}, "device is 'npu'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile(shared_llava(), **options)
