"""vLLM's LLaVA with the encoder, the projector and the reductions of an exported graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaImageEmbeddingInputs,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from deos_fx_vllm.vision import VisionGraph, tokens_per_image

__all__ = ["ReducedLlava", "ReducedLlavaInfo"]


class ReducedLlavaInfo(LlavaProcessingInfo):
    """Tells vLLM how many placeholders an image has in a prompt."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Return how many visual tokens are left of an image, whatever its size."""
        return tokens_per_image(self.get_hf_config().deos_fx)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=ReducedLlavaInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class ReducedLlava(LlavaForConditionalGeneration):
    """LLaVA whose images enter the prompt as the tokens that a policy leaves of them."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._vision = VisionGraph(self.config.deos_fx)

    def _process_image_input(self, image_input: Any) -> torch.Tensor:
        if isinstance(image_input, LlavaImageEmbeddingInputs):
            # Case: the caller has encoded the image.
            return image_input["data"]
        return self._vision(image_input["pixel_values"])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the weights, and drop those of the tower and the projector, which the graph has."""
        loaded = super().load_weights(weights)
        del self.vision_tower, self.multi_modal_projector
        return loaded
