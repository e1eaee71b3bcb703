"""Batches whose prompts differ: in how many images they have, of which sizes, and in videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import BATCHES, Image, anyres, batch_of, grid, model_of, plain, rows, video
from closeness import assert_close, roundings_of
from families import IMAGE, PAD, START, alone, prompts, shared
from masked import assert_pruning_is_masking, generate
from test_families import NORM, PRUNED

from deos_fx.inputs import items
from deos_fx.models.upstream import CACHE
from deos_fx.passes.pipeline import capture_call
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("policy", ["both"])
def test_prompts_with_other_images_get_what_they_get_alone(name: str, policy: str) -> None:
    prompts = BATCHES[name]()
    reduced = ReducedModel(model_of(name), Policy(PRUNED[policy]))
    batch = batch_of(name, prompts)
    tokens, logits = generate(reduced, batch)
    ends = reduced(**batch).logits[:, -1]
    for row, shown in enumerate(prompts):
        alone = batch_of(name, [shown])
        real = batch["attention_mask"][row].bool()
        alone["input_ids"] = batch["input_ids"][row][real][None]
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        own_tokens, own_logits = generate(reduced, alone)
        assert torch.equal(own_tokens[0], tokens[row])
        assert_close(own_logits[0], logits[row], roundings_of(name))
        assert_close(ends[row], own_logits[0, 0], roundings_of(name))


# *** prompts with several images, and videos, against the masked original ***

PROMPTS: dict[str, tuple[str, Callable[[], list[list[Image]]]]] = {
    "images of one size": ("gemma3", lambda: [[plain(), plain()]] * 2),
    "images of two sizes": ("qwen2_5_vl", lambda: [[grid(2, 3), grid(4, 4)]] * 2),
    "images of two sizes, deepstack": ("qwen3_vl", lambda: [[grid(4, 3), grid(4, 4)]] * 2),
    "images with breaks": ("pixtral", lambda: [[rows(16, 32), rows(32, 32)]] * 2),
    "images with ends of rows": ("llava_next", lambda: [[anyres(16, 32), anyres(32, 32)]] * 2),
    "a video": ("qwen2_5_vl", lambda: [[video(3, 2, 4)]] * 2),
    "a video, deepstack": ("qwen3_vl", lambda: [[video(1, 3, 4)]] * 2),
    "an image and a video": ("qwen2_vl", lambda: [[grid(4, 4), video(2, 3, 2)]] * 2),
    "a video and an image, deepstack": ("qwen3_vl", lambda: [[video(1, 3, 2), grid(2, 4)]] * 2),
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("policy", ["both"])
def test_pruning_is_masking(kind: str, policy: str) -> None:
    name, prompts = PROMPTS[kind]
    model, batch = shared(name), batch_of(name, prompts())
    reduced = ReducedModel(model, Policy(PRUNED[policy]))
    assert_pruning_is_masking(model, reduced, batch)


def test_each_image_keeps_its_share() -> None:
    batch = batch_of("qwen2_5_vl", [[grid(2, 4), grid(4, 8), grid(2, 4)]])
    reduced = ReducedModel(shared("qwen2_5_vl"), Policy((Reduction("projector", 0.25, **NORM),)))
    origin = reduced(**batch)[CACHE].spaces[0].origin[0]
    kept = batch["input_ids"][0][origin] == IMAGE
    starts = batch["input_ids"][0] == START
    image = starts.cumsum(0)[origin][kept]
    assert image.bincount().tolist() == [0, 2, 8, 2]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3", "llava_next"])
def test_beams_keep_the_images_of_their_prompt(name: str) -> None:
    batch, model = batch_of(name, BATCHES[name]()), shared(name)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    same = ReducedModel(model, Policy((Reduction("decoder.1", 1.0),)))
    given = {key: value.clone() for key, value in batch.items()}
    assert torch.equal(same.generate(**batch, **beams), model.generate(**given, **beams))


def test_answers_keep_patches_that_are_tokens_themselves() -> None:
    # The tower of Inkling takes patches one by one, without a table of sizes.
    batch, model = prompts("inkling_mm_model", 2), shared("inkling_mm_model")
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3, "do_sample": False}
    same = ReducedModel(model, Policy((Reduction("decoder.1", 1.0, position="compact"),)))
    given = {key: value.clone() for key, value in batch.items()}
    assert torch.equal(same.generate(**batch, **beams), model.generate(**given, **beams))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_prompts_of_text_alone_are_answered_as_by_the_model(name: str) -> None:
    model = shared(name)
    text = batch_of(name, [[], []])
    text["input_ids"][1, :2], text["attention_mask"][1, :2] = PAD, 0
    merged = Reduction("decoder.1", 0.25, gain=1.0, mass_bias=1.0, position="compact")
    policies = {"qwen2_5_vl": PRUNED["both"], "gemma3": (merged,)}
    reduced = ReducedModel(model, Policy(policies[name]))
    assert torch.equal(reduced(**text).logits, model(**text).logits)
    for ours, theirs in zip(generate(reduced, text), generate(model, text), strict=True):
        assert_close(ours.float(), theirs.float())


def test_a_new_size_is_lowered_again_but_not_captured_again(monkeypatch: Any) -> None:
    captured = []
    monkeypatch.setattr(
        "deos_fx.passes.captures.capture_call",
        lambda *args: captured.append(0) or capture_call(*args),
    )
    reduced = ReducedModel(shared("qwen2_5_vl"), Policy(PRUNED["both"]))
    for image in (grid(4, 8), grid(2, 3), grid(6, 2)):
        reduced(**batch_of("qwen2_5_vl", [[image]]))
    assert len(captured) == 1


def test_pixels_that_belong_to_nobody_are_refused() -> None:
    batch = batch_of("pixtral", [[rows(16, 16)], [rows(32, 32)]])
    batch["image_sizes"] = batch["image_sizes"].flip(0)
    with pytest.raises(ValueError, match="Prompt 0 .* 16 image placeholders .* same call of the"):
        ReducedModel(shared("pixtral"), Policy(PRUNED["both"]))(**batch)


def test_more_images_than_placeholders_are_refused() -> None:
    """Half as many placeholders would fit images of which each token stands for twice as much."""
    batch = batch_of("qwen2_5_vl", [[grid(4, 8)]])
    twice = {name: torch.cat([batch[name]] * 2) for name in ("pixel_values", "image_grid_thw")}
    for policy in (Policy(), Policy((Reduction("projector", 0.5, scores={"feature_norm": 1.0}),))):
        with pytest.raises(ValueError, match="has 2 images, but input_ids has placeholders"):
            ReducedModel(shared("qwen2_5_vl"), policy)(**batch | twice)


@pytest.mark.parametrize("name", ["glm5_next", "qwen3_5", "lfm2_vl"])
@torch.no_grad()
def test_a_prompt_without_padding_follows_a_padded_batch(name: str) -> None:
    """Layers with a state are given no mask where nothing is padded, or one of ones."""
    batch = prompts(name, 2)
    step = Reduction("decoder.1", 0.5, scores={"novelty": 1.0})
    reduced = ReducedModel(shared(name), Policy((step,)))
    together = reduced(**batch).logits
    own = reduced(**alone(name, batch, 1)).logits
    assert own.shape[1] < together.shape[1]
    assert_close(together[1:, -own.shape[1] :], own, roundings_of(name))


@torch.no_grad()
def test_an_encoder_is_asked_once_what_its_tokens_are(monkeypatch: Any) -> None:
    """Rows that end in a placeholder of their own are no multiple of the tokens of patches."""
    runs: list[Any] = []
    run = items.on_shapes
    monkeypatch.setattr(items, "on_shapes", lambda module: runs.append(module) or run(module))
    reduced, batch = ReducedModel(shared("hunyuan_vl"), Policy()), prompts("hunyuan_vl")
    reduced(**batch)
    asked = len(runs)
    reduced(**batch)
    assert len(runs) == asked
