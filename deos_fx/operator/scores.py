"""How much each visual token matters: one small function per score.

Every function returns one number per token, larger meaning more worth keeping, in at least single
precision. A new score is a function here and a row of ``SCORES``; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "SCORES",
    "Score",
    "agreed_attention",
    "calibrated_rater_attention",
    "cls_attention",
    "combine",
    "feature_norm",
    "full_precision",
    "grid_coverage",
    "joint_cls_attention",
    "key_l1_norm",
    "key_norm",
    "last_text_attention",
    "linear_probe",
    "mutual_attention",
    "novelty",
    "random",
    "rater_attention",
    "standardize",
    "text_attention",
    "text_irrelevance",
    "text_relevance",
]

LOG_FLOOR = 1e-13
"""Gates are clamped here before a logarithm, so that a closed gate is a bias of about -30."""


def full_precision(x: Tensor) -> Tensor:
    """Returns ``x`` in single precision, or in double precision if it has it already."""
    return x if x.dtype == torch.float64 else x.float()


def last_text_attention(attention_last: Tensor) -> Tensor:
    """Attention [B, V] that the last text token pays to each visual token (FastV, PyramidDrop)."""
    return full_precision(attention_last)


def text_attention(attention_text: Tensor) -> Tensor:
    """Mean attention [B, V] that the text tokens pay to each visual token (SparseVLM's raters)."""
    return full_precision(attention_text)


def cls_attention(attention_cls: Tensor) -> Tensor:
    """Attention [B, V] that the CLS token of the vision tower pays (FasterVLM, VisionZip)."""
    return full_precision(attention_cls)


def joint_cls_attention(attention_cls_joint: Tensor) -> Tensor:
    """Attention [B, V] of the CLS token over the full width, heads not split (PruMerge)."""
    return full_precision(attention_cls_joint)


def rater_attention(attention_raters: Tensor) -> Tensor:
    """Mean attention [B, V] of the text tokens that the image speaks to (SparseVLM's raters)."""
    return full_precision(attention_raters)


def calibrated_rater_attention(attention_raters_plus: Tensor) -> Tensor:
    """Attention [B, V] of the raters in the heads that look at the image, without the part that
    rotary positions alone explain (SparseVLM+)."""
    return full_precision(attention_raters_plus)


def mutual_attention(attention_mutual: Tensor) -> Tensor:
    """Mean attention [B, V] that a token gets: in the tower from all its tokens (HiPrune), in the
    decoder from the visual ones."""
    return full_precision(attention_mutual)


def agreed_attention(attention_text_max: Tensor, attention_mutual_max: Tensor) -> Tensor:
    """Product [B, V] of the attention from the text and from the image, largest head of each
    (FitPrune drops what neither looks at)."""
    return full_precision(attention_text_max) * full_precision(attention_mutual_max)


def key_l1_norm(joint_keys: Tensor) -> Tensor:
    """Sum of absolute values [B, V] of the keys of all heads [B, V, H * D] (DART's pivots)."""
    return full_precision(joint_keys).abs().sum(dim=-1)


def text_relevance(tokens: Tensor, text_tokens: Tensor, text_mask: Tensor) -> Tensor:
    """Mean cosine [B, V] of each token of [B, V, d] to the text [B, T, d] (see CDPruner).

    Args:
        tokens: Hidden states [B, V, d].
        text_tokens: Embeddings of the text [B, T, d].
        text_mask: [B, T], 1 where the text is not padding.
    """
    image, text = (F.normalize(full_precision(x), dim=-1) for x in (tokens, text_tokens))
    votes = full_precision(text_mask)
    share = (votes / votes.sum(dim=-1, keepdim=True).clamp_min(1)).unsqueeze(-1)
    return (image @ (text * share).sum(dim=1, keepdim=True).mT).squeeze(-1)


def text_irrelevance(tokens: Tensor, text_tokens: Tensor, text_mask: Tensor) -> Tensor:
    """Minus ``text_relevance``: the code of CDPruner negates it, for the cosines of CLIP."""
    return -text_relevance(tokens, text_tokens, text_mask)


def linear_probe(tokens: Tensor, probe: Tensor) -> Tensor:
    """Inner product [B, V] of the hidden states [B, V, d] with a given direction [d]."""
    values = full_precision(tokens)
    return values @ probe.to(values)


def random(grid: Tensor, seed: Tensor) -> Tensor:
    """Noise in [0, 1), [B or 1, V]: fixed by the token's place and a seed, the same for all inputs.

    Places are hashed by squaring modulo the prime 2^31 - 1, which whole numbers of every runtime
    hold exactly; so a graph needs no generator and repeats itself.

    Args:
        grid: Image, row and column of every token, [V, 3] or [B, V, 3].
        seed: 0-dim.
    """
    prime = 2**31 - 1
    value = grid[..., 0] * 10007 + grid[..., 1] * 1009 + grid[..., 2] + 1
    for _ in range(4):
        value = (value * value + value * 31 + seed.long() * 7919 + 12345) % prime
    noise = value.float() / prime
    return noise if grid.dim() == 3 else noise.unsqueeze(0)


def feature_norm(tokens: Tensor) -> Tensor:
    """Euclidean norm [B, V] of the hidden states [B, V, d]."""
    return torch.linalg.vector_norm(full_precision(tokens), dim=-1)


def key_norm(keys: Tensor) -> Tensor:
    """Euclidean norm [B, V] of the attention keys [B, V, Dk] (DART ranks its pivots by a norm)."""
    return torch.linalg.vector_norm(full_precision(keys), dim=-1)


def novelty(tokens: Tensor, alive: Tensor | None = None) -> Tensor:
    """Minus the largest cosine [B, V] of each token of [B, V, d] to any other (DivPrune's start).

    Args:
        tokens: Hidden states [B, V, d].
        alive: Gates [B, V] in [0, 1]; a token that is gone resembles nobody. All ones if None.
    """
    unit = F.normalize(full_precision(tokens), dim=-1)
    cosine = unit @ unit.mT
    if alive is not None:
        cosine = cosine + alive.clamp_min(LOG_FLOOR).log().unsqueeze(-2)
    itself = torch.eye(tokens.shape[1], dtype=cosine.dtype, device=cosine.device)
    return -(cosine - 100.0 * itself).amax(dim=-1)


def grid_coverage(grid: Tensor) -> Tensor:
    """A constant preference [B or 1, V] whose best K tokens are evenly spread, whatever K is.

    Minus the threshold of ordered dithering (Bayer 1973) at the token's row r and column c: with
    bits r_b, c_b and x_b = r_b xor c_b, the threshold is sum_b 4^-(b+1) (2 x_b + r_b). Each token
    is scored by its own position alone, and sides up to 64 are told apart.

    Args:
        grid: Image, row and column of every token, [V, 3] or [B, V, 3].
    """
    row, column = grid[..., 1].float(), grid[..., 2].float()
    threshold = torch.zeros_like(row)
    for bit in range(6):
        row_bit, column_bit = (torch.floor(x / 2**bit) % 2 for x in (row, column))
        threshold = threshold + 4.0 ** -(bit + 1) * (2 * (row_bit - column_bit).abs() + row_bit)
    return -(threshold if grid.dim() == 3 else threshold.unsqueeze(0))


def standardize(score: Tensor, alive: Tensor | None = None) -> Tensor:
    """Scales a score [B, V] to mean 0 and deviation 1 over the tokens, so that scores can be mixed.

    z = (s - mean) / deviation, both weighted by ``alive``. A score whose deviation is within the
    rounding error of its values carries no information and becomes (nearly) 0, not noise.

    Args:
        score: One number per token.
        alive: Gates [B, V] in [0, 1]; all ones if None.
    """
    score = full_precision(score)
    share = torch.ones_like(score) if alive is None else alive.to(score.dtype)
    share = share / share.sum(dim=-1, keepdim=True).clamp_min(LOG_FLOOR)
    centred = score - (share * score).sum(dim=-1, keepdim=True)
    variance = (share * centred.square()).sum(dim=-1, keepdim=True)
    rounding = 1e-6 * (share * score.abs()).sum(dim=-1, keepdim=True)
    return centred * torch.rsqrt(variance + rounding.square() + 1e-30)


def combine(scores: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """The weighted sum [B, V] of standardized scores: s = sum_j w_j z_j."""
    total = scores[0] * weights[0]
    for score, weight in zip(scores[1:], weights[1:], strict=True):
        total = total + score * weight
    return total


@dataclass(frozen=True)
class Score:
    """A row of ``SCORES``.

    Attributes:
        function: Takes the features named in ``needs``, in that order.
        needs: Names of features, or of its options.
        compares: Whether tokens are compared with each other, so that ``alive`` is an argument too.
        options: Name -> default of its parameters; None where a number, and () where a list of
            numbers must be given.
        searched: Whether a search tries it among its variations; not if it costs much to observe
            or needs to be given something.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...]
    compares: bool = False
    options: Mapping[str, float | tuple[float, ...] | None] = field(default_factory=dict)
    searched: bool = True

    @property
    def features(self) -> tuple[str, ...]:
        """The needs that are features of the tokens, not options."""
        return tuple(need for need in self.needs if need not in self.options)


SCORES: Mapping[str, Score] = {
    "last_text_attention": Score(last_text_attention, ("attention_last",)),
    "text_attention": Score(text_attention, ("attention_text",)),
    "cls_attention": Score(cls_attention, ("attention_cls",)),
    "joint_cls_attention": Score(joint_cls_attention, ("attention_cls_joint",), searched=False),
    "rater_attention": Score(rater_attention, ("attention_raters",), searched=False),
    "calibrated_rater_attention": Score(
        calibrated_rater_attention, ("attention_raters_plus",), searched=False
    ),
    "mutual_attention": Score(mutual_attention, ("attention_mutual",), searched=False),
    "agreed_attention": Score(
        agreed_attention, ("attention_text_max", "attention_mutual_max"), searched=False
    ),
    "feature_norm": Score(feature_norm, ("tokens",)),
    "key_norm": Score(key_norm, ("keys",)),
    "novelty": Score(novelty, ("tokens",), compares=True),
    "key_l1_norm": Score(key_l1_norm, ("joint_keys",), searched=False),
    "text_relevance": Score(text_relevance, ("tokens", "text_tokens", "text_mask"), searched=False),
    "text_irrelevance": Score(
        text_irrelevance, ("tokens", "text_tokens", "text_mask"), searched=False
    ),
    "linear_probe": Score(linear_probe, ("tokens", "probe"), options={"probe": ()}, searched=False),
    "random": Score(random, ("grid", "seed"), options={"seed": 0}, searched=False),
    "grid_coverage": Score(grid_coverage, ("grid",)),
}
