"""What decoder layers hand on to later ones beside hidden states, such as keys they have chosen.

In a model's code it is an output of one layer and an argument of another. In a graph, where the
node of a layer stands for its hidden states, it goes through a dict that all of these layers are
given. What it says of tokens is not looked into: it holds between layers that have the same tokens,
so the graph notes which layers read what another one has handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from deos_fx.errors import CaptureError
from deos_fx.models.blocks import Block
from deos_fx.models.views import with_forward
from deos_fx.passes.notes import annotate

__all__ = ["Handed", "HandedOn", "Handing", "Place", "places_of"]

_ARGUMENT = "handed_on"

Place = tuple[str, int]
"""Name of a layer, and the place of a value among its outputs."""


class HandedOn(dict[Place, Any]):
    """The values that the layers of one run have handed on."""


class Handed:
    """Stands in the model's code for what a layer has handed on: only a layer may be given it.

    Args:
        place: Where it comes from.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse to be computed with."""
        raise self.refused()

    def _refuse(self, *args: Any) -> NoReturn:
        raise self.refused()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __getitem__ = __iter__ = __len__ = _refuse

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to be computed with."""
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        raise next(leaf for leaf in leaves if isinstance(leaf, Handed)).refused()

    def refused(self) -> CaptureError:
        """Return the error of code that does anything but give it to a layer."""
        return CaptureError(
            f"{self.place[0]} hands more to the next layers than hidden states, in a way that "
            "cannot be followed when tokens are dropped. Use a model whose layers are given "
            "tensors of earlier ones as they are."
        )


def places_of(arguments: Mapping[str, Any]) -> dict[str, Place]:
    """Return those arguments of a layer that earlier ones have handed on, and from where."""
    return {name: x.place for name, x in arguments.items() if isinstance(x, Handed)}


class Handing:
    """Lets the layers of a capture hand on values through a node of the graph.

    Args:
        tracer: Records the capture; its views of blocks gain those that take part.
    """

    def __init__(self, tracer: Any) -> None:
        self.tracer = tracer
        self._node: fx.Node | None = None
        # Pairs of a layer that has handed on something and a layer that has read it.
        self._read: set[tuple[Block, Block]] = set()

    def given(
        self, module: nn.Module, takes: Mapping[str, Place], kwargs: Mapping[str, Any]
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return a layer that takes from the dict, and the arguments that are left besides."""
        rest = {name: value for name, value in kwargs.items() if name not in takes}
        return _taking(module, takes), {**rest, _ARGUMENT: self.tracer.proxy(self._dict())}

    def hand_on(
        self, node: fx.Node, module: nn.Module, takes: Mapping[str, Place], others: Sequence[Any]
    ) -> tuple[nn.Module, tuple[Handed | None, ...]]:
        """Let a layer hand on its outputs beside hidden states.

        Args:
            node: Its node, which has run.
            module: The model's own layer.
            takes: What it has taken.
            others: The outputs.

        Returns:
            The layer for the node, and what stands for the outputs in the model's code.

        Raises:
            CaptureError: If they are anything but tensors.
        """
        name = str(node.target)
        if not all(isinstance(x, (Tensor, type(None))) for x in others):
            raise Handed((name, 1)).refused()
        with self.tracer.graph.inserting_before(node):
            node.update_kwarg(_ARGUMENT, self._dict())
        values, layer = self.tracer.values[self._dict()], self.tracer.running_block()
        stand_ins: list[Handed | None] = []
        for i, x in enumerate(others, start=1):
            # What a layer has passed on as it got it is still that of the layer it comes from.
            place = getattr(x, "place", (name, i))
            stand_ins.append(None if x is None else Handed(place))
            if x is not None and place == (name, i):
                values[place] = _noted(x, place, partial(self._note, layer))
        self.tracer.views[layer] = view = _handing_on(_taking(module, takes), name)
        return view, tuple(stand_ins)

    def reads(self, layer: Block) -> bool:
        """Return whether a layer has read what an earlier one has handed on."""
        return any(reader == layer for _, reader in self._read)

    def _note(self, maker: Block) -> None:
        self._read.add((maker, self.tracer.running_block()))

    def _dict(self) -> fx.Node:
        """Return the node of the dict; each run starts with an empty one."""
        if self._node is None:
            node = self.tracer.create_node("call_function", HandedOn, (), {}, _ARGUMENT)
            annotate(node, shared=self._read)
            self._node = node
        return self._node


def _taking(module: nn.Module, takes: Mapping[str, Place]) -> nn.Module:
    """Return a view of a layer that takes some arguments from the dict."""

    def around(forward: Callable[..., Any], *args: Any, handed_on: HandedOn, **kwargs: Any) -> Any:
        # What no layer has handed on in this part of a graph, none of its layers reads.
        taken = {name: handed_on.get(place) for name, place in takes.items()}
        return forward(*args, **kwargs, **taken)

    return with_forward(module, around)


def _handing_on(module: nn.Module, name: str) -> nn.Module:
    """Return a view of a layer that hands on, and returns its hidden states alone."""

    def around(forward: Callable[..., Any], *args: Any, handed_on: HandedOn, **kwargs: Any) -> Any:
        hidden, *others = forward(*args, handed_on=handed_on, **kwargs)
        handed_on.update({(name, i): x for i, x in enumerate(others, start=1) if x is not None})
        return hidden

    return with_forward(module, around)


class _Noted(Tensor):
    """A value that notes when something is computed with it."""

    place: Place
    note: Callable[[], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on plain tensors."""
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, _Noted):
                value.note()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _noted(value: Tensor, place: Place, note: Callable[[], None]) -> Tensor:
    """Return a value that notes when something is computed with it."""
    noted = value.as_subclass(_Noted)
    noted.place, noted.note = place, note
    return noted
