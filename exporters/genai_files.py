"""The files of an export for onnxruntime-genai: names, the format, and what the engine reads."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from deos_fx.exporters.graphs.parts import FEATURES, Parts
from deos_fx.models.facts import facts_of
from deos_fx.passes.rewrite.split_embeddings import EMBEDDINGS

__all__ = ["CONFIG", "FORMAT", "VERSION", "genai_config"]

# What a manifest says of itself.
FORMAT, VERSION = "genai", 1

CONFIG = "genai_config.json"
"""What the engine reads."""

# Of the engine's types of models, the one whose images all have as many tokens as the config says.
# It runs three graphs, as others do, and adds nothing for one family.
_TYPE = "videochat_flash_qwen"

# Settings of `generate` with the same names and meanings.
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams")


def genai_config(model: PreTrainedModel, parts: Parts, device: str) -> dict[str, Any]:
    """Return what ``genai_config.json`` says.

    Args:
        model: The model.
        parts: Its graphs.
        device: ``cpu`` or ``cuda``.
    """
    text, settings = model.config.get_text_config(), model.generation_config
    states = parts.graphs["decoder"].inputs["past_key_values"]
    _, heads, _, width = states["0"]["key"].shape
    ends = settings.eos_token_id
    search = {name: getattr(settings, name, None) for name in _SEARCH}
    ids = {
        "bos_token_id": settings.bos_token_id,
        # A list, or one.
        "eos_token_id": ends,
        "pad_token_id": settings.pad_token_id,
    }
    return {
        "model": {
            "type": _TYPE,
            **{name: value for name, value in ids.items() if value is not None},
            "image_token_id": facts_of(model).image_token,
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "vision": {
                "filename": "vision.onnx",
                "num_visual_tokens": parts.images[0][1],
                "inputs": {"pixel_values": "pixel_values"},
                "outputs": {"image_features": FEATURES},
            },
            "embedding": {
                "filename": "embedding.onnx",
                "inputs": {"input_ids": "input_ids", "image_features": FEATURES},
                "outputs": {"inputs_embeds": EMBEDDINGS},
            },
            "decoder": {
                "filename": "decoder.onnx",
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [] if device == "cpu" else [{device: {}}],
                },
                "hidden_size": text.hidden_size,
                "num_attention_heads": text.num_attention_heads,
                "num_key_value_heads": heads,
                "head_size": width,
                "num_hidden_layers": len(states),
                "inputs": {
                    "inputs_embeds": EMBEDDINGS,
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            **{name: value for name, value in search.items() if value is not None},
            "max_length": text.max_position_embeddings,
            "past_present_share_buffer": False,
        },
    }
