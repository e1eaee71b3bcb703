"""Transfer of the content and the mass of dropped tokens to kept ones.

The mass of a token is the number of original tokens it stands for, kept in single precision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deos_fx.operator.gather import chosen, same_rows, take

__all__ = [
    "importance",
    "merge",
    "merged_mass",
    "own_part",
    "rest",
    "rest_beside",
    "reweight",
    "slot_of",
    "with_class",
]


def importance(score: Tensor, sharpness: float | Tensor = 1.0) -> Tensor:
    """Return weights u [B, V] in (0, 1) from standardized scores: u = sigmoid(kappa s).

    A z-score is negative for most dropped tokens, so its positive part would leave nothing to
    transfer; the logistic curve keeps the order and gives an average token half the weight.

    Args:
        score: s, [B, V].
        sharpness: kappa; the larger, the less a token below the average gives.
    """
    # Case: 1, which needs no multiplication.
    plain = isinstance(sharpness, float) and sharpness == 1
    return (score if plain else sharpness * score).sigmoid()


def merge(
    tokens: Tensor,
    kept: Tensor,
    sources: Tensor | None,
    assignment: Tensor,
    own: Tensor | None = None,
    mass: Tensor | None = None,
    weight: Tensor | None = None,
    gain: float = 1.0,
    exponent: float = 1.0,
    average: bool = False,
) -> Tensor:
    """Add source tokens to the kept ones they are assigned to.

    With c_ij = g P_ij u_j m_j, the own part o_i = m_i (times its factor in ``own``) and the total
    M_i = o_i + sum_j c_ij,

        y_i = (o_i x_i + sum_j c_ij x_j) / m_i * (m_i / M_i)^n

    so n = 1 is the mean weighted by mass and n = 0 the plain sum of PruMerge. Without ``own``, a
    kept token that receives nothing is unchanged for every n, and so is one with M_i = 0. The
    weights are computed in single precision and rounded once, so half precision cannot overflow on
    a sum of masses.

    Args:
        tokens: Hidden states x [B, V, d].
        kept: Indices [B, K]; the receivers are the last R of them.
        sources: Indices [B, S] of the tokens that move; all tokens if None.
        assignment: P [B, R, S].
        own: Factors [B, R] of the own parts; ones if None.
        mass: m [B, V]; ones if None.
        weight: u [B, V]; ones if None.
        gain: g.
        exponent: n.
        average: Whether the received tokens are averaged first; at g = 1 their mean counts as
            much as the receiving token itself (VisionZip).

    Returns:
        y [B, K, d], in the precision of the tokens.
    """
    if not _moves(assignment):
        # Case: every token is kept, so none moves. ONNX runtimes refuse products of empty matrices.
        return _alone(tokens, kept, own, exponent)
    # 1. c_ij. With `average`, a receiver takes in a mean, weighted like the receiver itself.
    receivers = kept[:, kept.shape[1] - assignment.shape[1] :]
    base = 1.0 if mass is None else take(mass, receivers)
    content = _content(assignment, sources, mass, weight)
    if average:
        content = content / content.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        content = content if mass is None else content * take(mass, receivers).unsqueeze(-1)
    content = content if gain == 1 else gain * content
    # 2. The total M_i, and the factor (m_i / M_i)^n / m_i of what moves.
    received_part = content.sum(dim=-1)
    if own is not None:
        # Case: weights that are all 0, as of tokens that no text attends to. The token stays.
        own = own.masked_fill(base * own + received_part == 0, 1.0)
    part = base if own is None else base * own
    total = part + received_part
    share = base / total
    share = share if exponent == 1 else share**exponent
    stays = share if own is None else share * own
    # 3. The sum. The weights are rounded to the precision of the tokens once, here.
    staying, moving = _parted(tokens, kept, sources)
    moved = (content * (share / base).unsqueeze(-1)).to(tokens.dtype) @ moving
    # Kept tokens before the receivers stay as they are.
    alone = kept.shape[1] - assignment.shape[1]
    factors = stays.unsqueeze(-1).to(tokens.dtype)
    received = torch.addcmul(moved, staying[:, alone:], factors)
    return torch.cat([staying[:, :alone], received], dim=1) if alone else received


def _moves(assignment: Tensor) -> bool:
    """Return whether there is a token that moves, in an assignment [B, R, S]."""
    number = assignment.shape[-1]
    # Symbolic in an elastic export, in which every reduction drops a token.
    return not isinstance(number, int) or number > 0


def _alone(tokens: Tensor, kept: Tensor, own: Tensor | None, exponent: float) -> Tensor:
    """Return the kept tokens [B, K, d] where none moves: y_i = (o_i / m_i)^(1 - n) x_i."""
    staying = take(tokens, kept)
    if own is None or exponent == 1:
        return staying
    # Kept tokens before the receivers stay as they are.
    own = own.masked_fill(own == 0, 1.0)
    factors = F.pad(own ** (1 - exponent), (kept.shape[1] - own.shape[1], 0), value=1.0)
    return staying * factors.unsqueeze(-1).to(tokens.dtype)


def _parted(tokens: Tensor, kept: Tensor, sources: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the kept tokens [B, K, d] and those that move [B, S, d].

    One gather serves both: the tokens may be a slice of a tensor (patches without their class
    token), and every gather from a slice copies the slice first.
    """
    if sources is None:
        return take(tokens, kept), tokens
    every = take(tokens, torch.cat(same_rows(kept, sources), dim=1))
    return every[:, : kept.shape[1]], every[:, kept.shape[1] :]


def _content(
    assignment: Tensor, sources: Tensor | None, mass: Tensor | None, weight: Tensor | None
) -> Tensor:
    """Return c [B, R, S] before the gain: P_ij u_j m_j."""
    content = assignment
    for factor in (mass, weight):
        if factor is not None:
            part = factor if sources is None else take(factor, sources)
            content = content * part.unsqueeze(1)
    return content


def merged_mass(
    kept: Tensor,
    sources: Tensor | None,
    assignment: Tensor,
    mass: Tensor | None = None,
    gain: float = 1.0,
) -> Tensor:
    """Return masses [B, K] after merging: m_i + g sum_j P_ij m_j.

    If g = 1 and the columns of P sum to 1, the sum of the masses is conserved.

    Args:
        kept: Indices [B, K]; the receivers are the last R of them.
        sources: Indices [B, S] of the tokens that move; all tokens if None.
        assignment: P [B, R, S].
        mass: m [B, V]; ones if None.
        gain: g.
    """
    if not _moves(assignment):
        # Case: every token is kept, so none moves.
        return torch.ones_like(kept, dtype=torch.float32) if mass is None else take(mass, kept)
    received = _content(assignment, sources, mass, None).sum(dim=-1)
    received = received if gain == 1 else gain * received
    # Kept tokens before the receivers receive nothing.
    alone = kept.shape[1] - received.shape[1]
    received = F.pad(received, (alone, 0)) if alone else received
    return received + (1.0 if mass is None else take(mass, kept))


def slot_of(receivers: Tensor, token: Tensor) -> Tensor:
    """Return flags [B, R] that are 1 at the receiver that is the given token [B, 1]."""
    return (receivers == token).float()


def own_part(slot: Tensor, receivers: Tensor, weight: Tensor) -> Tensor:
    """Return factors [B, R] of the own parts: the residual token counts as those it takes in.

    Args:
        slot: [B, R], 1 at the residual token.
        receivers: Indices [B, R].
        weight: u [B, V].
    """
    return torch.where(slot > 0, take(weight, receivers), 1.0)


def rest(assignment: Tensor | None, slot: Tensor, sources: Tensor, gain: float) -> Tensor:
    """Send the content that is not transferred otherwise to the residual token.

    P' = g P + (1 - g) e_r 1^T: with g = 0 the residual token r takes in all dropped tokens (the
    fused token of EViT), with g = 1 nothing is left for it. Merge with P' and gain 1.

    Args:
        assignment: P [B, R, S]; may be None if ``gain`` is 0.
        slot: e_r, [B, R].
        sources: Indices [B, S]; only their shape is read.
        gain: g.
    """
    everything = slot.unsqueeze(-1).expand(-1, -1, sources.shape[1])
    return everything if assignment is None else gain * assignment + (1 - gain) * everything


def rest_beside(assignment: Tensor, slot: Tensor, kept: Tensor, gain: float) -> Tensor:
    """Give the residual token every dropped token whole, even if others take some too (PruMerge).

    Args:
        assignment: P [B, R, V].
        slot: [B, R], 1 at the residual token.
        kept: Indices [B, K].
        gain: g of the parts that the others take. Merge with the result and gain 1.
    """
    lost = 1 - chosen(kept, assignment.mT)
    return torch.where(slot.unsqueeze(-1) > 0, lost.unsqueeze(1), gain * assignment)


def reweight(tokens: Tensor, score: Tensor, kept: Tensor, rho: float) -> Tensor:
    """Scale kept tokens [B, K, d] by their standardized scores [B, V]: y_i (1 + rho s_i)."""
    factor = 1 + rho * take(score, kept)
    return tokens * factor.unsqueeze(-1).to(tokens.dtype)


def with_class(tokens: Tensor, class_token: Tensor) -> Tensor:
    """Put a copy of the CLS token [B, 1, d] in front of the tokens [B, K, d] (VisionZip)."""
    return torch.cat([class_token.to(tokens.dtype), tokens], dim=1)
