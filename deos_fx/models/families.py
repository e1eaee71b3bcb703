"""What analysis cannot infer of a model family: one row each.

Everything else (which module is what, how many tokens an image has, what is added to them in the
decoder, what runs over the prompt) is read from the model, its config or the captured graph.
"""

from __future__ import annotations

__all__ = ["FORMER_IMAGES", "IMAGE_TOKENS", "PATCH_NUMBERS", "SHORTCUTS"]

IMAGE_TOKENS = ("image_token_id", "image_token_index")
"""Where a config has the id of the placeholder of one visual token."""

FORMER_IMAGES = frozenset({"pixel_values_images", "image_patches"})
"""What processors still call ``pixel_values``: video_llava, fuyu."""

PATCH_NUMBERS = frozenset({"image_token_pooling", "video_token_pooling"})
"""Inputs whose values are numbers of patches, counted through a whole batch: molmo2."""

SHORTCUTS = {"_maybe_slice_kv_shared_inputs": 4}
"""Methods that leave out, by values, what the last logits do not need -> how many of their
arguments come back. They are not called: all comes back whole. gemma4, gemma4_unified."""
