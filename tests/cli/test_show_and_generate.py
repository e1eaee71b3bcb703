"""One image and one question: what a policy keeps of it, and what is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_cases import fails, run
from in_pytorch import without_tracing
from PIL import Image

from deos_fx import Policy, ReducedModel, presets, reference

MERGE = presets.merge(keep=4)


@pytest.fixture(scope="module", name="asked")
def _asked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Questions of the reference model, and folders of it: whole and reduced."""
    folder = tmp_path_factory.mktemp("asked")
    model, processor = reference.load()
    reduced = ReducedModel(model, MERGE)
    reduced.save_pretrained(folder / "reduced")
    processor.save_pretrained(folder / "reduced")
    examples = reference.make_examples(8, "test")
    for i, example in enumerate(examples):
        example.scene.image.save(folder / f"{i}.png")
    (batch,) = reference.batches(processor, examples, 8, answers=False)

    def answers(generate: Any) -> list[str]:
        ids = generate(**batch)[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]

    whole, own = answers(model.generate), answers(reduced.generate)
    # A question that the two answer differently.
    i = next(i for i in range(8) if whole[i] != own[i])
    options = ("--image", folder / f"{i}.png", "--prompt", examples[i].question.text)
    return folder, options, whole[i], own[i]


def test_answers(asked: Any, tmp_path: Path) -> None:
    folder, options, whole, own = asked
    assert run("generate", reference.WEIGHTS, *options).splitlines()[-1] == whole
    assert run("generate", folder / "reduced", *options).splitlines()[-1] == own
    MERGE.save(tmp_path / "policy.json")
    chosen = ("--policy", tmp_path / "policy.json", "--dtype", "float32", "--device", "cpu")
    assert run("generate", reference.WEIGHTS, *options, *chosen).splitlines()[-1] == own


def test_answers_of_an_export(asked: Any, tmp_path: Path) -> None:
    folder, options, _, own = asked
    with without_tracing():
        run("export", folder / "reduced", tmp_path / "onnx", "--no-verify")
        assert run("generate", tmp_path / "onnx", *options).splitlines()[-1] == own
    message = fails("generate", tmp_path / "onnx", *options, "--budget", "0.5")
    assert "is an export, and its policy is part of its graphs" in message


def test_show_draws_the_policy_of_a_folder(asked: Any, tmp_path: Path) -> None:
    folder, options, *_ = asked
    output = run("-q", "show", folder / "reduced", *options, "--output", tmp_path / "out")
    assert "Wrote" not in output and "load" not in output
    assert "projector: 4 of 144 visual tokens kept" in output.replace("\n", " ")
    assert "4 of 144 visual tokens left" in (tmp_path / "out" / "show.html").read_text()
    with Image.open(tmp_path / "out" / "show.png") as picture:
        # Two panels of 480 pixels.
        assert picture.size == (2 * 480 + 3 * 16, 480 + 28 + 2 * 16)


def test_quiet_data_names_no_stages(asked: Any, tmp_path: Path) -> None:
    folder, options, *_ = asked
    row = {"image": str(options[1]), "prompt": options[3]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    shown = run("-q", "data", tmp_path / "d.jsonl", "--model", folder / "reduced")
    assert "1 row" in shown and "read:" not in shown


def test_an_image_that_is_missing(asked: Any, tmp_path: Path) -> None:
    folder, *_ = asked
    options = ("--image", tmp_path / "no.png", "--prompt", "what is")
    for command in ("show", "generate"):
        assert "--image: there is no image" in fails(command, folder / "reduced", *options)


def test_the_drawing_is_what_explain_returns(asked: Any) -> None:
    folder, *_ = asked
    model, processor = reference.load()
    examples = reference.make_examples(2, "test")
    (batch,) = reference.batches(processor, examples, 2, answers=False)
    explanation = ReducedModel(model, MERGE).explain(**batch)
    for row in range(2):
        drawn = explanation.draw([examples[row].scene.image], row=row)
        (step,) = drawn.steps[0]
        places = (batch["input_ids"][row] == processor.image_token_id).nonzero().flatten().tolist()
        assert [places[patch] for patch in step.kept] == explanation[0].kept[row].tolist()
    whole = ReducedModel(model, Policy()).explain(**batch)
    assert whole == [] and whole.draw([examples[0].scene.image]).steps == [[]]
