"""Questions about images from a JSONL file, as batches of model inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

__all__ = ["Record", "batches", "read_records"]

_IGNORE = -100
_FIELDS = {"image": str, "prompt": str, "answer": str}


@dataclass(frozen=True)
class Record:
    """One line of the file: a prompt about an image, and its answer unless there is none."""

    image: Path
    prompt: str
    answer: str | None = None


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Reads a JSONL file.

    Each line is an object with ``image`` (a path, relative to the file's folder), ``prompt`` and
    optionally ``answer``.

    Args:
        path: The file.

    Returns:
        A record for each line that is not empty.

    Raises:
        ValueError: If a line is not such an object, an image is missing, only some lines have an
            answer, or there is no line; the message names file and line.
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
        raise ValueError(f"{where}: give an object with image, prompt and, if you have it, answer")
    for name, kind in _FIELDS.items():
        if name in values and not isinstance(values[name], kind):
            raise ValueError(f"{where}: {name} is {values[name]!r}; give a text")
    image = folder / values["image"]
    if not image.is_file():
        raise ValueError(f"{where}: there is no image {image}")
    return Record(image, values["prompt"], values.get("answer"))


def batches(processor: Any, records: Sequence[Record], size: int) -> Iterator[dict[str, Tensor]]:
    """Turns records into model inputs, through the processor's chat template if it has one.

    Args:
        processor: A transformers processor of a vision-language model.
        records: What to ask, in order; all with an answer or all without.
        size: Records of a batch; the last batch may be smaller.

    Yields:
        What the processor returns, padded on the left; with answers also ``labels`` ``[B, S]``:
        the answers and the ends of the sequences where they stand in ``input_ids``, -100 elsewhere.

    Raises:
        ValueError: If an image cannot be read.
    """
    processor.tokenizer.padding_side = "left"
    for start in range(0, len(records), size):
        yield _batch(processor, records[start : start + size])


def _batch(processor: Any, records: Sequence[Record]) -> dict[str, Tensor]:
    images = [_open(record.image) for record in records]
    prompts = [_prompt(processor, record.prompt) for record in records]
    if records[0].answer is None:
        return dict(processor(images=images, text=prompts, padding=True, return_tensors="pt"))
    end = processor.tokenizer.eos_token or ""
    texts = [
        f"{prompt} {record.answer}{end}"
        for prompt, record in zip(prompts, records, strict=True)
    ]
    inputs = dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))
    ids = inputs["input_ids"]
    pairs = zip(prompts, texts, strict=True)
    lengths = [_answer_length(processor.tokenizer, *pair) for pair in pairs]
    answered = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return inputs | {"labels": torch.where(answered, ids, _IGNORE)}


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} is not an image that Pillow can read: {error}") from error


def _prompt(processor: Any, prompt: str) -> str:
    """The prompt as the model expects it, with a placeholder for the image."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return prompt if processor.image_token in prompt else f"{processor.image_token} {prompt}"


def _answer_length(tokenizer: Any, prompt: str, text: str) -> int:
    """Tokens of `text` behind those it shares with `prompt`.

    Counted on the shared start, since a tokenizer may join the prompt's end with the answer.
    """
    before, whole = tokenizer(prompt).input_ids, tokenizer(text).input_ids
    shared = 0
    while shared < min(len(before), len(whole)) and before[shared] == whole[shared]:
        shared += 1
    return len(whole) - shared
