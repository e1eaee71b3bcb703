"""Count tokens: find the counts that follow from a policy, and the largest that meet limits.

The costs come in as functions, so this file knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from deos_fx.operator import grid_layout
from deos_fx.policy.policy import Policy
from deos_fx.policy.site import first_layer
from deos_fx.policy.tier import Tier

__all__ = ["ASPECT", "along", "as_shares", "fit_counts", "on_grid", "tokens_per_layer", "within"]


# *** counts of a policy ***


T = TypeVar("T")


def along(before: T, cuts: Iterable[tuple[int, T]], places: int) -> list[T]:
    """Return how many tokens there are at each place of a row.

    Args:
        before: Tokens before the first cut.
        cuts: First place after each cut, in order, and the tokens from there on.
        places: Length of the row.
    """
    # Each cut holds to the end of the row, until the next one.
    counts = [before] * places
    for first, after in cuts:
        counts[first:] = [after] * (places - first)
    return counts


def tokens_per_layer(policy: Policy, sizes: Sequence[int], layers: int) -> list[int]:
    """Return the visual tokens of one prompt that each decoder layer processes.

    Args:
        policy: The policy.
        sizes: Visual tokens of each image of the prompt.
        layers: Layers of the decoder.
    """
    # policy.counts gives one row for each image; transposed, one for each reduction.
    of_images = zip(*map(policy.counts, sizes), strict=True)
    kept = zip(policy.reductions, map(sum, of_images), strict=True)
    cuts = ((first_layer(reduction.site), count) for reduction, count in kept)
    return along(sum(sizes), cuts, layers)


# *** counts within limits ***


ASPECT = 1.5
"""The largest ratio of a window's sides that is accepted when a count of windows is chosen."""


def within(amounts: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Return whether a policy meets every limit; limits are one-sided.

    Args:
        amounts: Its costs by name.
        limits: Absolute limits by the same names; costs without a limit are free.
    """
    return all(amounts[name] <= limit for name, limit in limits.items())


def fit_counts(
    policy: Policy,
    visual_tokens: int,
    amounts: Callable[[Policy], Mapping[str, float]],
    limits: Mapping[str, float],
) -> Policy | None:
    """Scale a policy's counts to the largest that meet every limit.

    1. All counts are scaled by one factor, as far as the limits allow.
    2. Single tokens are added where they still fit, deepest site first.

    Args:
        policy: A policy with any counts.
        visual_tokens: Visual tokens of one image.
        amounts: Returns the costs of a policy by name.
        limits: Absolute limits.

    Returns:
        The fitted policy, or None if even one token at every site breaks a limit.
    """
    counts = policy.counts(visual_tokens)

    def scaled(factor: float) -> list[int]:
        return [min(visual_tokens, max(1, round(factor * count))) for count in counts]

    def fits(candidate: Sequence[int]) -> bool:
        return within(amounts(with_counts(policy, candidate)), limits)

    # 1. Bisect the factor. At `low` every limit is met; `high` is too much, or keeps all tokens.
    # Costs grow with the counts, and 24 halvings leave less than a token.
    low, high = 0.0, float(visual_tokens)
    if not fits(scaled(low)):
        # Case: one token at every site is already too much.
        return None
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(scaled(middle)) else (low, middle)
    # 2. Fill up.
    return with_counts(policy, _filled(scaled(low), visual_tokens, fits))


def as_shares(policy: Policy, visual_tokens: int) -> Policy:
    """Return the policy with every count as a share of the image, for images of any size.

    Those of further tiers become shares of what their reduction keeps.

    Args:
        policy: Its counts are ints.
        visual_tokens: Visual tokens of one image, for which the shares give the same counts.
    """
    # count / n * n may differ from the count by an ulp; a share is rounded to the nearest count.
    counts = policy.counts(visual_tokens)
    shares = with_counts(policy, [count / visual_tokens for count in counts])
    steps = [
        replace(step, tiers=tuple(_as_share(tier, count) for tier in step.tiers))
        for step, count in zip(shares.reductions, counts, strict=True)
    ]
    return replace(shares, reductions=tuple(steps))


def _as_share(tier: Tier, total: int) -> Tier:
    """Return a further tier that chooses a share of the `total` that its reduction keeps."""
    # A count of 0, or one that leaves the first tier nothing, is no share; checks say so.
    is_count = isinstance(tier.keep, int) and 0 < tier.keep <= total
    return replace(tier, keep=tier.keep / total) if is_count else tier


def on_grid(policy: Policy, height: int, width: int) -> Policy:
    """Lower every count of grid anchors to one that the grid can be split into.

    No later reduction keeps more tokens than an earlier one leaves.

    Args:
        policy: Its counts are ints.
        height: Rows of one image's tokens.
        width: Columns of one image's tokens.

    Returns:
        A policy that costs at most as much.
    """
    # A single window always splits the grid, so the loop ends.
    counts = policy.counts(height * width)
    for i, reduction in enumerate(policy.reductions):
        counts[i] = min(counts[: i + 1])
        while reduction.selector == "grid" and not _splits(height, width, counts[i]):
            counts[i] -= 1
    return with_counts(policy, counts)


def _splits(height: int, width: int, count: int) -> bool:
    """Return whether nearly square windows split the grid; a single window of any shape does."""
    try:
        grid_layout(height, width, count, aspect=ASPECT)
    except ValueError:
        return count == 1
    return True


def _filled(
    counts: list[int], visual_tokens: int, fits: Callable[[Sequence[int]], bool]
) -> list[int]:
    """Add single tokens from the deepest site up while every limit holds."""
    # The deepest site shortens the fewest layers, so a token costs least there.
    for i in reversed(range(len(counts))):
        # A site keeps at most what the site before it leaves.
        most = counts[i - 1] if i else visual_tokens
        while counts[i] < most and fits([*counts[:i], counts[i] + 1, *counts[i + 1 :]]):
            counts[i] += 1
    return counts


def with_counts(policy: Policy, counts: Sequence[int | float]) -> Policy:
    reductions = zip(policy.reductions, counts, strict=True)
    return replace(
        policy, reductions=tuple(replace(reduction, keep=count) for reduction, count in reductions)
    )
