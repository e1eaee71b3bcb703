"""The cache of exported graphs, which stays where ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from deos_fx.exporters.session import Session, as_tensor, past_name
from deos_fx.exporters.shared import ort_value
from deos_fx.tokens.cache import ReducedCache

__all__ = ["SessionCache", "past_of"]

ROOM = 128
"""Tokens that a buffer has room for when it is made, so that one copy serves as many steps."""

# Keys and values are [B, heads, tokens, D]; states of convolutions have an axis less.
_AXES, _TOKENS = 4, 2


class SessionCache(ReducedCache):
    """A cache whose keys and values are ONNX Runtime's, on its device.

    Args:
        config: The text model's config.

    Attributes:
        states: ``past_key_values.<layer>.key`` and ``.value`` -> OrtValue [B, heads, tokens, D],
            perhaps with room for more tokens.
        lengths: Name -> tokens that it holds.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.states: dict[str, Any] = {}
        self.lengths: dict[str, int] = {}
        # Not that of the states: layers may hold fewer tokens than were seen.
        self._length = 0

    def begin(self, states: Mapping[str, Any]) -> None:
        """Take the states of a text of which nothing has been seen yet."""
        self.states = dict(states)
        self._measure()

    def why_no_images(self, layers: int) -> str:
        """Return why a later turn cannot bring images, in words."""
        return "an exported model reads images only in its prefill graph, on an empty cache"

    @property
    def rows(self) -> int:
        """Return the number of rows of the batch in the cache; 0 if it is empty."""
        return next((value.shape()[0] for value in self.states.values()), 0)

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Return the number of tokens seen so far, including dropped ones."""
        return self._length

    def states_for(self, session: Session) -> dict[str, Any]:
        """Return the keys and values as a session takes them: with room, or as long as they are.

        Args:
            session: The session that runs next, and writes new keys into what has room.
        """
        for name, length in self.lengths.items():
            value = self.states[name]
            room = value.shape()[_TOKENS] - length
            if name in session.buffers and not room:
                self.states[name] = _resized(value, length, length + ROOM)
            elif name not in session.buffers and room:
                self.states[name] = _resized(value, length, length)
        return self.states

    def take_states(self, outputs: Mapping[str, Any], length: int, session: Session) -> None:
        """Keep the keys and values that a run returned.

        Args:
            outputs: Outputs of the run by name.
            length: Tokens seen so far, including those of the run.
            session: What ran.
        """
        before = self.lengths
        self.states = past_of(outputs)
        self._measure()
        # In place, one token was written.
        self.lengths |= {name: before[name] + 1 for name in session.buffers}
        self._length = length

    def _measure(self) -> None:
        """Note how many tokens states hold that are as long as what they hold."""
        self.lengths = {
            name: shape[_TOKENS]
            for name, value in self.states.items()
            if len(shape := value.shape()) == _AXES
        }

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens: the keys and values belong to ONNX Runtime.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Tokens cannot be taken back from an exported model's cache: leave out assistant_model "
            "and prompt_lookup_num_tokens, or generate with the ReducedModel in PyTorch."
        )

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of everything in the cache, as beam search does.

        On CUDA, torch needs CUDA as well for this.
        """
        super()._rows(change)
        self.states = {
            name: ort_value(change(as_tensor(value))) for name, value in self.states.items()
        }


def past_of(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys and values that a run gave, under the names that the next one takes."""
    return {past: value for name, value in outputs.items() if (past := past_name(name))}


def _resized(value: Any, length: int, size: int) -> Any:
    """Return keys or values that hold `length` tokens, with space for `size`."""
    held = as_tensor(value)[:, :, :length]
    resized = torch.zeros(*held.shape[:2], size, *held.shape[3:], dtype=held.dtype)
    resized[:, :, :length] = held
    return ort_value(resized)
