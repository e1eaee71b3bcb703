"""Build the reference model: a small LLaVA made of the configuration classes of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from deos_fx.reference.scenes import (
    BACKDROPS,
    COLORS,
    COLUMNS,
    GRID,
    IMAGE_SIZE,
    NUMBERS,
    PATCH_SIZE,
    ROWS,
)

__all__ = [
    "SPECIAL",
    "VISUAL_TOKENS",
    "VOCABULARY",
    "build_config",
    "build_model",
    "build_processor",
    "word_embedding",
]

VISUAL_TOKENS = GRID**2
WIDTH = 128
HEADS = 4
VISION_LAYERS = 4
DECODER_LAYERS = 10

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
_FUNCTION_WORDS = "what is at color the where of how many digits behind most common".split()
VOCABULARY = {
    word: index
    for index, word in enumerate(
        (
            *SPECIAL,
            *map(str, range(10)),
            *COLORS,
            *ROWS,
            *COLUMNS,
            *NUMBERS,
            *BACKDROPS,
            *_FUNCTION_WORDS,
        )
    )
}


def build_processor(vocabulary: Mapping[str, int] = VOCABULARY) -> LlavaProcessor:
    """Build the processor: words separated by spaces, images of the size of a scene.

    The image processor is the one backed by Pillow, so that torchvision is not needed.

    Args:
        vocabulary: Word -> token id; the special tokens are called as those of ``VOCABULARY``.
    """
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=_build_tokenizer(vocabulary),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _build_tokenizer(vocabulary: Mapping[str, int]) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def build_config(vocabulary: Mapping[str, int] = VOCABULARY) -> LlavaConfig:
    """Build the configuration: 144 visual tokens, ten decoder layers."""
    begin, end, pad = (vocabulary[word] for word in ("<bos>", "<eos>", "<pad>"))
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=DECODER_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary["<image>"],
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


@torch.no_grad()
def build_model(
    seed: int = 0, vocabulary: Mapping[str, int] = VOCABULARY
) -> LlavaForConditionalGeneration:
    """Build the untrained model.

    Some weights are not initialised as in transformers, because a small model learns faster this
    way. Words are orthonormal vectors. The tower gets row and column of a patch as sines and
    cosines, and its patch embedding keeps the variance of the pixels. In the decoder queries equal
    keys, so that a word attends to the visual tokens that resemble it, and every second layer is
    the identity, so that it can be left out at first.

    Args:
        seed: Seed of the weights.
        vocabulary: Word -> token id.

    Returns:
        The model, in training mode.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(vocabulary))
    # Words at right angles can be read off a sum of them.
    nn.init.orthogonal_(word_embedding(model).weight)
    embeddings = model.model.vision_tower.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=(3 * PATCH_SIZE**2) ** -0.5)
    embeddings.position_embedding.weight[1:] = 0.5 * _grid_codes(WIDTH)
    layers = model.model.language_model.layers
    # Zero outputs make a residual layer the identity.
    for layer in layers[1::2]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for layer in layers:
        nn.init.normal_(layer.self_attn.q_proj.weight, std=WIDTH**-0.5)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model.train()


def word_embedding(model: LlavaForConditionalGeneration) -> nn.Embedding:
    """Return the layer that turns token ids into vectors."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding


def _grid_codes(width: int) -> Tensor:
    """Compute sines and cosines of the row and the column of every patch.

    Args:
        width: Length of a code, a multiple of four.

    Returns:
        ``[VISUAL_TOKENS, width]``, rows of patches one after the other.
    """
    steps = torch.arange(width // 4)
    # Wavelengths from about 4 patches, in a geometric row, as in the positions of a transformer.
    rates = 1.5 * torch.exp(-math.log(40.0) * steps / len(steps))
    angles = torch.arange(GRID)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows = line[:, None].expand(GRID, GRID, -1)
    return torch.cat([rows, rows.transpose(0, 1)], -1).reshape(VISUAL_TOKENS, width)
