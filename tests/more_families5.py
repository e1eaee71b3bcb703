"""More tiny models: families that transformers has since 5.24.

They are merged into `families.TWINS`; see there for the inputs.
"""

from __future__ import annotations

import torch
import transformers as hf
from families import (
    _SHORT,
    _TOKENS,
    END,
    IMAGE,
    START,
    Family,
    _grid,
    _noise,
    _patches,
    _sizes,
    _text,
    _types,
)

_FEW = {"moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
_DENSE_FIRST = ["dense"] + ["sparse"] * 4

TWINS: dict[str, Family] = {
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
        _grid(48),
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
