"""The real lmms-eval on tasks made of local files: what it gets is what transformers answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from in_pytorch import without_tracing

import deos_fx
from deos_fx import reference
from deos_fx.data import Record, batches

reason = "lmms-eval is not installed: pip install 'deos-fx[lmms-eval]'"
pytest.importorskip("lmms_eval.api", reason=reason)

# lmms-eval and what it imports warn of their own matters.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    # It patches filelock and ssl for good.
    pytest.mark.usefixtures("offline"),
]

COUNT = 6

TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_visual: !function looks.images
doc_to_text: !function looks.question
{rest}
"""

LOOKS = """
def images(doc):
    return [image.convert("RGB") for image in doc["images"]]

def question(doc):
    return doc["question"]

def chat(doc):
    first, *others = [{"type": "image", "url": image} for image in images(doc)]
    words = {"type": "text", "text": doc["question"]}
    return [{"role": "user", "content": [first, words, *others]}]
"""

GENERATE = """
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, until: ["\\n"]}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""

CHOOSE = """
doc_to_choice: ["yes", "no"]
doc_to_target: "yes"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def offline() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def examples() -> Sequence[Any]:
    return reference.make_examples(COUNT, "test")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, examples: Sequence[Any]) -> Path:
    """A folder of three tasks: one image each, two images each, and two choices."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    images = [example.scene.image for example in examples]
    shared = {
        "question": [example.question.text for example in examples],
        "answer": [example.question.answer for example in examples],
    }
    kind = {"images": datasets.List(datasets.Image())}
    kind |= {name: datasets.Value("string") for name in shared}
    several = {"one": [[image] for image in images]}
    several["two"] = [[image, images[0]] for image in images]
    for name, lists in several.items():
        rows = datasets.Dataset.from_dict({"images": lists, **shared}, datasets.Features(kind))
        rows.to_parquet(folder / f"{name}.parquet")
    (folder / "looks.py").write_text(LOOKS)
    chat = GENERATE + "doc_to_messages: !function looks.chat\n"
    for name, data, output, rest in (
        ("scenes", "one", "generate_until", GENERATE),
        ("pairs", "two", "generate_until", chat),
        ("choices", "one", "multiple_choice", CHOOSE),
    ):
        text = TASK.format(name=name, data=folder / f"{data}.parquet", kind=output, rest=rest)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = reference.load()
    folder = tmp_path_factory.mktemp("models") / "reduced"
    deos_fx.transform(model, policy=deos_fx.presets.fit("merge", 18, model)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def evaluated(tasks: Path, name: str, model: Path, *, simple: bool = False) -> Any:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    return simple_evaluate(
        model="deos_fx",
        model_args=f"pretrained={model}",
        tasks=[name],
        task_manager=TaskManager(include_path=str(tasks), model_name="deos_fx"),
        batch_size=4,
        device="cpu",
        force_simple=simple,
        log_samples=True,
        bootstrap_iters=0,
    )


def answers(result: Any, name: str) -> list[str]:
    samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples]


def own_answers(generate: Any, examples: Sequence[Any], form: str, *more: Any) -> list[str]:
    """What `generate` answers to each question alone; of the form, ``{}`` is the question."""
    _, processor = reference.load()
    found = []
    for example in examples:
        text = form.format(example.question.text)
        images = [example.scene.image, *more]
        inputs = processor(text=[text], images=[images], return_tensors="pt")
        ids = generate(**inputs, do_sample=False, max_new_tokens=4)
        new = ids[0, inputs["input_ids"].shape[1] :]
        found.append(processor.decode(new, skip_special_tokens=True).strip())
    return found


ASKED = "<image> {}"


def test_what_a_user_types(
    tasks: Path, reduced: Path, tmp_path: Path, examples: Sequence[Any]
) -> None:
    command = [sys.executable, "-m", "lmms_eval", "--model", "deos_fx", "--tasks", "scenes"]
    command += ["--model_args", f"pretrained={reduced}", "--batch_size", "4", "--device", "cpu"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.rglob("*_results.json")
    score = json.loads(written.read_text())["results"]["scenes"]["exact_match,none"]
    model = deos_fx.ReducedModel.from_pretrained(reduced)
    own = own_answers(model.generate, examples, ASKED)
    right = [
        answer == example.question.answer for answer, example in zip(own, examples, strict=True)
    ]
    assert score == pytest.approx(sum(right) / COUNT)


def test_batches_of_a_reduced_model(tasks: Path, reduced: Path, examples: Sequence[Any]) -> None:
    found = answers(evaluated(tasks, "scenes", reduced, simple=True), "scenes")
    model = deos_fx.ReducedModel.from_pretrained(reduced)
    assert found == own_answers(model.generate, examples, ASKED)


def test_images_stand_where_the_conversation_has_them(tasks: Path, examples: Sequence[Any]) -> None:
    found = answers(evaluated(tasks, "pairs", reference.WEIGHTS), "pairs")
    model, _ = reference.load()
    shared = examples[0].scene.image
    assert found == own_answers(model.generate, examples, "<image> {} <image>", shared)


def test_an_export(tasks: Path, examples: Sequence[Any], tmp_path: Path) -> None:
    model, processor = reference.load()
    inputs = next(reference.batches(processor, examples[:2], batch_size=2, answers=False))
    reduced = deos_fx.transform(model, policy=deos_fx.presets.fit("merge", 18, model))
    # What ONNX Runtime makes of it has tests of its own.
    with without_tracing():
        deos_fx.export_onnx(reduced, tmp_path / "onnx", example_inputs=inputs, verify=False)
        processor.save_pretrained(tmp_path / "onnx")
        found = answers(evaluated(tasks, "scenes", tmp_path / "onnx"), "scenes")
    assert found == own_answers(reduced.generate, examples, ASKED)


def test_choices_are_scored_by_the_loss_of_transformers(
    tasks: Path, examples: Sequence[Any]
) -> None:
    result = evaluated(tasks, "choices", reference.WEIGHTS, simple=True)
    model, processor = reference.load()
    for sample in result["samples"]["choices"]:
        example = examples[sample["doc_id"]]
        for choice, (loss, greedy) in zip(("yes", "no"), sample["filtered_resps"], strict=True):
            asked = replace(example, question=replace(example.question, answer=choice))
            (batch,) = reference.batches(processor, [asked], 1)
            with torch.no_grad():
                output = model(**batch)
            assert loss == pytest.approx(float(output.loss), rel=1e-4)
            labels = batch["labels"][0]
            best = output.logits[0, :-1].argmax(dim=-1)[labels[1:] >= 0]
            assert greedy == bool((best == labels[labels >= 0]).all())


def test_what_is_not_an_image_is_refused() -> None:
    from deos_fx.harness.requests import record_of_chat, record_of_text

    with pytest.raises(ValueError, match="task 3 has a dict to look at; .*images and text"):
        record_of_text("What?", [{"array": []}], "task 3")
    turn = {"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}
    with pytest.raises(ValueError, match="task 3 has a part of type video"):
        record_of_chat([turn], "task 3")


def test_settings_of_tasks() -> None:
    from deos_fx.harness.requests import ended, generation_options

    options, until = generation_options({"until": "\n", "temperature": 0, "num_beams": 2})
    assert options == {"max_new_tokens": 1024, "num_beams": 2, "do_sample": False}
    assert ended("cat\ndog", until) == "cat"
    options, until = generation_options({"temperature": 0.5, "max_new_tokens": 3, "fps": 1})
    assert options == {"max_new_tokens": 3, "temperature": 0.5, "do_sample": True}
    assert ended(" cat\ndog ", until) == "cat\ndog"


def test_images_enter_at_a_scale(tmp_path: Path) -> None:
    from real_processors import noise, write_qwen

    from deos_fx.harness.lmms import SimpleModel

    model, _ = write_qwen(tmp_path)
    scaled = SimpleModel(str(tmp_path), image_scale="0.5", device="cpu")
    (inputs,) = batches(scaled.processor, [Record(noise(64, 48), "what is")], 1)
    # 48 visual tokens of the whole image.
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 12
