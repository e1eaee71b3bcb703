"""A second task with its own trained model: questions about scenes of photographed garments.

The face is that of ``deos_fx.reference``, so that a benchmark can use either; scenes need the
photographs of Fashion-MNIST, in a folder that the user names.

    >>> from benchmarks import garments
    >>> model, processor = garments.load()
    >>> examples = garments.make_examples(64, "test", data="DIR")
    >>> garments.accuracy(model.generate, processor, examples)["overall"]
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from deos_fx import reference
from deos_fx.reference import Example, Question, accuracy, batches

from .sampling import make_examples, make_scenes
from .scenes import KINDS, Item, Scene

__all__ = [
    "KINDS",
    "WEIGHTS",
    "Example",
    "Item",
    "Question",
    "Scene",
    "accuracy",
    "batches",
    "load",
    "make_examples",
    "make_scenes",
]

WEIGHTS = Path(__file__).with_name("weights")


def load(folder: Path = WEIGHTS) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the trained model and its processor, as ``reference.load`` does."""
    return reference.load(folder)
