"""Tables of the names in model families that analysis cannot infer.

Everything else (the role of each module, the number of tokens of an image, values added to them in
the decoder, tensors that run over the prompt) is read from the model, its config or the captured
graph.
"""

from __future__ import annotations

__all__ = ["FORMER_IMAGES", "IMAGE_TOKENS", "PATCH_NUMBERS", "SHORTCUTS", "VIDEO_TOKENS"]

IMAGE_TOKENS = ("image_token_id", "image_token_index")
"""Entries of a config that may hold the id of the placeholder of one visual token."""

VIDEO_TOKENS = ("video_token_id", "video_token_index")
"""Entries that may hold the id of the placeholder of one visual token of a video."""

FORMER_IMAGES = frozenset({"pixel_values_images", "image_patches"})
"""Other names of inputs that processors still call ``pixel_values``: video_llava, fuyu."""

PATCH_NUMBERS = frozenset({"image_token_pooling", "video_token_pooling"})
"""Inputs whose values are indices of patches, counted through a whole batch: molmo2."""

SHORTCUTS = {"_maybe_slice_kv_shared_inputs": 4}
"""Methods that trim tensors to what the last logits need -> how many arguments they return.

While capturing they are replaced by the identity. gemma4, gemma4_unified."""
