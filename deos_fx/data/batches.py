"""Render records as inputs of a model, with labels for their answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor

from deos_fx.data.chat import ChatFormat, Rendered, say_once
from deos_fx.data.images import open_image
from deos_fx.data.record import Message, Record
from deos_fx.words import counted

__all__ = ["answer_labels", "batches", "render"]

_T = TypeVar("_T")

# The label that the losses of transformers leave out.
_IGNORE = -100


def batches(
    processor: Any, records: Sequence[Record], size: int, *, images: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Turn records into model inputs, through the processor's chat template.

    The answer is the assistant's turn, and the labels are the tokens that a model writes by itself:
    those of the answer and of the mark that ends the turn. A processor without a template, or
    whose template has no turn for the assistant, is warned of once; texts are joined by a space
    then, with the answer and the tokenizer's end of the sequence behind them.

    Args:
        processor: A transformers processor of a vision-language model.
        records: The questions, in order; all with an answer or all without.
        size: Records in a batch; the last batch may be smaller.
        images: Whether the images go in; without them, prompts are text alone.

    Yields:
        The processor's output, padded on the left; with answers also ``labels`` ``[B, S]``: the
        tokens of the answers where they stand in ``input_ids``, -100 elsewhere.

    Raises:
        ValueError: If an image cannot be read, an answer has no tokens, the template leaves images
            out, or only some prompts of a batch begin with the tokenizer's first special token.
    """
    processor.tokenizer.padding_side = "left"
    chat = ChatFormat(processor)
    for start in range(0, len(records), size):
        yield _batch(chat, records[start : start + size], images)


def render(processor: Any, record: Record) -> Rendered:
    """Return a record as text, in which each image is one placeholder."""
    return _Texts(ChatFormat(processor), [record], True).rendered[0]


class _Texts:
    """The texts of a batch, and how the tokenizer is called for them.

    Args:
        chat: The chat format of the processor.
        records: The records.
        with_images: Whether the images go in.

    Attributes:
        rendered: The conversations, with their answers if there are any.
        special: Options of the tokenizer's call.
        takes_answers: Whether the processor puts answers behind the texts by itself (PaliGemma).
    """

    def __init__(self, chat: ChatFormat, records: Sequence[Record], with_images: bool) -> None:
        tokenizer = chat.processor.tokenizer
        own = inspect.signature(type(chat.processor).__call__).parameters
        self.takes_answers = not chat.has_template and "suffix" in own
        turns = [_turns(record, chat.image_token, with_images) for record in records]
        if not chat.has_template:
            say_once(
                f"{type(chat.processor).__name__} has no chat template: images, question and "
                "answer are joined by spaces"
            )
        # 1. Conversations with answers, as the template writes them.
        if chat.has_template and records[0].answer is not None:
            asked = zip(records, turns, strict=True)
            found = [_written(r, chat.answered, turn, r.answer or "") for r, turn in asked]
            whole = [one for one in found if one is not None]
            if len(whole) == len(records):
                self.rendered = whole
                self.special, _ = _special_tokens(tokenizer, [one.text for one in whole])
                return
            say_once(
                f"the chat template of {type(chat.processor).__name__} writes no turn of the "
                "assistant: answers are appended to the prompt"
            )
        # 2. Prompts alone, without the special tokens that would end them.
        write = chat.prompt if chat.has_template else chat.joined
        prompts = [_written(r, write, turn) for r, turn in zip(records, turns, strict=True)]
        self.special, end = _special_tokens(tokenizer, prompts)
        prompts = [prompt.removesuffix(end) for prompt in prompts]
        if end and records[0].answer is None and not chat.writes_images:
            # Case: a tokenizer of an encoder, which would end a prompt that has to go on.
            start, _ = _added(tokenizer, prompts[0])
            self.special = {"add_special_tokens": False}
            prompts = [f"{start}{prompt}" for prompt in prompts]
        texts = prompts
        if records[0].answer is not None:
            # 3. Answers behind them, with one end of the sequence: the tokenizer's if it has one.
            eos = "" if end else tokenizer.eos_token or ""
            answers = [record.answer for record in records]
            pairs = zip(prompts, answers, strict=True)
            texts = [f"{prompt} {answer}{eos}" for prompt, answer in pairs]
        both = zip(texts, prompts, strict=True)
        self.rendered = [Rendered(text, len(prompt), len(text)) for text, prompt in both]


def _written(record: Record, write: Callable[..., _T], *arguments: Any) -> _T:
    """Call what writes a record; templates refuse some, such as those with a turn of the system."""
    try:
        return write(*arguments)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{_where(record)}: the chat template refuses it: {error}") from error


def _turns(record: Record, image_token: str, with_images: bool) -> list[Message]:
    turns = record.messages(image_token)
    if with_images:
        return turns
    return [
        {**turn, "content": [part for part in turn["content"] if part["type"] != "image"]}
        for turn in turns
    ]


def _batch(chat: ChatFormat, records: Sequence[Record], with_images: bool) -> dict[str, Tensor]:
    texts = _Texts(chat, records, with_images)
    inputs = _processed(chat, records, texts, with_images)
    if records[0].answer is None:
        # Processors that put answers in write labels even if there are none.
        inputs.pop("labels", None)
        return inputs
    if texts.takes_answers:
        return inputs
    tokenizer = chat.processor.tokenizer
    spans = [_answer_tokens(tokenizer, one, texts.special) for one in texts.rendered]
    for row, record, span in zip(inputs["input_ids"], records, spans, strict=True):
        _check_answer(record, row, *span)
    lengths, after = (
        torch.tensor(counts)
        for counts in zip(*((len(ids), behind) for ids, behind in spans), strict=True)
    )
    return inputs | {"labels": answer_labels(inputs["input_ids"], lengths, after)}


def _processed(
    chat: ChatFormat, records: Sequence[Record], texts: _Texts, with_images: bool
) -> dict[str, Tensor]:
    """Call the processor.

    Raises:
        ValueError: If it refuses a record, which the message names.
    """
    options: dict[str, Any] = texts.special | {"padding": True, "return_tensors": "pt"}
    options["text"] = [one.text for one in texts.rendered]
    if texts.takes_answers and records[0].answer is not None:
        options["text"] = [one.text[: one.start].strip() for one in texts.rendered]
        options["suffix"] = [record.answer for record in records]
    if with_images:
        options["images"] = [
            [open_image(source, record.where) for source in record.images] for record in records
        ]
    try:
        return dict(chat.processor(**options))
    except ValueError as error:
        if len(records) > 1:
            # Which of them it is shows one by one.
            for record in records:
                _batch(chat, [record], with_images)
        raise ValueError(
            f"{_where(records[0])}: the processor refuses {_sizes(options)}: {error}"
        ) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        # Case: settings of a processor that no image fits, which none of its checks has found.
        raise ValueError(
            f"{_where(records[0])}: the processor fails with {_sizes(options)} "
            f"({type(error).__name__}: {error}); give other images, or, if it fails with all, save "
            "or download it again"
        ) from error


def _sizes(options: Mapping[str, Any]) -> str:
    """Return what a processor was given, in words."""
    images = options.get("images", [[]])[0]
    if not images:
        return "the text"
    sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
    return f"{counted(len(images), 'image')} of {sizes} pixels"


def _where(record: Record) -> str:
    return record.where or repr(record.prompt)


def answer_labels(ids: Tensor, lengths: Tensor, after: Tensor | int = 0) -> Tensor:
    """Return labels [B, S]: the ids of the answer near the end of every row, and -100 elsewhere.

    Args:
        ids: [B, S].
        lengths: [B], tokens from the first of each answer to the end of the row.
        after: [B], tokens behind each answer that are not part of it.
    """
    # Rows are padded on the left, so places are counted from the end.
    left = torch.arange(ids.shape[1], 0, -1)
    answered = (left <= lengths[:, None]) & (left > torch.as_tensor(after)[..., None])
    return torch.where(answered, ids, _IGNORE)


def _special_tokens(tokenizer: Any, prompts: Sequence[str]) -> tuple[dict[str, bool], str]:
    """Find how to call the tokenizer so that it adds no special token that is written already.

    If the prompts begin with the first special token, as chat templates write it, none are added;
    `apply_chat_template` of transformers tokenizes by the same rule.

    Returns:
        Options of the call, and the special tokens that the tokenizer then writes after a text.

    Raises:
        ValueError: If only some of the prompts begin with that token.
    """
    start, end = _added(tokenizer, prompts[0])
    first = tuple(token for token in (tokenizer.bos_token, start) if token)
    written = [prompt.startswith(first) for prompt in prompts]
    if all(written):
        return {"add_special_tokens": False}, ""
    if any(written):
        raise ValueError(
            f"{' or '.join(first)} begins {sum(written)} of {len(prompts)} prompts of a batch; "
            "give it to all of them or to none"
        )
    return {}, end


def _added(tokenizer: Any, text: str) -> tuple[str, str]:
    """Return the special tokens that a tokenizer writes before and after a text."""
    whole = tokenizer(text).input_ids
    bare = tokenizer(text, add_special_tokens=False).input_ids
    # No tokenizer says which special tokens it adds, so look for the bare text in the whole.
    for start in range(len(whole) - len(bare) + 1):
        end = start + len(bare)
        if whole[start:end] == bare:
            parts = whole[:start], whole[end:]
            before, after = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in parts)
            return before, after
    return "", ""


def _answer_tokens(
    tokenizer: Any, text: Rendered, special: dict[str, bool]
) -> tuple[list[int], int]:
    """Find the tokens of an answer in its text, in which an image is one placeholder.

    The tokens that a text shares with its beginning decide, since a tokenizer may join the end of
    the prompt with the answer.

    Returns:
        The ids from the first of the answer to the end, and how many of them are behind it.
    """
    whole = tokenizer(text.text, **special).input_ids
    before, up_to = (
        _shared(whole, tokenizer(text.text[:end], **special).input_ids)
        for end in (text.start, text.end)
    )
    return whole[before:], len(whole) - up_to


def _shared(whole: Sequence[int], part: Sequence[int]) -> int:
    """Count the ids with which both begin."""
    shared = 0
    while shared < min(len(whole), len(part)) and whole[shared] == part[shared]:
        shared += 1
    return shared


def _check_answer(record: Record, row: Tensor, ids: Sequence[int], behind: int) -> None:
    """Check that the row ends as the text does, so that the labels are where the answer is."""
    if len(ids) == behind:
        raise ValueError(f"{_where(record)}: the answer {record.answer!r} has no tokens")
    if row[-len(ids) :].tolist() != list(ids):
        raise ValueError(
            f"{_where(record)}: the processor does not leave the end of the text as it is, so that "
            "the tokens of the answer are not known; give labels of your own to deos_fx.search"
        )
