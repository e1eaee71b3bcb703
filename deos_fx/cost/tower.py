"""Find which blocks of a vision tower its features are read from, and whether patch by patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deos_fx.cost.measure import counting, once
from deos_fx.cost.twin import twin_of
from deos_fx.errors import NoGroups
from deos_fx.inputs.call import Call
from deos_fx.inputs.items import Kind, encoding, given_kinds
from deos_fx.models.encoding import encoded_by
from deos_fx.models.facts import ModelFacts
from deos_fx.models.families import own_name
from deos_fx.models.groups import find_groups

__all__ = ["BlocksOfGroups", "blocks_of_groups", "blocks_read"]


class BlocksOfGroups(NamedTuple):
    """The vision blocks after which groups of patches can be reduced.

    Attributes:
        blocks: Their indices. They end with the last that the features are read from.
        before: Why there are none before them; empty if they begin with the first.
    """

    blocks: range
    before: str


def blocks_read(facts: ModelFacts) -> tuple[int, ...]:
    """Return the vision blocks that the features of an image are read from, without other blocks.

    The tower is run on shapes twice. The second time every block returns one patch less, in a
    tensor of its own: the features have one token less if each is made of one patch, and a gradient
    tells which of these tensors they depend on. Mostly that is the last block that is used alone;
    the features of some models are made of several.

    Args:
        facts: The facts of a model whose images have one size.

    Returns:
        Indices of the blocks, in order; none if the features are not made of one patch each, or the
        encoder reads values that it computes.
    """
    return once(facts, "blocks read", lambda: _read(facts))


def _read(facts: ModelFacts) -> tuple[int, ...]:
    twin = twin_of(facts.model)
    blocks = [twin.get_submodule(path) for path in facts.blocks.vision]
    made: dict[nn.Module, Any] = {}
    for block in blocks:
        block.register_forward_hook(lambda block, _, output: made.update({block: output}))
    try:
        whole = _tokens(_encoded(twin, facts))
        leaves = {block: pytree.tree_map(_one_less, output) for block, output in made.items()}
        for block, output in leaves.items():
            block.forward = lambda *_, output=output, **__: output
        features = _encoded(twin, facts)
    except (RuntimeError, ValueError, TypeError, LookupError):
        # Case: code that reads values, that arranges the patches in a square, or that has a table
        # of numbers of patches.
        return ()
    if _tokens(features) != whole - 1:
        return ()
    given = [
        (i, leaf)
        for i, block in enumerate(blocks)
        for leaf in pytree.tree_leaves(leaves.get(block))
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    with torch.enable_grad():
        total = torch.stack([feature.float().sum() for feature in features]).sum()
        gradients = torch.autograd.grad(total, [leaf for _, leaf in given], allow_unused=True)
    read = (i for (i, _), gradient in zip(given, gradients, strict=True) if gradient is not None)
    return tuple(dict.fromkeys(read))


def blocks_of_groups(facts: ModelFacts, inputs: Mapping[str, Any]) -> BlocksOfGroups:
    """Return the vision blocks after which groups of patches, that make the features, can go.

    Args:
        facts: The facts of a model.
        inputs: Arguments of its forward, with images or with videos.

    Raises:
        NoGroups: If the features are not made of groups of patches of its blocks, see
            `find_groups`. This is not remembered: it may be for the sizes of these images alone.
    """
    (kind,) = given_kinds(inputs)
    return once(
        facts, f"blocks of groups in {kind.pixels}", lambda: _of_groups(facts, inputs, kind)
    )


def _of_groups(facts: ModelFacts, inputs: Mapping[str, Any], kind: Kind) -> BlocksOfGroups:
    model = facts.model
    core: Any = model.base_model
    method, given = encoding(facts, inputs, kind)
    encode = getattr(type(core), method, None)
    if encode is None:
        raise NoGroups("no method of the model encodes its images")
    given = {own_name(name, encode): value for name, value in given.items()}
    blocks = [model.get_submodule(path) for path in facts.blocks.vision]
    try:
        found = find_groups(core, encode, blocks, (), given)
    except NoGroups:
        raise
    # How code of a family fails where gradients or made-up weights go through it is up to it.
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        (first, *_) = str(error).splitlines() or [""]
        raise NoGroups(
            f"its patches cannot be followed ({type(error).__name__}: {first})"
        ) from error
    layouts = (prompt.layout for prompt in Call.of(facts, inputs).prompts)
    placeholders = sum(sum(layout.sizes) for layout in layouts if layout)
    if len(found.groups) != placeholders:
        # Case: rows of an image end in tokens that are not told apart from others.
        raise NoGroups(
            f"patches make {len(found.groups)} visual tokens, and there are {placeholders} "
            "placeholders for such"
        )
    return BlocksOfGroups(range(found.first, found.used), found.before)


def _encoded(twin: Any, facts: ModelFacts) -> list[Tensor]:
    """Encode an image of the config's size."""
    with counting(), torch.enable_grad():
        features = encoded_by(twin.base_model, "get_image_features", facts.image())
    return [leaf for leaf in pytree.tree_leaves([features]) if leaf is not None]


def _tokens(features: list[Tensor]) -> int:
    return sum(feature.numel() // feature.shape[-1] for feature in features)


def _one_less(value: Any) -> Any:
    """Return a tensor of one patch less than hidden states [I, T, d]; other values as they are."""
    if not isinstance(value, Tensor) or value.ndim != 3:
        return value
    images, tokens, width = value.shape
    return torch.empty(images, tokens - 1, width, dtype=value.dtype, device="meta").requires_grad_()
