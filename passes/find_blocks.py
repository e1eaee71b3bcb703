"""Find the transformer blocks of a vision-language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from deos_fx.passes.capture import CaptureError

__all__ = ["Blocks", "find_blocks"]


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
        CaptureError: If the model has no vision tower or no decoder made of such blocks.
    """
    tower = model.get_encoder(modality="image")
    if tower in (model, model.base_model):
        raise CaptureError(
            f"{type(model).__name__} has no vision tower: deos_fx reduces visual tokens. Give it a "
            "vision-language model, for example LlavaForConditionalGeneration."
        )
    decoder = model.get_decoder()
    blocks = Blocks(_blocks_under(model, tower), _blocks_under(model, decoder))
    if not blocks.vision or not blocks.decoder:
        raise CaptureError(
            f"{type(model).__name__}: found {len(blocks.vision)} vision blocks and "
            f"{len(blocks.decoder)} decoder layers that derive from transformers' "
            "GradientCheckpointingLayer; both are needed. Cross-attention and recurrent models "
            "are not supported."
        )
    return blocks


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
