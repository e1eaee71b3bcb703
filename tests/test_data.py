"""Data of the command line: what transformers makes of the same prompts and images."""

import json
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch
from families import shared
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers.image_utils import load_image

from deos_fx import reference
from deos_fx.data import Record, batches, read_records
from deos_fx.inputs.example import example_inputs
from deos_fx.reference.model import build_processor

QUESTION = "what is at"
WORDS = "<image> {{ messages[0]['content'][1]['text'] }}"
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a.png"
    reference.make_examples(1)[0].scene.image.save(path)
    return path


def build(added, template=None):
    """A processor whose tokenizer adds what `added` has around $A."""
    processor = build_processor()
    tokenizer = processor.tokenizer
    names = ["<bos>", "<eos>", "<pad>"]
    tokens = list(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=added, special_tokens=tokens
    )
    processor.chat_template = template
    return processor


def read(processor, ids):
    """Token ids as text, with one placeholder for the whole image."""
    return " ".join(word for word, _ in groupby(processor.tokenizer.convert_ids_to_tokens(ids)))


def pixels(processor, image):
    (batch,) = batches(processor, [Record(image, QUESTION)], 1)
    return batch["pixel_values"]


# *** special tokens ***


@pytest.mark.parametrize("added", ["$A", "<bos> $A", "<bos> $A <eos>", "$A <eos>"])
@pytest.mark.parametrize("start", ["", "{{ bos_token }} "])
def test_prompts_are_tokenized_as_transformers_does(scene, start, added):
    processor = build(added, start + WORDS)
    content = [{"type": "image", "image": Image.open(scene)}, {"type": "text", "text": QUESTION}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    (batch,) = batches(processor, [Record(scene, QUESTION)], 1)
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert batch["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize(
    ("added", "template", "prompt", "answered"),
    [
        # Without a template, the beginning may stand in the data.
        ("<bos> $A", None, "{}", "<bos> <image> {} seven <eos>"),
        ("<bos> $A", None, "<bos> {}", "<bos> <image> {} seven <eos>"),
        ("<bos> $A", None, "<bos> <image> {}", "<bos> <image> {} seven <eos>"),
        ("$A", None, "{}", "<image> {} seven <eos>"),
        # A tokenizer that ends texts: the answer has one end, and the prompt none before it.
        ("<bos> $A <eos>", None, "{}", "<bos> <image> {} seven <eos>"),
        ("$A <eos>", WORDS, "{}", "<image> {} seven <eos>"),
        ("<bos> $A <eos>", WORDS + "{{ eos_token }}", "{}", "<bos> <image> {} seven <eos>"),
        ("<bos> $A <eos>", "{{ bos_token }} " + WORDS, "{}", "<bos> <image> {} seven <eos>"),
        # A beginning and an end of other names, as [CLS] and [SEP].
        ("<pad> $A", None, "<pad> <image> {}", "<pad> <image> {} seven <eos>"),
        ("<bos> $A <pad>", None, "{}", "<bos> <image> {} seven <pad>"),
    ],
)
def test_special_tokens_come_once(scene, added, template, prompt, answered):
    processor = build(added, template)
    records = [Record(scene, prompt.format(QUESTION), "seven")] * 2
    (batch,) = batches(processor, records, 2)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert read(processor, ids) == answered.format(QUESTION)
        assert read(processor, labels[labels != -100]) == "seven " + answered.split()[-1]
    # A prompt alone is what stands before its answer, and an end if the tokenizer writes one.
    bare = [Record(scene, record.prompt) for record in records]
    (prompts,) = batches(processor, bare, 2)
    before, end = answered.format(QUESTION).split(" seven ")
    writes = added.endswith(end) and not (template or "").startswith("{{ bos_token }}")
    assert read(processor, prompts["input_ids"][0]) == before + f" {end}" * writes


def test_prompts_that_begin_otherwise_than_others_are_refused(scene):
    records = [Record(scene, QUESTION), Record(scene, f"<bos> {QUESTION}")]
    with pytest.raises(ValueError, match="1 of 2 prompts of a batch begin with <bos>"):
        list(batches(build("<bos> $A"), records, 2))


def test_the_example_of_a_call_has_one_beginning():
    processor = build("<bos> $A", "{{ bos_token }} " + WORDS)
    ids = example_inputs(shared("qwen2_5_vl"), processor)["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1


# *** images ***


@pytest.fixture
def shades():
    """Noise, of the size that the processor wants: 8 bits, four channels."""
    return np.random.default_rng(0).integers(0, 256, (144, 144, 4), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_images_are_upright(tmp_path, shades, orientation, kind):
    exif, path = Image.Exif(), tmp_path / f"a.{kind}"
    exif[ORIENTATION] = orientation
    Image.fromarray(shades[:100, :, :3]).save(path, exif=exif)
    processor = build_processor()
    expected = processor.image_processor(load_image(str(path)), return_tensors="pt")
    assert pixels(processor, path).equal(expected["pixel_values"])


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, "png") for mode in ("1", "L", "LA", "P", "RGBA")]
    + [("CMYK", "jpg"), ("PA", "tif"), ("CMYK", "tif"), ("YCbCr", "tif"), ("RGBA", "webp")],
)
def test_images_of_every_mode_are_those_of_transformers(tmp_path, shades, mode, kind):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(shades).convert("RGB").convert(mode).save(path)
    processor = build_processor()
    expected = processor.image_processor(load_image(str(path)), return_tensors="pt")
    assert pixels(processor, path).equal(expected["pixel_values"])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_16_bits_are_scaled(tmp_path, shades, orientation, kind):
    # load_image cuts them off at 255. The high bytes are the image of 8 bits.
    exif, path = Image.Exif(), tmp_path / f"a.{kind}"
    exif[ORIENTATION] = orientation
    deep = 256 * shades[..., 0].astype(np.uint16) + shades[..., 1]
    Image.fromarray(deep).save(path, exif=exif)
    with Image.open(path) as image:
        assert image.mode == "I;16"
    expected = np.rot90(shades[..., 0], -1) if orientation == 6 else shades[..., 0]
    found = pixels(build_processor(), path)[0].add(1).mul(127.5).round()
    assert (found.numpy() == expected).all()


def test_images_without_a_known_range_are_refused(tmp_path, shades):
    path = tmp_path / "a.tif"
    Image.fromarray(shades[..., 0].astype(np.float32)).save(path)
    with pytest.raises(ValueError, match=r"a\.tif is not an image .* mode F, whose range"):
        pixels(build_processor(), path)


# *** files of questions ***


def test_batches_equal_those_of_the_reference(questions, examples):
    _, processor = reference.load()
    got = list(batches(processor, read_records(questions), 2))
    expected = list(reference.batches(processor, examples, 2))
    assert len(got) == len(expected) == 2
    for ours, theirs in zip(got, expected, strict=True):
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_batches_without_answers_are_prompts(questions, examples):
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    bare = [json.dumps({k: v for k, v in line.items() if k != "answer"}) for line in lines]
    questions.write_text("\n".join(bare))
    _, processor = reference.load()
    (got,) = batches(processor, read_records(questions), 3)
    (expected,) = reference.batches(processor, examples, 3, answers=False)
    assert "labels" not in got
    assert torch.equal(got["input_ids"], expected["input_ids"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ('{"prompt": "what"}', "line 2: give an object with image"),
        ('{"image": "0.png", "prompt": 3}', "line 2: prompt is 3"),
        ('{"image": "none.png", "prompt": "what"}', "there is no image"),
        ('{"image": "0.png", "prompt": "what"}', "1 of 2 lines have an answer"),
        ('{"image": "0.png", "prompt": "what", "question": "what"}', "give an object with"),
    ],
)
def test_bad_line_is_named(questions, line, words):
    questions.write_text(questions.read_text().splitlines()[0] + "\n" + line)
    with pytest.raises(ValueError, match=words):
        read_records(questions)


def test_kinds_are_read(questions):
    written = questions.read_text().splitlines()
    lines = [json.loads(line) | {"kind": f"kind {i}"} for i, line in enumerate(written)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    assert [record.kind for record in read_records(questions)] == ["kind 0", "kind 1", "kind 2"]


def test_images_that_are_loaded_already(questions):
    _, processor = reference.load()
    records = read_records(questions)
    loaded = [replace(record, image=Image.open(record.image)) for record in records]
    for ours, theirs in zip(*(batches(processor, x, 2) for x in (loaded, records)), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (None, "{}"),
        (None, "<image> {}"),
        (None, "{} <image>"),
        # A template writes a placeholder for each image.
        ("{{ messages[0]['content'][-1]['text'] }}", "{}"),
    ],
)
def test_prompts_without_images_are_text_alone(scene, template, prompt):
    processor = build("<bos> $A", template)
    records = [Record(scene, prompt.format(QUESTION))]
    (batch,) = batches(processor, records, 1, images=False)
    assert "pixel_values" not in batch
    assert read(processor, batch["input_ids"][0]) == f"<bos> {QUESTION}"


def test_empty_data_and_unreadable_image(questions):
    records = read_records(questions)
    records[0].image.write_text("no image")
    _, processor = reference.load()
    with pytest.raises(ValueError, match=r"0\.png is not an image"):
        list(batches(processor, records, 2))
    questions.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_records(questions)
