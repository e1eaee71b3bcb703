"""Images that enter at a scale are those that the unscaled processor makes of smaller ones."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from real_processors import noise, small_tokenizer, write_processor

from deos_fx.data import Record, batches, scaled_processor
from deos_fx.data.processors import load_processor

LARGE, WIDE, SMALL = noise(400, 300), noise(128, 64, 1), noise(12, 12, 2)


def qwen(folder: Path, **image: Any) -> Any:
    """A processor of images of any size, within limits; a visual token has 8 x 8 pixels."""
    size = {"shortest_edge": 4 * 64, "longest_edge": 400 * 64}
    settings = {"patch_size": 4, "merge_size": 2, "size": size, **image}
    return load_processor(write_processor("qwen2_5_vl", folder, image=settings))


def pixtral() -> Any:
    pytest.importorskip("torchvision", reason="the module of its processor needs it")
    from transformers import PixtralImageProcessor, PixtralProcessor

    special = {"pad": "<pad>", "eos": "</s>", "image_token": "[IMG]"}
    special |= {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    image_processor = PixtralImageProcessor(
        size={"longest_edge": 128}, patch_size={"height": 8, "width": 8}
    )
    tokenizer = small_tokenizer(special)
    return PixtralProcessor(image_processor, tokenizer, patch_size=8)


def resized(image: Image.Image, factor: float) -> Image.Image:
    width, height = (round(factor * side) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def made(processor: Any, *images: Image.Image) -> dict[str, torch.Tensor]:
    records = [Record(image, "what is at the top left") for image in images]
    return next(batches(processor, records, len(records)))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("family", ["qwen2_5_vl", "pixtral"])
def test_sides_are_scaled(tmp_path: Path, family: str) -> None:
    processor = qwen(tmp_path) if family == "qwen2_5_vl" else pixtral()
    smaller = [resized(WIDE, 0.5), resized(noise(64, 96), 0.5)]
    found = made(scaled_processor(processor, 0.5), WIDE, noise(64, 96))
    assert_same(found, made(processor, *smaller))


def test_an_image_beyond_the_limit_of_the_processor_shrinks_as_well(tmp_path: Path) -> None:
    processor = qwen(tmp_path)
    whole = made(processor, LARGE)["pixel_values"].numel()
    # Nine tenths of the sides are still at the limit of 400 tokens.
    assert made(processor, resized(LARGE, 0.9))["pixel_values"].numel() == whole
    found = made(scaled_processor(processor, 0.9), LARGE)
    assert 0.95 * 0.81 * whole <= found["pixel_values"].numel() <= 0.81 * whole
    _, rows, columns = found["image_grid_thw"][0].tolist()
    assert columns / rows == pytest.approx(400 / 300, rel=0.1)


def test_an_image_that_is_enlarged_stays(tmp_path: Path) -> None:
    processor = qwen(tmp_path)
    assert_same(made(scaled_processor(processor, 0.5), SMALL), made(processor, SMALL))


@pytest.mark.parametrize(
    ("family", "image", "scaled"),
    [
        ("smolvlm", {"size": {"longest_edge": 112}}, {"size": {"longest_edge": 56}}),
        ("internvl", {"max_patches": 12}, {"max_patches": 3}),
    ],
)
def test_settings_of_processors_that_make_tiles(
    tmp_path: Path, family: str, image: dict[str, Any], scaled: dict[str, Any]
) -> None:
    processor = load_processor(write_processor(family, tmp_path / "whole", image=image))
    smaller = load_processor(write_processor(family, tmp_path / "scaled", image=scaled))
    found = made(scaled_processor(processor, 0.5), LARGE)
    assert_same(found, made(smaller, LARGE))
    assert found["pixel_values"].numel() < made(processor, LARGE)["pixel_values"].numel()
    # The processor is as it was.
    assert getattr(processor.image_processor, next(iter(image))) != getattr(
        smaller.image_processor, next(iter(image))
    )


def test_tiles_that_follow_the_size(tmp_path: Path) -> None:
    processor = load_processor(write_processor("llava_onevision", tmp_path))
    # A number in Aria, where SmolVLM has a dict.
    processor.image_processor.max_image_size = 980
    found = made(scaled_processor(processor, 0.65), noise(60, 60))
    # Two of five tiles; the smallest factor that leaves three is more than 0.65.
    assert found["pixel_values"].shape[1] == 2


def test_one_size_is_refused(tmp_path: Path) -> None:
    processor = load_processor(write_processor("gemma3", tmp_path))
    with pytest.raises(ValueError, match=r"^image_scale=0.5 changes nothing: Gemma3Processor"):
        scaled_processor(processor, 0.5)
    for scale in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"give a number in \(0, 1\]"):
            scaled_processor(processor, scale)
    assert scaled_processor(processor, 1) is processor


def test_a_scale_is_never_applied_twice(tmp_path: Path) -> None:
    processor = qwen(tmp_path / "first")
    scaled = scaled_processor(processor, 0.5)
    assert_same(made(scaled_processor(scaled, 0.5), WIDE), made(scaled, WIDE))
    assert scaled_processor(scaled, 1) is processor
    # What it saves is the unscaled processor.
    scaled.save_pretrained(tmp_path / "second")
    again = load_processor(tmp_path / "second")
    assert_same(made(again, WIDE), made(processor, WIDE))


def test_it_goes_to_other_processes_and_is_copied(tmp_path: Path) -> None:
    """Data loaders pickle it for workers that are spawned."""
    scaled = scaled_processor(qwen(tmp_path), 0.5)
    scaled.chat_template += "\n"
    for again in (pickle.loads(pickle.dumps(scaled)), copy.deepcopy(scaled)):
        assert again.chat_template == scaled.chat_template
        assert_same(made(again, LARGE), made(scaled, LARGE))


def test_it_is_called_like_the_processor(tmp_path: Path) -> None:
    processor = qwen(tmp_path)
    scaled = scaled_processor(processor, 0.5)
    assert isinstance(scaled, type(processor)) and scaled.tokenizer is processor.tokenizer
    image = {"type": "image", "image": WIDE}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": "what is"}]}]
    small = copy.deepcopy(chat)
    small[0]["content"][0]["image"] = resized(WIDE, 0.5)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found = scaled.apply_chat_template(chat, **options)
    assert_same(dict(found), dict(processor.apply_chat_template(small, **options)))
    # A path is opened; an array, whose range of values is not known, is refused.
    WIDE.save(tmp_path / "wide.png")
    direct = scaled.image_processor([str(tmp_path / "wide.png")], return_tensors="pt")
    assert torch.equal(direct["pixel_values"], found["pixel_values"])
    with pytest.raises(TypeError, match="an image is a Tensor"):
        scaled.image_processor(torch.zeros(3, 32, 32))
