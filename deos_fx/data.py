"""Read questions about images from a JSONL file, and make batches of model inputs of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_utils import load_image

__all__ = ["Record", "answer_labels", "batches", "open_image", "read_records"]

# The label that the losses of transformers leave out.
_IGNORE = -100
# Entry of a line -> its type.
_FIELDS = {"image": str, "prompt": str, "answer": str, "kind": str}


@dataclass(frozen=True)
class Record:
    """A prompt about an image, as a line of the file says it.

    Attributes:
        image: The image, or its path.
        prompt: The text.
        answer: The answer, if given.
        kind: The kind of question, if given, by which comparisons count right answers.
    """

    image: Path | Image.Image
    prompt: str
    answer: str | None = None
    kind: str = ""


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read a JSONL file.

    Each line is an object with ``image`` (a path, relative to the file's folder), ``prompt`` and
    optionally ``answer`` and ``kind``.

    Args:
        path: The file.

    Returns:
        A record for each line that is not empty.

    Raises:
        ValueError: If a line is not such an object, an image is missing, only some lines have an
            answer, or the file is empty; the message names the file and, for one line, its number.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                records.append(_read_record(line, path.parent, f"{path}, line {number}"))
    if not records:
        raise ValueError(f"{path} is empty; give one JSON object a line, with image and prompt")
    answered = sum(record.answer is not None for record in records)
    if answered not in (0, len(records)):
        raise ValueError(
            f"{path}: {answered} of {len(records)} lines have an answer; give all of them one (to "
            "search with labels) or none (to search by the model's own answers)"
        )
    return records


def _read_record(line: str, folder: Path, where: str) -> Record:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, dict) or not {"image", "prompt"} <= set(values) <= set(_FIELDS):
        raise ValueError(
            f"{where}: give an object with image, prompt and, if you have them, answer and kind"
        )
    for name, kind in _FIELDS.items():
        if name in values and not isinstance(values[name], kind):
            raise ValueError(f"{where}: {name} is {values[name]!r}; give a text")
    image = folder / values["image"]
    if not image.is_file():
        raise ValueError(f"{where}: there is no image {image}")
    return Record(image, values["prompt"], values.get("answer"), values.get("kind", ""))


def batches(
    processor: Any, records: Sequence[Record], size: int, *, images: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Turn records into model inputs, through the processor's chat template if it has one.

    Args:
        processor: A transformers processor of a vision-language model.
        records: The questions, in order; all with an answer or all without.
        size: Records in a batch; the last batch may be smaller.
        images: Whether the images go in; without them, prompts are text alone.

    Yields:
        The processor's output, padded on the left; with answers also ``labels`` ``[B, S]``: the
        answers and the ends of the sequences where they stand in ``input_ids``, -100 elsewhere.

    Raises:
        ValueError: If an image cannot be read, or only some prompts of a batch begin with the
            tokenizer's first special token.
    """
    processor.tokenizer.padding_side = "left"
    for start in range(0, len(records), size):
        yield _batch(processor, records[start : start + size], images)


def _batch(processor: Any, records: Sequence[Record], with_images: bool) -> dict[str, Tensor]:
    tokenizer = processor.tokenizer
    images = [open_image(record.image) for record in records] if with_images else None
    prompts = [_prompt(processor, record.prompt, with_images) for record in records]
    # 1. Prompts without the special tokens that would end them: the answer goes on from there.
    special, end = _special_tokens(tokenizer, prompts)
    prompts = [prompt.removesuffix(end) for prompt in prompts]
    options = special | {"padding": True, "return_tensors": "pt"}
    # Case: no answers, so the prompts are the inputs.
    if records[0].answer is None:
        return dict(processor(images=images, text=prompts, **options))
    # Case: answers.
    # 2. Append each to its prompt, with one end of the sequence: the tokenizer's if it writes one.
    eos = "" if end else tokenizer.eos_token or ""
    texts = [
        f"{prompt} {record.answer}{eos}" for prompt, record in zip(prompts, records, strict=True)
    ]
    inputs = dict(processor(images=images, text=texts, **options))
    # 3. Label them. Rows are padded on the left, so every answer is at the end of its row.
    pairs = zip(prompts, texts, strict=True)
    lengths = torch.tensor([_answer_length(tokenizer, *pair, special) for pair in pairs])
    return inputs | {"labels": answer_labels(inputs["input_ids"], lengths)}


def answer_labels(ids: Tensor, lengths: Tensor) -> Tensor:
    """Return labels [B, S]: the ids of the answer at the end of every row, and -100 elsewhere.

    Args:
        ids: [B, S].
        lengths: [B], tokens of each answer.
    """
    answered = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
    return torch.where(answered, ids, _IGNORE)


def open_image(path: Path | Image.Image) -> Image.Image:
    """Load the pixels as transformers' `load_image` does: upright, three channels of 8 bits.

    Args:
        path: The file, or an image that is loaded already.

    Raises:
        ValueError: If it cannot be read, or the range of its values is not known.
    """
    if isinstance(path, Image.Image):
        return load_image(path)
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):
                # load_image clips 16-bit values at 255, which makes nearly everything white.
                upright = ImageOps.exif_transpose(image)
                return load_image(Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)))
            if image.mode in ("I", "F"):
                raise ValueError(
                    f"its pixels are of mode {image.mode}, whose range is not known; save it with "
                    "8 or 16 bits a channel"
                )
            return load_image(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error


def _prompt(processor: Any, prompt: str, with_image: bool) -> str:
    """Write a prompt as the model expects it, with a placeholder for the image if it has one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * with_image + [{"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if not with_image:
        return prompt.replace(f"{processor.image_token} ", "").replace(processor.image_token, "")
    if processor.image_token in prompt:
        return prompt
    # Case: no chat template and no placeholder yet. It goes before the text, but after a first
    # special token that is written already.
    words = prompt.removeprefix(processor.tokenizer.bos_token or "")
    return f"{prompt.removesuffix(words)}{processor.image_token} {words}"


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
            f"{sum(written)} of {len(prompts)} prompts of a batch begin with {' or '.join(first)}; "
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


def _answer_length(tokenizer: Any, prompt: str, text: str, special: dict[str, bool]) -> int:
    """Count the tokens of `text` after those that it shares with `prompt`.

    The shared start decides, since a tokenizer may join the prompt's end with the answer.
    """
    before, whole = (tokenizer(part, **special).input_ids for part in (prompt, text))
    shared = 0
    while shared < min(len(before), len(whole)) and before[shared] == whole[shared]:
        shared += 1
    return len(whole) - shared
