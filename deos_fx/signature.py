"""What deos_fx has to know of a model before it is captured."""

from __future__ import annotations

from transformers import PreTrainedModel

from deos_fx.passes.find_blocks import find_blocks
from deos_fx.policy import ModelSignature

__all__ = ["grid_of", "has_class_token", "signature_of"]


def signature_of(model: PreTrainedModel) -> ModelSignature:
    """What a policy must match.

    Args:
        model: A transformers vision-language model.

    Raises:
        TypeError: If it is not a transformers model.
        ValueError: If it reads no images, or not through placeholders in its prompt.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; give a transformers vision-language model, for "
            "example LlavaForConditionalGeneration.from_pretrained(...)."
        )
    if model.get_output_embeddings() is None or _image_token(model) is None:
        raise ValueError(
            f"{type(model).__name__} does not read images through placeholders in its prompt and "
            "answer in text. Give a vision-language model that does, for example "
            "LlavaForConditionalGeneration."
        )
    blocks = find_blocks(model)
    rows, columns = grid_of(model)
    return ModelSignature(
        model_type=model.config.model_type,
        vision_layers=len(blocks.vision),
        decoder_layers=len(blocks.decoder),
        visual_tokens=rows * columns,
    )


def _image_token(model: PreTrainedModel) -> int | None:
    return getattr(model.config, "image_token_id", None)


def grid_of(model: PreTrainedModel) -> tuple[int, int]:
    """Rows and columns of the visual tokens of one image."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    return side, side


def has_class_token(model: PreTrainedModel) -> bool:
    """Whether the vision tower puts a CLS token in front of the patches."""
    tower = model.get_encoder(modality="image")
    return any("class_embedding" in name for name, _ in tower.named_parameters())
