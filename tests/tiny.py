"""A LLaVA that is small enough to test on exactly, and prompts with images for it.

Weights are drawn with fan-in scale: at transformers' default of 0.02 a model this small is almost
linear and every token says nearly the same, so wrong code would pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.models.facts import facts_of
from deos_fx.policy.latency import LatencyTable

PAD, IMAGE, VOCABULARY = 0, 120, 128
VISUAL = 64
LAYOUTS = {
    # Lengths of the texts before, between and after the images; an image is where None stands.
    "middle": lambda images: [4, *[None] * images, 7],
    "between": lambda images: [3, *[part for _ in range(images) for part in (None, 4)]],
    "first": lambda images: [*[None] * images, 6],
}


def tiny_llava(
    layers: int = 6,
    *,
    attn: str = "sdpa",
    seed: int = 0,
    tower: str = "clip",
    blocks: int = 3,
    feature_layer: int | list[int] = -2,
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights: 64 visual tokens per image, eval mode.

    Args:
        layers: Number of decoder layers.
        attn: Attention implementation.
        seed: Of the weights.
        tower: ``clip`` (with a class token, which is not among the features) or ``siglip``.
        blocks: Number of vision blocks; the features come from the last but one.
        feature_layer: Which hidden states of the tower are the features.
    """
    vision = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower](
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        **({"projection_dim": 48} if tower == "clip" else {"vision_use_head": False}),
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        image_seq_length=VISUAL,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attn)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "embed_tokens" in name or "class_embedding" in name:
            parameter.data.copy_(noise)
        elif parameter.ndim == 1:
            parameter.data.add_(0.1 * noise)
        else:
            parameter.data.copy_(noise * parameter[0].numel() ** -0.5)
    model.generation_config.pad_token_id = PAD
    return model.eval().requires_grad_(False)


@functools.cache
def shared_llava(
    layers: int = 6, attn: str = "sdpa", tower: str = "clip", blocks: int = 3
) -> LlavaForConditionalGeneration:
    """One model for all tests that leave it as it is."""
    return tiny_llava(layers, attn=attn, tower=tower, blocks=blocks)


def abacus(model: PreTrainedModel) -> LatencyTable:
    """A machine on which every token takes a millisecond in every decoder layer."""
    signature = facts_of(model).signature
    return LatencyTable(
        model=signature,
        machine="abacus",
        lengths=(1, 1000),
        layers=((1.0, 1000.0),) * signature.decoder_layers,
        encoder=0.0,
        encoder_flops=1,
    )


def inputs(
    model: LlavaForConditionalGeneration,
    batch: int = 1,
    images: int = 1,
    *,
    layout: str = "middle",
    padding: str | None = "left",
    text: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Prompts with images.

    Args:
        model: Whose prompts.
        batch: Number of prompts. With padding, each is 2 tokens shorter than the one before.
        images: Images per prompt.
        layout: ``middle`` (text, images, text), ``between`` (text before, between and after the
            images) or ``first`` (no text before the images).
        padding: ``left``, ``right``, or None for prompts of one length and no mask.
        text: Tokens of text to add at the end of every prompt.
        seed: Of ids and pixels.

    Returns:
        ``input_ids``, ``pixel_values`` and, if padded, ``attention_mask``.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    rows = []
    for row in range(batch):
        *lengths, last = LAYOUTS[layout](images)
        lengths.append(last + text + (2 * (batch - 1 - row) if padding else 0))
        parts = [
            torch.full((VISUAL,), IMAGE)
            if length is None
            else torch.randint(1, 100, (length,), generator=generator)
            for length in lengths
        ]
        rows.append(torch.cat(parts))
    config = model.config.vision_config
    side = config.image_size
    pixels = torch.randn(batch * images, 3, side, side, generator=generator)
    result = {"input_ids": _padded(rows, PAD, padding), "pixel_values": pixels.to(model.dtype)}
    if padding:
        ones = [torch.ones_like(row) for row in rows]
        result["attention_mask"] = _padded(ones, 0, padding)
    return result


def row_of(batch: dict[str, Any], row: int) -> dict[str, Any]:
    """One prompt of a padded batch, alone and without padding."""
    real = batch["attention_mask"][row].bool()
    images = len(batch["pixel_values"]) // len(batch["input_ids"])
    return {
        "input_ids": batch["input_ids"][row][real][None],
        "pixel_values": batch["pixel_values"][row * images : (row + 1) * images],
        "attention_mask": torch.ones_like(batch["input_ids"][row][real][None]),
    }


def _padded(rows: list[Tensor], value: int, padding: str | None) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=value, padding_side=padding or "right"
    )


def call_of(model: Any, batch: Any) -> Call:
    """Make a call with everything explicit that the model would choose itself."""
    return completed(Call.of(facts_of(model), batch))


def shard(model: Any) -> Any:
    """Shard the blocks of a model, and then the rest, over all processes of torch.distributed."""
    # Importing FSDP takes long, and few tests need it.
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model.modules():
        if isinstance(part, GradientCheckpointingLayer):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)
