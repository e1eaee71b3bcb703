"""Learned parts of a reduction: scores and a similarity whose directions a search trains.

Every part is one tensor. Scores that are learned are added to the standardized mix of the others,
and the sum is standardized again. All of them compare directions, not lengths: hidden states are
scaled to length 1 first, so a part means the same in every layer and model.

Shapes: V visual tokens of width d, T text tokens of width e, r directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from deos_fx.operator.scores import full_precision

__all__ = [
    "LEARNED",
    "LearnedPart",
    "linear_probe",
    "place_preference",
    "projected",
    "quadratic_probe",
    "text_probe",
]


def linear_probe(tokens: Tensor, probe: Tensor) -> Tensor:
    """Return the inner product [B, V] of each token of [B, V, d] with a direction [d]."""
    unit = F.normalize(full_precision(tokens), dim=-1)
    return unit @ probe.to(unit)


def quadratic_probe(tokens: Tensor, quadratic: Tensor) -> Tensor:
    """Return a quadratic form of low rank [B, V]: sum_k (x a_k)^2 - sum_k (x b_k)^2.

    Args:
        tokens: [B, V, d].
        quadratic: [d, 2 r], the directions a_1 ... a_r, b_1 ... b_r.
    """
    unit = F.normalize(full_precision(tokens), dim=-1)
    more, less = (unit @ quadratic.to(unit)).square().chunk(2, dim=-1)
    return more.sum(dim=-1) - less.sum(dim=-1)


def text_probe(tokens: Tensor, text_tokens: Tensor, text_mask: Tensor, text: Tensor) -> Tensor:
    """Return what the text asks of each token, [B, V]: sum_t m_t (x A) (y_t B).

    It is a bilinear form of low rank between tokens x and words y. A sum, not a mean: a word that
    asks for something asks as much in a long question as in a short one.

    Args:
        tokens: [B, V, d].
        text_tokens: Embeddings or hidden states of the text [B, T, e].
        text_mask: m [B, T], 1 at the text tokens that count.
        text: [d + e, r], A above B.
    """
    image, words = (F.normalize(full_precision(x), dim=-1) for x in (tokens, text_tokens))
    of_image, of_text = text.to(image).split([image.shape[-1], words.shape[-1]])
    # The sum over the words is taken first: one product with each token instead of T.
    asked = ((words @ of_text) * full_precision(text_mask).unsqueeze(-1)).sum(dim=1, keepdim=True)
    return ((image @ of_image) @ asked.mT).squeeze(-1)


def place_preference(grid: Tensor, sides: Tensor, place: Tensor) -> Tensor:
    """Return a smooth preference by place in the image, [B or 1, V], that fits every grid.

    It is a cosine series over the relative place: sum_mn c_mn cos(pi m y) cos(pi n x), with
    (y, x) in [0, 1] from one end of the grid to the other.

    Args:
        grid: Image, row and column of every token, [V, 3] or [B, V, 3].
        sides: Rows and columns of a whole image, [1, 2].
        place: c, [M, N].
    """
    every = grid if grid.dim() == 3 else grid.unsqueeze(0)
    waves = []
    for axis, number in enumerate(place.shape):
        # The centre of a cell, as a share of the side.
        share = (every[..., axis + 1].float() + 0.5) / sides[0, axis].to(every.device)
        order = torch.arange(number, device=every.device)
        waves.append((math.pi * share.unsqueeze(-1) * order).cos())
    rows, columns = waves
    return ((rows @ place.to(rows)) * columns).sum(dim=-1)


def projected(tokens: Tensor, metric: Tensor) -> Tensor:
    """Return tokens [B, V, d] along the directions [d, r] that a learned similarity compares."""
    values = full_precision(tokens)
    return values @ metric.to(values)


@dataclass(frozen=True)
class LearnedPart:
    """A row of ``LEARNED``.

    Attributes:
        function: Takes the features named in ``needs``, in that order, and the tensor.
        needs: Names of features.
        axes: Number of axes of the tensor.
        words: What it looks at, for people.
        degree: How its values grow with the tensor: by this power of a common factor.
        scores: Whether it is a score; otherwise it is the similarity ``learned``.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...]
    axes: int
    words: str
    degree: int = 1
    scores: bool = True


LEARNED: Mapping[str, LearnedPart] = {
    "probe": LearnedPart(linear_probe, ("tokens",), 1, "a direction of the tokens"),
    "quadratic": LearnedPart(quadratic_probe, ("tokens",), 2, "squares along directions", 2),
    "text": LearnedPart(
        text_probe, ("tokens", "text_tokens", "text_mask"), 2, "the words of the prompt", 2
    ),
    "place": LearnedPart(place_preference, ("grid", "sides"), 2, "the place in the image"),
    "metric": LearnedPart(projected, ("tokens",), 2, "directions to compare", scores=False),
}
