"""Counts of tokens that follow from a policy alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from deos_fx.policy.policy import Policy
from deos_fx.policy.site import first_layer

__all__ = ["along", "tokens_per_layer"]

T = TypeVar("T")


def along(before: T, cuts: Iterable[tuple[int, T]], places: int) -> list[T]:
    """Return how many tokens there are at each place of a row.

    Args:
        before: Tokens before the first cut.
        cuts: First place after each cut, in order, and the tokens from there on.
        places: Length of the row.
    """
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
    of_images = zip(*map(policy.counts, sizes), strict=True)
    kept = zip(policy.reductions, map(sum, of_images), strict=True)
    cuts = ((first_layer(reduction.site), count) for reduction, count in kept)
    return along(sum(sizes), cuts, layers)
