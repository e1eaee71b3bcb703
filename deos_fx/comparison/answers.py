"""Let a model answer questions, score the answers, and compute the loss of the right ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from deos_fx.data import Record, batches, open_image
from deos_fx.errors import Undivided

__all__ = [
    "Metric",
    "answer_logits",
    "answer_loss",
    "check_apart",
    "exact_match",
    "generated",
    "inputs_for",
    "longest_answer",
]

Metric: TypeAlias = Callable[[str, Record], float]
"""Scores an answer to a question from 0 to 1."""


def exact_match(answer: str, record: Record) -> float:
    """Return 1 if the answer is the right one, to the letter, without spaces around it."""
    assert record.answer is not None
    return float(answer.strip() == record.answer.strip())


def inputs_for(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Move inputs to the model's device, and pixels to its precision."""
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(model.device)
            value = value.to(model.dtype) if value.is_floating_point() else value
        moved[name] = value
    return moved


def longest_answer(processor: Any, records: Iterable[Record]) -> int:
    """Return the tokens of the longest answer."""
    texts = [record.answer or "" for record in records]
    return max(len(ids) for ids in processor.tokenizer(texts).input_ids)


def generated(
    generate: Callable[..., Tensor],
    model: PreTrainedModel,
    processor: Any,
    records: Sequence[Record],
    *,
    batch_size: int,
    max_new_tokens: int,
    images: bool = True,
    **options: Any,
) -> list[str]:
    """Let a model answer, greedily unless options say otherwise.

    Args:
        generate: `generate` of the model or of a reduced model.
        model: The unmodified model.
        processor: Its processor.
        records: The questions.
        batch_size: Questions answered at once.
        max_new_tokens: Tokens of an answer.
        images: Whether the model sees the images.
        **options: Other options of `generate`.

    Returns:
        The answers, without spaces around them.
    """
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, **options}
    asked = [replace(record, answer=None) for record in records]

    def answered(together: list[Record]) -> list[str]:
        (batch,) = batches(processor, together, len(together), images=images)
        inputs = inputs_for(model, batch)
        try:
            ids = generate(**inputs, **options)
        except Undivided:
            if len(together) == 1:
                raise
            return [answer for record in together for answer in answered([record])]
        # Ids begin with the prompt; only what follows is the answer.
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    starts = range(0, len(asked), batch_size)
    return [answer for i in starts for answer in answered(asked[i : i + batch_size])]


def answer_loss(
    run: Callable[..., Any], model: PreTrainedModel, data: Iterable[Mapping[str, Any]]
) -> float:
    """Return the mean cross-entropy of the tokens of the right answers.

    Args:
        run: A reduced model.
        model: The unmodified model.
        data: Batches with ``labels``, padded on the left.
    """
    total, tokens = 0.0, 0
    for batch in data:
        logits, labels = answer_logits(run, model, batch)
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        tokens += int((labels >= 0).sum())
    return total / tokens


def answer_logits(
    run: Callable[..., Any], model: PreTrainedModel, batch: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Run a batch, and return what it predicts of the answers and what they are.

    No token is dropped from the first label on, so that logits and labels are told apart from the
    end.

    Args:
        run: A reduced model, or an exported one.
        model: The unmodified model, or what has the ``device`` and ``dtype`` of its inputs.
        batch: Inputs with ``labels``, padded on the left.

    Returns:
        Logits ``[B, L, vocabulary]`` in float32, and labels ``[B, L]``, -100 where a row has none.
        L is the number of tokens from the first label of any row to the end.
    """
    inputs = inputs_for(model, batch)
    labels = inputs.pop("labels")
    length = int((labels >= 0).any(dim=0).flip(0).nonzero().max()) + 1
    with torch.no_grad():
        logits = run(**inputs, use_cache=False).logits
    return logits[:, -length - 1 : -1].float(), labels[:, -length:]


def check_apart(tuning: Sequence[Record], test: Sequence[Record]) -> None:
    """Check that no example is in both sets: the same pixels with the same prompt.

    Raises:
        ValueError: If one is; the message names the first.
    """
    seen = {_digest(record): i for i, record in enumerate(tuning)}
    for i, record in enumerate(test):
        known = seen.get(_digest(record))
        if known is not None:
            raise ValueError(
                f"Question {i + 1} of the test data is question {known + 1} of the tuning data: "
                f"{record.prompt!r} about the same image. Take it out of one of them, since a "
                "method tuned on the test looks better than it is."
            )


def _digest(record: Record) -> tuple[str, str]:
    pixels = hashlib.sha256()
    for source in record.images:
        image = open_image(source, record.where)
        pixels.update(f"{image.size}".encode() + image.tobytes())
    return pixels.hexdigest(), f"{record.prompt}{record.chat}"
