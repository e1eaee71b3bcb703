"""A Qwen2.5-VL that is small enough to test on, with a processor for images of any size."""

from __future__ import annotations

from typing import Any

import torch
from families import FAMILIES
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from deos_fx.reference.model import build_processor


class AnySize:
    """What Qwen2_5_VLProcessor does, with the tokenizer of the reference model.

    The processor itself asks for packages that read videos.
    """

    def __init__(self, config: Any, min_pixels: int) -> None:
        vision = config.vision_config
        self.tokenizer = build_processor().tokenizer
        self.image_token = "<image>"
        self.chat_template = None
        self.cells = vision.spatial_merge_size**2
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            min_pixels=min_pixels,
            max_pixels=10**6,
        )
        self.batch_decode = self.tokenizer.batch_decode

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> dict[str, Any]:
        pixels: dict[str, Any] = {}
        if images is not None:
            pixels = dict(self.image_processor(images=images, return_tensors="pt"))
            counts = (pixels["image_grid_thw"].prod(dim=1) // self.cells).tolist()
            text = [
                line.replace("<image>", " ".join(["<image>"] * count))
                for line, count in zip(text, counts, strict=True)
            ]
        tokens = dict(self.tokenizer(text, **options))
        image = tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids("<image>")
        return tokens | {"mm_token_type_ids": image.int()} | pixels


def small_qwen(min_pixels: int = 64) -> tuple[Any, AnySize]:
    """The model with random weights, and its processor; ids are those of the reference model."""
    config = FAMILIES["qwen2_5_vl"].config()
    ids = build_processor().tokenizer.convert_tokens_to_ids
    config.image_token_id = ids("<image>")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    model.generation_config.pad_token_id = ids("<pad>")
    return model, AnySize(config, min_pixels)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
