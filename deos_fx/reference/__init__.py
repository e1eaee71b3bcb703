"""A small vision-language model with its training data, for tests, examples and studies.

The model is an ordinary ``LlavaForConditionalGeneration``: a CLIP tower, 144 visual tokens, ten
Llama layers. It answers eight kinds of questions about pictures of handwritten digits. Some depend
on the tokens the text asks about, some on counting, some on the picture as a whole, so that
reducing visual tokens has a measurable price.

    >>> from deos_fx import reference
    >>> model, processor = reference.load()
    >>> examples = reference.make_examples(64, "test")
    >>> reference.accuracy(model.generate, processor, examples)["overall"] > 0.8
    True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from deos_fx.data import answer_labels
from deos_fx.reference.sampling import make_examples, make_scenes
from deos_fx.reference.scenes import KINDS, Example, Question, Scene, SceneObject

__all__ = [
    "KINDS",
    "WEIGHTS",
    "Example",
    "Question",
    "Scene",
    "SceneObject",
    "accuracy",
    "batches",
    "load",
    "make_examples",
    "make_scenes",
]

WEIGHTS = Path(__file__).with_name("weights")


def load(folder: Path = WEIGHTS) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the trained model and its processor.

    Args:
        folder: Folder that they were saved in; by default that of the package.

    Returns:
        The model in evaluation mode and single precision, and the processor.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), LlavaProcessor.from_pretrained(folder)


def batches(
    processor: LlavaProcessor, examples: Sequence[Example], batch_size: int, answers: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Turn examples into inputs of the model.

    Args:
        processor: The processor of the model.
        examples: The examples, in order.
        batch_size: Examples in a batch; the last batch may be smaller.
        answers: Whether answers follow the questions, with labels for a loss. Without them the
            inputs are prompts to generate from.

    Yields:
        ``input_ids`` and ``attention_mask`` ``[B, S]``, padded on the left, and ``pixel_values``
        ``[B, 3, 144, 144]``; with answers also ``labels`` ``[B, S]``: the words of the answer and
        the end of the sequence where they stand in ``input_ids``, -100 elsewhere.
    """
    # The prompt is written by hand, since the tokenizer knows no chat template.
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        questions = [example.question for example in part]
        texts = [f"<image> {question.text}" for question in questions]
        if answers:
            pairs = zip(texts, questions, strict=True)
            texts = [f"{text} {question.answer} <eos>" for text, question in pairs]
        images = [example.scene.image for example in part]
        inputs = dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))
        if answers:
            # One token for each word, and the end of the sequence.
            lengths = torch.tensor([len(question.answer.split()) + 1 for question in questions])
            inputs["labels"] = answer_labels(inputs["input_ids"], lengths)
        yield inputs


def accuracy(
    generate: Callable[..., Tensor],
    processor: LlavaProcessor,
    examples: Sequence[Example],
    batch_size: int = 32,
) -> dict[str, float]:
    """Measure how often generated answers are exactly right.

    Args:
        generate: Called with the inputs of a batch as keywords; returns token ids ``[B, S]``
            that start with the prompt, as ``model.generate`` does.
        processor: The processor of the model.
        examples: The examples.
        batch_size: Questions answered at once.

    Returns:
        Fraction of right answers for every kind of question asked, and ``"overall"``.
    """
    right: dict[str, list[bool]] = {}
    inputs = batches(processor, examples, batch_size, answers=False)
    for start, batch in zip(range(0, len(examples), batch_size), inputs, strict=True):
        ids = generate(**batch)[:, batch["input_ids"].shape[1] :]
        texts = processor.batch_decode(ids, skip_special_tokens=True)
        for example, text in zip(examples[start : start + batch_size], texts, strict=True):
            question = example.question
            right.setdefault(question.kind, []).append(text.strip() == question.answer)
    total = sum(map(sum, right.values())) / max(1, len(examples))
    kinds = [kind for kind in dict.fromkeys((*KINDS, *right)) if kind in right]
    return {kind: sum(right[kind]) / len(right[kind]) for kind in kinds} | {"overall": total}
