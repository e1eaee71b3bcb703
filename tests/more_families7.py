"""More tiny models: images as entries of a codebook, several streams in front, towers of timm.

They are merged into `families.TWINS`; see there for the inputs.
"""

from __future__ import annotations

from importlib.util import find_spec
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
    _noise,
    _patches,
    _plain,
    _sized,
    _text,
    _types,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

# Pixels become entries of a codebook of 32.
_CODES = {
    "codebook_size": 32,
    "base_channels": 32,
    "num_res_blocks": 1,
}


def _qwen4() -> Any:
    """Layers look up n-grams of ids, keep a state, and choose keys by averages of two."""
    kinds = ["linear"] * 2 + ["indexed", "linear", "indexed"]
    text = _text(
        dict,
        head_dim=16,
        rope_parameters=dict(_MROPE),
        layer_types=[f"{kind}_attention" for kind in kinds],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        hc_count=2,
        hc_lowrank=8,
        ple_layer_ids=[1],
        ple_embed_dim=64,
        heads_per_ngram=2,
        ngram_vocab_size_base=50,
        split_ngram_parts=2,
        eos_token_id=2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=2,
    )
    vision = {**_MERGING, **_WIDE, "depth": 2, "num_position_embeddings": 64}
    return hf.Qwen4ExpConfig(text_config=text, vision_config=vision, **_TOKENS, **_MARKS)


def _emu3() -> Any:
    codes = {f"<|visual token {i:06d}|>": 60 + i for i in range(32)}
    vision = {
        **_CODES,
        "embed_dim": 4,
        "latent_channels": 4,
        "channel_multiplier": [1, 1, 2, 2],
        "hidden_size": 64,
    }
    return hf.Emu3Config(
        text_config=_text(dict),
        vq_config=vision,
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": BREAK, **codes},
    )


def _apertus() -> Any:
    sounds = hf.AutoConfig.for_model("wavtokenizer_encoder", codebook_size=8)
    text = {**_text(dict), "vocab_size": VOCABULARY + 40, "rope_parameters": {"rope_theta": 1e4}}
    vision = {
        **_CODES,
        "embed_dim": 8,
        "latent_channels": 8,
        "channel_multiplier": [1, 1, 2],
        "attn_resolutions": [8],
        "resolution": 32,
    }
    return hf.Apertus1p5Config(
        text_config=text,
        vision_config=vision,
        audio_config=sounds,
        image_token_id=IMAGE,
        audio_token_id=VIDEO,
        image_token_offset=VOCABULARY,
        audio_token_offset=VOCABULARY + 32,
    )


def _gemma3n(vision: Any, tokens: int, shared: int = 0) -> Any:
    """Two streams of hidden states, in front of the batch, and an embedding for every layer."""
    text = _text(
        dict,
        head_dim=16,
        vocab_size=VOCABULARY + 32,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        num_kv_shared_layers=shared,
        laurel_rank=8,
        activation_sparsity_pattern=[0.5] + [0.0] * 4,
        **_WINDOWS,
    )
    audio = {
        "vocab_size": 16,
        "vocab_offset": VOCABULARY + 16,
        "hidden_size": 32,
        "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 1,
        "sscp_conv_channel_size": [8, 8],
    }
    return hf.Gemma3nConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_id=IMAGE,
        audio_token_id=VIDEO,
        boi_token_id=START,
        eoi_token_id=END,
        boa_token_id=125,
        eoa_token_id=126,
        vision_soft_tokens_per_image=tokens,
    )


class _StandInConfig(hf.Gemma3nVisionConfig):
    model_type = "stand_in_for_timm"


class _StandIn(hf.PreTrainedModel):
    """A tower of one convolution in place of one of timm, which is not installed everywhere."""

    config_class = _StandInConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.convolution = torch.nn.Conv2d(3, config.hidden_size, 4, stride=4)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.convolution(pixel_values))


hf.AutoModel.register(_StandInConfig, _StandIn)
_OF_IMAGES = {"vocab_size": 16, "vocab_offset": VOCABULARY}


def _stand_in() -> Any:
    return _StandInConfig(hidden_size=32, **_OF_IMAGES)


def _mobile() -> Any:
    return hf.Gemma3nVisionConfig(
        architecture="mobilenetv5_300m_enc", hidden_size=2048, **_OF_IMAGES
    )


def _perception() -> Any:
    tower = {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "img_size": [32, 32],
        "patch_size": 4,
        "global_pool": "",
        "ref_feat_shape": [8, 8],
    }
    vision = {
        "model_type": "timm_wrapper",
        "architecture": "vit_pe_core_large_patch14_336",
        "hidden_size": 32,
        "do_pooling": False,
        "num_classes": 0,
        "model_args": tower,
    }
    return hf.PerceptionLMConfig(
        text_config={**_text(dict), "model_type": "llama"}, vision_config=vision, **_TOKENS
    )


def _fast() -> Any:
    vision = {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_mci3",
        "do_pooling": True,
        "global_pool": "avg",
        "hidden_size": 128,
        "model_args": {"inference_mode": True, "layers": [1] * 5, "embed_dims": [64] * 5},
    }
    return hf.FastVlmConfig(
        text_config={**_text(dict), "model_type": "qwen2"},
        vision_config=vision,
        image_token_index=IMAGE,
        image_seq_length=16,
    )


HAS_TIMM = find_spec("timm") is not None
OF_TIMM: dict[str, Family] = {
    "gemma3n": Family(lambda: _gemma3n(_mobile(), 256), _plain(256), [IMAGE] * 256),
    "perception_lm": Family(
        _perception, lambda batch: {"pixel_values": _noise(batch, 1, 3, 32, 32)}
    ),
    "fast_vlm": Family(_fast, _plain(256), [IMAGE] * 16),
}
"""Families whose towers are those of timm."""
TWINS: dict[str, Family] = {
    "qwen4_exp": Family(_qwen4, _patches, _SHORT, _types),
    # 8 x 8 entries, and an end of each row.
    "emu3": Family(_emu3, _sized(3, 64, 64, height=64, width=64), [IMAGE] * (8 * 9)),
    "gemma3n": Family(lambda: _gemma3n(_stand_in(), 64), _plain(32)),
    **(OF_TIMM if HAS_TIMM else {}),
}
ONLY_NEWER: dict[str, Family] = {
    "apertus1p5": Family(_apertus, _sized(3, 32, 32, height=32, width=32)),
}
STATEFUL = ("qwen4_exp",)
