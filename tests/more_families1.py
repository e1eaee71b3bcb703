"""More tiny models: grids and positions with coordinates, experts, windows, convolutions.

They are merged into `families.FAMILIES`; see there for the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from families import (
    _MARKS,
    _MERGING,
    _MROPE,
    _SHORT,
    _TOKENS,
    _WIDE,
    _WINDOWS,
    BREAK,
    END,
    IMAGE,
    START,
    VIDEO,
    VOCABULARY,
    Family,
    _grid,
    _noise,
    _patches,
    _plain,
    _qwen,
    _siglip,
    _sizes,
    _text,
    _types,
)
from torch import Tensor

_FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXPERTS = {"num_experts": 4, **_FEW}
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, **_FEW}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_INTERLEAVED = {**_MROPE, "mrope_interleaved": True}
_DEEP = {
    **_WIDE,
    "depth": 3,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}
_WINDOWED = {**_WIDE, "depth": 2, "window_size": 16, "fullatt_block_indexes": [1]}
_GLM = {**_WIDE, "depth": 2, "image_size": 32}
_GLM_MARKS = {
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": BREAK,
    "video_end_token_id": BREAK + 1,
}
_VISION = _sizes(patch_size=4)
_HEARING = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "output_dim": 64,
    "num_mel_bins": 16,
}


def _glm(config: Any) -> Family:
    kinds = {"model_type": "glm4v_text"}, {"model_type": "glm4v_vision", **_GLM}
    return Family(lambda: _qwen(config, *kinds, **_GLM_MARKS), _patches, _SHORT, _types)


def _experts_by_type(ids: Tensor) -> dict[str, Tensor]:
    types = _types(ids)
    return types | {"moe_mm_token_type_ids": types["mm_token_type_ids"]}


def _sam_pixels(batch: int) -> dict[str, Tensor]:
    sides = {"pixel_values": 32, "high_res_pixel_values": 128}
    return {name: _noise(batch, 3, side, side) for name, side in sides.items()}


def _spatial(batch: int) -> dict[str, Tensor]:
    return {
        "pixel_values": _noise(batch, 128, 48),
        "spatial_shapes": torch.tensor([[8, 16]] * batch),
        "pixel_attention_mask": torch.ones(batch, 128, dtype=torch.int64),
    }


def _places(height: int, width: int, pixels: int) -> Callable[[int], dict[str, Tensor]]:
    """Patches with their column and row."""
    grid = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    places = torch.stack(grid, dim=-1).reshape(1, -1, 2)
    return lambda batch: {
        "pixel_values": _noise(batch, height * width, pixels),
        "image_position_ids": places.repeat(batch, 1, 1),
    }


def _gemma4(**text: Any) -> Family:
    layers = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    heads = {"head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
    sizes = {"sliding_window": 24, "layer_types": layers, "vocab_size_per_layer_input": VOCABULARY}
    return Family(
        lambda: hf.Gemma4Config(
            text_config=_text(dict, **heads | sizes | text),
            vision_config={**_VISION, "head_dim": 16, "num_key_value_heads": 2}
            | {"pooling_kernel_size": 2, "position_embedding_size": 16},
            **_TOKENS,
        ),
        _places(8, 16, 48),
        _SHORT,
        _types,
    )


MORE: dict[str, Family] = {
    "lfm2_vl": Family(
        lambda: hf.Lfm2VlConfig(
            text_config=_text(
                hf.Lfm2Config,
                layer_types=["conv", "conv", "full_attention", "conv", "full_attention"],
            ),
            vision_config=hf.Siglip2VisionConfig(**_VISION, num_patches=256, vision_use_head=False),
            image_token_id=IMAGE,
            projector_hidden_size=64,
        ),
        _spatial,
        _SHORT,
    ),
    "gemma4": _gemma4(use_bidirectional_attention="vision"),
    "gemma4_unified": Family(
        lambda: hf.Gemma4UnifiedConfig(
            text_config=_text(dict, head_dim=16, global_head_dim=16, sliding_window=24),
            vision_config={"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32}
            | {"mm_posemb_size": 16, "output_proj_dims": 32},
            **_TOKENS,
        ),
        _places(4, 8, 192),
        _SHORT,
        _types,
    ),
    "lfm3_vl": Family(
        lambda: hf.Lfm3VlConfig(
            text_config=_text(
                dict,
                model_type="lfm3",
                head_dim=16,
                sliding_window=24,
                layer_types=["conv", "sliding_attention", "full_attention", "conv", "conv"],
            ),
            vision_config={**_VISION, "num_key_value_heads": 2},
            projector_hidden_size=64,
            **_TOKENS,
            **_MARKS,
        ),
        _patches,
        _SHORT,
    ),
    "minimax_m3_vl": Family(
        lambda: hf.MiniMaxM3VLConfig(
            text_config=_text(
                dict,
                head_dim=16,
                rotary_dim=16,
                dense_intermediate_size=64,
                shared_intermediate_size=32,
                num_local_experts=4,
                **_FEW,
            ),
            vision_config={**_VISION, "image_size": 32},
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            projector_hidden_size=64,
        ),
        _patches,
        _SHORT,
    ),
    "muse_glimmer": Family(
        lambda: hf.MuseGlimmerConfig(
            text_config=_text(dict, head_dim=16, **_WINDOWS),
            vision_config={**_VISION, "pos_emb_height": 8, "pos_emb_width": 8},
            out_hidden_size=128,
            projector_hidden_size=64,
            tie_word_embeddings=False,
            **_TOKENS,
        ),
        _patches,
        _SHORT,
    ),
    "qwen3_vl_moe": Family(
        lambda: _qwen(
            hf.Qwen3VLMoeConfig,
            {"head_dim": 16, "rope_parameters": _INTERLEAVED, **_EXPERTS},
            _DEEP,
            **_MARKS,
        ),
        _patches,
        _SHORT,
        _types,
    ),
    "glm4v_moe": Family(
        lambda: _qwen(
            hf.Glm4vMoeConfig,
            {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}, **_ROUTED},
            _GLM,
            **_GLM_MARKS,
        ),
        _patches,
        _SHORT,
        _types,
    ),
    "glm46v": _glm(hf.Glm46VConfig),
    "glmga": _glm(hf.GlmgaConfig),
    "glm_ocr": Family(
        lambda: _qwen(hf.GlmOcrConfig, {"head_dim": 16}, _GLM, **_GLM_MARKS),
        _patches,
        _SHORT,
        _types,
    ),
    "ernie4_5_vl_moe": Family(
        lambda: _qwen(
            hf.Ernie4_5_VLMoeConfig,
            {
                "moe_intermediate_size": [32, 16],
                "moe_num_experts": 4,
                "moe_k": 2,
                "rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]},
            },
            {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2},
            **_GLM_MARKS,
        ),
        _grid(48),
        _SHORT,
        _experts_by_type,
    ),
    "paddleocr_vl": Family(
        lambda: _qwen(
            hf.PaddleOCRVLConfig, {"head_dim": 16}, {**_VISION, "image_size": 32}, **_MARKS
        ),
        _grid(3, 4, 4),
        _SHORT,
        _types,
    ),
    "qwen2_5_omni_thinker": Family(
        lambda: hf.Qwen2_5OmniThinkerConfig(
            text_config=_text(dict, rope_parameters=_MROPE),
            vision_config=_MERGING | _WINDOWED,
            audio_config=_HEARING,
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            **_MARKS,
        ),
        _patches,
        _SHORT,
    ),
    "qwen3_omni_moe_thinker": Family(
        lambda: hf.models.qwen3_omni_moe.Qwen3OmniMoeThinkerConfig(
            text_config=_text(dict, head_dim=16, rope_parameters=_INTERLEAVED, **_EXPERTS),
            vision_config=_MERGING | _DEEP,
            audio_config={**_HEARING, "downsample_hidden_size": 16},
            **_TOKENS,
            **_MARKS,
        ),
        _patches,
        _SHORT,
    ),
    "cosmos3_edge": Family(
        lambda: _qwen(
            hf.Cosmos3EdgeConfig,
            {"head_dim": 16, "rope_parameters": _INTERLEAVED},
            {**_VISION, "num_patches": 64},
            projector_hidden_size=64,
            **_MARKS,
        ),
        _grid(48),
        _SHORT,
        _types,
    ),
    "cosmos3_omni": Family(
        lambda: _qwen(
            hf.Cosmos3OmniConfig,
            {"model_type": "qwen3_vl_text", "head_dim": 16, "rope_parameters": _INTERLEAVED},
            {"model_type": "qwen3_vl_vision", **_DEEP},
            **_MARKS,
        ),
        _patches,
        _SHORT,
        _types,
    ),
    "cohere_compass": Family(
        lambda: _qwen(
            hf.CohereCompassConfig,
            {
                "rope_parameters": dict.fromkeys(_WINDOWS["layer_types"], _INTERLEAVED),
                **_WINDOWS,
            },
            _DEEP,
            **_MARKS,
        ),
        _patches,
        _SHORT,
        _types,
    ),
    "exaone4_5": Family(
        lambda: hf.Exaone4_5_Config(
            text_config=_text(dict, model_type="exaone4", **_WINDOWS),
            vision_config=_MERGING | _WINDOWED | {"num_key_value_heads": 2},
            **_TOKENS,
        ),
        _patches,
        _SHORT,
    ),
    "kimi_k25": Family(
        lambda: hf.Kimi_K25Config(
            text_config=_text(
                dict, model_type="deepseek_v3", first_k_dense_replace=2, **_LATENT, **_ROUTED
            ),
            vision_config={**_VISION, "pos_emb_height": 8, "pos_emb_width": 8},
            projection_hidden_size=32,
            **_MARKS,
            **_TOKENS,
        ),
        _grid(3, 4, 4),
        _SHORT,
    ),
    "video_llama_3": Family(
        lambda: hf.VideoLlama3Config(
            text_config=_text(dict, model_type="qwen2"), vision_config=_VISION, **_TOKENS
        ),
        _grid(48, image_merge_sizes=2),
        _SHORT,
    ),
    "cohere2_vision": Family(
        lambda: hf.Cohere2VisionConfig(
            vision_config=_siglip(32, 2),
            text_config=_text(hf.Cohere2Config, **_WINDOWS),
            image_token_id=IMAGE,
            alignment_intermediate_size=64,
        ),
        _plain(32),
    ),
    "deepseek_vl": Family(
        lambda: hf.DeepseekVLConfig(
            text_config=_text(), vision_config=_siglip(32, 4), image_token_id=IMAGE
        ),
        _plain(32),
    ),
    "deepseek_vl_hybrid": Family(
        lambda: hf.DeepseekVLHybridConfig(
            text_config=_text(),
            vision_config=_siglip(32, 4),
            high_res_vision_config=_sizes(
                model_type="sam_vision_model",
                image_size=128,
                patch_size=4,
                output_channels=16,
                global_attn_indexes=[1],
                mlp_dim=64,
                window_size=6,
            ),
            image_token_id=IMAGE,
        ),
        _sam_pixels,
    ),
    "janus": Family(
        lambda: hf.JanusConfig(
            text_config=_text(),
            vision_config={**_VISION, "image_size": 32, "projection_dim": 64, "mlp_ratio": 2.0},
            vq_config={
                "num_embeddings": 16,
                "base_channels": 32,
                "latent_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": 32,
                "image_token_embed_dim": 32,
            },
            image_token_id=IMAGE,
        ),
        _plain(32),
    ),
}
TWINS = frozenset(
    {
        "gemma4_unified",
        "lfm3_vl",
        "minimax_m3_vl",
        "muse_glimmer",
        "glm46v",
        "glmga",
        "glm_ocr",
        "paddleocr_vl",
        "qwen2_5_omni_thinker",
        "cosmos3_edge",
        "cosmos3_omni",
        "video_llama_3",
        "cohere2_vision",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "janus",
    }
)
"""Families whose structure is that of another one: fewer tests do for them."""
STATEFUL = ("lfm2_vl", "lfm3_vl")
