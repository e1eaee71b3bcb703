"""Random tokens of a site, with every feature that an operator can ask for."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from deos_fx.operator import SCORES, similarity

SIDE, WIDTH, TEXT = 6, 8, 7
TOKENS = SIDE**2

quick = settings(deadline=None, max_examples=10)
seeds = st.integers(0, 2**31)
counts = st.integers(1, TOKENS)


def grid(side: int = SIDE, images: int = 1) -> Tensor:
    """Image, row and column of every token."""
    places = [
        [image, row, column]
        for image in range(images)
        for row in range(side)
        for column in range(side)
    ]
    return torch.tensor(places)


def inputs(
    seed: int, rows: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Tokens, masses and all features of a site; some as two more blocks would report them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    needs = sorted({need for score in SCORES.values() for need in score.features})
    attentions = [name for name in needs if name.startswith("attention_")]
    attentions += ["attention_mutual@vision.1", "attention_mutual@next"]
    features = {name: normal(rows, TOKENS).softmax(-1) for name in attentions}
    features |= {"keys": normal(rows, TOKENS, 5), "joint_keys": normal(rows, TOKENS, 10)}
    mask = torch.ones(rows, TEXT, dtype=dtype)
    mask[::2, :2] = 0
    features |= {"text_tokens": normal(rows, TEXT, WIDTH), "text_mask": mask, "grid": grid()}
    features |= {"normed_tokens": normal(rows, TOKENS, 12), "normed_text": normal(rows, TEXT, 12)}
    features |= {"text_score": normal(rows, TEXT), "keys@next": normal(rows, TOKENS, 5)}
    features |= {
        "class_token": normal(rows, 1, WIDTH),
        "sides": torch.tensor([[SIDE, SIDE]] * rows),
    }
    return normal(rows, TOKENS, WIDTH), normal(rows, TOKENS).exp(), features


def gather(values: Tensor, kept: Tensor) -> Tensor:
    """The kept entries of every row, by a loop."""
    return torch.stack([row[index] for row, index in zip(values, kept, strict=True)])


def cosine(x: Tensor) -> Tensor:
    return similarity({"feature": x}, {"feature": 1.0})


def falling(values: Tensor, among: list[int]) -> list[int]:
    return sorted(among, key=lambda j: -float(values[j]))
