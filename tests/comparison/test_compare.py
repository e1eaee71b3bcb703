"""Comparisons: every method is asked the same, and its figures are those found without them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from PIL import Image
from real_processors import noise, write_qwen

from deos_fx import (
    Budget,
    Comparison,
    Policy,
    ReducedModel,
    Reduction,
    compare,
    presets,
    reference,
    transform,
)
from deos_fx.comparison import bench
from deos_fx.comparison.answers import answer_loss, check_apart
from deos_fx.comparison.compare import evaluate
from deos_fx.cost.model import CostModel
from deos_fx.data import Record, batches
from deos_fx.results.search_result import Candidate, SearchResult

TOKENS = Budget(visual_tokens=0.125)
needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="the extra [compare] is not installed"
)


def records(examples: Any) -> list[Record]:
    return [
        Record(
            example.scene.image,
            example.question.text,
            example.question.answer,
            example.question.kind,
        )
        for example in examples
    ]


@pytest.fixture(scope="module", name="loaded")
def _loaded() -> Any:
    return reference.load()


@pytest.fixture(scope="module", name="asked")
def _asked() -> Any:
    return reference.make_examples(12, "test")


@pytest.fixture(scope="module", name="result")
def _result(loaded: Any, asked: Any) -> Comparison:
    return compare(
        *loaded,
        records(asked),
        budget=TOKENS,
        policies={"mine": presets.merge(keep=18)},
        presets=["merge", "random", "uniform"],
        seeds=2,
        batch_size=5,
    )


# *** what is measured ***


def test_the_rows(result: Comparison) -> None:
    names = [row.name for row in result.rows]
    assert names == [
        "no reduction",
        "mine",
        "merge",
        "random",
        "uniform",
        "smaller image",
        "no image",
    ]
    assert (result.limit, result.questions, result.tokens_per_image) == (18, 12, 144)
    smaller = result.row("smaller image")
    assert not smaller.runs and "takes one size of images" in smaller.reason


def test_right_answers_are_those_of_the_reference(
    result: Comparison, loaded: Any, asked: Any
) -> None:
    model, processor = loaded
    ways = {"no reduction": model, "mine": ReducedModel(model, presets.merge(keep=18))}
    for name, way in ways.items():
        expected = reference.accuracy(way.generate, processor, asked)
        row = result.row(name)
        assert result.accuracy(row).mean == expected.pop("overall")
        assert {kind: result.accuracy(row, kind).mean for kind in result.kind_names} == expected


def test_costs_are_those_of_the_first_prompt(result: Comparison, loaded: Any, asked: Any) -> None:
    model, processor = loaded
    inputs = next(reference.batches(processor, asked[:1], 1, answers=False))
    for name in ("merge", "uniform"):
        (run,) = result.row(name).runs
        assert run.cost == ReducedModel(model, run.policy).cost(**inputs).after
    assert all(run.milliseconds > 0 for row in result.rows for run in row.runs)


def test_equal_policies_answer_alike(result: Comparison) -> None:
    (mine,), (merge,) = result.row("mine").runs, result.row("merge").runs
    assert mine.policy == merge.policy and mine.answers == merge.answers
    assert mine.milliseconds == merge.milliseconds


def test_random_has_a_run_for_each_seed(result: Comparison) -> None:
    first, second = result.row("random").runs
    assert [run.policy for run in (first, second)] == [
        presets.random(keep=18, seed=seed) for seed in (0, 1)
    ]
    assert first.answers != second.answers
    assert len(result.row("uniform").runs) == 1


def test_no_image_is_text_alone(result: Comparison, loaded: Any, asked: Any) -> None:
    model, processor = loaded
    (run,) = result.row("no image").runs
    assert run.cost.visual_tokens == 0 and set(run.cost.visual_tokens_per_layer) == {0}
    for example, answer in list(zip(asked, run.answers, strict=True))[:4]:
        inputs = processor.tokenizer(example.question.text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == text.strip()


def test_a_metric_of_ones_own(loaded: Any, asked: Any) -> None:
    def share(answer: str, record: Record) -> float:
        return 0.25 if record.kind == "at" else 0.0

    found = compare(*loaded, records(asked[:3]), budget=TOKENS, presets=[], metric=share)
    expected = [share("", record) for record in records(asked[:3])]
    assert list(found.unreduced.runs[0].scores) == expected
    assert found.best is None


def test_progress_counts_the_methods(loaded: Any, asked: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    given = {"none": Policy()}
    compare(
        *loaded,
        records(asked[:2]),
        budget=TOKENS,
        policies=given,
        presets=[],
        progress=lambda *args: seen.append(args),
    )
    assert seen == [("methods", i, 4) for i in range(1, 5)]


def test_presets_may_leave_as_many_tokens_as_the_policies(loaded: Any, asked: Any) -> None:
    given = {"few": presets.merge(keep=9), "late": presets.fastv(2, 36)}
    rows = records(asked[:2])
    found = compare(*loaded, rows, policies=given, presets=["random"], seeds=1)
    late = found.row("late").runs[0].cost.visual_tokens
    assert late == (2 * 144 + 8 * 36) / 10 and found.limit == late
    assert late - 1 < found.row("random").runs[0].cost.visual_tokens <= late
    # With the default budget of a search, they would leave less.
    with pytest.warns(UserWarning, match=r"^late leaves 57.6 visual tokens.* may leave 18:"):
        evaluate(*loaded, rows, policies=given, presets=["random"], budget=TOKENS)


# *** tuning ***


@needs_optuna
def test_presets_are_tuned_on_other_questions(loaded: Any, asked: Any) -> None:
    tuning = records(reference.make_examples(16, "validation"))
    told: list[tuple[str, int, int]] = []
    found = compare(
        *loaded,
        records(asked),
        budget=TOKENS,
        tuning=tuning,
        presets=["redistribute", "uniform"],
        evaluations=5,
        seeds=2,
        progress=lambda *args: told.append(args),
    )
    # How long the rest will take, once one of the two is tuned.
    stages = [stage for stage, _, _ in told]
    assert stages == ["methods", "methods", "estimate", "methods", "methods", "methods"]
    assert told[2][2] >= told[2][1] > 0
    tuned = found.row("redistribute").runs
    assert [run.seed for run in tuned] == [0, 1]
    assert all(run.evaluations == 5 for run in tuned)
    losses = []
    for policy in (presets.fit("redistribute", 18, loaded[0]), *(run.policy for run in tuned)):
        reduced = ReducedModel(loaded[0], policy)
        batch = next(reference.batches(loaded[1], reference.make_examples(16, "validation"), 16))
        losses.append(answer_loss(reduced, loaded[0], [batch]))
    assert max(losses[1:]) <= losses[0]
    for run in tuned:
        assert run.policy == presets.fit("redistribute", 18, loaded[0], **run.values)
    (uniform,) = found.row("uniform").runs
    assert uniform.evaluations == 1


@needs_optuna
def test_as_many_evaluations_as_the_search_took(
    loaded: Any, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(
        "deos_fx.comparison.bench.tune",
        lambda *args, evaluations, **options: given.append(evaluations) or pytest.fail("tuned"),
    )
    policy = presets.merge(keep=18)
    cost = CostModel.of_images(loaded[0], images=1, text_tokens=4).predict(policy)
    candidates = [Candidate(policy, "preset merge", 0.5, cost)]
    searched = SearchResult(policy, [], candidates, {}, cost, 0.1, 0.5, evaluations=61)
    with pytest.raises(pytest.fail.Exception):
        compare(
            *loaded,
            records(asked[:1]),
            budget=TOKENS,
            policies={"found": searched},
            tuning=records(reference.make_examples(5, "validation")),
            batch_size=2,
            presets=["fastv"],
        )
    # A loss is that of three batches.
    assert given == [61 // 3]


def test_tuning_without_optuna(loaded: Any, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    tuning = records(reference.make_examples(2, "validation"))
    with pytest.raises(ImportError, match="Optuna is not installed"):
        compare(*loaded, records(asked), budget=TOKENS, tuning=tuning)


@pytest.mark.parametrize("behind", [0, 2])
def test_the_loss_is_that_of_the_model(loaded: Any, behind: int) -> None:
    model, processor = loaded
    (batch,) = reference.batches(processor, reference.make_examples(8, "validation"), 8)
    # Tokens behind the answers that are not part of them, as a template may write.
    for name, value in (("input_ids", 5), ("attention_mask", 1), ("labels", -100)):
        batch[name] = torch.nn.functional.pad(batch[name], (0, behind), value=value)
    with torch.no_grad():
        expected = model(**batch).loss
    found = answer_loss(ReducedModel(model, Policy()), model, [batch])
    assert_close(torch.tensor(found), expected)


# *** images of any size ***


def test_images_are_resized_where_the_model_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = write_qwen(tmp_path)
    seen: list[Mapping[str, Any]] = []

    def fitted(name: str, **options: Any) -> Policy:
        seen.append(options)
        return presets.fit(name, **options)

    monkeypatch.setattr(bench, "fit", fitted)
    asked = [
        Record(noise(64, 48), "what is at the top left", "7"),
        Record(noise(80, 80, 1), "how many digits", "two"),
    ]
    # Cells of 8 pixels: 48 and 100 visual tokens.
    found = compare(
        model,
        processor,
        asked,
        budget=Budget(visual_tokens=0.25),
        presets=["merge", "divprune", "visionzip", "avg_pool"],
        max_new_tokens=2,
    )
    smaller = found.row("smaller image")
    (run,) = smaller.runs
    assert (smaller.visual_tokens, run.policy) == (12, Policy(name="resize", image_scale=0.5))
    # Oracle: the original model on images that PIL has resized.
    for record, size, answer in zip(asked, [(32, 24), (40, 40)], run.answers, strict=True):
        small = replace(
            record, image=record.image.resize(size, Image.Resampling.BICUBIC), answer=None
        )
        (inputs,) = batches(processor, [small], 1)
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == text.strip()
    # Shares of each image, with the positions it had.
    (run,) = found.row("divprune").runs
    assert [(r.keep, r.position) for r in run.policy.reductions] == [(0.25, "keep")]
    assert found.row("visionzip").visual_tokens == 12
    # Images of 6 x 8 and 10 x 10 tokens.
    (run,) = found.row("avg_pool").runs
    assert run.policy.reductions[0].keep == 0.25
    # Where an image becomes inputs only by a processor (Gemma 4), presets of the tower need a call.
    assert [options["example_inputs"]["image_grid_thw"].tolist() for options in seen] == [
        [[1, 12, 16]]
    ] * 4


def test_images_of_several_sizes_in_one_question(tmp_path: Path) -> None:
    model, processor = write_qwen(tmp_path)
    asked = [Record([noise(64, 48), noise(80, 80)], "is <image> like <image>?", "no")]
    found = compare(
        *(model, processor, asked),
        budget=Budget(visual_tokens=0.25),
        presets=["merge", "visionzip"],
        max_new_tokens=1,
    )
    # Of 48 and 100 tokens; counts in words are those of the first.
    rows = found.row("no reduction"), found.row("merge"), found.row("visionzip")
    assert [row.visual_tokens for row in rows] == [148, 37, 37]
    assert found.to_dict()["methods"][1]["tokens_kept"] == "projector 12"
    # The default policy of such prompts, too.
    (given,) = batches(processor, [replace(asked[0], answer=None)], 1)
    assert transform(model, example_inputs=given).cost(**given).after.visual_tokens == 74


def test_a_processor_that_enlarges_small_images(tmp_path: Path) -> None:
    model, processor = write_qwen(tmp_path, min_pixels=64 * 48)
    asked = [Record(noise(64, 48), "what is", "7")]
    budget = Budget(visual_tokens=0.25)
    found = compare(model, processor, asked, budget=budget, presets=[], max_new_tokens=1)
    smaller = found.row("smaller image")
    assert not smaller.runs and "48 visual tokens of the first image" in smaller.reason


# *** what is refused ***


def test_the_same_example_in_both(loaded: Any, asked: Any) -> None:
    tuning = records(reference.make_examples(4, "validation"))
    # The same pixels in another object.
    again = replace(records(asked)[2], image=asked[2].scene.image.copy())
    with pytest.raises(ValueError, match="Question 3 of the test data is question 5 of the tuning"):
        check_apart([*tuning, again], records(asked))
    check_apart([*tuning, replace(again, prompt="how many digits")], records(asked))


def test_files_are_compared_by_their_pixels(tmp_path: Any, asked: Any) -> None:
    image = asked[0].scene.image
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    one, other = (Record(tmp_path / name, "what is") for name in ("a.png", "b.bmp"))
    with pytest.raises(ValueError, match="about the same image"):
        check_apart([one], [other])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": Budget(flops=0.5)}, "presets are fitted to visual_tokens"),
        ({"budget": Budget(visual_tokens=18, flops=0.5)}, "limit these and no other"),
        ({"budget": Budget(visual_tokens=200)}, "the model has only 144"),
        ({"budget": None}, "give one, as .*, or policies, whose visual tokens are the limit"),
        ({"presets": ["best"]}, "no preset 'best'; choose from fastv"),
        ({"seeds": 0}, "seeds is 0"),
        ({"evaluations": 0}, "evaluations is 0"),
        ({"policies": {"merge": Policy()}}, "a policy is called 'merge', as another row is"),
        ({"tuning": []}, "the tuning data is empty; give at least one question"),
        ({"policies": {"deep": Policy((Reduction("decoder.20", 8),))}}, "decoder.20"),
    ],
)
def test_wrong_arguments(loaded: Any, asked: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compare(*loaded, records(asked[:1]), **({"budget": TOKENS} | options))


def test_missing_answers(loaded: Any, asked: Any) -> None:
    bare = [replace(record, answer=None) for record in records(asked)]
    with pytest.raises(ValueError, match="no answer to 12 of 12 questions of the test data"):
        compare(*loaded, bare, budget=TOKENS)
    with pytest.raises(ValueError, match="the test data is empty"):
        compare(*loaded, [], budget=TOKENS)
    with pytest.raises(TypeError, match="budget is a float"):
        compare(*loaded, bare, budget=0.125)


# *** files ***


def test_everything_is_written(result: Comparison, tmp_path: Any) -> None:
    (tmp_path / "mine.txt").write_text("")
    result.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy.svg",
        "comparison.csv",
        "comparison.html",
        "comparison.json",
        "cost.svg",
        "mine.txt",
    ]
    saved = json.loads((tmp_path / "comparison.json").read_text())
    merge = next(method for method in saved["methods"] if method["method"] == "merge")
    assert merge["runs"][0]["answers"] == list(result.row("merge").runs[0].answers)
    assert Policy.from_json(json.dumps(merge["runs"][0]["policy"])) == presets.merge(keep=18)


def test_a_policy_that_cannot_run_is_refused_before_any_question(
    loaded: Any, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.Bench, "unreduced", lambda _: pytest.fail("asked before checking"))
    with pytest.raises(ValueError, match="no decoder layer comes after it"):
        compare(
            *loaded,
            records(asked),
            policies={"late": Policy((Reduction("decoder.9", 4),))},
            presets=[],
        )
