"""Notes: what the passes know of a node, and of a graph as a whole.

A note is frozen, and lies under one key of `meta`. Copies of a node or a graph therefore carry the
notes of the original, and a note that is written on a copy leaves the original as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from deos_fx.models.blocks import Block

__all__ = ["MASK", "GraphNote", "Note", "annotate", "annotate_graph", "note_of", "note_of_graph"]

_KEY = "deos_fx"

MASK = "mask"
"""The ``axes`` of a mask. They follow from its role and not from its shape, since the same mask may
be None in one run and 4-D in the next.
"""


@dataclass(frozen=True)
class Note:
    """What the passes know of a node.

    Attributes:
        block: The transformer block that it calls. Written by `capture`, as are the next eight.
        keeps_shape: Whether it calls a block whose output has the shape and dtype of its input.
        indexes: Whether it calls a block in which a token sees keys that an index has chosen, its
            own or that of an earlier block.
        stateful: Whether it calls a block that keeps a state and no keys, by its code.
        example: The result of an opaque image encoder in the example run, until shapes are known.
        reads: If it is a guard: whether it reads what a tensor contains, and not only sizes.
        unrolled: If it is an iteration that was unrolled: its number of parts.
        masked: If it reads the rows that a mask selects: the number of axes of such a row.
        shared: If it makes a dict of what layers share outside the cache (keys) or hand on: pairs
            of a block that writes something and a block that reads it.
        axes: The axes that run over the tokens of the prompt: `MASK`, or nested like the value,
            with an axis or None for each leaf. Written by `annotate_token_spaces`, as are the next
            five.
        shape: The nested shape of the value in the example run.
        dtype: Its dtype, if it is one tensor.
        content: Whether it depends, by a differentiable path, on what a tensor contains and not
            only on its shape. Masks and rotary tables read only the shape of the hidden states that
            they are given.
        padding: Whether it is a mask that only says which tokens are padding.
        plain: If it makes a mask: whether the mask depends only on the order of the tokens and on
            padding. None for other nodes.
        root: If it is a value re-indexed for another token space: the name of the original value.
            Written by `OpenSpaces`.
        explains: Sites and roles in which `ReducedModel.explain` reads it. Written by
            `lower_reductions`.
    """

    block: Block | None = None
    keeps_shape: bool = False
    indexes: bool = False
    stateful: bool = False
    example: Any = None
    reads: bool = False
    unrolled: int | None = None
    masked: int | None = None
    shared: set[tuple[Block, Block]] | None = None
    axes: Any = None
    shape: Any = None
    dtype: torch.dtype | None = None
    content: bool = False
    padding: bool = False
    plain: bool | None = None
    root: str = ""
    explains: tuple[tuple[str, str], ...] = ()

    @property
    def is_mask(self) -> bool:
        """Return whether the value is an attention mask, or a dict of masks."""
        return isinstance(self.axes, str)

    @property
    def has_prompt_axis(self) -> bool:
        """Return whether the value, or a part of it, has a row for every token of the prompt."""
        if isinstance(self.axes, (tuple, list)):
            # Case: a tuple of values, each with an axis of its own.
            return any(axis is not None for axis in self.axes)
        return self.axes is not None


@dataclass(frozen=True)
class GraphNote:
    """What the passes know of a graph as a whole.

    Attributes:
        output_class: The model's class of output, whose fields the graph returns as a dict. A
            lowered graph adds the field ``spaces`` (see `lower_reductions`).
        blocks: All transformer blocks of the model, also those whose output nothing uses.
        explains: Site and role of a value that is a constant -> the value.
        in_front: Whether the model puts images in front of its text itself.
    """

    output_class: type
    blocks: Mapping[Block, nn.Module]
    explains: Mapping[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    in_front: bool = False


_NOTHING = Note()


def note_of(node: fx.Node) -> Note:
    """Return the note of a node; an empty one if none was written."""
    # Notes are frozen, so all nodes without one can share the empty one.
    note: Note = node.meta.get(_KEY, _NOTHING)
    return note


def annotate(node: fx.Node, **changes: Any) -> None:
    """Change attributes of a node's note."""
    node.meta[_KEY] = replace(note_of(node), **changes)


def note_of_graph(graph_module: fx.GraphModule) -> GraphNote:
    """Return the note of a captured graph, or of one that was made from it."""
    note: GraphNote = graph_module.meta[_KEY]
    return note


def annotate_graph(graph_module: fx.GraphModule, note: GraphNote) -> None:
    """Write the note of a graph, in place of the one it has."""
    graph_module.meta[_KEY] = note
