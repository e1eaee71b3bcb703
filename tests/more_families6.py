"""More tiny models: decoders in which an index chooses the keys that a token sees.

They are merged into `families.TWINS`; see there for the inputs.
"""

from __future__ import annotations

from typing import Any

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
    _grid,
    _patches,
    _pixtral,
    _sized,
    _sizes,
    _text,
    _types,
)

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


MORE: dict[str, Family] = {
    "glm5_next": _glm(*["linear"] * 2, "indexed", "linear", "indexed", indexer_types=["full"] * 5),
    # The second layer sees the keys that the first has chosen.
    "glm5_next_shared": _glm(
        *["indexed"] * 3, "linear", "indexed", indexer_types=["full", "shared", *["full"] * 3]
    ),
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
        _grid(48),
        _SHORT,
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
}
ONLY_NEWER: dict[str, Family] = {
    # Rows of an image end in a learned vector.
    "hy_v4_vl": Family(
        lambda: hf.HYV4VLConfig(
            text_config=_text(
                dict, **_CHOSEN, indexer_types=_LAST_SHARED, hc_mult=2, rope_parameters=dict(_MROPE)
            ),
            vision_config=_sizes(patch_size=4, max_image_size=64, out_hidden_size=64),
            **_TOKENS,
        ),
        _grid(48),
        [START, *[IMAGE] * (4 * 9), END],
        _types,
    ),
}
"""Those that transformers has since 5.24."""
STATEFUL = ("glm5_next", "glm5_next_shared")
