"""Selectors that pick tokens step by step, each step depending on the picks before it.

A step is a few batched tensor operations, and the number of steps is a constant. An exported graph
has loops in place of hundreds of steps. ``at_once`` > 1 makes several picks by the same gains:
an approximation with fewer steps (the benchmarks measure how often it picks other tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from deos_fx.operator.gather import same_rows, take
from deos_fx.operator.scores import LOG_FLOOR, full_precision

__all__ = [
    "coverage",
    "determinantal",
    "distinct",
    "greedy",
    "greedy_penalty",
    "max_min",
    "max_min_ranking",
    "probe",
]

# Below this share of its variance, a token is spanned by the picks of `determinantal`.
_SPANNED = 1e-5
# A new state, and the picks of a step.
_Step: TypeAlias = tuple[tuple[Tensor, ...], Tensor]


def greedy(
    score: Tensor,
    similarity: Tensor,
    taken: Tensor | None,
    diversity: float,
    count: int,
    at_once: int = 1,
) -> Tensor:
    """Pick tokens one by one, each unlike those picked before: maximal marginal relevance (1998).

    Step t takes argmax_j s_j - delta * max_{i in S} a_ij over the tokens not yet in S.

    Args:
        score: Standardized scores [B, V].
        similarity: a, [B or 1, V, V], at least -1.
        taken: Flags [B, V] of tokens that are chosen already, or None. They are not picked again,
            and like the picks they count against tokens that resemble them.
        diversity: delta >= 0.
        count: Number of tokens to pick, at least 1.
        at_once: Picks per step.

    Returns:
        Indices [B, K], in the order of the picks.
    """
    return _pick(score, similarity, taken, count, diversity, at_once)


def greedy_penalty(
    score: Tensor, similarity: Tensor, count: int, diversity: float | Tensor
) -> Tensor:
    """Return the penalty [B, V] of the greedy rule, for each token when it is picked.

    It is max_{i in S} a_ij at that time, or after the last step for tokens that are not picked
    within ``count`` steps. Since the penalty only grows, ``score - diversity * penalty`` falls in
    the order of the picks, and its largest K are the K tokens that ``greedy`` takes.

    The picks have no gradient. Given them, the penalty is the similarity to one of them, and has
    its gradient.
    """
    with torch.no_grad():
        picks = _pick(score, similarity, None, count, diversity, 1)
        closest = _penalty(similarity, picks)
        # The pick that the penalty of each token is the similarity to.
        near = take(similarity.expand(len(picks), -1, -1), picks)
        which = (near - closest.unsqueeze(1)).abs().argmin(dim=1, keepdim=True)
        exact = near.gather(1, which) == closest.unsqueeze(1)
    value = take(similarity.expand(len(picks), -1, -1), picks).gather(1, which)
    # Before the first pick the penalty is a constant, which is like no token.
    return torch.where(exact, value, closest.unsqueeze(1)).squeeze(1)


def max_min(similarity: Tensor, taken: Tensor | None, count: int, at_once: int = 1) -> Tensor:
    """Pick, again and again, the token that is farthest from all picked before (DivPrune).

    The first pick is the token whose nearest neighbour is farthest (the most novel one), unless
    tokens are taken already; every other pick is argmin_j max_{i in S} a_ij.

    Args:
        similarity: a, [B or 1, V, V].
        taken: Flags [B, V] of tokens that are chosen already, or None.
        count: Number of tokens to pick.
        at_once: Picks per step, after the first.

    Returns:
        Indices [B, K], in the order of the picks.
    """
    # With tokens taken, the first step is like all others: similarity alone decides.
    first = _isolation(similarity) if taken is None else None
    score = torch.zeros_like(similarity[..., 0] if taken is None else taken)
    return _pick(score, similarity, taken, count, 1.0, at_once, first=first)


def max_min_ranking(similarity: Tensor, count: int, alive: Tensor) -> Tensor:
    """Return a ranking [B, V] that falls in the order of the picks of ``max_min``.

    It is -max_{i in S} a_ij at the time when a token is picked, or after the last step for tokens
    that are not picked within ``count`` steps. So its largest K are the K tokens that ``max_min``
    takes. No gradient flows through it.

    Args:
        similarity: a, [B or 1, V, V].
        count: Number of steps.
        alive: Gates [B, V] in [0, 1]; a token that is gone is not picked or compared with.
    """
    with torch.no_grad():
        # A closed gate is about -30: too low to be picked, or to be a nearest neighbour.
        gate = alive.clamp_min(LOG_FLOOR).log()
        first = _isolation(similarity + gate.unsqueeze(1)) + gate
        return -_penalty(similarity, _pick(gate, similarity, None, count, 1.0, 1, first=first))


def _isolation(similarity: Tensor) -> Tensor:
    """Return minus the similarity [B or 1, V] of each token to its nearest other token."""
    itself = torch.eye(similarity.shape[-1], dtype=similarity.dtype, device=similarity.device)
    return -(similarity - 100.0 * itself).amax(dim=-1)


def _pick(
    score: Tensor,
    similarity: Tensor,
    taken: Tensor | None,
    count: int,
    diversity: float | Tensor,
    at_once: int,
    *,
    first: Tensor | None = None,
) -> Tensor:
    """Return the picks [B, K].

    The gain s_j - delta max_{i in S} a_ij is the least of s_j - delta a_ij over S, to the last bit,
    so a step carries nothing but the gains.

    ``first``, if given, are the gains at the first step, when nothing is taken.
    """
    score, similarity = same_rows(full_precision(score), similarity)
    lowest = torch.finfo(score.dtype).min

    def beside(nearest: Tensor) -> Tensor:
        """Return the gains of tokens that are as near as that to a pick."""
        return score - diversity * nearest.to(score.dtype)

    # No similarity is below -1, so without any pick that is the penalty.
    gain = beside(torch.full_like(score, -1.0))
    if taken is not None:
        # Tokens that are taken count like picks.
        resembles = torch.where(taken.unsqueeze(-1) > 0, similarity, -1.0)
        gain = torch.minimum(gain, beside(resembles.amax(dim=1)))
        gain = torch.where(taken > 0, lowest, gain)

    def without(gain: Tensor, pick: Tensor) -> Tensor:
        left = torch.minimum(gain, beside(take(similarity, pick).amax(dim=1)))
        # Nothing is left of a pick itself: it is not picked again.
        return left.scatter(1, pick, lowest)

    def step(number: int, gain: Tensor) -> _Step:
        pick = gain.argmax(-1, keepdim=True) if number == 1 else gain.topk(number).indices
        return (without(gain, pick),), pick

    # The first pick is always a single one: until then, no penalty tells tokens apart.
    pick = (gain if first is None else first).argmax(-1, keepdim=True)
    state: tuple[Tensor, ...] = (without(gain, pick),)
    picks = [pick]
    times, rest = divmod(count - 1, at_once)
    for number, steps in ((at_once, times), (rest, min(rest, 1))):
        state, found = _repeated(partial(step, number), state, steps)
        picks += found
    return torch.cat(picks, dim=-1)


def _penalty(similarity: Tensor, picks: Tensor) -> Tensor:
    """Return max_{i in S} a_ij [B, V], at least -1, at the time when token j was picked.

    For a token that was not picked, it is that after the last step.

    Args:
        similarity: a, [B or 1, V, V].
        picks: [B, K], in order.
    """
    near = full_precision(take(similarity.expand(len(picks), -1, -1), picks))
    tokens = torch.arange(similarity.shape[-1], device=picks.device)
    later = (picks.unsqueeze(-1) == tokens).cumsum(dim=1) == 0
    return torch.where(later, near, -1.0).amax(dim=1).clamp_min(-1.0)


def determinantal(score: Tensor, similarity: Tensor, taken: Tensor | None, count: int) -> Tensor:
    """Pick by greedy MAP inference of a determinantal point process (CDPruner).

    This is fast greedy MAP (Chen et al., NeurIPS 2018). The kernel is L_ij = r_i a_ij r_j with the
    relevance r = (s - min + 1e-6) / (max - min). Each step takes the token j with the largest
    variance that is left, d_j, and adds a row to the Cholesky factor of the picks,
    c_t = (L_j: - sum_{s < t} c_sj c_s) / sqrt(d_j), whose squares come off d. Where the picks span
    all other tokens, as happens when more are kept than the similarity has dimensions, relevance
    alone decides.

    Args:
        score: [B, V], the relevance before scaling.
        similarity: a, [B or 1, V, V], positive semidefinite (with ones on the diagonal).
        taken: Flags [B, V] of tokens that are chosen already, or None; they are not picked again.
        count: Number of tokens to pick.

    Returns:
        Indices [B, K], in the order of the picks.
    """
    score, kernel = same_rows(full_precision(score), full_precision(similarity))
    relevance = _relevance(score)
    free = torch.ones_like(score) if taken is None else 1 - taken

    # Conditioning commutes with scaling by relevance, so the kernel stays a; relevance enters only
    # in the gain.
    def step(free: Tensor, variance: Tensor, factor: Tensor) -> _Step:
        # The variance of a token that the picks span is rounding error. It comes after all others.
        gain = torch.where(variance > _SPANNED, relevance.square() * variance, relevance - 2)
        gain = torch.where(free > 0, gain, -torch.inf)
        pick = gain.argmax(dim=-1, keepdim=True)
        free = free.scatter(1, pick, 0.0)
        # For the same reason, such a pick changes nothing.
        remains = take(variance, pick)
        scale = torch.where(remains > _SPANNED, remains.clamp_min(_SPANNED).rsqrt(), 0.0)
        # What earlier picks say of this one, [B, 1, K]
        known = factor.gather(2, pick.unsqueeze(1).expand(-1, count, -1)).mT
        row = (take(kernel, pick) - known @ factor) * scale.unsqueeze(-1)
        # Rows that are not there yet are zeros. Their order makes no difference.
        factor = torch.cat([factor[:, 1:], row], dim=1)
        return (free, variance - row.squeeze(1).square(), factor), pick

    # A copy of its own: a loop would not keep the strides of a diagonal.
    variance = kernel.diagonal(dim1=-2, dim2=-1).clone(memory_format=torch.contiguous_format)
    factor = kernel.new_zeros(kernel.shape[0], count, kernel.shape[-1])
    _, picks = _repeated(step, (free, variance, factor), count)
    return torch.cat(picks, dim=-1)


def coverage(
    score: Tensor, similarity: Tensor, taken: Tensor | None, count: int, power: float
) -> Tensor:
    """Pick tokens one by one that make the others resemble some pick: facility location (SCOPE).

    With c_j = max_{i in S} a_ij, at least 0, the coverage of token j by the picks so far, a step
    takes

        argmax_i r_i^power sum_j max(0, a_ij - c_j)

    over the tokens not yet in S, where r = (s - min + 1e-6) / (max - min) is the relevance. With
    power 0 relevance plays no part. Greedy steps reach at least 63 % of the largest coverage.

    Args:
        score: [B, V], the relevance before scaling.
        similarity: a, [B or 1, V, V].
        taken: Flags [B, V] of tokens that are chosen already, or None; they are not picked again,
            and cover others like picks.
        count: Number of tokens to pick.
        power: How much relevance counts.

    Returns:
        Indices [B, K], in the order of the picks.
    """
    score, similarity = same_rows(full_precision(score), full_precision(similarity))
    weight = _relevance(score) ** power
    free = torch.ones_like(score) if taken is None else 1 - taken
    covered = torch.zeros_like(score)
    if taken is not None:
        resembles = torch.where(taken.unsqueeze(-1) > 0, similarity, 0.0)
        covered = torch.maximum(covered, resembles.amax(dim=1))

    def step(free: Tensor, covered: Tensor) -> _Step:
        more = (similarity - covered.unsqueeze(1)).clamp_min(0).sum(dim=-1)
        gain = torch.where(free > 0, weight * more, -1.0)
        pick = gain.argmax(dim=-1, keepdim=True)
        free = free.scatter(1, pick, 0.0)
        return (free, torch.maximum(covered, take(similarity, pick).squeeze(1))), pick

    _, picks = _repeated(step, (free, covered), count)
    return torch.cat(picks, dim=-1)


def _repeated(
    step: Callable[..., _Step], state: tuple[Tensor, ...], times: int
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Take a step again and again.

    Args:
        step: Returns a new state and picks [B, k], from the parts of a state.
        state: The state before the first step.
        times: How many steps to take.

    Returns:
        The state after the last step, and picks [B, k'] in order.
    """
    if times > 1 and torch.compiler.is_exporting():
        # Case: an export. torch's scan becomes one node with the step as a graph of its own.
        from torch._higher_order_ops import scan

        places = torch.arange(times, device=state[0].device)
        state, picks = scan(lambda held, _: step(*held), state, places)
        # [times, B, k] -> [B, times k]
        return state, [picks.movedim(0, 1).flatten(1)]
    found = []
    for _ in range(times):
        state, pick = step(*state)
        found.append(pick)
    return state, found


def _relevance(score: Tensor) -> Tensor:
    """Scale scores [B, V] to (0, 1]: (s - min + 1e-6) / (max - min)."""
    low, high = score.amin(dim=-1, keepdim=True), score.amax(dim=-1, keepdim=True)
    return (score - low + 1e-6) / (high - low).clamp_min(1e-6)


def distinct(
    score: Tensor,
    similarity: Tensor,
    taken: Tensor | None,
    already: int,
    count: int,
    per_round: int,
) -> Tensor:
    """Drop near duplicates in rounds until ``count`` tokens are left (VisPruner).

    The list starts in the order of falling scores. A round splits it into even and odd places and
    drops the ``per_round`` even tokens that are most similar to some odd one. The remaining even
    tokens, most similar first, then come before the odd ones.

    Args:
        score: [B, V].
        similarity: a, [B or 1, V, V].
        taken: Flags [B, V] of tokens that are chosen already, or None; they are not on the list.
        already: Number of tokens that are chosen already.
        count: Number of tokens to leave.
        per_round: Number of tokens that a round drops.

    Returns:
        Indices [B, K], in the order of the last list.
    """
    score, similarity = same_rows(full_precision(score), similarity)
    if taken is not None:
        score = torch.where(taken > 0, torch.finfo(score.dtype).min, score)
    # Taken tokens have the lowest scores, so they are not among the best V - already.
    left = score.topk(score.shape[-1] - already).indices
    if torch.compiler.is_exporting():
        # Case: an export. Whole rounds become loops, of which each serves until half are left.
        while (rounds := _whole_rounds(left.shape[1], count, per_round)) > 1:
            left = _distinct_rounds(left, similarity, per_round, rounds)
    while left.shape[1] > count:
        even, odd = left[:, ::2], left[:, 1::2]
        # [B, odd, even]: `take` gathers rows.
        between = take(take(similarity, even).mT, odd)
        most = between.amax(dim=1)
        # The last round may drop fewer; a round drops even tokens only.
        drop = min(per_round, left.shape[1] - count, even.shape[1])
        order = most.topk(even.shape[1]).indices[:, drop:]
        left = torch.cat([take(even, order), odd], dim=-1)
    return left


def _whole_rounds(length: int, count: int, per_round: int) -> int:
    """Count the rounds of `distinct` that drop all they may, until half of a list is left.

    Args:
        length: Length of the list.
        count: Tokens to leave.
        per_round: Number of tokens that a round drops.
    """
    # A round needs as many even places, and half a list of any length is left by the last one.
    least = max(count, length // 2, 2 * per_round)
    return max(length - least, 0) // per_round


def _distinct_rounds(left: Tensor, similarity: Tensor, per_round: int, rounds: int) -> Tensor:
    """Take rounds of `distinct` in tensors of one shape, as a loop needs them.

    Args:
        left: The list [B, N].
        similarity: a, [B, V, V].
        per_round: Number of tokens that a round drops.
        rounds: How many rounds.

    Returns:
        The list [B, N - rounds x per_round].
    """
    from torch._higher_order_ops import scan

    places = torch.arange(left.shape[1], device=left.device)
    lowest = torch.finfo(similarity.dtype).min

    def step(held: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        # The list is in front, and what was dropped behind it.
        even, odd = held[:, ::2], held[:, 1::2]
        between = take(take(similarity, even).mT, odd)
        between = torch.where(places[1::2, None] < length, between, lowest)
        most = torch.where(places[::2] < length, between.amax(dim=1), lowest)
        ranked = take(even, most.topk(even.shape[1]).indices)
        # Even tokens that stay, odd ones, and anything.
        stay = (length + 1) // 2 - per_round
        source = torch.where(places < stay, places + per_round, places - stay + even.shape[1])
        source = source.clamp(max=held.shape[1] - 1).expand_as(held)
        return take(torch.cat([ranked, odd], dim=1), source), length.clone()

    lengths = left.shape[1] - per_round * torch.arange(rounds, device=left.device)
    # A part of a longer list has the strides of that one, which a loop would not keep.
    last, _ = scan(step, left.clone(memory_format=torch.contiguous_format), lengths)
    return last[:, : left.shape[1] - rounds * per_round]


def probe(
    score: Tensor,
    tokens: Tensor,
    text_score: Tensor,
    text: Tensor,
    taken: Tensor | None,
    count: int,
    image_pivots: int,
    text_pivots: int,
) -> Tensor:
    """Keep the tokens that are least similar to a few pivot tokens (DART).

    The pivots are the best visual tokens by score, which are picked first, and the best text
    tokens, which are only compared with. One after the other, each pivot picks an equal share of
    the remaining places (the first pivots one more, if shares cannot be equal): the free tokens
    with the smallest cosine to it.

    Args:
        score: [B, V].
        tokens: The vectors to compare, [B, V, d].
        text_score: [B, T]; the lowest finite number at tokens that must not become pivots.
        text: [B, T, d].
        taken: Flags [B, V] of tokens that are chosen already, or None.
        count: K, at least ``image_pivots``.
        image_pivots: Number of pivots among the visual tokens.
        text_pivots: Number of pivots among the text tokens; a row with less text has fewer.

    Returns:
        Indices [B, K]: the visual pivots in the order of the image, then the picks of each pivot.
    """
    score, tokens = same_rows(full_precision(score), tokens)
    free = torch.ones_like(score) if taken is None else 1 - taken
    # The pivots, in the order of the image and of the text.
    ranked = torch.where(free > 0, score, torch.finfo(score.dtype).min)
    first = ranked.topk(min(image_pivots, count), dim=-1).indices.sort(dim=-1).values
    of_text = text_pivots
    if not torch.compiler.is_exporting():
        # The length of a text is open in exported graphs, which refuse prompts with less of it.
        of_text = min(text_pivots, text_score.shape[-1])
    in_text = text_score.topk(of_text, dim=-1).indices.sort(dim=-1).values
    vectors = torch.cat([take(tokens, first), take(text, in_text)], dim=1)
    pivots, unit = (F.normalize(full_precision(x), dim=-1) for x in (vectors, tokens))
    cosine = pivots @ unit.mT
    free = free - F.one_hot(first, score.shape[-1]).to(free.dtype).sum(dim=1)
    # How many tokens each pivot picks [B, P], as rows may have unequal numbers of text pivots: the
    # first `more` pivots of a row pick one token more.
    of_row = take(text_score, in_text) > torch.finfo(text_score.dtype).min
    pivot = torch.cat([torch.ones_like(first, dtype=torch.bool), of_row], dim=1).long()
    pivots_of_row = pivot.sum(dim=1, keepdim=True)
    rest = torch.full_like(pivots_of_row, count - first.shape[1])
    more = pivot.cumsum(dim=1) <= rest % pivots_of_row
    shares = pivot * (rest // pivots_of_row + more)
    # The place of each token among the picks, behind all of them if it is not picked.
    place = torch.full_like(score, score.shape[-1], dtype=torch.long)
    done = torch.zeros_like(pivots_of_row)
    for i, share in enumerate(shares.split(1, dim=1)):
        unlike = torch.where(free > 0, -cosine[:, i], torch.finfo(score.dtype).min)
        rank = unlike.argsort(dim=-1, descending=True).argsort(dim=-1)
        place = torch.where(rank < share, done + rank, place)
        free = torch.where(rank < share, 0, free)
        done = done + share
    picks = place.topk(count - first.shape[1], dim=-1, largest=False).indices
    return torch.cat([first, picks], dim=-1)
