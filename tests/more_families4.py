"""More tiny models: images that are read by queries, and encoders of the model's own.

They are merged into `families.FAMILIES`; see there for the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from families import BREAK, IMAGE, LAYERS, PAD, VOCABULARY, Family, _noise, _plain, _sizes, _text
from torch import Tensor

_QUERIES = {"vocab_size": 32, "encoder_hidden_size": 32, "cross_attention_frequency": 1}


_HEARD = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_blocks": 1,
    "num_attention_heads": 2,
    "ext_pw_out_channel": 32,
    "depthwise_separable_out_channel": 32,
    "nemo_conv_channels": 8,
    "audio_token_id": BREAK,
}


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


_KOSMOS = {
    "vocab_size": VOCABULARY,
    "embed_dim": 64,
    "layers": LAYERS,
    "ffn_dim": 96,
    "attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "eos_token_id": None,
}


def _marks(ids: Tensor) -> dict[str, Tensor]:
    return {"image_embeds_position_mask": (ids == IMAGE).long()}


def _numbered(batch: int) -> dict[str, Tensor]:
    # 8 x 8 patches behind the numbers of their rows and columns, from 1.
    places = torch.cartesian_prod(torch.arange(1.0, 9), torch.arange(1.0, 9))
    patches = torch.cat([places.expand(batch, -1, -1), _noise(batch, 64, 48)], dim=-1)
    return {"flattened_patches": patches}


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
    "phi4_multimodal": Family(
        lambda: _text(
            hf.Phi4MultimodalConfig,
            vision_config={
                **_sizes(image_size=16, patch_size=2),
                "crop_size": 16,
                "image_token_id": IMAGE,
            },
            audio_config=_HEARD,
        ),
        # A tile of 8 x 8 patches and the whole image in another: 4 x 4 tokens each with ends of
        # rows, and one between them.
        lambda batch: {
            "image_pixel_values": _noise(batch, 2, 3, 16, 16),
            "image_sizes": torch.tensor([[16, 16]] * batch),
            "image_attention_mask": torch.ones(batch, 2, 8, 8),
        },
        [IMAGE] * 41,
    ),
    "kosmos-2": Family(
        lambda: hf.Kosmos2Config(
            text_config=_KOSMOS,
            vision_config=_sizes(image_size=32, patch_size=4),
            latent_query_num=32,
        ),
        _plain(32),
        [IMAGE] * 32,
        _marks,
    ),
    "kosmos-2.5": Family(
        lambda: hf.Kosmos2_5Config(
            text_config=_KOSMOS,
            vision_config={
                **_sizes(patch_embed_hidden_size=48, head_dim=16, max_num_patches=64),
            },
            latent_query_num=32,
        ),
        _numbered,
        [IMAGE] * 32,
        _marks,
    ),
    "llama4": Family(
        lambda: hf.Llama4Config(
            vision_config={
                **_sizes(image_size=32, patch_size=2),
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            text_config=_text(
                dict,
                head_dim=16,
                intermediate_size_mlp=96,
                num_local_experts=2,
                attention_chunk_size=25,
                no_rope_layers=[1, 0, 1, 1, 0],
            ),
            image_token_index=IMAGE,
        ),
        _plain(32),
    ),
}
STATEFUL = ("llama4",)
"""Its layers keep no state, but count the tokens that they get."""
