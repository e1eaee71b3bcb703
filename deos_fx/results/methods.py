"""Record the measurements of the demo: methods, example pictures and the check of the export."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from PIL import Image

from deos_fx.cost.amounts import Cost
from deos_fx.policy.policy import Policy
from deos_fx.results.token_drawing import TokenStep

__all__ = ["SEARCHED", "UNREDUCED", "Method", "OnnxCheck", "Picture", "versions"]

SEARCHED = "searched"

UNREDUCED = "no reduction"


def versions() -> dict[str, str]:
    """Return the versions and the machine that measurements were made with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
    }


@dataclass(frozen=True)
class Method:
    """One way to run the model, with its cost and its accuracy.

    Attributes:
        name: A preset's name, ``searched`` or ``no reduction``.
        policy: The policy that it runs.
        cost: Cost of one prompt.
        accuracy: Fraction of right answers by kind of question, and ``overall``; empty if there
            is no measurement.
        reason: Why there is no measurement.
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
        """Return whether this is the policy that the search returned."""
        return self.name == SEARCHED

    @property
    def paint(self) -> str:
        """Return its colour: the regime of its first reduction, unless it was searched."""
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
        answers: The answer of each method, by its name.
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
    """Comparison of ONNX Runtime's answers with PyTorch's.

    Attributes:
        compared: Questions that both answered.
        equal: How many answers are equal, token by token.
        device: The device that ONNX Runtime ran on.
        files: Size in bytes of each exported file, by name.
    """

    compared: int
    equal: int
    device: str
    files: Mapping[str, int]
