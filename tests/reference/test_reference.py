"""The reference model answers, and its data are what they claim to be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from closeness import assert_close
from transformers import AutoProcessor, LlavaForConditionalGeneration

from deos_fx import reference
from deos_fx.reference.lessons import IGNORE, Described, Pack, PackLayout
from deos_fx.reference.model import VISUAL_TOKENS, VOCABULARY, build_processor
from deos_fx.reference.sampling import sample_scenes
from deos_fx.reference.scenes import BACKDROPS, COLORS, NUMBERS, Scene, scans
from deos_fx.reference.train import Stage, Student, join_lesson, train

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def loaded():
    return reference.load()


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def _answer(scene: Scene, text: str) -> str:
    """Answers a question from the pixels' own record: cells as coordinates, not as names."""
    where = {}
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        where[int((y0 + y1) / 2 // 48), int((x0 + x1) / 2 // 48)] = thing
    place = {str(thing.digit): cell for cell, thing in where.items()}
    colors = Counter(thing.color for thing in scene.objects)
    rows, columns = ["top", "middle", "bottom"], ["left", "center", "right"]
    match text.split():
        case ["what", "is", "at", row, column]:
            return str(where[rows.index(row), columns.index(column)].digit)
        case ["what", "color", "is", "the", digit]:
            return where[place[digit]].color
        case ["where", "is", "the", digit]:
            row, column = place[digit]
            return f"{rows[row]} {columns[column]}"
        case ["what", "is", "left", "of", "the", digit]:
            row, column = place[digit]
            return str(where[row, column - 1].digit)
        case ["how", "many", "digits"]:
            return NUMBERS[len(scene.objects)]
        case ["how", "many", color, "digits"]:
            return NUMBERS[colors[color]]
        case ["what", "is", "behind"]:
            return BACKDROPS[scene.batch.backdrop[scene.index]]
        case ["most", "common", "color"]:
            (first, most), *others = colors.most_common()
            assert all(count < most for _, count in others)
            return first
    raise AssertionError(f"unknown question: {text}")


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_what_is_drawn(split):
    for scene in reference.make_scenes(60, split, seed=3):
        assert 3 <= len(scene.objects) <= 7
        assert {q.kind for q in scene.questions} >= set(reference.KINDS) - {"left_of", "most"}
        for question in scene.questions:
            assert question.answer == _answer(scene, question.text), question


def test_boxes_hold_the_ink():
    for scene in reference.make_scenes(20, "test"):
        pixels = np.asarray(scene.image)
        assert pixels.shape == (144, 144, 3)
        outside = np.ones((144, 144), bool)
        for thing in scene.objects:
            x0, y0, x1, y1 = thing.box
            assert 6 <= y1 - y0 <= 26 and 3 <= x1 - x0 <= 26
            assert pixels[y0:y1, x0:x1].max() > 150
            outside[y0:y1, x0:x1] = False
        assert pixels[outside].max() < 160


def test_scenes_are_determined_by_their_arguments():
    few, many = reference.make_scenes(3, "test", seed=1), reference.make_scenes(300, "test", seed=1)
    for scene, again in zip(few, many, strict=False):
        assert scene.objects == again.objects and scene.questions == again.questions
        assert np.array_equal(np.asarray(scene.image), np.asarray(again.image))
    other = reference.make_scenes(3, "test", seed=2)
    assert [scene.objects for scene in few] != [scene.objects for scene in other]


def test_splits_share_no_scan():
    used = [
        set(sample_scenes(2000, split, np.random.default_rng(0)).scan.tolist()) for split in SPLITS
    ]
    assert all(used) and sum(map(len, used)) == len(set.union(*used))
    images = [{scans()[0][index].tobytes() for index in indices} for indices in used]
    assert not images[0] & images[2] and not images[0] & images[1]


def test_examples_balance_the_kinds():
    examples = reference.make_examples(40, "validation")
    assert Counter(e.question.kind for e in examples) == dict.fromkeys(reference.KINDS, 5)
    assert all(e.question in e.scene.questions for e in examples)


def test_model_is_of_the_promised_size(loaded):
    model, _ = loaded
    assert 1e6 < model.num_parameters() < 6e6
    assert model.config.text_config.num_hidden_layers >= 6
    assert VISUAL_TOKENS == 144
    assert not model.training and model.dtype == torch.float32


def test_weights_load_as_any_model_does(loaded):
    model = LlavaForConditionalGeneration.from_pretrained(reference.WEIGHTS)
    processor = AutoProcessor.from_pretrained(reference.WEIGHTS)
    assert type(processor) is type(loaded[1])
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), loaded[0].parameters(), strict=True)
    )


def test_processor_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    examples = reference.make_examples(8, "test")
    (inputs,), (saved,) = (
        list(reference.batches(each, examples, 8)) for each in (processor, again)
    )
    for name in inputs:
        # With torchvision, a processor that is loaded rounds pixels otherwise than one without.
        assert_close(inputs[name].float(), saved[name].float())
    for ids, example in zip(inputs["input_ids"], examples, strict=True):
        text = processor.decode(ids, skip_special_tokens=True)
        assert text == f"{example.question.text} {example.question.answer}"


def test_batches(processor):
    examples = reference.make_examples(11, "test")
    parts = list(reference.batches(processor, examples, 8))
    assert [len(part["input_ids"]) for part in parts] == [8, 3]
    for part in parts:
        ids, labels = part["input_ids"], part["labels"]
        assert (ids == VOCABULARY["<image>"]).sum(1).tolist() == [VISUAL_TOKENS] * len(ids)
        assert (part["attention_mask"] == (ids != VOCABULARY["<pad>"])).all()
        assert (labels[:, -1] == VOCABULARY["<eos>"]).all()
        assert ((labels == ids) | (labels == -100)).all()
    answers = [
        processor.decode(row[row != -100], skip_special_tokens=True)
        for part in parts
        for row in part["labels"]
    ]
    assert answers == [example.question.answer for example in examples]
    (prompts,) = reference.batches(processor, examples[:4], 4, answers=False)
    assert "labels" not in prompts and not (prompts["input_ids"] == VOCABULARY["<eos>"]).any()


def test_pixels_are_scaled_to_one(processor):
    scene = reference.make_scenes(1, "test")[0]
    pixels = processor.image_processor(scene.image, return_tensors="pt")["pixel_values"][0]
    expected = torch.from_numpy(np.asarray(scene.image) / 127.5 - 1).permute(2, 0, 1).float()
    assert_close(pixels, expected)


def test_accuracy_counts_exact_answers(processor):
    examples = reference.make_examples(16, "test")
    truth = iter(reference.batches(processor, examples, 8))

    def oracle(**inputs):
        labels = next(truth)["labels"].clamp(min=0)
        return torch.cat([inputs["input_ids"], labels], 1)

    expected = dict.fromkeys((*reference.KINDS, "overall"), 1.0)
    assert reference.accuracy(oracle, processor, examples, 8) == expected
    silent = reference.accuracy(lambda **inputs: inputs["input_ids"], processor, examples)
    assert set(silent.values()) == {0.0}


def test_description_covers_every_digit():
    batch = sample_scenes(50, "train", np.random.default_rng(0))
    described = Described.of(batch)
    for index, scene in enumerate(batch.scenes()):
        seen = described.digit[index]
        assert set(seen[seen >= 0].tolist()) == {thing.digit for thing in scene.objects}
        backdrop = described.backdrop[index]
        assert set(backdrop[backdrop >= 0].tolist()) == {BACKDROPS.index(scene.backdrop)}
    assert int(described.color.max()) == len(COLORS) - 1


@torch.no_grad()
def test_packed_questions_are_answered_as_if_alone(processor):
    student = Student(seed=1).eval()
    batch = sample_scenes(1, "train", np.random.default_rng(3))
    pack, layout = Pack.of(batch, np.random.default_rng(4)), PackLayout()
    packed = student.answer(student.look(batch)[0], pack)
    (scene,) = batch.scenes()
    begin = torch.tensor([[VOCABULARY["<bos>"]] + [VOCABULARY["<image>"]] * VISUAL_TOKENS])
    pixels = processor.image_processor(scene.image, return_tensors="pt")["pixel_values"]
    alone = []
    for slot in range(len(layout.kind)):
        prompt = torch.cat([begin, pack.words[:, layout.slot == slot]], 1)
        logits = student.model(input_ids=prompt, pixel_values=pixels).logits[0, begin.shape[1] :]
        alone.append(logits[pack.targets[0, layout.slot == slot] != IGNORE])
    assert_close(packed, torch.cat(alone))


def test_interrupted_training_continues_as_if_it_had_not_been(tmp_path):
    stages = (Stage("join", join_lesson, ("",), steps=2, size=2, rate=1e-3),)

    class Interrupted(Exception):
        pass

    def interrupt(*arguments):
        if arguments[-1] > 0:
            raise Interrupted
        return join_lesson(*arguments)

    whole = train(tmp_path / "whole", stages, every=1)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", (replace(stages[0], lesson=interrupt),), every=1)
    parts = train(tmp_path / "parts", stages, every=1)
    for weight, again in zip(whole.parameters(), parts.parameters(), strict=True):
        assert_close(weight, again)


def test_trained_model_answers_test_scenes(loaded):
    model, processor = loaded
    with torch.inference_mode():
        right = reference.accuracy(
            model.generate, processor, reference.make_examples(96, "test", seed=11)
        )
    assert right["overall"] >= 0.92
    assert min(right.values()) >= 0.75
