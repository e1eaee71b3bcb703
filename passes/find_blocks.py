"""Find the transformer blocks of a vision-language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from deos_fx.passes.capture import CaptureError

__all__ = ["Blocks", "find_blocks"]

# Kinds of layers, in transformers' words, that keep a running state instead of keys.
_RECURRENT = ("conv", "linear_attention", "mamba", "recurrent", "hybrid")


@dataclass(frozen=True)
class Blocks:
    """Module paths of the blocks, in order.

    Attributes:
        vision: Paths of the vision tower's blocks.
        decoder: Paths of the language model's decoder layers.
    """

    vision: tuple[str, ...]
    decoder: tuple[str, ...]

    def names(self) -> dict[str, str]:
        """Module path -> node name: ``vision_0``, ``decoder_0``, ..."""
        return {path: f"vision_{i}" for i, path in enumerate(self.vision)} | {
            path: f"decoder_{i}" for i, path in enumerate(self.decoder)
        }


def find_blocks(model: PreTrainedModel) -> Blocks:
    """Locate the stacks of blocks through transformers' own accessors and block base class.

    Args:
        model: A transformers vision-language model.

    Returns:
        The paths of its vision blocks and decoder layers.

    Raises:
        CaptureError: If the model has no vision tower, no decoder made of such blocks, or one in
            which visual tokens cannot be dropped.
    """
    tower = model.get_encoder(modality="image")
    if tower in (model, model.base_model):
        raise CaptureError(
            f"{type(model).__name__} has no vision tower: deos_fx reduces visual tokens. Give it a "
            "vision-language model, for example LlavaForConditionalGeneration."
        )
    decoder = model.get_decoder()
    blocks = Blocks(_blocks_under(model, tower), _blocks_under(model, decoder))
    if not blocks.decoder:
        raise CaptureError(
            f"{type(model).__name__} has no list of decoder layers that derive from transformers' "
            "GradientCheckpointingLayer. Use a model with a decoder made of such layers."
        )
    _check_layers(model, blocks)
    return blocks


def _check_layers(model: PreTrainedModel, blocks: Blocks) -> None:
    """Refuse decoders in which dropping a visual token is not hiding its key."""
    recurrent = [kind for kind in _kinds(model) if kind in _RECURRENT]
    if recurrent:
        raise CaptureError(
            f"{type(model).__name__} has {' and '.join(sorted(set(recurrent)))} layers, whose "
            "state runs through every token: dropping some changes what the others mean. Use a "
            "model whose layers all attend."
        )
    crossing = [
        path
        for path in blocks.decoder
        if "cross" in f"{type(model.get_submodule(path)).__name__} {_parts(model, path)}".lower()
    ]
    if crossing or not hasattr(model.base_model, "get_image_features"):
        raise CaptureError(
            f"{type(model).__name__} reads images through cross-attention, not in its prompt, so "
            "its decoder has no visual tokens to reduce. Use a model with image placeholders in "
            "its prompt, for example LlavaForConditionalGeneration."
        )
    bridge = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "qformer"]
    if bridge:
        raise CaptureError(
            f"{type(model).__name__} reads images through a Q-Former ({bridge[0]}), whose few "
            "queries stand for no part of the image. Use a model whose visual tokens are patches."
        )


def _kinds(model: PreTrainedModel) -> list[str]:
    return list(getattr(model.config.get_text_config(), "layer_types", None) or ())


def _parts(model: nn.Module, path: str) -> str:
    return " ".join(name for name, _ in model.get_submodule(path).named_children())


def _blocks_under(model: nn.Module, part: nn.Module) -> tuple[str, ...]:
    """Paths (in `model`) of the elements of the longest block list inside `part`."""
    inside = {id(module) for module in part.modules()}
    stacks = [
        [f"{path}.{i}" for i in range(len(module))]
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and id(module) in inside
        and len(module) > 0
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    ]
    longest: list[str] = max(stacks, key=lambda stack: len(stack), default=[])
    return tuple(longest)
