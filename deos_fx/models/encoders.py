"""The inputs that images come in, and the methods of a model that encode them."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["ENCODERS", "PIXELS", "features_of", "is_encoder"]

PIXELS = ("pixel_values", "pixel_values_videos")
"""The inputs that images and videos come in."""

# Method of a model's core that encodes images or videos -> name of its node.
ENCODERS = {"get_image_features": "image_encoder", "get_video_features": "video_encoder"}


def is_encoder(node: fx.Node) -> bool:
    """Return whether the node encodes images or videos as a whole."""
    return node.op == "call_module" and node.target in ENCODERS.values()


def features_of(output: Any) -> Any:
    """Return the part of an image encoder's output that enters the prompt.

    It is [I, V, d], or a list of [V, d].
    """
    if output.pooler_output is not None or "deepstack_features" not in output:
        return output.last_hidden_state if output.pooler_output is None else output.pooler_output
    # Case: only features for several layers; the first of them replace the placeholders.
    return output.deepstack_features[0][1]
