"""More tiny models: families that transformers has since 5.24.

They are merged into `families.TWINS`; see there for the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from families import (
    _MERGING,
    _MROPE,
    _SHORT,
    _TOKENS,
    _WIDE,
    END,
    IMAGE,
    START,
    Family,
    _noise,
    _patches,
    _pixtral,
    _sized,
    _sizes,
    _text,
    _types,
)

_FEW = {"moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
_DENSE_FIRST = ["dense"] + ["sparse"] * 4

# A token sees 8 of the keys before it, which an index chooses.
_CHOSEN = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 24,
    "index_n_heads": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 2,
}
_OF_WINDOWS = (
    *("num_key_value_heads", "q_lora_rank", "kv_lora_rank"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
)
_LAST_SHARED = ["full"] * 4 + ["shared"]


def _glm(*kinds: str, indexer_types: list[str]) -> Family:
    def build() -> Any:
        text = _text(
            dict,
            **_CHOSEN | {"qk_rope_head_dim": 0},
            layer_types=[f"{kind}_attention" for kind in kinds],
            indexer_types=indexer_types,
            index_kpool=2,
            linear_head_dim=16,
            linear_num_heads=2,
            hc_mult=2,
            hc_sinkhorn_iters=3,
        )
        vision = {**_WIDE, "depth": 2, "image_size": 32, "projection_intermediate_size": 64}
        return hf.Glm5NextConfig(text_config=text, vision_config=_MERGING | vision, **_TOKENS)

    return Family(build, _patches, _SHORT)


TWINS: dict[str, Family] = {
    "glm5_next": _glm(*["linear"] * 2, "indexed", "linear", "indexed", indexer_types=["full"] * 5),
    # The last layer sees the keys that the one before has chosen.
    "glm5_next_shared": _glm("indexed", "linear", *["indexed"] * 3, indexer_types=_LAST_SHARED),
    "dots3_note": Family(
        lambda: hf.Dots3NoteConfig(
            text_config=_text(
                dict,
                **_CHOSEN,
                head_dim=32,
                shared_experts_intermediate_size=32,
                sliding_window=24,
                layer_types=["sliding_attention", "indexed_attention"] * 2 + ["sliding_attention"],
                **{f"swa_{name}": _CHOSEN[name] for name in _OF_WINDOWS},
                swa_num_attention_heads=4,
                swa_head_dim=32,
            ),
            vision_config={
                **_sizes(patch_size=4, adapter_in_dim=32, adapter_out_dim=64),
                "mlp_layer_types": ["dense"] * 2,
            },
            audio_config={**_sizes(adapter_input_size=32, adapter_out_dim=64), "feature_size": 8},
            **_TOKENS,
        ),
        lambda batch: {
            "pixel_values": _noise(batch * 128, 48),
            "image_grid_thw": torch.tensor([[1, 8, 16]] * batch),
        },
        _SHORT,
    ),
    # Rows of an image end in a learned vector.
    "hy_v4_vl": Family(
        lambda: hf.HYV4VLConfig(
            text_config=_text(
                dict, **_CHOSEN, indexer_types=_LAST_SHARED, hc_mult=2, rope_parameters=dict(_MROPE)
            ),
            vision_config=_sizes(patch_size=4, max_image_size=64, out_hidden_size=64),
            **_TOKENS,
        ),
        lambda batch: {
            "pixel_values": _noise(batch * 128, 48),
            "image_grid_thw": torch.tensor([[1, 8, 16]] * batch),
        },
        [START, *[IMAGE] * (4 * 9), END],
        _types,
    ),
    # The last layer has no keys of its own, but an index.
    "mistral_large4": Family(
        lambda: hf.MistralLarge4Config(
            text_config=_text(
                dict,
                **_CHOSEN,
                kv_source_layers=[0, 1, 2, 3, 3],
                no_rope_layers=[1, 0, 1, 1, 1],
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            ),
            vision_config=_pixtral(2),
            image_token_index=IMAGE,
        ),
        _sized(3, 32, 32, height=32, width=32),
    ),
    # Rows of an image end in a learned vector, and so do both of its sides.
    "hunyuan_vl": Family(
        lambda: hf.HunYuanVLConfig(
            text_config=_text(
                dict,
                head_dim=16,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 2, 2, 2],
                },
            ),
            vision_config={
                **_sizes(patch_size=4, max_image_size=64, min_image_size=16),
                "out_hidden_size": 64,
            },
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        ),
        lambda batch: {
            "pixel_values": _noise(batch * 128, 48),
            "image_grid_thw": torch.tensor([[1, 8, 16]] * batch),
        },
        [START, *[IMAGE] * (1 + 4 * 9 + 1), END],
        _types,
    ),
    "muse_spark": Family(
        lambda: hf.MuseSparkConfig(
            text_config=_text(
                dict,
                head_dim=16,
                moe_hidden_size=32,
                sliding_window=24,
                mlp_layer_types=_DENSE_FIRST,
                **_FEW,
            ),
            vision_config={
                **_sizes(patch_size=4, max_position_embeddings=64),
                "pos_emb_height": 8,
                "pos_emb_width": 8,
            },
            audio_config={"out_hidden_size": 64, "hidden_sizes": [16] * 4, "depths": [1] * 4},
            out_hidden_size=128,
            projector_hidden_size=64,
            **_TOKENS,
        ),
        _patches,
        _SHORT,
    ),
    # Two parts of an image in 4 x 4 tokens each, and the whole in 8 x 8.
    "step3p7": Family(
        lambda: hf.Step3p7Config(
            text_config=_text(
                dict,
                head_dim=16,
                n_routed_experts=4,
                share_expert_dim=32,
                sliding_window=24,
                layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
                mlp_layer_types=_DENSE_FIRST,
                **_FEW,
            ),
            vision_config=_sizes(image_size=64, patch_size=2, max_position_embeddings=1024),
            image_token_id=IMAGE,
        ),
        lambda batch: {
            "pixel_values": _noise(batch, 3, 64, 64),
            "pixel_values_local": _noise(batch * 2, 3, 32, 32),
            "num_local_patches": torch.tensor([2] * batch),
        },
        [IMAGE] * (2 * 16 + 64),
    ),
}
"""Families whose structure is that of another one: fewer tests do for them."""
STATEFUL = ("glm5_next", "glm5_next_shared")
