"""An image encoder in whose tower groups of patches are dropped or merged.

The encoder is the model's own code, in which blocks after a reduction run on the patches that are
left. Everything between and after the blocks still sees all patches: the dropped ones keep the
hidden states that they had when they were dropped, and the visual tokens made of them are left out
of the prompt afterwards. So orders of windows, tables of rows and columns, mergers and taps of
several depths need no code of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from deos_fx.attention.observation import OBSERVED
from deos_fx.attention.seam import ObservedBlock
from deos_fx.errors import NoGroups
from deos_fx.models.arguments import hidden_first
from deos_fx.models.groups import PatchGroups, find_groups, key_of_sizes
from deos_fx.models.views import with_forward, with_parts
from deos_fx.passes.capture.leaves import ImageEncoder
from deos_fx.passes.lower.reduced_patches import ReducedPatches
from deos_fx.policy.site import split_site
from deos_fx.recent import Recent
from deos_fx.tokens.layout import PromptLayout

__all__ = ["LEFT", "ReducedEncoder", "explained", "left_in_tower"]

LEFT = "left_in_tower"
"""The field of the encoder's output that says what is left of the images."""

_SIZES = 64
"""Sets of sizes for which the groups of patches are kept."""


class ReducedEncoder(ImageEncoder):
    """The image encoder, with reductions after some blocks of its tower.

    The groups of patches are found when images of new sizes come.

    Args:
        core: The base model that has the method.
        encode: The method that encodes, such as ``get_image_features``.
        blocks: The blocks of its vision tower, in order.
        steps: The reductions, as steps of a `SiteWalk`, in order of depth.
        layout: The prompts.
        fixed: Whether only values may depend on which patches are left, see `ReducedPatches`.
    """

    def __init__(
        self,
        core: nn.Module,
        encode: Callable[..., Any],
        blocks: Sequence[nn.Module],
        steps: Sequence[Any],
        layout: PromptLayout,
        fixed: bool = False,
    ) -> None:
        self._steps = {split_site(step.site.name)[1]: step for step in steps}
        self._layout = layout
        self._known: Recent[Any, PatchGroups] = Recent(_SIZES)
        self._fixed = fixed
        # A tuple keeps the whole encoder out of the module tree: the view shares all its weights.
        self._whole = core, encode, tuple(blocks)
        first = min(self._steps)
        self._observers = {
            i: _Observer(block, names)
            for i, block in enumerate(blocks)
            if (names := sorted(self._needs(i) & OBSERVED.keys())) or (fixed and i > first)
        }
        views = {
            block: with_forward(block, partial(self._run_block, i, block))
            for i, block in enumerate(blocks)
            if i >= first
        }
        super().__init__(with_parts(core, views), encode)

    def exportable(self) -> ReducedEncoder:
        """Return the same encoder for an export, where nothing but values depends on the pixels.

        Raises:
            ValueError: If the attention of a block after the first site is not transformers' own.
        """
        return ReducedEncoder(*self._whole, [*self._steps.values()], self._layout, fixed=True)

    def _needs(self, i: int) -> frozenset[str]:
        """Return the features that the reduction after a block reads."""
        step = self._steps.get(i)
        return frozenset() if step is None else step.needs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Encode the images; the output has a field more, see `left_in_tower`."""
        call = _Call(args, kwargs)
        token = _CALL.set(call)
        try:
            output = super().forward(*args, **kwargs)
        finally:
            _CALL.reset(token)
        assert call.patches is not None, "the encoder has not run its blocks"
        output[LEFT] = call.patches.left()
        return output

    def _patches(self, call: _Call, hidden: Tensor) -> ReducedPatches:
        """Return the patches of a call, whose groups are found when sizes are new."""
        if call.patches is None:
            core, encode, blocks = self._whole
            given = pytree.tree_leaves((call.args, call.kwargs))
            # Code may leave out images that are only padding, so hidden states count as well.
            key = hidden.shape, key_of_sizes({str(i): value for i, value in enumerate(given)})
            try:
                groups = self._known.find(
                    key, lambda: find_groups(core, encode, blocks, call.args, call.kwargs)
                )
            except NoGroups as reason:
                raise ValueError(
                    f"Images of these sizes cannot be reduced in the vision tower: {reason}. Use "
                    "sites at the projector or in the decoder."
                ) from reason
            call.patches = ReducedPatches(groups, self._layout, self._fixed)
        return call.patches

    def _run_block(
        self, i: int, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a block on what is left, and reduce what it makes."""
        (hidden, *others), kwargs = hidden_first(block, args, kwargs)
        patches = self._patches(_CALL.get(), hidden)
        observer = self._observers.get(i)
        run = observer or partial(_unobserved, forward)
        output, seen = patches.run(run, hidden, others, kwargs)
        step = self._steps.get(i)
        if step is None:
            return output
        made, *others = output if isinstance(output, tuple) else (output,)
        names = observer.names if observer else []
        made = patches.reduce(step, made, dict(zip(names, seen, strict=True)))
        return (made, *others) if isinstance(output, tuple) else made


def _unobserved(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
    """Run a block of which nothing is observed."""
    return forward(*args, **kwargs), []


class _Observer:
    """A block that also reports features of its attention, with all patches as queries.

    Args:
        block: The block.
        names: Names of the features.
    """

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        self.names = names
        self._wanted = [OBSERVED[name] for name in names]
        # Without its hooks, which collect hidden states: they run when the encoder calls the block.
        bare = with_forward(block, lambda forward, *args, **kwargs: forward(*args, **kwargs))
        bare._forward_hooks.clear()
        self._block = ObservedBlock(bare, tuple(observation for observation, _ in self._wanted))

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """Run the block: its output, and each feature [R, P, k], with k = 1 for attention."""
        asked: Any = [(None, None, None) for _, queries in self._wanted if queries]
        output, *seen = self._block(*args, asked=tuple(asked), **kwargs)
        # Blocks with segments call their attention for one after the other.
        count = len(self._wanted)
        return output, [self._joined(seen[i::count]) for i in range(count)]

    @staticmethod
    def _joined(segments: Sequence[Tensor]) -> Tensor:
        """Join what was observed in every segment of the rows."""
        if segments[0].ndim == 3:
            return torch.cat([*segments], dim=1)
        # Attention is a mean over the queries of a segment; those of other segments give nothing.
        total = sum(part.shape[1] for part in segments)
        return torch.cat([part * (part.shape[1] / total) for part in segments], dim=1)[..., None]


@dataclass
class _Call:
    """A call of the encoder: its arguments and, from the first reduction on, its patches."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    patches: ReducedPatches | None = None


# The call that this thread runs. All threads share the views of the blocks.
_CALL: ContextVar[_Call] = ContextVar("deos_fx_reduced_encoder")


def left_in_tower(output: Any, what: str) -> Tensor:
    """Return what is left of each prompt's images, of the output of a `ReducedEncoder`.

    Args:
        output: The output.
        what: ``kept``, indices [B, K] into the visual tokens of a prompt, or ``mass`` [B, K].
    """
    value: Tensor = output[LEFT][what]
    return value


@fx.node.has_side_effect
def explained(output: Any, site: str, role: str) -> Tensor | None:
    """Return a value for `ReducedModel.explain` of the output of a `ReducedEncoder`.

    Nothing in the graph reads it, which is why it is marked to stay.

    Args:
        output: The output.
        site: Name of the site.
        role: The role.
    """
    value: Tensor | None = output[LEFT][site].get(role)
    return value
