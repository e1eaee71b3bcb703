"""More tiny models: decoders most of whose layers keep a state (linear attention, Mamba).

They are merged into `families.FAMILIES`; see there for the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from families import (
    _MARKS,
    _MROPE,
    _SHORT,
    _TOKENS,
    _WIDE,
    BREAK,
    END,
    IMAGE,
    START,
    Family,
    _clip,
    _noise,
    _patches,
    _plain,
    _qwen,
    _sizes,
    _text,
    _types,
)
from torch import Tensor

_ROPE = {**_MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}
_KINDS = ["linear_attention"] * 2 + ["full_attention", "linear_attention", "full_attention"]
_DELTA = {
    "head_dim": 16,
    "rope_parameters": _ROPE,
    "layer_types": _KINDS,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# Keys, values and both parts of a layer are convolved.
_CONVOLVED = {
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 24,
    "d_rel": 4,
    "rel_extent": 32,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2 + ["hybrid_sliding"],
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
_HEARD = {"n_mel_bins": 4, "mel_vocab_size": 8}
_VISION = {**_WIDE, "depth": 2, "num_position_embeddings": 64}


def _strip(batch: int) -> dict[str, Tensor]:
    # 16 x 32 patches of 4 x 4 pixels, side by side in one strip for all images; 4 x 4 of them make
    # a visual token.
    return {
        "pixel_values": _noise(1, 3, 4, batch * 512 * 4),
        "target_sizes": torch.tensor([[16, 32]] * batch, dtype=torch.int32),
    }


def _minicpm(config: Any, **more: Any) -> Family:
    def build() -> Any:
        text = _text(dict, model_type="qwen3_5_text", **_DELTA)
        vision = _sizes(image_size=128, patch_size=4, insert_layer_id=0)
        return config(text_config=text, vision_config=vision, insert_layer_id=0, **_TOKENS, **more)

    return Family(build, _strip, _SHORT)


def _llava(**text: Any) -> Family:
    def build() -> Any:
        return hf.LlavaConfig(
            vision_config=_clip(), text_config=_text(dict, **text), image_token_index=IMAGE
        )

    return Family(build, _plain(32))


MORE: dict[str, Family] = {
    "qwen3_5": Family(
        lambda: _qwen(hf.Qwen3_5Config, _DELTA, _VISION, **_MARKS), _patches, _SHORT, _types
    ),
    "qwen3_5_moe": Family(
        lambda: _qwen(
            hf.Qwen3_5MoeConfig,
            {
                **_DELTA,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
            },
            _VISION,
            **_MARKS,
        ),
        _patches,
        _SHORT,
        _types,
    ),
    "minicpmv4_6": _minicpm(hf.MiniCPMV4_6Config),
    "minicpm_ocr": _minicpm(hf.MiniCPMOcrConfig, downsample_mode="16x"),
    "minicpmv4_7": Family(
        _minicpm(
            hf.MiniCPMV4_7Config,
            image_start_id=START,
            image_end_id=END,
            slice_start_id=BREAK,
            slice_end_id=BREAK + 1,
            newline_id=BREAK + 2,
        ).config,
        _strip,
        _SHORT,
        _types,
    ),
    "inkling_mm_model": Family(
        lambda: hf.InklingConfig(
            text_config=_text(dict, mlp_layer_types=["dense"] * 5, **_CONVOLVED),
            vision_config={"patch_size": 4, "num_hidden_layers": 2},
            audio_config=_HEARD,
            image_token_id=IMAGE,
        ),
        lambda batch: {"pixel_values": _noise(batch * 32, 2, 4, 4, 3)},
        _SHORT,
    ),
    "inkling2": Family(
        lambda: hf.Inkling2Config(
            text_config=_text(
                dict, unpadded_vocab_size=128, n_layers_per_attn_res_block=2, **_CONVOLVED
            ),
            vision_config=_sizes(
                patch_size=4, posemb_grid_size=8, projection_hidden_dim=32, text_hidden_size=64
            ),
            audio_config={**_HEARD, "text_hidden_size": 64},
            image_token_id=IMAGE,
        ),
        lambda batch: {
            "pixel_values": _noise(batch * 32, 8, 8, 3),
            "image_grid_thw": torch.tensor([[1, 4, 8]] * batch),
        },
        _SHORT,
    ),
    "nemotron_h_omni": Family(
        lambda: hf.NemotronH_Omni_Reasoning_V3_Config(
            text_config=_text(
                dict,
                model_type="nemotron_h",
                head_dim=16,
                layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"]
                + ["full_attention"],
                mamba_num_heads=4,
                mamba_head_dim=16,
                n_groups=2,
                ssm_state_size=16,
                chunk_size=16,
                expand=1,
            ),
            vision_config=_sizes(
                patch_size=4, image_size=32, max_img_size=64, video_temporal_patch_size=2
            ),
            vision_hidden_size=32,
            projector_hidden_size=64,
            audio_config=None,
            **_TOKENS,
        ),
        lambda batch: {
            "pixel_values": _noise(batch * 128, 48),
            "image_grid_hw": torch.tensor([[8, 16]] * batch),
        },
        _SHORT,
    ),
}
# Every layer attends and has a state.
MORE["llava_falcon_h1"] = _llava(
    model_type="falcon_h1",
    head_dim=16,
    mamba_d_ssm=64,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_d_state=16,
    mamba_n_groups=1,
    mamba_chunk_size=16,
)
MORE["llava_jamba"] = _llava(
    model_type="jamba",
    attn_layer_period=2,
    attn_layer_offset=0,
    num_experts=1,
    mamba_d_state=8,
    mamba_dt_rank=4,
)
TWINS = frozenset(
    {
        "qwen3_5_moe",
        "minicpm_ocr",
        "minicpmv4_6",
        "inkling_mm_model",
        "inkling2",
        "llava_falcon_h1",
        "llava_jamba",
    }
)
"""Families whose structure is that of another one: fewer tests do for them."""
STATEFUL = (*MORE,)
