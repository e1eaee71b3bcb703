"""Name what analysis cannot infer: names of single families, and those that all families share.

Everything else (the role of each module, the number of tokens of an image, values added to them in
the decoder, tensors that run over the prompt) is read from the model, its config or the captured
graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

__all__ = [
    "COORDINATES",
    "ENCODERS",
    "FEATURES",
    "FORMER_IMAGES",
    "IMAGE_TOKENS",
    "IN_FRONT",
    "INDEXES",
    "MARKS",
    "PATCH_NUMBERS",
    "PER_LAYER",
    "PIXELS",
    "POSITIONS",
    "QUERIES",
    "READ",
    "WRITER",
    "SHORTCUTS",
    "TEXT_IDS",
    "VIDEO_TOKENS",
    "auto_class",
    "features_of",
    "is_encoder",
    "own_name",
]


IMAGE_TOKENS = ("image_token_id", "image_token_index")
"""Entries of a config that may hold the id of the placeholder of one visual token."""

IN_FRONT = -1
"""Id of the placeholders that a call gets where a model has none and puts images in front: git."""

VIDEO_TOKENS = ("video_token_id", "video_token_index")
"""Entries that may hold the id of the placeholder of one visual token of a video."""

FORMER_IMAGES = frozenset(
    {"pixel_values_images", "image_patches", "image_pixel_values", "flattened_patches"}
)
"""Other names of ``pixel_values``: video_llava, fuyu, phi4_multimodal, kosmos-2.5."""

FEATURES = "image_embeds"
"""Argument of a text model with the features of images: kosmos-2, kosmos-2.5."""

MARKS = "image_embeds_position_mask"
"""Input that is 1 where a visual token is, in place of ids that say so: kosmos-2, kosmos-2.5."""

POSITIONS = "create_position_ids_from_input_ids"
"""Method of a module that gives a token its position by the ids up to it: kosmos-2, kosmos-2.5."""

WRITER = "embed_tokens_extend"
"""Module of a model's core that encodes images and writes them over their placeholders.

phi4_multimodal.
"""

READ = frozenset({"qformer_input_ids", "qformer_attention_mask"})
"""Inputs with the text that an image encoder reads beside the image: instructblip."""

QUERIES = frozenset({"query_tokens", "latent_query"})
"""Parameters with a learned vector for each visual token, which stands for no place in an image.

blip-2, instructblip, kosmos-2, kosmos-2.5.
"""

PATCH_NUMBERS = frozenset({"image_token_pooling", "video_token_pooling"})
"""Inputs whose values are indices of patches, counted through a whole batch: molmo2."""

SHORTCUTS = {"_maybe_slice_kv_shared_inputs": 4}
"""Methods that trim tensors to what the last logits need -> how many arguments they return.

While capturing they are replaced by the identity. gemma4, gemma4_unified."""


PER_LAYER = ("per_layer_inputs", "hidden_size_per_layer_input")
"""Argument of a decoder with embeddings for every layer [B, N, layers, d], and d in its config.

gemma4, gemma3n.
"""

TEXT_IDS = "ple_input_ids"
"""Argument of a decoder whose layers look up n-grams of token ids [B, N]: qwen4_exp."""

INDEXES = "indexer_types"
"""Entry of a config with a word per layer: ``shared`` if it sees keys that an earlier one chose.

glm5_next, hy_v4_vl, mistral_large4.
"""

COORDINATES = "get_rope_index"
"""Method of a model's core that gives each token a position of several coordinates (mRoPE)."""

PIXELS = ("pixel_values", "pixel_values_videos")
"""The inputs that images and videos come in."""

# Method of a model's core (its base_model) that encodes images or videos -> name of its node.
ENCODERS = {"get_image_features": "image_encoder", "get_video_features": "video_encoder"}


def auto_class(config: Any) -> Any:
    """Return transformers' auto class of the models of a config; None if they read no images."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    # Case: a model that does is among those of text, as phi4_multimodal.
    among_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and hasattr(config, "vision_config")
    return AutoModelForCausalLM if among_text else None


def is_encoder(node: fx.Node) -> bool:
    """Return whether the node encodes images or videos as a whole."""
    return node.op == "call_module" and node.target in (*ENCODERS.values(), WRITER)


def own_name(name: str, forward: Callable[..., Any]) -> str:
    """Return what a model's forward calls an input."""
    taken = inspect.signature(forward).parameters
    former = (own for own in taken if name == PIXELS[0] and own in FORMER_IMAGES)
    return name if name in taken else next(former, name)


def features_of(output: Any) -> Any:
    """Return the part of an image encoder's output that enters the prompt.

    It is [I, V, d], or a list of [V, d].
    """
    if output.pooler_output is not None:
        # Case: features made for the prompt; last_hidden_state is then the tower's.
        return output.pooler_output
    if "deepstack_features" not in output:
        return output.last_hidden_state
    # Case: only features for several layers; the first of them replace the placeholders.
    return output.deepstack_features[0][1]
