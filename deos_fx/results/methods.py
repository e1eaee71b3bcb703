"""One way to run a model, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from deos_fx.cost.amounts import Cost
from deos_fx.policy.policy import Policy
from deos_fx.results.pictures import TokenStep

__all__ = ["SEARCHED", "UNREDUCED", "Method", "OnnxCheck", "Picture"]

SEARCHED = "searched"

UNREDUCED = "no reduction"


@dataclass(frozen=True)
class Method:
    """One way to run the model, with what it costs and how often it is right.

    Attributes:
        name: A preset's name, ``searched`` or ``no reduction``.
        policy: What it does.
        cost: Cost of one prompt.
        accuracy: Fraction of right answers by kind of question, and ``overall``; empty if there
            is no measurement.
        reason: Why there is none.
        answers: Its answers, in the order of the questions.
    """

    name: str
    policy: Policy
    cost: Cost
    accuracy: Mapping[str, float]
    reason: str = ""
    answers: Sequence[str] = ()

    @property
    def is_searched(self) -> bool:
        """Whether it is what the search returned."""
        return self.name == SEARCHED

    @property
    def paint(self) -> str:
        """The colour it is drawn in: that of its first reduction's regime."""
        if self.is_searched:
            return "accent"
        return self.policy.reductions[0].regime if self.policy.reductions else "ink"


@dataclass(frozen=True)
class Picture:
    """One question about one image, and what the searched policy did to the image's tokens.

    Attributes:
        image: The image.
        kind: Kind of the question.
        question: The question.
        expected: The right answer.
        answers: Answer by name of a method.
        steps: The reductions, in order.
    """

    image: Image.Image
    kind: str
    question: str
    expected: str
    answers: Mapping[str, str]
    steps: Sequence[TokenStep]


@dataclass(frozen=True)
class OnnxCheck:
    """How ONNX Runtime's answers compare with PyTorch's, where it ran, and the files it ran."""

    compared: int
    equal: int
    device: str
    files: Mapping[str, int]
