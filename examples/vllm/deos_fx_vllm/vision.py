"""Images -> the visual tokens that are left of them, by a graph that deos_fx wrote."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import torch

__all__ = ["VisionGraph", "tokens_per_image"]


def tokens_per_image(folder: str) -> int:
    """Return how many visual tokens are left of an image.

    Args:
        folder: What `deos_fx.export_genai` wrote, for prompts of one image.

    Raises:
        ValueError: If it was written for prompts of several images.
    """
    images = json.loads((Path(folder) / "deos_fx.json").read_text(encoding="utf-8"))["images"]
    if len(images) != 1:
        raise ValueError(
            f"{folder} was exported for prompts of {len(images)} images, and vLLM encodes images "
            "one by one: export it with example_inputs of one image"
        )
    left: int = images[0]["left"]
    return left


class VisionGraph:
    """The vision tower, the projector and the reductions, in ONNX Runtime.

    Args:
        folder: What `deos_fx.export_genai` wrote, for prompts of one image.
    """

    def __init__(self, folder: str) -> None:
        found = onnxruntime.get_available_providers()
        wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        providers = [name for name in wanted if name in found]
        path = Path(folder) / "vision.onnx"
        self._session = onnxruntime.InferenceSession(path, providers=providers)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            pixel_values: [I, C, H, W].

        Returns:
            [I, T, d] in the dtype and on the device of the pixels.
        """
        features = [
            # The graph takes float32, whatever it computes in.
            self._session.run(None, {"pixel_values": image[None].float().cpu().numpy()})[0]
            for image in pixel_values
        ]
        return torch.stack([torch.from_numpy(each) for each in features]).to(pixel_values)
