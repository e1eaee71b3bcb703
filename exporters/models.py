"""Which models can be exported, and for which device."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from deos_fx.exporters.fuse import DEVICES
from deos_fx.tokens.cache import ReducedCache

__all__ = ["ATTENTION", "check_model", "device_of"]

ATTENTION = ("sdpa", "eager")
"""Attention implementations with an ONNX form."""


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that has no ONNX form, before any compute.

    Raises:
        ValueError: If its attention implementation has none, or a layer holds nothing of its own
            or more than keys, values and a state.
    """
    _check_attention(model)
    _check_caches(model)


def device_of(model: PreTrainedModel, device: str | None) -> str:
    """Return the device that an export is for.

    Args:
        model: The model.
        device: ``cpu``, ``cuda``, or None: CUDA if the model is there or in half precision.

    Raises:
        ValueError: If it is none of these.
    """
    if device is None:
        half = model.dtype in (torch.float16, torch.bfloat16)
        return "cuda" if half or model.device.type == "cuda" else "cpu"
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}; give {' or '.join(map(repr, DEVICES))}")
    return device


def _check_caches(model: PreTrainedModel) -> None:
    """Refuse layers that hold nothing of their own, or an index besides."""
    cache = ReducedCache(model.config.get_text_config())
    if cache.has_index:
        raise ValueError(
            f"{type(model).__name__} has layers that choose keys by an index, and an exported "
            "graph takes and gives keys, values and states alone. Run the reduced model in PyTorch."
        )
    # Such a layer counts as filled from the start.
    if any(getattr(layer, "is_initialized", False) for layer in cache.layers):
        raise ValueError(
            f"{type(model).__name__} has layers that hold nothing of their own, and an exported "
            "graph takes and gives what every layer holds. Run the reduced model in PyTorch."
        )


def _check_attention(model: PreTrainedModel) -> None:
    """Refuse attention implementations that have no ONNX form."""
    for name in model.config.sub_configs:
        # The config of a part that the model does not have is None.
        implementation = getattr(getattr(model.config, name), "_attn_implementation", None)
        if implementation not in (None, *ATTENTION):
            raise ValueError(
                f"the model's attention implementation is {implementation!r}, which "
                f"has no ONNX form; load the model with attn_implementation={ATTENTION[0]!r}"
            )
