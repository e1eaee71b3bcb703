"""A folder with a real processor and a file of questions, from the first look to a policy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_cases import fails, run
from families import FAMILIES, shared
from real_processors import noise, write_processor, write_qwen
from transformers import AutoModelForImageTextToText

from deos_fx import Policy, Reduction
from deos_fx.cli.grouping import alike
from deos_fx.cli.processors import export_example
from deos_fx.data import Record, scaled_processor
from deos_fx.data.processors import load_processor

ROWS: list[dict[str, Any]] = [
    {"image": "0.png", "prompt": "what is at the top left?", "answer": "[red] one", "id": 1},
    {
        "images": ["0.png", "1.png"],
        "question": "is <image> or <image>?",
        "answer": "seven",
        "kind": "what",
    },
]


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2.5-VL with its processor, and questions."""
    folder = tmp_path_factory.mktemp("user")
    write_qwen(folder / "qwen")
    for i, size in enumerate([(64, 48), (80, 80)]):
        noise(*size).save(folder / f"{i}.png")
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "alike.jsonl").write_text(json.dumps(ROWS[0]))
    return folder


# *** data ***


def test_data_shows_what_the_model_sees(folder: Path) -> None:
    output = run("data", folder / "d.jsonl", "--model", folder / "qwen")
    # Cells of 8 pixels: 48 and 100 visual tokens.
    first, second = output.split(f"{folder / 'd.jsonl'}, line ")[1:]
    assert first.startswith("1: 1 image of 64 x 48 pixels; ")
    assert "48 of them for images" in first
    assert "<|vision_start|><|image_pad|> x 48<|vision_end|>what is at the top left?" in first
    assert "assistant\n>>>[red] one<|im_end|><<<" in first
    assert second.startswith("2: 2 images of 64 x 48, 80 x 80 pixels; ")
    assert "148 of them for images, 3 of the answer" in second
    assert "x 48<|vision_end|> or <|vision_start|>" in second
    assert ">>>seven<|im_end|><<<" in second
    totals = [line.split() for line in second.splitlines()]
    assert ["tokens", "for", "images", "48", "98", "148"] in totals
    assert ["images", "1", "1.5", "2"] in totals
    assert "kinds: what" in output and "entries that are not used: id" in output


def test_data_names_a_row_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes()[:100])
    (tmp_path / "d.jsonl").write_text("\n" + json.dumps(ROWS[0]))
    message = fails("data", tmp_path / "d.jsonl", "--model", folder / "qwen")
    assert f"{tmp_path / 'd.jsonl'}, line 2: {tmp_path / '0.png'} is not an image" in message


def test_data_says_what_a_folder_lacks(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / "qwen" / name).read_bytes())
    message = fails("data", folder / "d.jsonl", "--model", tmp_path)
    assert "has no processor of images" in message


# *** the others, on images of any size ***


def test_inspect(folder: Path) -> None:
    assert "decoder.0" in run("inspect", folder / "qwen")


def test_inspect_counts_the_tokens_of_a_given_image(folder: Path, tmp_path: Path) -> None:
    options = ("--preset", "merge", "--budget", "25%")
    text = run("inspect", folder / "qwen", "--image", folder / "0.png", *options)
    # Cells of 8 pixels of an image of 64 x 48.
    assert "48 visual tokens an image; images of other sizes have others" in text
    assert "-> 12" in text and "visual tokens, mean 48 12 25.0%" in " ".join(text.split())
    missing = tmp_path / "none.png"
    assert f"there is no image {missing}" in fails("inspect", folder / "qwen", "--image", missing)
    (tmp_path / "config.json").write_bytes((folder / "qwen" / "config.json").read_bytes())
    message = fails("inspect", tmp_path, "--image", folder / "0.png")
    assert "has no processor of images; save the model's own there" in message


def test_inspect_says_how_many_tiles_an_image_has(folder: Path, tmp_path: Path) -> None:
    write_processor("internvl", tmp_path, image={"size": {"height": 32, "width": 32}})
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_seq_length": 64}))
    config = FAMILIES["internvl"].config()
    tokenizer = load_processor(tmp_path).tokenizer
    config.image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    config.text_config.vocab_size = len(tokenizer)
    config.save_pretrained(tmp_path)
    assert "64 visual tokens an image (8 x 8)" in run("inspect", tmp_path)
    # 80 x 80 pixels: two by two tiles, and the whole image.
    text = run("inspect", tmp_path, "--image", folder / "1.png")
    assert "320 visual tokens an image (5 tiles of 8 x 8)" in text


def test_inspect_counts_the_tokens_of_all_tiles(tmp_path: Path) -> None:
    size = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    write_processor("smolvlm", tmp_path, image=size)
    config = FAMILIES["smolvlm"].config()
    # Of 16 x 16 patches, 8 x 8 are a token.
    config.scale_factor = 8
    processor = load_processor(tmp_path)
    config.image_token_id = processor.image_token_id
    config.text_config.vocab_size = len(processor.tokenizer)
    config.save_pretrained(tmp_path)
    text = run("inspect", tmp_path, "--preset", "merge", "--budget", "25%")
    # Four tiles and the whole image, each of 4 tokens.
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["projector"][-3:-1] == ["20", "20"] and rows["merge"][-1] == "5"
    assert rows["decoder.0"][-2] == "5"


def test_transform_copies_the_processor(folder: Path, tmp_path: Path) -> None:
    Policy((Reduction("projector", 0.5, scores={"novelty": 1.0}),)).save(tmp_path / "policy.json")
    run("transform", folder / "qwen", tmp_path / "out", "--policy", tmp_path / "policy.json")
    copied = load_processor(tmp_path / "out")
    assert copied.to_dict() == load_processor(folder / "qwen").to_dict()


# Slow: searches of other models are tested elsewhere, as is all that is special here.
@pytest.mark.slow
def test_search(folder: Path, tmp_path: Path) -> None:
    options = ("--budget", "50%", "--steps", 1, "--output", tmp_path / "found")
    run("search", folder / "qwen", "--data", folder / "alike.jsonl", *options)
    assert (tmp_path / "found" / "policy.json").is_file()


def test_a_search_batches_images_that_become_as_many_tokens(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder / "qwen")
    sizes = [(64, 48), (80, 80), (65, 47), (64, 48)]
    records = [Record(noise(*size), "what?", str(i)) for i, size in enumerate(sizes)]
    processor = load_processor(folder / "qwen")
    for scales in [1], [1, 0.5]:
        processors = [scaled_processor(processor, scale) for scale in scales]
        found = alike(model, processors, records, 2, 0)
        # 65 x 47 is resized to 64 x 48.
        answers = [{record.answer for record in group} for group in found]
        assert {"1"} in answers and set.union(*answers) == set("0123")
        assert sorted(map(len, answers)) == [1, 1, 2]


def test_the_last_quarter_has_its_share_of_all_images(folder: Path) -> None:
    """A file often has its questions in order: by image, by size, by kind."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "qwen")
    processor = load_processor(folder / "qwen")
    files = [folder / f"{name}.png" for name in "abcdefghijkl"]
    for i, file in enumerate(files):
        noise(*((64, 48) if i < 8 else (80, 80)), i).save(file)
    # Two questions about each: 16 about wide images, then 8 about square ones.
    records = [Record(file, "what?", f"{file.stem}{i}") for file in files for i in range(2)]
    found = alike(model, [processor], records, 2, 0)
    names = [[str(record.answer) for record in group] for group in found]
    assert sorted(sum(names, [])) == sorted(str(record.answer) for record in records)
    # Both about an image are in one batch, and of three batches two are wide.
    assert all(first[0] == second[0] for first, second in names)
    squares = [first[0] in "ijkl" for first, _ in names]
    assert sum(squares[:9]) == 3 and sum(squares[9:]) == 1
    assert names != [[str(r.answer) for r in records[i : i + 2]] for i in range(0, 24, 2)]
    # The same seed gives the same order, in every process.
    again, other = (alike(model, [processor], records, 2, seed) for seed in (0, 1))
    assert again == found != other


def test_a_policy_that_is_not_there_is_named(folder: Path) -> None:
    for command, data in (("eval", "--data"), ("compare", "--test")):
        message = fails(command, folder / "qwen", data, folder / "d.jsonl", "--policy", "found")
        assert "there is no policy found; give a policy file, or the folder" in message


def test_a_policy_may_be_the_folder_of_a_search(folder: Path, tmp_path: Path) -> None:
    half = Reduction("projector", 0.5, scores={"feature_norm": 1.0})
    Policy((half,)).save(tmp_path / "policy.json")
    assert "projector: keep 0.5" in run("inspect", folder / "qwen", "--policy", tmp_path)
    Policy().save(tmp_path / "policy-0.25.json")
    message = fails("inspect", folder / "qwen", "--policy", tmp_path)
    assert "has the policies policy-0.25.json, policy.json; give one, as" in message


def test_export_takes_images_as_the_processor_makes_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def export(reduced: Any, folder: Path, **options: Any) -> None:
        seen.update(options)

    monkeypatch.setattr("deos_fx.export_onnx", export, raising=False)
    reduced = SimpleNamespace(processor=lambda processor: processor)
    monkeypatch.setattr("deos_fx.cli.loading.load_reduced", lambda *_, **options: reduced)
    monkeypatch.setattr("deos_fx.cli.processors.copy_processor", lambda *_: None)
    images = ("--image", folder / "0.png", "--image", folder / "1.png")
    run("export", folder / "qwen", tmp_path / "onnx", *images, "--elastic")
    assert seen["example_inputs"]["image_grid_thw"].prod(dim=1).tolist() == [4 * 48, 4 * 100]
    assert seen["elastic"]


def test_an_export_needs_no_image_where_all_have_one_size(tmp_path: Path) -> None:
    """Gemma 3 takes kinds of tokens, which only its processor knows."""
    config = FAMILIES["gemma3"].config()
    side, tokens = config.vision_config.image_size, config.mm_tokens_per_image
    write_processor("gemma3", tmp_path, image={"size": {"height": side, "width": side}})
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_seq_length": tokens}))
    tokenizer = load_processor(tmp_path).tokenizer
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image_soft_token>")
    config.text_config.vocab_size = len(tokenizer)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    reduced: Any = SimpleNamespace(model=model, processor=lambda processor: processor)
    example = export_example(reduced, str(tmp_path))
    assert example is not None and example["pixel_values"].shape == (1, 3, side, side)
    assert example["token_type_ids"].sum() == tokens
    # Nothing is made up where the size of images matters.
    reduced.model = shared("qwen2_5_vl")
    assert export_example(reduced, str(tmp_path)) is None


# *** example ***


def test_example_is_what_the_other_commands_take(tmp_path: Path) -> None:
    output = run("example", tmp_path / "tried", "--questions", 2)
    model = tmp_path / "tried" / "model"
    for name in ("questions", "test"):
        assert "2 rows" in run("data", tmp_path / "tried" / f"{name}.jsonl", "--model", model)
    assert "visual tokens, mean" in run("inspect", model, "--preset", "merge")
    # The commands that it names exist.
    assert len(re.findall(r"^  deos-fx (inspect|data|search|eval) ", output, flags=re.M)) == 4
    assert "add --force" in fails("example", tmp_path / "tried")
