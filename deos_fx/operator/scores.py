"""Scores, which say how much each visual token matters: one small function for each.

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
"""Gates are clamped to this before the logarithm, so a closed gate becomes a bias of about -30."""


def full_precision(x: Tensor) -> Tensor:
    """Return ``x`` in single precision, or unchanged if it is in double precision."""
    return x if x.dtype == torch.float64 else x.float()


def last_text_attention(attention_last: Tensor) -> Tensor:
    """Return attention [B, V] from the last text token to visual ones (FastV, PyramidDrop)."""
    return full_precision(attention_last)


def text_attention(attention_text: Tensor) -> Tensor:
    """Return the mean attention [B, V] that all text tokens pay to each visual token."""
    return full_precision(attention_text)


def cls_attention(attention_cls: Tensor) -> Tensor:
    """Return attention [B, V] from the CLS token of the vision tower (FasterVLM, VisionZip)."""
    return full_precision(attention_cls)


def joint_cls_attention(attention_cls_joint: Tensor) -> Tensor:
    """Return attention [B, V] from the CLS token at full width, heads not split (PruMerge)."""
    return full_precision(attention_cls_joint)


def rater_attention(attention_raters: Tensor) -> Tensor:
    """Return mean attention [B, V] from the text that the image calls up (SparseVLM's raters)."""
    return full_precision(attention_raters)


def calibrated_rater_attention(attention_raters_plus: Tensor) -> Tensor:
    """Return attention [B, V] from the raters, corrected for rotary positions (SparseVLM+).

    Only the heads count that attend most to the image. Their attention is divided by what rotary
    positions alone would give.
    """
    return full_precision(attention_raters_plus)


def mutual_attention(attention_mutual: Tensor) -> Tensor:
    """Return the mean attention [B, V] that each token receives.

    In the vision tower it comes from all tokens (HiPrune), in the decoder from the visual ones.
    """
    return full_precision(attention_mutual)


def agreed_attention(attention_text_max: Tensor, attention_mutual_max: Tensor) -> Tensor:
    """Return the product [B, V] of attention from the text and from the image (FitPrune).

    Each factor is that of the head that attends most. FitPrune drops tokens that neither text nor
    image attends to.
    """
    return full_precision(attention_text_max) * full_precision(attention_mutual_max)


def key_l1_norm(joint_keys: Tensor) -> Tensor:
    """Return the L1 norm [B, V] of the keys of all heads [B, V, H * D] (DART's pivots)."""
    return full_precision(joint_keys).abs().sum(dim=-1)


def text_relevance(tokens: Tensor, text_tokens: Tensor, text_mask: Tensor) -> Tensor:
    """Return the mean cosine [B, V] of each token of [B, V, d] to the text [B, T, d] (CDPruner).

    Args:
        tokens: Hidden states [B, V, d].
        text_tokens: Embeddings of the text [B, T, d].
        text_mask: [B, T], 1 at the text tokens that count, 0 at the others and at padding.
    """
    image, text = (F.normalize(full_precision(x), dim=-1) for x in (tokens, text_tokens))
    votes = full_precision(text_mask)
    # The mean over the text is taken first: one product with each token instead of T.
    share = (votes / votes.sum(dim=-1, keepdim=True).clamp_min(1)).unsqueeze(-1)
    return (image @ (text * share).sum(dim=1, keepdim=True).mT).squeeze(-1)


def text_irrelevance(tokens: Tensor, text_tokens: Tensor, text_mask: Tensor) -> Tensor:
    """Return minus ``text_relevance``: CDPruner's code negates it, for the cosines of CLIP."""
    return -text_relevance(tokens, text_tokens, text_mask)


def random(grid: Tensor, seed: Tensor) -> Tensor:
    """Return noise in [0, 1), [B or 1, V], that depends only on a token's place and a seed.

    Places are hashed by squaring modulo the prime 2^31 - 1, which the integers of every runtime
    represent exactly. So a graph needs no generator and is reproducible.

    Args:
        grid: Image, row and column of every token, [V, 3] or [B, V, 3].
        seed: 0-dim.
    """
    prime = 2**31 - 1
    value = grid[..., 0] * 10007 + grid[..., 1] * 1009 + grid[..., 2] + 1
    for _ in range(4):
        # Below 2^63 at every step, since value < 2^31.
        value = (value * value + value * 31 + seed.long() * 7919 + 12345) % prime
    noise = value.float() / prime
    return noise if grid.dim() == 3 else noise.unsqueeze(0)


def feature_norm(tokens: Tensor) -> Tensor:
    """Return the Euclidean norm [B, V] of the hidden states [B, V, d]."""
    return torch.linalg.vector_norm(full_precision(tokens), dim=-1)


def key_norm(keys: Tensor) -> Tensor:
    """Return the L2 norm [B, V] of the keys [B, V, Dk] (DART ranks its pivots by a norm)."""
    return torch.linalg.vector_norm(full_precision(keys), dim=-1)


def novelty(tokens: Tensor, alive: Tensor | None = None) -> Tensor:
    """Return minus the largest cosine [B, V] of each token to any other (DivPrune's start).

    Args:
        tokens: Hidden states [B, V, d].
        alive: Gates [B, V] in [0, 1]; a token that is gone is not compared with. Ones if None.
    """
    unit = F.normalize(full_precision(tokens), dim=-1)
    cosine = unit @ unit.mT
    if alive is not None:
        # A closed gate lowers the cosine to that token by about 30.
        cosine = cosine + alive.clamp_min(LOG_FLOOR).log().unsqueeze(-2)
    # A token is not compared with itself.
    itself = torch.eye(tokens.shape[1], dtype=cosine.dtype, device=cosine.device)
    return -(cosine - 100.0 * itself).amax(dim=-1)


def grid_coverage(grid: Tensor) -> Tensor:
    """Return a constant preference [B or 1, V] whose best K tokens are evenly spread for every K.

    It is minus the threshold of ordered dithering (Bayer 1973) at the token's row r and column c:
    with bits r_b, c_b and x_b = r_b xor c_b, the threshold is sum_b 4^-(b+1) (2 x_b + r_b). The
    score of a token depends on its own position only; positions on sides up to 64 are distinct.

    Args:
        grid: Image, row and column of every token, [V, 3] or [B, V, 3].
    """
    row, column = grid[..., 1].float(), grid[..., 2].float()
    threshold = torch.zeros_like(row)
    for bit in range(6):
        # Bits as floats: their exclusive or is the distance between them.
        row_bit, column_bit = (torch.floor(x / 2**bit) % 2 for x in (row, column))
        threshold = threshold + 4.0 ** -(bit + 1) * (2 * (row_bit - column_bit).abs() + row_bit)
    return -(threshold if grid.dim() == 3 else threshold.unsqueeze(0))


def standardize(score: Tensor, alive: Tensor | None = None) -> Tensor:
    """Scale a score [B, V] to mean 0 and deviation 1 over the tokens, so that scores can be mixed.

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
    # About the rounding error of float32, relative to the values.
    rounding = 1e-6 * (share * score.abs()).sum(dim=-1, keepdim=True)
    return centred * torch.rsqrt(variance + rounding.square() + 1e-20)


def combine(scores: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """Return the weighted sum [B, V] of standardized scores: s = sum_j w_j z_j."""
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
        compares: Whether it compares tokens with each other and so also takes ``alive``.
        options: Defaults of its parameters by name; None where a number, and () where a list of
            numbers must be given.
        searched: Whether a search tries it among its variations; false if it is costly to observe
            or needs an option that must be given.
        signed: Whether it may be negative; it is then no weight of a mean.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...]
    compares: bool = False
    options: Mapping[str, float | tuple[float, ...] | None] = field(default_factory=dict)
    searched: bool = True
    signed: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """Return the names in ``needs`` that are features of the tokens, not options."""
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
    "novelty": Score(novelty, ("tokens",), compares=True, signed=True),
    "key_l1_norm": Score(key_l1_norm, ("joint_keys",), searched=False),
    "text_relevance": Score(
        text_relevance, ("tokens", "text_tokens", "text_mask"), searched=False, signed=True
    ),
    "text_irrelevance": Score(
        text_irrelevance, ("tokens", "text_tokens", "text_mask"), searched=False, signed=True
    ),
    "random": Score(random, ("grid", "seed"), options={"seed": 0}, searched=False),
    "grid_coverage": Score(grid_coverage, ("grid",), signed=True),
}
