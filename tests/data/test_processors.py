"""Processors are loaded with and without torchvision, and images need nothing of the video side."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES
from PIL import Image
from real_processors import REAL, write_processor
from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.utils import is_torchvision_available

from deos_fx.data import Record, batches
from deos_fx.data.processors import load_processor

IMAGE = Image.effect_noise((90, 60), 60).convert("RGB")
without_torchvision = pytest.mark.skipif(
    is_torchvision_available(), reason="torchvision is installed"
)


@pytest.mark.parametrize("family", REAL)
def test_images_are_read(family: str, tmp_path: Path) -> None:
    processor = load_processor(write_processor(family, tmp_path))
    assert type(processor).__name__ == REAL[family].name
    (batch,) = batches(processor, [Record(IMAGE, "what is at the top")], 1)
    expected = AutoImageProcessor.from_pretrained(tmp_path)
    own = getattr(processor, "images_kwargs", {})
    options = {name: own[name] for name in ("crop_to_patches", "do_convert_rgb") if name in own}
    pixels = expected([[IMAGE]], return_tensors="pt", **options)["pixel_values"]
    np.testing.assert_array_equal(batch["pixel_values"], pixels)


@pytest.mark.parametrize("family", REAL)
def test_saving_changes_no_settings(family: str, tmp_path: Path) -> None:
    write_processor(family, tmp_path / "a")
    load_processor(tmp_path / "a").save_pretrained(tmp_path / "b")
    load_processor(tmp_path / "b").save_pretrained(tmp_path / "c")
    first, second, third = (
        json.loads((tmp_path / name / "processor_config.json").read_text()) for name in "abc"
    )
    assert second == third
    assert second["processor_class"] == first["processor_class"]
    videos = first.get("video_processor", {})
    assert videos.items() <= second.get("video_processor", {}).items()


@without_torchvision
def test_videos_are_refused(tmp_path: Path) -> None:
    processor = load_processor(write_processor("qwen2_5_vl", tmp_path))
    video = np.zeros((4, 28, 28, 3), dtype=np.uint8)
    with pytest.raises(ImportError, match=r"^reading videos needs packages that are not installed"):
        processor(videos=[video], text=["<|video_pad|>"])


@without_torchvision
def test_settings_of_videos_that_the_files_leave_at_their_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor of MiniCPM-V asks the one of videos for two of them."""
    names = ("image", "video", "image_start", "image_end", "slice_start", "slice_end")
    marks = {f"{name}_token": f"<{name}>" for name in (*names, "image_id_start", "image_id_end")}
    parts = "MiniCPMV4_6ImageProcessor", "MiniCPMV4_6VideoProcessor"
    image = {"image_processor_type": parts[0], "patch_size": 4, "scale_resolution": 32}
    special = {"pad": "<pad>", "eos": "<eos>"} | marks
    mini = REAL["gemma3"]._replace(
        name="MiniCPMV4_6Processor", special=special, image=image, video=parts[1], settings={}
    )
    monkeypatch.setitem(REAL, "mini", mini)
    processor = load_processor(write_processor("mini", tmp_path, template=""))
    (batch,) = batches(processor, [Record(IMAGE, "what is at the top")], 1)
    number = processor.tokenizer.convert_tokens_to_ids("<image>")
    patches = int(batch["target_sizes"].prod(dim=-1).sum())
    assert int((batch["input_ids"] == number).sum()) == patches // 16


@without_torchvision
def test_other_threads_and_later_calls_find_transformers_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_processor("internvl", tmp_path)
    seen: list[str] = []

    def elsewhere() -> None:
        with pytest.raises(ImportError) as caught:
            AutoVideoProcessor.from_pretrained(tmp_path)
        seen.append(str(caught.value))

    load = AutoProcessor.from_pretrained

    def during(folder: Path) -> Any:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return load(folder)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", during)
    load_processor(tmp_path)
    elsewhere()
    assert len(seen) == 2 and all("Torchvision" in words for words in seen)


@without_torchvision
def test_images_that_need_torchvision_are_one_line(tmp_path: Path) -> None:
    """An image processor that has no form without it."""
    write_processor("gemma3", tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    config["image_processor"] = {"image_processor_type": "Lfm2VlImageProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError) as caught:
        load_processor(tmp_path)
    assert "\n" not in str(caught.value) and "deos-fx[video]" in str(caught.value)


def test_a_tokenizer_alone_is_no_processor(tmp_path: Path) -> None:
    write_processor("qwen2_5_vl", tmp_path)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="no processor of images and text"):
        load_processor(tmp_path)


def test_a_model_without_a_processor_says_what_to_do(tmp_path: Path) -> None:
    FAMILIES["pixtral"].config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="has no processor of images; save the model's own there"):
        load_processor(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [0]}'),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("processor_config.json", "{"),
    ],
)
def test_a_damaged_processor_is_named_in_one_line(tmp_path: Path, name: str, content: str) -> None:
    write_processor("qwen2_5_vl", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, OSError)) as caught:
        load_processor(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
