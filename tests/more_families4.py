"""More tiny models: images that are read by queries, and encoders of the model's own.

They are merged into `families.FAMILIES`; see there for the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from families import IMAGE, Family, _plain, _sizes, _text
from torch import Tensor

_QUERIES = {"vocab_size": 32, "encoder_hidden_size": 32, "cross_attention_frequency": 1}


def _querying(config: Any, text: dict[str, Any], **more: Any) -> Family:
    def build() -> Any:
        return config(
            vision_config=_sizes(image_size=32, patch_size=4),
            qformer_config=_sizes(**_QUERIES),
            text_config=text,
            num_query_tokens=32,
            image_token_index=IMAGE,
        )

    return Family(build, _plain(32), [IMAGE] * 32, **more)


def _question(ids: Tensor) -> dict[str, Tensor]:
    """The text as the Q-Former reads it: here the first words."""
    words = (ids * (ids != IMAGE)).sum(dim=1, keepdim=True) % 29
    return {"qformer_input_ids": torch.cat([words, words + 1], dim=1)}


MORE: dict[str, Family] = {
    "blip-2": _querying(
        hf.Blip2Config,
        _text(
            dict,
            model_type="opt",
            ffn_dim=96,
            word_embed_proj_dim=64,
        ),
    ),
    "instructblip": _querying(
        hf.InstructBlipConfig, _text(dict, model_type="llama"), extra=_question
    ),
}
TWINS: frozenset[str] = frozenset()
