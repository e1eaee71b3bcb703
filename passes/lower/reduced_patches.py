"""The patches of a call of an image encoder, while groups of them are dropped or merged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deos_fx import tokens
from deos_fx.errors import NoGroups
from deos_fx.forms.static import static_reduce
from deos_fx.models.arguments import (
    Segments,
    arguments_at,
    axes_of,
    have_no_rows,
    in_one_row,
)
from deos_fx.models.groups import PatchGroups
from deos_fx.operator.gather import listed
from deos_fx.passes.lower.patch_rows import (
    Alike,
    Part,
    of_groups,
    one_by_one,
    parts_of,
    put_in_rows,
)
from deos_fx.policy.reduction import Reduction
from deos_fx.tokens.layout import PromptLayout, grid_after

__all__ = ["ROLES", "ReducedPatches"]

ROLES = ("kept", "mass", "score", "assignment", "receivers", "sources", "weight")
"""Roles in which values of a reduction explain it."""


class ReducedPatches:
    """What is left of the patches of a batch of prompts, from block to block of a tower.

    A group of patches counts as one token: its hidden states, side by side, are one vector of width
    s d. So it is chosen and merged as a whole, each patch with those at its place in other groups.

    Args:
        groups: The groups of patches.
        layout: The prompts.
        fixed: Whether only values may depend on which patches are left, as in an export. Rows
            and segments of which it depends how much is left run as one, with a mask between them.

    Raises:
        ValueError: If the encoder makes another number of visual tokens than the prompts have.
    """

    def __init__(self, groups: PatchGroups, layout: PromptLayout, fixed: bool = False) -> None:
        self._groups = groups
        self._fixed = fixed
        self._layout = layout
        self._per_prompt = sum(layout.sizes)
        prompts, rest = divmod(len(groups.groups), self._per_prompt)
        if rest:
            raise ValueError(
                f"The image encoder makes {len(groups.groups)} visual tokens of patches, and a "
                f"prompt has {self._per_prompt} placeholders for such: which patches belong to "
                "which of them is not known. Use sites at the projector or in the decoder."
            )
        of_prompts = torch.arange(len(groups.groups)).reshape(prompts, -1)
        of_images = of_prompts.split(layout.sizes, dim=1)
        self._alike = [
            Alike(
                images,
                torch.stack([of_images[i] for i in images], dim=1).flatten(0, 1),
                PromptLayout(0, 1, layout.each_grid[images[0]]).grid_tensor(1),
                groups.groups,
            )
            for images in layout.alike()
        ]
        grouped = torch.zeros(math.prod(groups.shape), dtype=torch.int64)
        grouped[groups.groups.flatten()] = 1
        # How many patches before each are part of no token.
        self._alone = [0, *(1 - grouped).cumsum(0).tolist()]
        # Patches that are left; None while all are, or while they are one row.
        self._parts: list[Part] | None = None
        # [1, M] patches that are left of all rows.
        self._row: Tensor | None = None
        # Borders of segments -> what is left before each.
        self._before: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._seen: dict[str, dict[str, Tensor]] = {}

    def run(
        self,
        block: Callable[..., Any],
        hidden: Tensor,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> tuple[Any, list[Tensor]]:
        """Run a block on the patches that are left.

        Args:
            block: The block, which returns its output and a list of observations [R, P, k].
            hidden: Hidden states of all patches, [R, P, d] or [P, d].
            args: Its other arguments.
            kwargs: Its keyword arguments.

        Returns:
            Its output, in which dropped patches have the hidden states that came in, and the
            observations, which are zero there.
        """
        if self._row is None:
            return block(hidden, *args, **kwargs)
        axes = pytree.tree_map_only(Segments, self._known, axes_of(hidden, args, kwargs))
        segments = [axis for axis in pytree.tree_leaves(axes) if isinstance(axis, Segments)]
        if self._fixed and (self._parts is None or not all(axis.left for axis in segments)):
            return self._run_apart(block, axes, segments, hidden, args, kwargs)
        assert self._parts is not None
        whole = hidden if hidden.ndim == 3 else hidden[None]
        seen: list[Tensor] = []
        parts = self._parts
        if len(whole) > 1 and have_no_rows(axes, args, kwargs):
            parts = one_by_one(parts)
        for rows, index in parts:
            given, named = arguments_at(index, axes, hidden, args, kwargs, rows)
            output, observed = block(*given, **named)
            made = output[0] if isinstance(output, tuple) else output
            whole = put_in_rows(whole, rows, index, made if made.ndim == 3 else made[None])
            seen = seen or [x.new_zeros(*whole.shape[:2], x.shape[-1]) for x in observed]
            seen = [
                put_in_rows(into, rows, index, x) for into, x in zip(seen, observed, strict=True)
            ]
        left = whole if hidden.ndim == 3 else whole[0]
        return (left, *output[1:]) if isinstance(output, tuple) else left, seen

    def reduce(self, step: Any, hidden: Tensor, observed: Mapping[str, Tensor]) -> Tensor:
        """Reduce the groups of every image.

        Args:
            step: The step of a `SiteWalk`.
            hidden: Hidden states of all patches, [R, P, d] or [P, d].
            observed: Features of all patches [R, P, k] that were observed in the block.

        Returns:
            The same, in which the groups that are left have what was merged into them.
        """
        groups = self._groups.groups.to(hidden.device)
        flat = hidden.reshape(-1, hidden.shape[-1])
        for alike in self._alike:
            own = groups[alike.tokens.to(groups.device)]
            share = self._share_of_row(own)
            features = {
                name: of_groups(x.flatten(0, 1)[own], share) for name, x in observed.items()
            }
            flat = self._reduce_alike(step, alike, groups, flat, features)
        left = flat.new_ones(len(flat), dtype=torch.float32).scatter(0, groups.flatten(), 0.0)
        for alike in self._alike:
            left = left.scatter(0, groups[alike.tokens.to(groups.device)].flatten(), 1.0)
        self._before.clear()
        length = self._groups.shape[-1]
        before = self._left_before(range(0, len(flat) + 1, length))
        if before is None and not self._fixed:
            before = [0, *left.reshape(-1, length).sum(dim=1).cumsum(0).int().tolist()]
        if before is not None:
            counts = [b - a for a, b in itertools.pairwise(before)]
            self._parts = parts_of(left.reshape(-1, length), counts)
        alone, images = self._alone[-1], self._alike
        count = alone + sum(alike.tokens.numel() for alike in images) * groups.shape[1]
        self._row = listed(left[None], count).sort(dim=1).values
        return flat.reshape(hidden.shape)

    def _left_before(self, borders: Iterable[int]) -> list[int] | None:
        """Return how many patches are left before some numbers of patches.

        Returns:
            None if it depends on which are left of an image that a border divides.
        """
        counts = []
        for border in borders:
            count = self._alone[border]
            for alike in self._alike:
                each = alike.tokens.shape[1] * self._groups.groups.shape[1]
                for first, last in alike.spans:
                    if first < border <= last:
                        return None
                    count += each * (last < border)
            counts.append(count)
        return counts

    def _known(self, segments: Segments) -> Segments:
        """Return segments with what is left of them, where that is known."""
        borders = segments.borders
        if borders not in self._before:
            self._before[borders] = tuple(self._left_before(borders) or ())
        return replace(segments, left=self._before[borders])

    def _run_apart(
        self,
        block: Callable[..., Any],
        axes: Any,
        segments: Sequence[Segments],
        hidden: Tensor,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> tuple[Any, list[Tensor]]:
        """Run a block on one row of what is left, with a mask between rows and segments."""
        assert self._row is not None
        index, count = self._row, self._row.shape[1]
        rows, length = math.prod(hidden.shape[:-2]), hidden.shape[-2]
        # The number of the part that each patch is in: rows, or else segments of the only row.
        part = torch.arange(rows * length) // length
        for one in segments:
            lengths = torch.tensor([b - a for a, b in itertools.pairwise(one.borders)])
            part = part * len(lengths) + torch.arange(len(lengths)).repeat_interleave(lengths)
        axes = pytree.tree_map_only(Segments, lambda one: replace(one, left=(0, count)), axes)
        one_row = hidden, args, kwargs
        if rows > 1:
            try:
                one_row = in_one_row(axes, hidden, args, kwargs)
            except NoGroups as reason:
                raise ValueError(
                    f"Reductions in the vision tower cannot be exported: {reason}. Run the reduced "
                    "model in PyTorch, or reduce after the tower."
                ) from reason
        given, named = arguments_at(index, axes, *one_row)
        own = part.to(index.device)[index[0]]
        same = own[:, None] == own
        apart = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
        apart = torch.where(same, apart, torch.finfo(hidden.dtype).min)[None, None]
        output, observed = block(*given, apart=apart, **named)
        made = output[0] if isinstance(output, tuple) else output
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        whole = tokens.put(flat, index, made.reshape(1, count, -1)).reshape(hidden.shape)
        seen = []
        for x in observed:
            if rows > 1 and x.shape[-1] == 1:
                # Attention is a mean over the queries of one row.
                x = x * (count / same.sum(dim=1)).to(x)[:, None]
            zeros = x.new_zeros(1, rows * length, x.shape[-1])
            seen.append(tokens.put(zeros, index, x).reshape(rows, length, -1))
        return (whole, *output[1:]) if isinstance(output, tuple) else whole, seen

    def _share_of_row(self, own: Tensor) -> float:
        """Return the share of the patches of a row that are those of an image.

        Args:
            own: Numbers [I, V, s] of the patches of images.

        Returns:
            1 where every image has rows of its own.
        """
        rows = math.prod(self._groups.shape[:-1])
        if rows >= sum(len(alike.tokens) for alike in self._alike):
            return 1.0
        left = rows * self._groups.shape[-1]
        if self._row is not None:
            left = self._row.shape[1]
        return rows * own[0].numel() / left

    def _reduce_alike(
        self,
        step: Any,
        alike: Alike,
        groups: Tensor,
        flat: Tensor,
        features: Mapping[str, Tensor],
    ) -> Tensor:
        """Reduce the images of one size, and return the hidden states [R P, d]."""
        reduction: Reduction = step.reduction
        images, last = len(alike.images), alike.images[-1] == self._layout.images - 1
        count = step.counts[alike.images[0]]
        numbers, cells = alike.tokens.to(flat.device), alike.cells.to(flat.device)
        own = flat[groups[numbers]].flatten(2)
        reduced = static_reduce(
            reduction,
            count,
            own,
            alike.mass,
            {"grid": cells, "sides": torch.tensor([self._layout.grid], device=flat.device)}
            | dict(features),
            # Only the last image can end the prompt, and has to keep its last token then.
            last_of=images if self._layout.ends and last else 0,
        )
        # Values that are the same for all images have one row.
        self._seen[step.site.name] = {
            role: value.expand(len(numbers), *value.shape[1:])
            for role in ROLES
            if (value := getattr(reduced, role)) is not None
        }
        known = grid_after(reduction, count, alike.cells) if cells.ndim == 2 else None
        if known is None:
            known = tokens.take(cells if cells.ndim == 3 else cells[None], reduced.kept)
        alike.cells, alike.mass = known, reduced.mass
        alike.tokens = tokens.take(numbers, reduced.kept)
        if reduced.assignment is None and not reduction.reweight:
            return flat
        patches = reduced.tokens.reshape(1, -1, flat.shape[-1])
        return tokens.put(flat[None], groups[alike.tokens].reshape(1, -1), patches)[0]

    def left(self) -> dict[str, Any]:
        """Return ``kept`` [B, K] and ``mass``, for prompts, and what explains each reduction."""
        kept = torch.cat([self._of_prompts(alike, alike.tokens) for alike in self._alike], dim=1)
        order = kept.argsort(dim=1)
        found: dict[str, Any] = {"kept": tokens.take(kept, order) % self._per_prompt}
        masses = [alike.mass for alike in self._alike]
        if all(mass is not None for mass in masses):
            of_prompts = [self._of_prompts(alike, alike.mass) for alike in self._alike]
            found["mass"] = tokens.take(torch.cat(of_prompts, dim=1), order)
        return found | self._seen

    def _of_prompts(self, alike: Alike, of_images: Any) -> Tensor:
        """Join values [I, K] of images to those of prompts [B, I K]."""
        return tokens.masses_of_prompt(of_images, len(alike.images))
