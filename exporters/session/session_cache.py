"""A cache whose keys and values stay with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from deos_fx.exporters.session.session import as_tensor, ort_value
from deos_fx.tokens.cache import ReducedCache

__all__ = ["SessionCache"]


class SessionCache(ReducedCache):
    """A cache whose keys and values are ONNX Runtime's, on its device.

    Args:
        config: The text model's config.

    Attributes:
        states: ``past_key_values.<layer>.key`` and ``.value`` -> OrtValue.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.states: dict[str, Any] = {}
        self._length = 0

    @property
    def rows(self) -> int:
        """Return the number of rows of the batch in the cache; 0 if it is empty."""
        return next((value.shape()[0] for value in self.states.values()), 0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen so far, including dropped ones."""
        return self._length

    def take_states(self, outputs: Mapping[str, Any], length: int) -> None:
        """Keep the keys and values that a run returned.

        Args:
            outputs: Outputs of the run by name.
            length: Tokens seen so far, including those of the run.
        """
        self.states = {
            name.replace("present.", "past_key_values."): value
            for name, value in outputs.items()
            if name.startswith("present.")
        }
        self._length = length

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
        """Change the rows of everything in the cache, as beam search does."""
        super()._rows(change)
        self.states = {
            name: ort_value(change(as_tensor(value))) for name, value in self.states.items()
        }
