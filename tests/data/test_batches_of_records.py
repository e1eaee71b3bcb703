"""Data of the command line: what transformers makes of the same prompts and images."""

import json
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from families import shared
from PIL import Image
from real_processors import small_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import Blip2Processor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from deos_fx import reference
from deos_fx.data import Record, batches, read_records
from deos_fx.inputs.example import example_inputs
from deos_fx.reference.model import build_processor

QUESTION = "what is at"
WORDS = "<image> {{ messages[0]['content'][1]['text'] }}"


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
    with pytest.raises(ValueError, match="<bos> begins 1 of 2 prompts"):
        list(batches(build("<bos> $A"), records, 2))


def test_the_example_of_a_call_has_one_beginning():
    processor = build("<bos> $A", "{{ bos_token }} " + WORDS)
    ids = example_inputs(shared("qwen2_5_vl"), processor)["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1


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


def test_images_that_are_loaded_already(questions):
    _, processor = reference.load()
    records = read_records(questions)
    loaded = [replace(record, image=Image.open(record.image)) for record in records]
    for ours, theirs in zip(*(batches(processor, x, 2) for x in (loaded, records)), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_processor_that_puts_queries_in_front_writes_each_image_once(scene):
    """BLIP-2: its placeholder is a token with settings, and its processor writes 8 of them."""
    tokenizer = small_tokenizer({"pad": "<pad>", "eos": "</s>", "picture": "<image>"})
    image = BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = Blip2Processor(image, tokenizer, num_query_tokens=8)
    for answer, end in ((None, ""), ("seven", " seven</s>")):
        (batch,) = batches(processor, [Record(scene, QUESTION, answer)], 1)
        expected = processor(images=Image.open(scene), text=QUESTION + end, return_tensors="pt")
        assert torch.equal(batch["input_ids"], expected["input_ids"])


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (None, "{}"),
        (None, "<image> {}"),
        (None, "{} <image>"),
        (
            "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image> "
            "{% else %}{{ part['text'] }}{% endif %}{% endfor %}",
            "{}",
        ),
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
