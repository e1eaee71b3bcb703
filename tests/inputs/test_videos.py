"""Videos as processors write them: alone, beside images, several in a prompt and over a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from batches import Image, batch_of, grid
from closeness import assert_close, roundings_of
from families import FAMILIES, IMAGE, PAD, STATEFUL, TWINS, VIDEO, shared
from masked import alive_of, assert_pruning_is_masking, generate, masked_from
from test_families import PRUNED
from torch import Tensor
from videos import VIDEOS

import deos_fx
from deos_fx.models.upstream import CACHE
from deos_fx.policy.policy import Policy
from deos_fx.runtime.reduced_model import ReducedModel

GLM = ["glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"]
"""They write videos with the placeholders of images."""
ONE_KIND = [*GLM, "molmo2"]
"""Their own code refuses images and videos in one call."""
BOTH = [name for name in VIDEOS if name not in {*TWINS, *ONE_KIND, *STATEFUL}]
BOTH += ["llava_next_video", "video_llava", "video_llama_3", "gemma4_unified"]
STACKED = ["llava_next_video", "llava_onevision", "video_llava"]
"""Their videos all have as many frames."""
FRAMES = {"kimi_k25": (1, 1)} | dict.fromkeys(STACKED, (2, 2))
"""Frames of two videos; kimi_k25 itself fails at several."""
every_family = pytest.mark.parametrize("name", VIDEOS)


def two_videos(name: str) -> list[Image]:
    return [VIDEOS[name](frames) for frames in FRAMES.get(name, (2, 3))]


def image_of(name: str) -> Image:
    family = (FAMILIES | TWINS)[name]
    return family.block, family.pixels(1)


def reduced(name: str) -> ReducedModel:
    return ReducedModel(shared(name), Policy(PRUNED["both"]))


def without_first(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Prompts without their first tokens."""
    shape = batch["input_ids"].shape
    return {
        name: value[:, count:] if value.shape == shape else value for name, value in batch.items()
    }


def check_pruning_is_masking(model: Any, batch: dict[str, Tensor]) -> None:
    """Compare prefill and new tokens with the original with the dropped tokens masked."""
    ours = ReducedModel(model, Policy(PRUNED["both"]))
    assert_pruning_is_masking(model, ours, batch, roundings_of(model.config.model_type))


# *** a video and no image ***


@every_family
def test_the_empty_policy_is_bit_identical(name: str) -> None:
    model, batch = shared(name), batch_of(name, [two_videos(name)])
    empty = ReducedModel(model, Policy())
    assert torch.equal(empty(**batch).logits, model(**batch).logits)
    for ours, theirs in zip(generate(empty, batch), generate(model, batch), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in VIDEOS if name not in STATEFUL])
def test_pruning_is_masking_in_prompts_that_begin_with_a_video(name: str) -> None:
    check_pruning_is_masking(shared(name), without_first(batch_of(name, [two_videos(name)]), 3))


@pytest.mark.parametrize("name", [name for name in VIDEOS if name not in TWINS])
def test_rows_with_other_videos_get_what_they_get_alone(name: str) -> None:
    short, long = two_videos(name)
    image = image_of(name)
    rows = [[short], [image], [long, image], []]
    if name in ONE_KIND:
        rows = [[short], [long, short], []]
    ours, batch = reduced(name), batch_of(name, rows)
    tokens, logits = generate(ours, batch)
    for row, shown in enumerate(rows):
        own, real = batch_of(name, [shown]), batch["attention_mask"][row].bool()
        for key, value in batch.items():
            if value.shape == batch["input_ids"].shape:
                own[key] = value[row][real][None]
        own_tokens, own_logits = generate(ours, own)
        assert torch.equal(own_tokens[0], tokens[row])
        assert_close(logits[row], own_logits[0], roundings_of(name))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision", "qwen3_vl", "gemma4"])
def test_beams_keep_the_videos_of_their_prompt(name: str) -> None:
    short, long = two_videos(name)
    model, batch = shared(name), batch_of(name, [[short], [long, short]])
    beams = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    given = {key: value.clone() for key, value in batch.items()}
    ours = ReducedModel(model, Policy()).generate(**batch, **beams)
    assert torch.equal(ours, model.generate(**given, **beams))


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_vl", "glm4v", "gemma4"])
def test_a_chat_about_a_video_goes_on(name: str) -> None:
    ours, batch = reduced(name), batch_of(name, [two_videos(name)])
    said = {"return_dict_in_generate": True, "max_new_tokens": 2, "do_sample": False}
    first = ours.generate(**batch, **said)
    more = torch.tensor([[7, 8, 9]])
    ids = torch.cat([first.sequences, more], dim=1)
    longer = ids.shape[1] - batch["input_ids"].shape[1]
    whole = {
        key: torch.nn.functional.pad(value, (0, longer), value=int(key == "attention_mask"))
        for key, value in batch.items()
        if value.shape == batch["input_ids"].shape
    }
    given = batch | whole | {"input_ids": ids, CACHE: first[CACHE]}
    alive = alive_of(first[CACHE], batch["input_ids"])
    second = ours.generate(**given, **said)
    with masked_from(shared(name), alive):
        given.pop(CACHE)
        expected = shared(name).generate(**given, **said)
    assert torch.equal(second.sequences, expected.sequences)


def test_a_new_video_in_a_later_turn() -> None:
    first, other = two_videos("qwen2_5_vl")
    ours, batch = reduced("qwen2_5_vl"), batch_of("qwen2_5_vl", [[first]])
    cache = ours(**batch)[CACHE]
    more = batch_of("qwen2_5_vl", [[other]])
    more["attention_mask"] = torch.cat([batch["attention_mask"], more["attention_mask"]], dim=1)
    again = more | {name: batch[name] for name in batch if "video" in name or "second" in name}
    with pytest.raises(ValueError, match="not those of the images given"):
        ours(**again, **{CACHE: cache})
    logits = ours(**more, **{CACHE: cache}).logits
    # The whole conversation: what runs over the prompt, and what counts videos.
    whole = {
        key: torch.cat([value, more[key]], dim=int(value.shape == batch["input_ids"].shape))
        for key, value in batch.items()
        if key != "attention_mask"
    }
    with masked_from(shared("qwen2_5_vl"), alive_of(cache, whole["input_ids"])) as masked:
        expected = masked(**whole).logits
    assert_close(logits, expected[:, cache.spaces[-1].origin[0, -logits.shape[1] :]])


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl", "glm4v"])
def test_placeholders_of_a_video_without_a_video_are_refused(name: str) -> None:
    batch = batch_of(name, [two_videos(name)[:1]])
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="has image placeholders, but there are no images"):
        reduced(name)(**text)


@pytest.mark.parametrize("policy", ["both", "nothing"])
def test_a_video_that_is_not_in_the_prompt_is_refused(policy: str) -> None:
    first, other = two_videos("llava_next_video")
    batch = batch_of("llava_next_video", [[first, other]])
    (block, _), ids = first, batch["input_ids"]
    batch["input_ids"] = torch.cat([ids[:, : 3 + len(block)], ids[:, -5:]], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    ours = ReducedModel(shared("llava_next_video"), Policy(PRUNED.get(policy, ())))
    with pytest.raises(ValueError, match=r"pixel_values_videos has 2 .* id 121\) for 1\."):
        ours(**batch)


def test_seconds_between_frames_move_positions() -> None:
    ours, (video, _) = reduced("qwen2_5_vl"), two_videos("qwen2_5_vl")
    batch = batch_of("qwen2_5_vl", [[video]])
    later = batch | {"second_per_grid_ts": 4 * batch["second_per_grid_ts"]}
    check_pruning_is_masking(shared("qwen2_5_vl"), later)
    assert (ours(**batch).logits - ours(**later).logits).abs().max() > 1e-3


def test_videos_that_a_model_encodes_as_images() -> None:
    vision = hf.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
        vision_use_head=False,
        model_args={"embed_dim": 32},
    )
    config = hf.PerceptionLMConfig(
        vision_config=vision,
        text_config=shared("llava").config.text_config,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_use_cls_token=False,
        projector_pooling_ratio=2,
    )
    torch.manual_seed(0)
    model = hf.PerceptionLMForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = PAD
    noise = torch.randn(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    image, video = {"pixel_values": noise[:, :2]}, {"pixel_values_videos": noise[:, 2:]}
    for ids, pixels in (
        ([5, *[VIDEO] * 48, 6, 7], video),
        ([5, *[IMAGE] * 32, 6, *[VIDEO] * 48, 7], image | video),
    ):
        batch = {"input_ids": torch.tensor([ids]), **pixels}
        check_pruning_is_masking(model, batch)
        costs = ReducedModel(model, Policy()).cost(**batch)
        assert costs.before.visual_tokens == len(ids) - 3


# *** videos and images ***


@pytest.mark.parametrize("name", BOTH)
def test_pruning_is_masking_with_an_image_between_videos(name: str) -> None:
    video, other = two_videos(name)
    batch = batch_of(name, [[video, image_of(name), other]])
    empty = ReducedModel(shared(name), Policy())
    assert torch.equal(empty(**batch).logits, shared(name)(**batch).logits)
    check_pruning_is_masking(shared(name), batch)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "paligemma", "idefics3"])
def test_prompts_that_begin_with_an_image(name: str) -> None:
    check_pruning_is_masking(shared(name), without_first(batch_of(name, [[image_of(name)]]), 3))


@pytest.mark.parametrize(
    ("name", "policy"), [("glm4v", "both"), ("glm4v_moe", "both"), ("glm_ocr", "nothing")]
)
def test_images_and_videos_of_one_placeholder_in_other_rows(name: str, policy: str) -> None:
    # Of one frame and as large as the image: only the inputs that they come in differ.
    image, video = grid(2, 3), VIDEOS[name](1)
    rows: list[list[Image]] = [[image], [video], []]
    ours = ReducedModel(shared(name), Policy(PRUNED.get(policy, ())))
    batch = batch_of(name, rows)
    tokens, logits = generate(ours, batch)
    for row, shown in enumerate(rows):
        own, real = batch_of(name, [shown]), batch["attention_mask"][row].bool()
        for key, value in batch.items():
            if value.shape == batch["input_ids"].shape:
                own[key] = value[row][real][None]
        own_tokens, own_logits = generate(ours if policy == "both" else shared(name), own)
        assert torch.equal(own_tokens[0], tokens[row])
        assert_close(logits[row], own_logits[0], roundings_of(name))
    with pytest.raises(ValueError, match="The prompts of this batch differ"):
        ours.cost(**batch_of(name, [[image], [video]]))


@pytest.mark.parametrize("policy", ["both", "nothing"])
@pytest.mark.parametrize("name", ONE_KIND)
def test_an_image_and_a_video_of_one_placeholder_are_refused(name: str, policy: str) -> None:
    ours = ReducedModel(shared(name), Policy(PRUNED.get(policy, ())))
    batch: dict[str, Any] = batch_of(name, [[image_of(name), two_videos(name)[0]]])
    with pytest.raises(ValueError, match="one placeholder"):
        ours(**batch)
    del batch["mm_token_type_ids"]
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(3, 1, -1)
    with pytest.raises(ValueError, match="one placeholder .* Pass the mm_token_type_ids"):
        ours(**batch)


@pytest.mark.parametrize("name", ["glm4v", "glm4v_moe", "glm_ocr"])
def test_videos_need_no_marks_where_positions_are_given(name: str) -> None:
    batch: dict[str, Any] = batch_of(name, [two_videos(name)])
    del batch["mm_token_type_ids"]
    positions = torch.arange(batch["input_ids"].shape[1]).expand(3, 1, -1)
    model, ours = shared(name), reduced(name)
    output = ours(**batch, position_ids=positions)
    with masked_from(model, alive_of(output[CACHE], batch["input_ids"])):
        whole = model(**batch, position_ids=positions).logits
        tokens, logits = generate(model, batch)
    # It counts positions as in text.
    our_tokens, our_logits = generate(ours, batch)
    assert torch.equal(our_tokens, tokens)
    assert_close(our_logits, logits, roundings_of(name))
    origin = output[CACHE].spaces[-1].origin[0]
    assert_close(output.logits, whole[:, origin], roundings_of(name))


# *** what is told about videos ***


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl", "glm4v"])
def test_cost_and_explanation_of_a_video(name: str) -> None:
    batch, ours = batch_of(name, [two_videos(name)]), reduced(name)
    visual = int(torch.isin(batch["input_ids"], torch.tensor([IMAGE, VIDEO])).sum())
    report = ours.cost(**batch)
    assert report.before.visual_tokens == visual
    spaces = ours(**batch)[CACHE].spaces
    text = batch["input_ids"].shape[1] - visual
    assert report.after.visual_tokens_per_layer[-1] == spaces[-1].origin.shape[1] - text
    for site, space in zip(ours.explain(**batch), spaces, strict=True):
        assert site is not None and space.origin.shape[1] < batch["input_ids"].shape[1]


def half_of(batch: dict[str, Tensor]) -> float:
    return torch.isin(batch["input_ids"], torch.tensor([IMAGE, VIDEO])).sum().item() / 2


@pytest.mark.parametrize("name", ["video_llava", "qwen2_5_vl", "glm4v"])
def test_defaults_and_budgets_take_videos(name: str) -> None:
    batch = batch_of(name, [two_videos(name)[:1]])
    budget = deos_fx.Budget(visual_tokens=0.5)
    fitted = deos_fx.transform(shared(name), budget=budget, example_inputs=batch)
    for ours in (deos_fx.transform(shared(name)), fitted):
        assert 0 < ours.cost(**batch).after.visual_tokens <= half_of(batch)
        assert ours(**batch).logits.isfinite().all()


def test_the_search_takes_videos() -> None:
    model = shared("llava_next_video")
    batch = batch_of("llava_next_video", [two_videos("llava_next_video")[:1]])
    found = deos_fx.search(model, [batch], budget=deos_fx.Budget(visual_tokens=0.5), steps=1)
    ours = ReducedModel(model, found.policy)
    assert 0 < ours.cost(**batch).after.visual_tokens <= half_of(batch)
