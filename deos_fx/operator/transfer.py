"""What happens to the content and the mass of dropped tokens.

The mass of a token is how many original tokens it stands for. Masses are kept in single precision.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from deos_fx.operator.assign import dropped
from deos_fx.operator.scores import full_precision
from deos_fx.operator.select import take

__all__ = ["importance", "merge", "merged_mass", "residual", "reweight"]


def importance(score: Tensor) -> Tensor:
    """Weights u [B, V] in (0, 1) from standardized scores: u = sigmoid(s).

    A z-score is negative for most dropped tokens, so its positive part would leave nothing to
    transfer; the logistic curve keeps the order and gives an average token half the weight.
    """
    return score.sigmoid()


def merge(
    tokens: Tensor,
    kept: Tensor,
    assignment: Tensor,
    mass: Tensor | None = None,
    weight: Tensor | None = None,
    gain: float = 1.0,
    exponent: float = 1.0,
) -> Tensor:
    """Adds the dropped tokens to the kept ones they are assigned to.

    With c_ij = g P_ij u_j m_j and the total M_i = m_i + sum_j c_ij,

        y_i = (m_i x_i + sum_j c_ij x_j) / m_i * (m_i / M_i)^n

    so n = 1 is the mean weighted by mass and n = 0 the plain sum of PruMerge. A kept token that
    receives nothing is unchanged whatever n is. The weights are computed in single precision and
    rounded once, so half precision cannot overflow on a sum of masses.

    Args:
        tokens: Hidden states x [B, V, d].
        kept: Indices [B, K].
        assignment: P [B, K, V].
        mass: m [B, V]; ones if None.
        weight: u [B, V]; ones if None.
        gain: g.
        exponent: n.

    Returns:
        y [B, K, d], in the precision of the tokens.
    """
    content = gain * assignment
    if mass is not None:
        content = content * mass.unsqueeze(1)
    if weight is not None:
        content = content * weight.unsqueeze(1)
    own = 1.0 if mass is None else take(mass, kept)
    total = own + content.sum(dim=-1)
    share = (own / total) ** exponent
    moved = content * (share / own).unsqueeze(-1)
    stays = take(tokens, kept) * share.unsqueeze(-1).to(tokens.dtype)
    return stays + moved.to(tokens.dtype) @ tokens


def merged_mass(
    kept: Tensor, assignment: Tensor, mass: Tensor | None = None, gain: float = 1.0
) -> Tensor:
    """Masses [B, K] after merging: m_i + g sum_j P_ij m_j. With g = 1 their sum is conserved."""
    if mass is None:
        return 1.0 + gain * assignment.sum(dim=-1)
    return take(mass, kept) + gain * (assignment * mass.unsqueeze(1)).sum(dim=-1)


def residual(
    score: Tensor, kept: Tensor, assignment: Tensor | None = None, gain: float = 0.0
) -> Tensor:
    """Sends what is not transferred to the kept token with the lowest score.

    P' = g P + (1 - g) e_r 1^T over the dropped tokens, where r is that token's slot: with g = 0 it
    becomes the mean of everything dropped and itself (the fused token of EViT, the extra token of
    PruMerge), with g = 1 nothing is left for it. Merge with P' and gain 1.

    Args:
        score: [B, V].
        kept: Indices [B, K].
        assignment: P [B, K, V]; may be None if ``gain`` is 0.
        gain: g.
    """
    last = take(full_precision(score), kept).argmin(dim=-1)
    slot = F.one_hot(last, kept.shape[1]).to(score.dtype).unsqueeze(-1)
    rest = slot * dropped(kept, score.shape[-1]).unsqueeze(1)
    return rest if assignment is None else gain * assignment + (1 - gain) * rest


def reweight(tokens: Tensor, score: Tensor, kept: Tensor, rho: float) -> Tensor:
    """Scales kept tokens [B, K, d] by their standardized scores [B, V]: y_i (1 + rho s_i)."""
    factor = 1 + rho * take(score, kept)
    return tokens * factor.unsqueeze(-1).to(tokens.dtype)
