"""The second benchmark task: its scenes, its splits and its weights, without its photographs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import garments
from benchmarks.garments.lessons import SLOTS, VOCABULARY, Described, garment_task
from benchmarks.garments.measure import touched
from benchmarks.garments.photographs import GARMENTS, read_wardrobe
from benchmarks.garments.sampling import sample_crowds
from benchmarks.garments.scenes import COLORS, DIGITS, PLACES, TINTS, Item, Scene
from deos_fx.reference.lessons import IGNORE, Pack
from deos_fx.reference.model import VISUAL_TOKENS
from deos_fx.reference.scenes import NUMBERS, scans
from deos_fx.reference.train import Stage, join_lesson, language_lesson, tower_lesson, train

SPLITS = ("train", "validation", "test")


def _photograph(rng: np.random.Generator) -> np.ndarray:
    """Something bright and uneven in front of black, as high or as wide as the photograph."""
    rows, columns = np.mgrid[-1:1:28j, -1:1:28j]
    shape = (rows / rng.uniform(0.6, 1)) ** 2 + (columns / rng.uniform(0.4, 1)) ** 2 < 1
    return (shape * rng.integers(60, 256, (28, 28))).astype(np.uint8)


def _write(folder: Path, **changed: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for name, count in (("train", 40), ("test", 20)):
        labels = np.arange(10, dtype=np.uint8).repeat(count)
        images = np.stack([_photograph(rng) for _ in labels])
        np.savez(folder / f"{name}.npz", **{"images": images, "labels": labels} | changed)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("photographs"))


def _mask(item: Item, scene: Scene) -> np.ndarray:
    """The silhouette of an item on the whole image: where its photograph is not black."""
    number = GARMENTS.index(item.garment)
    photograph = Image.fromarray(scene.wardrobe.photographs[scene.split][number][item.photograph])
    large = photograph.resize((item.size, item.size), Image.Resampling.BILINEAR)
    canvas = Image.new("L", (144, 144))
    canvas.paste(large, item.corner)
    # Opaque by a half, which the opacity 6 (p / 255 - 0.03) is at p = 28.9.
    return np.asarray(canvas) > 28.9


def _seen(scene: Scene) -> list[np.ndarray]:
    """What is seen of every item, tags included: later ones hide earlier ones, tags hide all."""
    tags = [np.zeros((144, 144), bool) for _ in scene.items]
    for tag, item in zip(tags, scene.items, strict=True):
        if item.tag:
            (x, y), size = item.tag.corner, item.tag.size
            tag[y : y + size, x : x + size] = True
    seen, hidden = [], np.any(tags, axis=0)
    for item, tag in zip(scene.items[::-1], tags[::-1], strict=True):
        mask = _mask(item, scene)
        seen.append((mask & ~hidden) | tag)
        hidden = hidden | mask
    return seen[::-1]


def _answer(scene: Scene, text: str) -> str:
    """Answers a question from masks of the items."""
    masks, seen = [_mask(item, scene) for item in scene.items], _seen(scene)

    def the(name: str) -> int:
        (index,) = [i for i, item in enumerate(scene.items) if item.garment == name]
        return index

    def count(**wanted: str) -> int:
        ((field, value),) = wanted.items()
        return sum(getattr(item, field) == value for item in scene.items)

    match text.split():
        case ["what", "color", "is", "the", name]:
            return scene.items[the(name)].color
        case ["where", "is", "the", name]:
            rows, columns = np.nonzero(seen[the(name)])
            row, column = rows.mean() + 0.5, columns.mean() + 0.5
            assert min(abs(row - 72), abs(column - 72)) > 7.9
            return f"{'bottom' if row > 72 else 'top'} {'right' if column > 72 else 'left'}"
        case ["what", "number", "is", "on", "the", name]:
            return str(scene.items[the(name)].tag.digit)
        case ["what", "has", "number", digit]:
            (item,) = [i for i in scene.items if i.tag and str(i.tag.digit) == digit]
            return item.garment
        case ["what", "is", color]:
            (item,) = [item for item in scene.items if item.color == color]
            return item.garment
        case ["what", "touches", "the", name]:
            me = the(name)
            shared = [int((masks[me] & mask).sum()) for mask in masks]
            (other,) = [i for i, pixels in enumerate(shared) if pixels and i != me]
            assert shared[other] >= 24
            return scene.items[other].garment
        case ["how", "many", "items"]:
            return NUMBERS[len(scene.items)]
        case ["how", "many", name, "items"] if name in GARMENTS:
            return NUMBERS[count(garment=name)]
        case ["how", "many", color, "items"]:
            return NUMBERS[count(color=color)]
        case ["most", "common", "color"]:
            (first, most), *others = Counter(item.color for item in scene.items).most_common()
            assert all(number < most for _, number in others)
            return first
    raise AssertionError(f"unknown question: {text}")


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_what_is_drawn(data, split):
    asked = set()
    for scene in garments.make_scenes(60, split, seed=3, data=data):
        assert 3 <= len(scene.items) <= 6
        for question in scene.questions:
            assert question.answer == _answer(scene, question.text), question
            asked.add(question.kind)
    assert asked == {*garments.KINDS, "touch"} == set(SLOTS)


def test_pixels_show_what_the_record_says(data):
    right = []
    for scene in garments.make_scenes(30, "test", data=data):
        pixels = np.asarray(scene.image).astype(float)
        assert pixels.shape == (144, 144, 3)
        tints = np.array(list(TINTS.values()), float)
        tints /= np.linalg.norm(tints, axis=1, keepdims=True)
        for item, seen in zip(scene.items, _seen(scene), strict=True):
            assert np.count_nonzero(seen) >= 40
            if item.tag:
                (x, y), size = item.tag.corner, item.tag.size
                tag = pixels[y : y + size, x : x + size]
                # Paper and ink, neither of them tinted.
                assert tag.max() > 200 and tag.min() < 120 and (tag == tag[..., :1]).all()
                seen[y : y + size, x : x + size] = False
            colors = (pixels[seen] @ tints.T).argmax(1)
            right.append((colors == COLORS.index(item.color)).mean())
    # Some pixels are the translucent edge of another item.
    assert np.mean(right) > 0.97 and min(right) > 0.5


def _near(groups: list[Sequence[Item]]) -> float:
    """The share of the pairs of a group whose centers are less than 48 pixels apart."""
    near = []
    for group in groups:
        centers = np.array([np.array(item.corner) + item.size / 2 for item in group])
        away = np.linalg.norm(centers[:, None] - centers, axis=-1)
        near += (away[np.triu_indices(len(group), 1)] < 48).tolist()
    return float(np.mean(near))


def test_items_lie_anywhere_overlap_and_differ_in_size(data):
    scenes = garments.make_scenes(150, "train", data=data)
    items = [item for scene in scenes for item in scene.items]
    for places in (
        [end for item in items for end in item.corner],
        [end for item in items if item.tag for end in item.tag.corner],
    ):
        # No preferred place within a patch: none of 12 has less than half of its share.
        assert min(Counter(place % 12 for place in places).values()) > len(places) / 24
    sizes = np.array([item.size for item in items])
    assert sizes.min() == 22 and sizes.max() == 46
    assert min(np.mean(sizes <= 26), np.mean(sizes >= 40)) > 0.2
    tagged = np.mean([item.tag is not None for item in items])
    assert 0.2 < tagged < 0.7
    meeting = []
    for scene in scenes:
        total = sum(_mask(item, scene).astype(int) for item in scene.items)
        meeting.append(total.max() > 1)
    assert np.mean(meeting) > 0.4
    # They come in clusters: more are near to each other than if scenes were shuffled.
    shuffled = [items[n::30] for n in range(30)]
    own, others = (_near(groups) for groups in ([scene.items for scene in scenes], shuffled))
    assert own > 1.2 * others
    quarters = [Counter(q.answer for q in scene.questions if q.kind == "where") for scene in scenes]
    assert set().union(*quarters) == set(PLACES)


def test_most_visual_tokens_are_clutter(data):
    examples = garments.make_examples(60, "test", data=data)
    assert 0.15 < touched(examples) < 0.45
    gray = np.asarray(garments.make_scenes(1, "test", data=data)[0].image)[..., 1]
    assert gray[:20].std() > 3


def test_scenes_are_determined_by_their_arguments(data):
    few = garments.make_scenes(3, "test", seed=1, data=data)
    many = garments.make_scenes(40, "test", seed=1, data=str(data))
    for scene, again in zip(few, many, strict=False):
        assert scene.items == again.items and scene.questions == again.questions
        assert np.array_equal(np.asarray(scene.image), np.asarray(again.image))
    other = garments.make_scenes(3, "test", seed=2, data=data)
    assert [scene.items for scene in few] != [scene.items for scene in other]


def test_splits_share_no_photograph_and_no_scan(data):
    pools = read_wardrobe(data).photographs
    whole = [{image.tobytes() for pool in pools[split] for image in pool} for split in SPLITS]
    assert list(map(len, whole)) == [6 * 36, 6 * 4, 6 * 20]
    assert len(set.union(*whole)) == sum(map(len, whole))
    drawn, inked = [], []
    for split in SPLITS:
        scenes = garments.make_scenes(300, split, data=data)
        items = [(item, scene) for scene in scenes for item in scene.items]
        assert {scene.split for scene in scenes} == {split}
        drawn.append(
            {
                scene.wardrobe.photographs[split][GARMENTS.index(item.garment)][
                    item.photograph
                ].tobytes()
                for item, scene in items
            }
        )
        inked.append({scans()[0][item.tag.scan].tobytes() for item, _ in items if item.tag})
        assert all(scans()[1][item.tag.scan] == item.tag.digit for item, _ in items if item.tag)
    assert [used <= those for used, those in zip(drawn, whole, strict=True)] == [True] * 3
    assert len(set.union(*inked)) == sum(map(len, inked))


def test_examples_balance_the_kinds(data):
    examples = garments.make_examples(45, "validation", data=data)
    assert Counter(e.question.kind for e in examples) == dict.fromkeys(garments.KINDS, 5)
    assert all(e.question in e.scene.questions for e in examples)


def test_photographs_may_lie_in_a_folder_of_their_name(data, tmp_path):
    _write(tmp_path / "fashion_mnist")
    found = read_wardrobe(tmp_path).photographs["test"]
    assert [len(pool) for pool in found] == [20] * 6


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"images": np.zeros((400, 28, 28))}, "float64"),
        ({"images": np.zeros((7, 28, 28), np.uint8)}, "7, 28, 28"),
        ({"labels": np.zeros(400, np.uint8)}, "400 labels|fewer than 10.*trousers"),
        ({"images": np.array([None])}, "cannot be read"),
    ],
)
def test_wrong_data(tmp_path, changed, message):
    folder = _write(tmp_path / "wrong", **changed)
    with pytest.raises(ValueError, match=message):
        garments.make_examples(1, "test", data=folder)


def test_missing_data(tmp_path):
    with pytest.raises(ValueError, match="--data.*train.npz"):
        garments.make_scenes(1, data=tmp_path)
    (tmp_path / "train.npz").write_text("no archive")
    with pytest.raises(ValueError, match="cannot be read"):
        garments.make_scenes(1, data=tmp_path)


def test_descriptions_name_what_is_on_a_patch(data):
    batch = sample_crowds(20, np.random.default_rng(0), wardrobe=read_wardrobe(data))
    described = Described.of(batch)
    for index, scene in enumerate(batch.scenes()):
        # One patch stands for each item, and says what it is.
        hearts = described.heart[index] > 0
        pairs = zip(described.garment[index][hearts], described.color[index][hearts], strict=True)
        assert Counter((GARMENTS[g], COLORS[c]) for g, c in pairs) == Counter(
            (item.garment, item.color) for item in scene.items
        )
        digits = described.digit[index]
        assert {DIGITS[d] for d in digits[digits != IGNORE].tolist()} == {
            item.tag.digit for item in scene.items if item.tag
        }
        # Recount one field from the pixels: the share of a patch on which any item is seen.
        shares = np.any(_seen(scene), axis=0).reshape(12, 12, 12, 12).mean((1, 3)).ravel()
        assert np.array_equal(described.empty[index].numpy(), shares < 0.03)


def test_every_question_fits_its_slot(data):
    task = garment_task(read_wardrobe(data))
    rng = np.random.default_rng(0)
    batch = task.sample(20, "train", rng)
    for scene in batch.scenes():
        for question in scene.questions:
            words = len(question.text.split()), len(question.answer.split())
            assert SLOTS[question.kind][1:] == words
            assert set(f"{question.text} {question.answer}".split()) <= set(VOCABULARY)
    pack = Pack.of(batch, rng, task.layout)
    assert pack.words.shape == pack.targets.shape == (20, len(task.layout.slot))


def test_the_stages_of_the_reference_model_train_it(data, tmp_path):
    stages = [
        Stage(lesson.__name__, lesson, ("",), steps=1, size=2, rate=1e-3)
        for lesson in (tower_lesson, language_lesson, join_lesson)
    ]
    task = garment_task(read_wardrobe(data))
    student = train(tmp_path, tuple(stages), task=task)
    assert all(weight.isfinite().all() for weight in student.parameters())
    assert student.model.config.text_config.vocab_size == len(VOCABULARY)


@pytest.fixture(scope="module")
def loaded():
    return garments.load()


def test_weights_are_small_and_load(loaded):
    model, processor = loaded
    assert sum(f.stat().st_size for f in garments.WEIGHTS.iterdir()) < 10.5e6
    assert processor.tokenizer.get_vocab() == VOCABULARY
    assert not model.training and model.dtype == torch.float32
    assert model.config.image_seq_length == VISUAL_TOKENS


def test_batches(data, loaded):
    _, processor = loaded
    examples = garments.make_examples(10, "test", data=data)
    (inputs,) = garments.batches(processor, examples, 10)
    assert (inputs["input_ids"] == VOCABULARY["<image>"]).sum(1).tolist() == [VISUAL_TOKENS] * 10
    for ids, labels, example in zip(inputs["input_ids"], inputs["labels"], examples, strict=True):
        question = example.question
        text = processor.decode(ids, skip_special_tokens=True)
        assert text == f"{question.text} {question.answer}"
        answer = processor.decode(labels[labels != -100], skip_special_tokens=True)
        assert answer == question.answer


def test_trained_model_answers_stand_in_scenes(data, loaded):
    """What garments the stand-ins are, no one can say; colors, numbers and places can be told."""
    model, processor = loaded
    examples = garments.make_examples(120, "test", seed=5, data=data)
    wanted = {
        **dict.fromkeys(("color", "most"), COLORS),
        **dict.fromkeys(("owner", "tinted"), GARMENTS),
        **dict.fromkeys(("count", "count_garment", "count_color"), NUMBERS),
        "where": PLACES,
        "tag": tuple(map(str, DIGITS)),
    }
    fitting: list[bool] = []

    def generate(**inputs):
        ids = model.generate(**inputs)
        texts = processor.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for text in texts:
            fitting.append(text in wanted[examples[len(fitting)].question.kind])
        return ids

    with torch.inference_mode():
        right = garments.accuracy(generate, processor, examples)
    assert list(right) == [*sorted(garments.KINDS, key=list(right).index), "overall"]
    assert np.mean(fitting) > 0.95
    assert right["most"] > 0.6 and right["overall"] > 0.25
