"""A processor in a model's folder that is another model's, or of another version of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_cases import fails, run
from real_processors import noise, write_processor, write_qwen


@pytest.fixture(scope="module", name="qwen")
def _qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2.5-VL with its processor, and a question beside it."""
    folder = tmp_path_factory.mktemp("together")
    write_qwen(folder / "qwen", max_pixels=64 * 64)
    noise(64, 48).save(folder / "0.png")
    (folder / "d.jsonl").write_text(
        json.dumps({"image": "0.png", "prompt": "what is it?", "answer": "one"})
    )
    return folder / "qwen"


def _with_config(qwen: Path, folder: Path, **other: Any) -> Path:
    """The folder without weights, with other entries of its config."""
    shutil.copytree(qwen, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text()) | other
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _with_settings(folder: Path, **other: Any) -> None:
    """Give its image processor other settings."""
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"] |= other
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "settings", "says"),
    [
        ({"image_token_id": 299}, {}, r"an image is <\|image_pad\|> there .*, and token id 299 in"),
        ({}, {"patch_size": 2}, "the model fails on its inputs .RuntimeError: "),
        (
            {},
            {"merge_size": 1},
            r"it writes 256 placeholders of an image, .* model makes 64 tokens",
        ),
        ({}, None, "it does not make image_grid_thw, which the model takes"),
    ],
    ids=["token", "patches", "merged", "family"],
)
def test_what_does_not_fit_is_said(
    qwen: Path, tmp_path: Path, config: Any, settings: Any, says: str
) -> None:
    folder = _with_config(qwen, tmp_path / "other", **config)
    if settings is None:
        write_processor("internvl", folder)
    else:
        _with_settings(folder, **settings)
    # Neither reads weights, of which there are none.
    found = [
        fails("data", qwen.parent / "d.jsonl", "--model", folder),
        fails("inspect", folder, "--image-scale", "0.5"),
    ]
    for message in found:
        assert f"the processor in {folder} does not go with the qwen2_5_vl model there" in message
        assert re.search(says, message), message
        assert message.endswith("Save the model's own there (processor.save_pretrained)")


def test_ids_that_the_model_does_not_know(qwen: Path, tmp_path: Path) -> None:
    text = json.loads((qwen / "config.json").read_text())["text_config"]
    folder = _with_config(qwen, tmp_path / "other", text_config=text | {"vocab_size": 300})
    message = fails("data", qwen.parent / "d.jsonl", "--model", folder)
    assert re.search(r"its prompts have the token id \d+, and the model knows 300 tokens", message)


def test_weights_are_not_needed_to_say_so(qwen: Path, tmp_path: Path) -> None:
    folder = _with_config(qwen, tmp_path / "other", image_token_id=299)
    asked = ("--image", qwen.parent / "0.png", "--prompt", "what is it?")
    data = ("--data", qwen.parent / "d.jsonl")
    for command in (
        ("generate", folder, *asked),
        ("show", folder, *asked, "--output", tmp_path / "show"),
        ("eval", folder, *data),
        ("search", folder, *data, "--output", tmp_path / "found"),
        ("compare", folder, "--test", qwen.parent / "d.jsonl", "--output", tmp_path / "compared"),
        ("export", folder, tmp_path / "onnx", "--image", qwen.parent / "0.png"),
    ):
        assert "does not go with the qwen2_5_vl model there" in fails(*command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_one_that_fits_is_taken(qwen: Path) -> None:
    assert "48 of them for images" in run("data", qwen.parent / "d.jsonl", "--model", qwen)
