"""The choice of the tokens to keep, tier by tier."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from deos_fx.forms.needs import feature_name
from deos_fx.operator import assign, gather, grid, learned, select, transfer
from deos_fx.operator.assign import SIMILARITIES
from deos_fx.operator.learned import LEARNED
from deos_fx.operator.scores import SCORES, combine, standardize
from deos_fx.operator.select import SELECTORS
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier

__all__ = ["Choice", "Execute", "Value", "execute", "number_of", "short"]

Execute = Callable[..., Any]
"""Called as ``call(operator, *arguments)``; returns the result, or a graph node for it."""

Value = torch.Tensor | fx.Node
"""A value, or the graph node that will compute it."""


def short(call: Execute) -> Execute:
    """Leave out trailing arguments that equal their defaults, so that graphs are easy to read."""

    def shortened(operator: Callable[..., Any], *arguments: Any) -> Any:
        defaults = getattr(operator, "__defaults__", None) or ()
        while defaults and len(arguments) > operator.__code__.co_argcount - len(defaults):
            # The default of the last argument that is left. Tensors and nodes are compared by
            # identity.
            default = defaults[len(arguments) - operator.__code__.co_argcount - 1]
            number = isinstance(arguments[-1], int | float)
            if not (arguments[-1] is default or (number and arguments[-1] == default)):
                break
            arguments = arguments[:-1]
        return call(operator, *arguments)

    return shortened


def execute(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function at once: the ``Execute`` to use where nothing is recorded."""
    return operator(*arguments)


class Choice:
    """The choice of a reduction's tokens, made tier by tier.

    Args:
        reduction: The reduction.
        count: K, a copy of the CLS token included.
        tokens: Hidden states [B, V, d], or their node.
        features: Features by name.
        call: Runs or records an operator.
        last_of: As for ``static_reduce``.

    Attributes:
        count: How many tokens are chosen.
        raw: The first score of the first tier [B, V]; None if no scores are used.
        score: The mixture of the first tier's scores.
    """

    def __init__(
        self,
        reduction: Reduction,
        count: int,
        tokens: Value,
        features: Mapping[str, Any],
        call: Execute,
        last_of: int,
    ) -> None:
        self.reduction = reduction
        self.count = count - reduction.keep_class
        self.tokens = tokens
        self.features = features
        self.call = call
        self.last_of = last_of
        self.tiers = reduction.selection
        self.first = self.tiers[0]
        self.raw: Value | None = None
        self.score: Value | None = None
        self.anchors: Value | None = None
        """The first tier's picks, before the last token of a prompt takes a place."""
        self._compared: dict[str, Any] | None = None
        self.rest: Value | None = None
        """The token [B, 1] whose place the residual one takes."""

    def is_constant(self, kept: Value) -> bool:
        """Return whether every row keeps the same tokens: the choice is then a constant [1, K]."""
        # If the tokens themselves are given and have one row, any choice is [1, K].
        one_row = isinstance(self.tokens, torch.Tensor) and len(self.tokens) == 1
        return isinstance(kept, torch.Tensor) and len(kept) == 1 and not one_row

    def token_axis(self, kept: Value) -> Value:
        """Return a value whose axis 1 runs over the tokens; a constant if the choice is one."""
        return self.feature("grid").unsqueeze(0) if self.is_constant(kept) else self.tokens

    @property
    def sorted_last(self) -> bool:
        """Return whether tokens stay in the order of the tiers until they are merged.

        The receivers are then found by their places; the order of the image is restored afterwards.
        """
        receivers = self.reduction.receivers == "last"
        return self.reduction.order == "position" and receivers

    def feature(self, name: str, tier: Tier | None = None) -> Any:
        """Return a feature as the tier observes it, or a constant from the tier's options."""
        tier = tier or self.first
        if name == "tokens":
            return self.tokens
        if name in tier.options:
            return torch.tensor(tier.options[name])
        return self.features[feature_name(name, tier.observe)]

    def compared(self) -> dict[str, Any]:
        """Return the features that the similarity compares, by kind."""
        if self._compared is None:
            self._compared = {kind: self._made(kind) for kind in self.reduction.similarity}
        return self._compared

    def _made(self, kind: str) -> Any:
        """Return what a kind of similarity compares: a feature, or what is computed of it."""
        feature = self.feature(SIMILARITIES[kind])
        if kind == "centred":
            return self.call(assign.centred, feature)
        if kind == "learned":
            return self.call(learned.projected, feature, self.reduction.learned["metric"])
        return feature

    def kept(self) -> Value:
        """Choose the tokens.

        Returns:
            Indices [B, K], in the order of the tiers if `sorted_last`, else in that of the output.
        """
        if self.reduction.uses_scores:
            self.raw, self.score = self._scored(self.first)
        order = self.reduction.order
        parts = self._picks()
        if self.reduction.has_rest:
            parts = self._with_rest_apart(parts)
        if order == "tier":
            parts = [self.call(gather.in_order, picks) for picks in parts]
        kept = parts[0] if len(parts) == 1 else self.call(torch.cat, parts, 1)
        if self.reduction.has_rest and order != "position":
            # The residual token comes last, apart from the last token of a prompt.
            (kept,) = self._with_last([kept])
        # The order is right already, is restored after merging, or is that of anchors.
        in_order = order != "position" or self.sorted_last or self.reduction.leaves_grid
        return kept if in_order else self.call(gather.in_order, kept)

    def _picks(self) -> list[Value]:
        """Return the picks of each tier; if there are several, also that of the residual token.

        With one tier, the residual token is its last pick.
        """
        tiers = list(self.tiers)
        counts = self.reduction.tier_counts(self.count)
        if self.reduction.has_rest and self.reduction.tiers:
            # The best token by score that no tier chose becomes the residual one.
            tiers.append(replace(self.first, selector="top_k"))
            counts.append(1)
        parts: list[Value] = []
        taken = flags = None
        for i, (tier, count) in enumerate(zip(tiers, counts, strict=True)):
            if SELECTORS[tier.selector].flags:
                # Case: a tier that picks nothing, but says what later tiers prefer.
                flags = self._run(tier, None, 0, self.count, None)
                continue
            picks = self._run(tier, taken, sum(counts[:i]), count, flags)
            # Picks of several tiers are joined, so a constant one gets the rows of the others.
            if len(tiers) > 1 and self.is_constant(picks):
                picks = self.call(gather.for_each_row, picks, self.tokens)
            parts.append(picks)
            self.anchors = parts[0]
            if self.last_of and i + 1 == len(self.tiers):
                # After the last tier, before the residual token. Another pick may have made way, so
                # the flags are computed again, from all parts.
                parts, taken = self._with_last(parts, self._picks_after_last()), None
            if i + 1 < len(tiers):
                # Flags of what is taken, for the next tier.
                for part in parts if taken is None else parts[-1:]:
                    now = self.call(gather.chosen, part, self.tokens)
                    taken = now if taken is None else self.call(torch.add, taken, now)
        return parts

    def _picks_after_last(self) -> int:
        """Return how many picks of a single tier come after the last token: the residual one."""
        return int(self.reduction.has_rest and not self.reduction.tiers and self.count > 1)

    def _with_last(self, parts: list[Value], after: int = 0) -> list[Value]:
        """Make the picks of the tiers include the last token of a prompt that ends in an image."""
        if not self.last_of:
            return parts
        kept = parts[0] if len(parts) == 1 else self.call(torch.cat, parts, 1)
        if self.last_of > 1 and self.is_constant(kept):
            kept = self.call(gather.for_each_row, kept, self.tokens)
        given = (self.token_axis(kept), self.last_of, after)
        kept = self.call(gather.with_last, kept, *given)
        if len(parts) == 1:
            return [kept]
        # Split the picks into tiers again; tiers that only flag have none.
        sizes = [size for size in self.reduction.tier_counts(self.count) if size]
        starts = itertools.accumulate([0, *sizes[:-1]])
        return [
            self.call(torch.narrow, kept, 1, start, size)
            for start, size in zip(starts, sizes, strict=True)
        ]

    def _with_rest_apart(self, parts: list[Value]) -> list[Value]:
        """Take the last pick for the residual token, and split it off if the others get sorted."""
        if len(parts) > 1:
            # Case: several tiers. The residual token is a part of its own.
            self.rest = parts[-1]
            return parts
        self.rest = self.call(torch.narrow, parts[0], 1, self.count - 1, 1)
        if self.reduction.order != "tier":
            return parts
        return [self.call(torch.narrow, parts[0], 1, 0, self.count - 1), self.rest]

    def _run(
        self, tier: Tier, taken: Value | None, already: int, count: int, flags: Value | None
    ) -> Value:
        """Run the selector of a tier.

        Args:
            tier: The tier.
            taken: Flags of tokens that earlier tiers chose; None before the first.
            already: Their number.
            count: How many to pick.
            flags: Flags of tokens to prefer, if an earlier tier gave some.
        """
        selector = SELECTORS[tier.selector]
        # Functions, so that only what the selector needs is computed.
        values: dict[str, Callable[[], Any]] = {
            "score": lambda: self._ranking(tier, flags),
            "similarity": lambda: self.call(
                assign.similarity, self.compared(), dict(self.reduction.similarity)
            ),
            "halves": lambda: self.call(
                assign.between_halves,
                self.compared(),
                dict(self.reduction.similarity),
                number_of(tier.options["first"]),
            ),
            "taken": lambda: taken,
            "already": lambda: already,
            "diversity": lambda: tier.diversity,
            "members": lambda: self.call(
                grid.window_members, self._whole_grid(tier), number_of(tier.options["windows"])
            ),
            "columns": lambda: self.call(grid.columns, self._whole_grid(tier)),
            "grid": lambda: self._whole_grid(tier),
        }
        needs = (
            values[name]() if name in values else self.feature(name, tier)
            for name in selector.needs
        )
        options = [number_of(tier.options[name]) for name in selector.options]
        return self.call(selector.function, *needs, count, *options)

    def _whole_grid(self, tier: Tier) -> torch.Tensor:
        """Return the places of complete images [V, 3].

        Raises:
            ValueError: If scores have dropped tokens before, so that places differ from row to row.
        """
        places = self.feature("grid", tier)
        if not isinstance(places, torch.Tensor) or places.dim() != 2:
            raise ValueError(
                f"{self.reduction.site}: the selector {tier.selector!r} needs complete images, and "
                "a reduction before it dropped tokens by score; choose another selector"
            )
        return places

    def _ranking(self, tier: Tier, flags: Value | None) -> Value:
        """Return what a tier ranks by: its score, with flagged tokens above all others."""
        raw, score = self.raw, self.score
        # The score of the first tier serves this one, too, unless this one needs it standardized
        # and the first does not.
        serves = not tier.mixes or self.reduction.uses_score_values
        if score is None or not serves or _scoring(tier) != _scoring(self.first):
            raw, score = self._scored(tier)
        # A single score that is only ranked need not be standardized.
        if (
            raw is not None
            and len(tier.scores) == 1
            and not (tier.mixes or self._adds_learned(tier))
        ):
            score = raw
        return score if flags is None else self.call(select.favour, score, flags)

    def _scored(self, tier: Tier) -> tuple[Value | None, Value]:
        """Return the first score as it is (None if all are learned), and the mixture of all.

        A single score is standardized only if its values matter and not just their order.
        """
        parts = []
        for name in tier.scores:
            score = SCORES[name]
            inputs = (self.feature(need, tier) for need in score.needs)
            parts.append(self.call(score.function, *inputs))
        if self._adds_learned(tier):
            # Case: there may be no other scores.
            mixed = self._mixed(parts, tier) if parts else None
            return parts[0] if parts else None, self._with_learned(mixed)
        raw = parts[0]
        values_matter = tier is self.first and self.reduction.uses_score_values
        if len(parts) == 1 and not values_matter and not tier.mixes:
            return raw, raw
        return raw, self._mixed(parts, tier)

    def _mixed(self, parts: list[Value], tier: Tier) -> Value:
        """Return the mixture of the standardized scores of a tier."""
        parts = [self.call(standardize, part) for part in parts]
        if len(parts) == 1:
            return parts[0]
        return self.call(combine, parts, list(tier.scores.values()))

    def _adds_learned(self, tier: Tier) -> bool:
        """Return whether learned scores are added to those of a tier: to the first one's only."""
        return tier is self.first and bool(self.reduction.learned.scores)

    def _with_learned(self, score: Value | None) -> Value:
        """Add the learned scores to a mixture of others, and standardize the sum."""
        parts = [] if score is None else [score]
        for name in self.reduction.learned.scores:
            part = LEARNED[name]
            inputs = (self.feature(need) for need in part.needs)
            parts.append(self.call(part.function, *inputs, self.reduction.learned[name]))
        total = parts[0]
        for value in parts[1:]:
            total = self.call(torch.add, total, value)
        return self.call(standardize, total)

    def weight(self) -> Value | None:
        """Return u of the transfer [B, V], or None if it is 1."""
        if self.reduction.weighting == "score":
            return self.call(transfer.importance, self.score, self.reduction.sharpness)
        return self.raw if self.reduction.weighting == "raw" else None


def _scoring(tier: Tier) -> tuple[Any, ...]:
    """Return everything that the score of a tier depends on."""
    names = {name for score in tier.scores for name in SCORES[score].options}
    return tier.scores, tier.observe, {name: tier.options[name] for name in names}


def number_of(value: Any) -> Any:
    """Turn whole numbers into int, so that counts are written without a decimal point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
