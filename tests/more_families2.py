"""More tiny models: towers and text models of other kinds in LLaVA, and families that differ more.

They are merged into `families.FAMILIES`; see there for the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from families import (
    _ANYRES,
    _MERGING,
    _SHORT,
    _TOKENS,
    _WIDE,
    _WINDOWS,
    BREAK,
    END,
    IMAGE,
    PAD,
    START,
    VIDEO,
    VOCABULARY,
    Family,
    _clip,
    _noise,
    _patches,
    _pixtral,
    _plain,
    _siglip,
    _sized,
    _sizes,
    _text,
)
from torch import Tensor

_GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 16, **_WINDOWS}
_VISION = _sizes(image_size=32, patch_size=4)
_POOLED = {"num_key_value_heads": 2, "head_dim": 16}
_FULL = {"vision_feature_select_strategy": "full"}


def _llava(vision: Callable[[], Any], text: Any, more: dict[str, Any], **sizes: Any) -> Family:
    def config() -> Any:
        words = _text(text, **sizes)
        return hf.LlavaConfig(
            vision_config=vision(), text_config=words, image_token_index=IMAGE, **more
        )

    return Family(config, _plain(32))


def _tiles(batch: int) -> dict[str, Tensor]:
    whole = torch.ones(batch, 2, 16, 16, dtype=torch.int64)
    return {"pixel_values": _noise(batch, 2, 3, 16, 16), "pixel_attention_mask": whole}


def _molmo_patches(batch: int) -> dict[str, Tensor]:
    # Two neighbouring patches of 4 x 4 pixels make a token. A processor counts patches through the
    # batch; here all have the numbers, and the image, of the first prompt, so that a test can take
    # a row out as it is.
    return {
        "pixel_values": _noise(1, 64, 48).repeat(batch, 1, 1),
        "image_token_pooling": torch.arange(64).reshape(-1, 2).repeat(batch, 1),
        "image_grids": torch.tensor([[8, 4, 0, 0]] * batch),
    }


MORE: dict[str, Family] = {
    "llava_dinov2": _llava(lambda: hf.Dinov2Config(**_VISION), hf.Olmo2Config, {}),
    "paligemma2": Family(
        lambda: hf.PaliGemmaConfig(
            vision_config=_siglip(32, 4),
            text_config=_text(hf.Gemma2Config, **_GEMMA2),
            image_token_index=IMAGE,
            projection_dim=64,
        ),
        _plain(32),
        extra=lambda ids: {"token_type_ids": torch.zeros_like(ids)},
    ),
    "ovis2": Family(
        lambda: hf.Ovis2Config(
            vision_config=hf.Ovis2VisionConfig(**_VISION, vocab_size=64),
            text_config=_text(hf.Qwen2Config),
            image_token_id=IMAGE,
            visual_indicator_token_ids=[START, END, BREAK],
            vocab_size=VOCABULARY,
            hidden_size=64,
            tie_word_embeddings=False,
        ),
        _plain(32),
        [START, *[IMAGE] * 64, END],
    ),
    "molmo2": Family(
        lambda: hf.Molmo2Config(
            vision_config=_sizes(patch_size=4, num_position_embeddings=64, **_POOLED),
            adapter_config={
                **_POOLED,
                "hidden_size": 32,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "text_hidden_size": 64,
                "vision_feature_layer": [-1],
            },
            text_config=_text(hf.Molmo2TextConfig, head_dim=16),
            image_patch_id=IMAGE,
        ),
        _molmo_patches,
        [IMAGE] * 32,
        lambda ids: {"mm_token_type_ids": (ids == IMAGE).long()},
    ),
    "granite_docling": Family(
        lambda: hf.GraniteDoclingConfig(
            vision_config=_sizes(
                image_size=32,
                patch_size=2,
                out_hidden_size=64,
                scale_factor=2,
                deepstack_visual_indexes=[0],
            ),
            text_config=_text(hf.GraniteDoclingTextConfig, attention_multiplier=0.25),
            image_token_id=IMAGE,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        ),
        lambda batch: {
            "pixel_values": _noise(batch, 1, 3, 32, 32),
            "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool),
        },
    ),
    "fuyu": Family(
        lambda: hf.FuyuConfig(
            text_config=_text(hf.PersimmonConfig), image_token_id=IMAGE, patch_size=4
        ),
        lambda batch: {"pixel_values": _noise(batch, 64, 48)},
        [*[IMAGE] * 8, BREAK] * 8,
    ),
    "llava_mistral": _llava(_clip, hf.MistralConfig, {}, sliding_window=24),
    "llava_gemma2": _llava(lambda: _siglip(32, 4), hf.Gemma2Config, _FULL, **_GEMMA2),
    "llava_mixtral": _llava(lambda: _siglip(32, 4), hf.MixtralConfig, _FULL, num_local_experts=4),
    "granite_vision": Family(
        lambda: hf.LlavaNextConfig(
            vision_config=_siglip(16, 4),
            text_config=_text(hf.GraniteConfig),
            vision_feature_layer=[-2, -1],
            **_FULL,
            **_ANYRES,
        ),
        _sized(5, 3, 16, 16, height=32, width=32),
        [IMAGE] * (16 + 8 * 9),
    ),
    "llava_next_video": Family(
        lambda: hf.LlavaNextVideoConfig(
            vision_config=_clip(16), text_config=_text(), video_token_index=VIDEO, **_ANYRES
        ),
        _sized(5, 3, 16, 16, height=32, width=32),
        [IMAGE] * (16 + 8 * 9),
    ),
    "aria": Family(
        lambda: hf.AriaConfig(
            vision_config=hf.Idefics3VisionConfig(**_VISION),
            text_config=_text(hf.AriaTextConfig, moe_num_experts=4),
            projector_patch_to_query_dict={64: 16},
            image_token_index=IMAGE,
        ),
        _plain(32),
        [IMAGE] * 16,
    ),
    "idefics2": Family(
        lambda: hf.Idefics2Config(
            vision_config=_sizes(image_size=16, patch_size=4),
            perceiver_config={
                "hidden_size": 64,
                "resampler_n_latents": 16,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 1,
            },
            text_config=_text(hf.MistralConfig, sliding_window=None),
            image_token_id=IMAGE,
        ),
        _tiles,
        [START, *[IMAGE] * 16, END] * 2,
    ),
    "granite4_vision": Family(
        lambda: hf.Granite4VisionConfig(
            vision_config={
                "model_type": "siglip_vision_model",
                **_VISION,
                "hidden_size": 64,
                "vision_use_head": False,
            },
            text_config=_text(hf.Granite4VisionTextConfig),
            qformer_config={
                "model_type": "blip_2_qformer",
                "num_hidden_layers": 1,
                "intermediate_size": 64,
                "cross_attention_frequency": 1,
                "use_qformer_text_input": False,
            },
            downsample_rate="1/2",
            deepstack_layer_map=[[-2, 0], [-1, 3]],
            spatial_target_layers=[2],
            image_token_index=IMAGE,
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
            **_FULL,
        ),
        _sized(5, 3, 32, 32, height=64, width=64),
        [IMAGE] * (16 + 8 * 9),
    ),
    "lighton_ocr": Family(
        lambda: hf.LightOnOcrConfig(
            vision_config=_pixtral(2),
            text_config=_text(hf.Qwen3Config, head_dim=16),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        ),
        _sized(3, 32, 32, height=32, width=32),
    ),
    "qianfan_ocr": Family(
        lambda: hf.QianfanOCRConfig(
            vision_config=_sizes(image_size=[32, 32], patch_size=[2, 2]),
            text_config=_text(hf.Qwen3Config, head_dim=16),
            image_token_id=IMAGE,
        ),
        _plain(32),
    ),
    "hyperclovax_v2": Family(
        lambda: hf.HyperCLOVAXVisionV2Config(
            vision_config=hf.Qwen2_5_VLVisionConfig(**_MERGING, **_WIDE, depth=1),
            text_config=_text(hf.HyperCLOVAXConfig),
            **_TOKENS,
        ),
        _patches,
        _SHORT,
    ),
    "video_llava": Family(
        lambda: hf.VideoLlavaConfig(
            vision_config=_clip(),
            text_config=_text(),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
        ),
        lambda batch: {"pixel_values_images": _noise(batch, 3, 32, 32)},
    ),
    "deepseek_ocr2": Family(
        lambda: hf.DeepseekOcr2Config(
            vision_config={
                "sam_config": _sizes(
                    image_size=64,
                    patch_size=4,
                    output_channels=8,
                    global_attn_indexes=[1],
                    window_size=6,
                    mlp_dim=64,
                    downsample_channels=[16, 32],
                ),
                "encoder_config": _text(dict, num_hidden_layers=1, hidden_size=32),
            },
            text_config=_text(
                hf.DeepseekOcr2TextConfig,
                n_routed_experts=4,
                moe_intermediate_size=32,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                mlp_layer_types=["dense"] + ["sparse"] * 4,
            ),
            image_token_id=IMAGE,
        ),
        _plain(64),
        [IMAGE] * (144 + 1),
    ),
    "chameleon": Family(
        lambda: _text(
            hf.ChameleonConfig,
            vq_config={
                "embed_dim": 8,
                "num_embeddings": 8,
                "latent_channels": 8,
                "resolution": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
            },
            vocabulary_map={
                "<image>": IMAGE,
                **{f"IMGIMG{letter}Z": 100 + i for i, letter in enumerate("ABCDEFGH")},
            },
        ),
        _plain(16),
    ),
    # It puts the 65 features of an image, CLS among them, in front of the text itself.
    "git": Family(
        lambda: hf.GitConfig(
            **_text(dict),
            vision_config=_sizes(3, image_size=32, patch_size=4),
        ),
        _plain(32),
        [],
    ),
}
TWINS = frozenset(
    {
        "granite4_vision",
        "llava_mistral",
        "llava_gemma2",
        "llava_mixtral",
        "granite_vision",
        "llava_next_video",
        "aria",
        "idefics2",
        "lighton_ocr",
        "qianfan_ocr",
        "hyperclovax_v2",
        "video_llava",
        "deepseek_ocr2",
        "chameleon",
        "git",
    }
)
"""Families whose structure is that of another one: few tests do for them."""
