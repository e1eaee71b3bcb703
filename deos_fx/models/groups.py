"""Find which patches of a vision tower make which visual token.

The features of many models are made of several patches each: they are merged by twos, pooled, or
their pixels are shuffled into channels, in orders of windows or of rows. Which patch goes where is
read from the model's own code, by gradients: it runs once with values in place of the blocks'
outputs, and a visual token depends on exactly the patches through which a gradient reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deos_fx.errors import NoGroups
from deos_fx.models.arguments import hidden_first
from deos_fx.models.families import features_of
from deos_fx.models.known_shapes import META
from deos_fx.models.patch_order import kinds_of, why_all_in_place
from deos_fx.models.patch_tokens import groups_of, tokens_of
from deos_fx.models.shapes_only import ShapesOnly, shaped
from deos_fx.models.views import execution_device, with_forward, with_parts

__all__ = ["PatchGroups", "find_groups", "key_of_sizes"]

_OTHERS = "later blocks of the tower have other patches"


@dataclass(frozen=True, eq=False)
class PatchGroups:
    """The patches of a call of an image encoder, and the visual tokens that they make.

    Attributes:
        shape: Rows and patches in a row of the hidden states [R, P, d] of every block. Hidden
            states [P, d] have no rows.
        groups: int64 [T, s], numbers of the patches of every visual token, ascending: patch p of
            row r has the number r P + p. Some patches, such as CLS, may be part of no token.
        used: Number of blocks up to the last that the features are read from.
        first: The first block after which patches may be missing.
        before: Why they may not after an earlier one; empty if there is none.
    """

    shape: tuple[int, ...]
    groups: Tensor
    used: int
    first: int = 0
    before: str = ""


@dataclass
class _Run:
    """What blocks are given and make in one run of the encoder.

    Attributes:
        on_meta: Whether weights have no values.
        given: Arguments of every block after the hidden states.
        made: The leaf that stands for the hidden states that every block makes.
        unlike: Why a block, or what it makes, does not continue what the one before it made.
        outputs: Hidden states that the first block of each class makes of each shape, and the Nones
            beside them; None if its output is no tuple.
    """

    on_meta: bool
    given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    made: dict[int, Tensor] = field(default_factory=dict)
    unlike: dict[int, str] = field(default_factory=dict)
    outputs: dict[Hashable, tuple[Tensor, list[None] | None]] = field(default_factory=dict)


def find_groups(
    core: nn.Module,
    encode: Callable[..., Any],
    blocks: Sequence[nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> PatchGroups:
    """Find the groups of patches of one call of an image encoder.

    1. Run the encoder. What each block makes becomes a leaf, so that gradients show what the code
       around the blocks does with it.
    2. From some block on, every block up to the last that is read gets what the one before it made,
       of one shape.
    3. Each patch is part of one token at most, of the same one at every depth that is read, and
       all tokens have equally many.
    4. The blocks after some block can run on a part of their tokens, see `why_all_in_place`.

    Weights on the meta device have no values: those outside of blocks and decoder are made up.

    Args:
        core: The base model that has the method.
        encode: The method that encodes, such as ``get_image_features``.
        blocks: The blocks of its vision tower, in order.
        args: Arguments of the method, without the model.
        kwargs: Its keyword arguments.

    Raises:
        NoGroups: If one of these does not hold.
    """
    # 1.
    run = _Run(execution_device(core) == META)
    views = {
        block: with_forward(block, partial(_record, run, i, block))
        for i, block in enumerate(blocks)
    }
    view: Any = with_parts(core, views)
    if run.on_meta:
        _make_up(view, core, blocks)
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, since tensors of inference mode take no part in gradients.
        args, kwargs = pytree.tree_map_only(Tensor, _made_up, (tuple(args), dict(kwargs)))
        output = encode(view, *args, **kwargs)
        levels = [_joined(level) for level in _levels(output)]
        found = [tokens_of(level, run.made) for level in levels]
    # 2.
    used = max((i + 1 for tokens in found for i in tokens), default=0)
    if not used:
        raise NoGroups("the visual tokens are not made of the patches of its blocks")
    first = _first(run, used)
    if any(i < first for tokens in found for i in tokens):
        raise NoGroups(run.unlike[first])
    # 3.
    shape = run.made[used - 1].shape[:-1]
    groups = groups_of([tokens for level in found for tokens in level.values()], len(levels[0]))
    # 4.
    before = _OTHERS if first else ""
    later = {i: blocks[i] for i in range(first + 1, used)}
    for i, *same in kinds_of(later, run.given):
        last = same[-1] if same else i
        why = why_all_in_place(blocks[i], run.made[i].detach(), *run.given[i], run.on_meta)
        if why and last > first:
            first, before = last, why
    return PatchGroups(tuple(shape), groups, used, first, before)


def key_of_sizes(given: Mapping[str, Any]) -> Hashable:
    """Return a key of the sizes of images: tables by their values, other tensors by their shapes.

    Args:
        given: Arguments of a method that encodes.
    """
    return tuple(
        (name, tuple(value.shape), repr(value.tolist()) if _is_table(value) else "")
        for name, value in given.items()
        if isinstance(value, Tensor)
    )


def _is_table(value: Tensor) -> bool:
    return value.ndim < 3 and not value.is_floating_point()


# *** 1: the run ***


def _record(
    run: _Run,
    i: int,
    block: nn.Module,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Note what a block is given, and let it make a leaf.

    Only the first block of each kind runs: values do not matter, but the form of the output does.

    Args:
        run: Gets what the block is given and makes.
        i: Its index.
        block: The block.
        forward: Its own forward.
        *args: Its arguments.
        **kwargs: Its keyword arguments.
    """
    args, kwargs = hidden_first(block, args, kwargs)
    if i in run.given:
        raise NoGroups("its blocks run more than once for a batch of images")
    given, *others = args
    run.given[i] = tuple(others), kwargs
    kind = type(block), given.shape
    if kind not in run.outputs:
        run.outputs[kind] = _output(run, block, forward, args, kwargs)
    hidden, beside = run.outputs[kind]
    before = run.made.get(i - 1)
    if hidden.shape != given.shape or hidden.ndim not in (2, 3):
        run.unlike[i] = run.unlike[i + 1] = "its blocks change how many patches there are"
    elif i and (before is None or before.shape != given.shape or not given.equal(before)):
        run.unlike[i] = "hidden states change between its blocks"
    run.made[i] = hidden.detach().requires_grad_()
    # Not the leaf itself, which code must not change in place.
    passed = run.made[i] * 1
    return passed if beside is None else (passed, *beside)


def _output(
    run: _Run,
    block: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, list[None] | None]:
    """Run a block, and return its hidden states and the Nones beside them, see `_Run`."""
    # Forwards are called directly: hooks of blocks collect hidden states, and must run once.
    with torch.no_grad(), ShapesOnly() if run.on_meta else nullcontext():
        output = (shaped(block).forward if run.on_meta else forward)(*args, **kwargs)
    if not isinstance(output, tuple):
        return _made_up(output), None
    hidden, *beside = output
    if any(value is not None for value in beside):
        raise NoGroups("its blocks hand on more than hidden states")
    return _made_up(hidden), beside


def _levels(output: Any) -> Iterator[Any]:
    """Yield the features that enter the prompt, and those of other depths (DeepStack)."""
    yield features_of(output)
    yield from output.get("deepstack_features") or ()


def _joined(level: Any) -> Tensor:
    """Join features, of all images or a tensor for each, to [T, d]."""
    # A level may come with the number of the layer that it is for.
    parts = (leaf for leaf in pytree.tree_leaves(level) if isinstance(leaf, Tensor))
    return torch.cat([part.flatten(0, -2) for part in parts])


def _make_up(view: nn.Module, core: Any, blocks: Sequence[nn.Module]) -> None:
    """Give a view values in place of weights on meta, where code outside of its blocks reads them.

    Linear layers and convolutions get few of them: each output depends on each input, as with a
    full matrix, but the product costs next to nothing.

    Args:
        view: The view, whose modules are all copies.
        core: The model that it is a view of.
        blocks: Blocks of the tower, which run on shapes.
    """
    elsewhere = {module for block in (*blocks, core.get_decoder()) for module in block.modules()}
    for (_, own), (_, module) in zip(
        view.named_modules(remove_duplicate=False),
        core.named_modules(remove_duplicate=False),
        strict=True,
    ):
        if module not in elsewhere:
            for name in ("_parameters", "_buffers"):
                made = _thin if type(module) in _THIN else _weight
                vars(own)[name] = {key: made(value) for key, value in vars(module)[name].items()}
            if type(module) in _THIN:
                vars(own)["forward"] = partial(_THIN[type(module)], own)


def _weight(value: Any) -> Any:
    """Make up a weight where there is none."""
    missing = isinstance(value, Tensor) and value.is_meta and value.is_floating_point()
    return _matrix(value.shape, value.dtype) if missing and value.ndim > 1 else _made_up(value)


def _matrix(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make up a matrix, or a kernel, of a size for which attention sees more than one key."""
    return torch.randn(*shape, dtype=dtype) * math.prod(shape[1:]) ** -0.5


# Rank of a made-up matrix. With one, a norm after it would hide all that it is made of.
_RANK = 8


def _thin(value: Any) -> Any:
    """Make up a matrix that takes no memory: it has the same number again and again in a row."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return _weight(value)
    column = torch.randn(value.shape[0], *[1] * (value.ndim - 1), dtype=value.dtype)
    return (column * value[0].numel() ** -0.5).expand(value.shape)


def _mixed(layer: nn.Linear, input: Tensor) -> Tensor:
    """Apply a linear layer of low rank: [..., in_features] -> [..., out_features]."""
    return _widened(layer, input @ _matrix((_RANK, layer.in_features), input.dtype).T)


def _convolved(layer: Any, input: Tensor) -> Tensor:
    """Apply a convolution of low rank: [I, in_channels, ...] -> [I, out_channels, ...]."""
    if layer.groups > 1:
        return layer._conv_forward(input, layer.weight, layer.bias)
    kernel = _matrix((_RANK, *layer.weight.shape[1:]), input.dtype)
    few = layer._conv_forward(input, kernel, None)
    return _widened(layer, few.movedim(1, -1)).movedim(-1, 1)


def _widened(layer: Any, few: Tensor) -> Tensor:
    """Make of few numbers [..., r] all outputs of a layer."""
    mixed = few @ _matrix((len(layer.weight), _RANK), few.dtype).T
    return mixed if layer.bias is None else mixed + layer.bias


# Class of a layer -> what applies one of low rank.
_THIN: dict[type, Any] = {
    nn.Linear: _mixed,
    nn.Conv1d: _convolved,
    nn.Conv2d: _convolved,
    nn.Conv3d: _convolved,
}


def _made_up(value: Any) -> Any:
    """Return a copy of a tensor; of one on meta, noise, or zeros in place of indices."""
    if not isinstance(value, Tensor) or not value.is_meta:
        return value.clone() if isinstance(value, Tensor) else value
    if value.is_floating_point():
        return torch.randn(value.shape, dtype=value.dtype)
    return torch.zeros(value.shape, dtype=value.dtype)


# *** 2: blocks hand hidden states on to each other ***


def _first(run: _Run, used: int) -> int:
    """Return the first block from which on each gets what the one before it made, of one shape."""
    if any(i not in run.made for i in range(used)):
        raise NoGroups("not all of its blocks run")
    first = max((i for i in run.unlike if i <= used), default=0)
    if first == used:
        raise NoGroups(run.unlike[first])
    return first
