"""Write what a model puts in front of its text over the placeholders that a call has got.

The model joins features of images and embeddings of text, and flags of both. It is given the whole
prompt in place of the text, and where it would make that longer, the first tokens are replaced: the
graph is that of a model with placeholders.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from deos_fx.errors import CaptureError
from deos_fx.models.families import IN_FRONT
from deos_fx.passes.capture.proxy import ValueProxy

__all__ = ["InFront"]

# Functions that make a tensor of one number -> that number, or None where it is an argument.
_FILLED = {"full": None, "full_like": None, "ones": 1, "ones_like": 1, "zeros": 0, "zeros_like": 0}


class InFront:
    """Joins of something in front of a prompt, in a call whose prompt has places for it.

    Args:
        tracer: Records the capture.
        arguments: The proxies of the call's inputs, by name.
    """

    def __init__(self, tracer: Any, arguments: Mapping[str, Any]) -> None:
        self.tracer = tracer
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        self._lengths = {int(x.value.shape[-1]) for x in (ids, mask) if isinstance(x, ValueProxy)}
        self._mask = mask
        # Flags [B, N] of the placeholders; None in a call that has none, of later text.
        self._places = ids == IN_FRONT if bool((ids.value == IN_FRONT).any()) else None

    def given(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments as the model takes them: placeholders are no words of it."""
        if self._places is None:
            return dict(arguments)
        given = {**arguments, "input_ids": arguments["input_ids"].clamp(min=0)}
        if "labels" in given and "shift_labels" not in given:
            # The next token's label at every token: shortened like the logits that it goes with.
            given["shift_labels"] = functional.pad(given["labels"][:, 1:], (0, 1), value=-100)
        return given

    def whole(self, value: Any, key: Any) -> Any:
        """Return the key of a part of a prompt's values [B, N, d], with what is in front in it.

        A loss is that of the text alone; visual tokens have no labels.
        """
        if self._places is None or not isinstance(key, tuple) or len(key) < 2:
            return key
        rows, part, *rest = key
        # A start that is a proxy is another number at every call, and not what is in front.
        start = part.start if isinstance(part, slice) else None
        cut = type(start) is int and start == int(self._places.value[0].sum())
        of_prompt = value.ndim == 3 and value.shape[:2] == self._places.value.shape
        return (rows, slice(None, part.stop), *rest) if cut and of_prompt else key

    def joined(self, parts: Any, dim: int = 0) -> Any:
        """Return what stands for two joined values; None if they are joined as they are.

        Args:
            parts: The values that the model joins.
            dim: The axis.

        Raises:
            CaptureError: If what is put in front is neither features of images nor the same flag.
        """
        front, prompt = parts if len(parts) == 2 else (None, None)
        if not (isinstance(front, ValueProxy) and isinstance(prompt, ValueProxy)):
            return None
        axis = dim % prompt.value.ndim
        if axis != 1 or int(prompt.value.shape[1]) not in self._lengths:
            return None
        if prompt is self._mask or self._places is None:
            # Case: flags of padding have been made for the whole prompt, or nothing is in front.
            return prompt
        if front.value.ndim == 2:
            # Case: flags. They must be alike, since they are written by what is a placeholder.
            flagged: Any = prompt
            return torch.where(self._places, self._flag(front.node), flagged)
        if front.value.shape[:2].numel() != int(self._places.value.sum()):
            raise self._refused(f"{list(front.value.shape)} for {self._places.value.sum()} places")
        return prompt.masked_scatter(self._places[..., None], self._once(front))

    def _flag(self, node: fx.Node) -> int:
        """Return the number that all values of a node are."""
        while node.target is operator.getitem:
            node = node.all_input_nodes[0]
        value: Any = _FILLED.get(getattr(node.target, "__name__", ""), node)
        value = node.args[1] if value is None else value
        if not isinstance(value, int):
            raise self._refused(f"{node.name}, whose values are not known to be one number")
        return value

    def _once(self, front: Any) -> Any:
        """Return the features of every image once: a call has as many as there are rows."""
        node = front.node
        if node.target != "repeat":
            return front
        source, *times = node.args
        known = [self.tracer.values.get(x, x) for x in times]
        if any(x != 1 for x in known):
            raise self._refused("features of an image that several rows share")
        for x in times:
            if isinstance(x, fx.Node):
                int(ValueProxy(x, self.tracer, 1))
        return ValueProxy(source, self.tracer, self.tracer.values[source])

    def _refused(self, what: str) -> CaptureError:
        return CaptureError(
            f"The model puts {what} in front of the text, which cannot be followed when tokens are "
            "dropped. Use a model whose visual tokens take the places of image placeholders."
        )
