"""Rows are rendered by the processor's own chat template, and labels are the assistant's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from real_processors import REAL, small_tokenizer, write_processor
from tokenizers import Regex, normalizers
from torch import Tensor
from transformers import BatchFeature, PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from deos_fx.data import Record, batches
from deos_fx.data.batches import render
from deos_fx.data.chat import say_once
from deos_fx.data.processors import load_processor

SIZES = [(90, 60), (60, 60), (40, 100)]
IMAGES = [Image.effect_noise(size, 60).convert("RGB") for size in SIZES]
ANSWERS = ["seven", "a red one", "there are three of them; seven or eight."]
QUESTIONS = ["what is at the top left?", "what?", "how many digits are there?"]


@pytest.fixture(scope="module", name="processors")
def _processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processors")
    return {family: load_processor(write_processor(family, folder / family)) for family in REAL}


def text(words: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": words}]


def by_transformers(processor: Any, conversations: Any, **options: Any) -> BatchFeature:
    """What transformers makes of conversations that hold their images."""
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
        **options,
    )


def assert_same(batch: dict[str, Tensor], expected: BatchFeature) -> None:
    masks = expected.pop("assistant_masks", None)
    assert set(batch) - {"labels"} == set(expected)
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name
    if masks is None:
        assert "labels" not in batch
    else:
        labels = torch.where(torch.as_tensor(masks).bool(), batch["input_ids"], -100)
        assert torch.equal(batch["labels"], labels)


# *** compared with transformers ***


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("family", REAL)
def test_questions(family: str, answers: bool, processors: dict[str, Any]) -> None:
    processor = processors[family]
    records = [
        Record(image, question, answer if answers else None)
        for image, question, answer in zip(IMAGES, QUESTIONS, ANSWERS, strict=True)
    ]
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, *text(question)]}]
        for image, question in zip(IMAGES, QUESTIONS, strict=True)
    ]
    if answers:
        for conversation, answer in zip(conversations, ANSWERS, strict=True):
            conversation.append({"role": "assistant", "content": text(answer)})
    (batch,) = batches(processor, records, 3)
    options = {"return_assistant_tokens_mask" if answers else "add_generation_prompt": True}
    assert_same(batch, by_transformers(processor, conversations, **options))


@pytest.mark.parametrize("family", REAL)
def test_several_images_at_their_places(family: str, processors: dict[str, Any]) -> None:
    processor = processors[family]
    first, second, _ = IMAGES
    record = Record((first, second), "what is <image> and what\nis <image>?", "seven")
    content = [
        *text("what is "),
        {"type": "image", "image": first},
        *text(" and what\nis "),
        {"type": "image", "image": second},
        *text("?"),
    ]
    conversation = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": text("seven")},
    ]
    expected = by_transformers(processor, [conversation], return_assistant_tokens_mask=True)
    assert_same(next(batches(processor, [record], 1)), expected)


@pytest.mark.parametrize("family", REAL)
def test_of_a_chat_the_last_answer_is_learned(family: str, processors: dict[str, Any]) -> None:
    processor = processors[family]
    turns = [
        {"role": "user", "content": [{"type": "image"}, *text("what is at the left?")]},
        {"role": "assistant", "content": text("seven")},
        {"role": "user", "content": text("how many?")},
    ]
    record = Record(IMAGES[0], "how many?", "three of them", chat=turns)
    (batch,) = batches(processor, [record], 1)
    given = [
        {
            "role": "user",
            "content": [{"type": "image", "image": IMAGES[0]}, *turns[0]["content"][1:]],
        },
        *turns[1:],
        {"role": "assistant", "content": text("three of them")},
    ]
    expected = by_transformers(processor, [given], return_assistant_tokens_mask=True)
    # Of the assistant's two turns, the mask has both.
    mask = torch.as_tensor(expected["assistant_masks"][0]).bool()
    starts = (mask & ~torch.cat([mask[:1] * 0, mask[:-1]]).bool()).nonzero().flatten()
    assert len(starts) == 2
    mask[: starts[1]] = False
    expected["assistant_masks"] = [mask.tolist()]
    assert_same(batch, expected)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_one_beginning_of_the_sequence(family: str, processors: dict[str, Any]) -> None:
    processor = processors[family]
    (batch,) = batches(processor, [Record(IMAGES[0], "what?", "seven")], 1)
    bos = processor.tokenizer.bos_token_id
    assert batch["input_ids"][0].tolist().count(bos) == (1 if bos is not None else 0)


# *** other templates ***

# A thinking model: the prompt begins a thought, which a finished turn does not have.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# No mark at the end of a turn, and spaces around what is said.
PLAIN = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Contents are texts: this is a tokenizer's template.
TEXTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (THINKING, "seven<|im_end|>"),
        (THINKING.replace("<think>\n", "<think>\n\n</think>\n\n"), "seven<|im_end|>"),
        (PLAIN, " seven"),
    ],
)
@pytest.mark.parametrize("given", ["seven", "seven \n", "A seven", "B"])
def test_the_part_that_answers(template: str, answer: str, given: str, tmp_path: Path) -> None:
    processor = load_processor(write_processor("llava_onevision", tmp_path, template))
    found = render(processor, Record(IMAGES[0], "what?", given))
    assert found.answer.replace(" \n<", "<") == answer.replace("seven", given.rstrip())
    (batch,) = batches(processor, [Record(IMAGES[0], "what?", given)], 1)
    labels = batch["labels"][batch["labels"] >= 0]
    assert processor.tokenizer.decode(labels) == found.answer
    # The rendering is the template's, from its beginning to its end.
    left = batch["input_ids"][batch["attention_mask"].bool()]
    image = "<image>" * int((left == processor.image_token_id).sum())
    assert processor.tokenizer.decode(left) == found.text.replace("<image>", image)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_template_of_the_tokenizer_alone(by_name: bool, tmp_path: Path) -> None:
    processor = load_processor(write_processor("llava_onevision", tmp_path, ""))
    processor.tokenizer.chat_template = {"default": TEXTS, "tool_use": "no"} if by_name else TEXTS
    found = render(processor, Record(IMAGES[0], "what?", "seven"))
    assert found.text == (
        "<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\nseven<|im_end|>\n"
    )
    assert found.answer == "seven<|im_end|>"
    (batch,) = batches(processor, [Record(IMAGES[0], "what?", "seven")], 1)
    labels = batch["labels"][batch["labels"] >= 0]
    assert processor.tokenizer.decode(labels) == "seven<|im_end|>"


def test_a_template_that_leaves_images_out_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    processor = load_processor(write_processor("llava_onevision", tmp_path, template))
    with pytest.raises(ValueError, match="chat template of LlavaOnevisionProcessor writes no <im"):
        list(batches(processor, [Record(IMAGES[0], "what?")], 1))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("", "LlavaOnevisionProcessor has no chat template"),
        (
            "{% for p in messages[0]['content'] %}{{ p['text'] or '<image>' }}{% endfor %}",
            "writes no turn of the assistant",
        ),
    ],
)
def test_without_a_turn_for_the_answer_texts_are_joined_and_it_is_said(
    template: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    say_once.cache_clear()
    processor = load_processor(write_processor("llava_onevision", tmp_path, template))
    records = [Record(IMAGES[0], "what?", "seven")]
    found = render(processor, records[0])
    assert found.answer == " seven<|im_end|>"
    assert found.text == ("<image>what?" if template else "<image> what?") + found.answer
    list(batches(processor, records, 1))
    assert [words in message for message in caplog.messages] == [True]


# Seen with transformers 5.23 and numpy 2.4: PaliGemma copies tensors the old way.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_paligemma_puts_answers_in_by_itself() -> None:
    tokenizer = small_tokenizer({"pad": "<pad>", "eos": "<eos>", "bos": "<bos>"})
    image_processor = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 4
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    records = [
        Record(image, question, answer)
        for image, question, answer in zip(IMAGES, QUESTIONS, ANSWERS, strict=True)
    ]
    (batch,) = batches(processor, records, 3)
    for labels, ids, answer in zip(batch["labels"], batch["input_ids"], ANSWERS, strict=True):
        assert tokenizer.decode(labels[labels >= 0]) == f"{answer}<eos>"
        assert torch.equal(ids[labels >= 0], labels[labels >= 0])
    (asked,) = batches(processor, [Record(IMAGES[0], "what?")], 1)
    assert "labels" not in asked


# *** what is refused ***


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            Record(IMAGES[:2], "what is <image>?", where="d.jsonl, line 2"),
            "line 2: the text has pl",
        ),
        (Record(IMAGES[0], "<image> and <image>"), "has places for 2 images, but comes with 1"),
        (Record(Path("no.png"), "what?", where="d.csv, line 5"), "line 5: no.png is not an image"),
    ],
)
def test_the_row_is_named(record: Record, words: str, processors: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=words):
        list(batches(processors["gemma3"], [record], 1))


@pytest.mark.parametrize("answer", [None, "seven"])
def test_a_row_that_the_template_refuses_is_named(answer: str | None, tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = strict + REAL["llava_onevision"].template
    processor = load_processor(write_processor("llava_onevision", tmp_path, template))
    asks = {"role": "user", "content": [{"type": "image"}, *text("what?")]}
    records = [
        Record(IMAGES[0], "what?", answer, chat=chat, where=f"d.jsonl, line {line}")
        for line, chat in enumerate([[asks], [{"role": "system", "content": text("a")}, asks]])
    ]
    with pytest.raises(ValueError, match="^d.jsonl, line 1: the chat template refuses it: no sys"):
        list(batches(processor, records, 2))


def test_a_row_that_the_processor_refuses_is_named(processors: dict[str, Any]) -> None:
    narrow = Image.new("RGB", (1, 3000))
    records = [
        Record(image, "what?", where=f"d.jsonl, line {line}")
        for line, image in enumerate([IMAGES[0], narrow, IMAGES[1]], start=1)
    ]
    with pytest.raises(ValueError, match="^d.jsonl, line 2: .* of 1 x 3000 pixels: absolute"):
        list(batches(processors["qwen2_5_vl"], records, 3))


def test_an_answer_without_tokens_is_refused(tmp_path: Path) -> None:
    processor = load_processor(write_processor("llava_onevision", tmp_path, PLAIN))
    # A tokenizer may drop characters that it does not know.
    drops = normalizers.Replace(Regex(r"\s?\x{200b}"), "")
    processor.tokenizer.backend_tokenizer.normalizer = drops
    with pytest.raises(ValueError, match="^d, line 1: the answer '\\\\u200b' has no tokens"):
        list(batches(processor, [Record(IMAGES[0], "what?", "\u200b", where="d, line 1")], 1))


def test_a_processor_that_changes_the_end_is_refused(processors: dict[str, Any]) -> None:
    class Adds(type(processors["gemma3"])):  # type: ignore[misc]
        def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
            return super().__call__(images, [f"{line}!" for line in text], **options)

    own = processors["gemma3"]
    changed = Adds(own.image_processor, own.tokenizer, own.chat_template, image_seq_length=4)
    with pytest.raises(ValueError, match="does not leave the end of the text as it is"):
        list(batches(changed, [Record(IMAGES[0], "what?", "seven")], 1))
