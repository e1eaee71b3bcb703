"""Compare an export for onnxruntime-genai with the reduced model before it is published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deos_fx.exporters.check import ROUNDING
from deos_fx.exporters.genai_inputs import genai_inputs
from deos_fx.exporters.graphs.example import Example
from deos_fx.exporters.graphs.parts import FEATURES
from deos_fx.exporters.session import Session, as_tensor, open
from deos_fx.exporters.session_cache import past_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.rewrite.split_embeddings import EMBEDDINGS
from deos_fx.runtime.reduced_model import ReducedModel

__all__ = ["check_genai"]

# Logits that are compared for each prompt: of its last token, and of new ones.
_STEPS = 3
# How much text is added to the prompt that was traced, and what its pixels are multiplied by:
# images of which other tokens are kept.
_PROMPTS = ((0, 1.0), (3, -1.0))


@torch.no_grad()
def check_genai(reduced: ReducedModel, example: Example, folder: Path, device: str) -> None:
    """Refuse an export whose logits are not those of the reduced model.

    Args:
        reduced: The reduced model.
        example: What its graphs were traced with.
        folder: The export.
        device: Where ONNX Runtime runs it. On the CPU, exports in bfloat16 are not compared.

    Raises:
        ValueError: If the logits differ.
    """
    dtype = reduced.model.dtype
    if dtype == torch.bfloat16 and device == "cpu":
        return
    names = ("vision", "embedding", "decoder")
    vision, embedding, decoder = (open(folder / f"{name}.onnx", device) for name in names)
    for more, brightness in _PROMPTS:
        prompt = _prompt(example, more, brightness)
        right = list(_in_torch(reduced, prompt))
        given = {n: torch.from_numpy(x) for n, x in genai_inputs(folder, prompt).items()}
        features = as_tensor(vision(given)[FEATURES])
        words = [given["input_ids"], *(logits.argmax(dim=-1) for logits in right[:-1])]
        found = _in_runtime(embedding, decoder, features, words)
        for ours, theirs in zip(found, right, strict=True):
            worst = ((ours - theirs).abs().max() / theirs.abs().max()).item()
            # Not ``worst >= limit``, which is false for NaN.
            if not worst < ROUNDING[dtype]:
                raise ValueError(
                    f"{type(reduced.model).__name__} is not the same in the graphs for "
                    f"onnxruntime-genai: logits differ by {worst:.1g} of the largest. Run the "
                    "reduced model in PyTorch."
                )


def _prompt(example: Example, more: int, brightness: float) -> dict[str, Tensor]:
    """Return a prompt like those of the example, with more text and other images."""
    prompt = {
        # The last tokens are text.
        name: torch.cat([value[:1], value[:1, value.shape[1] - more :]], dim=1)
        for name, value in example.inputs.items()
        if name not in example.images and name != "position_ids"
    }
    pixels = example.images["pixel_values"]
    return prompt | example.images | {"pixel_values": pixels * brightness}


def _in_torch(reduced: ReducedModel, prompt: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield the logits [1, 1, vocabulary] of the last token, and of the likeliest ones after it."""
    inputs: dict[str, Any] = {**prompt, "use_cache": True}
    for _ in range(_STEPS):
        output = reduced(**inputs)
        logits = output.logits[:, -1:]
        yield logits.float().cpu()
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        inputs = {
            "input_ids": logits.argmax(dim=-1),
            "attention_mask": mask,
            CACHE: output[CACHE],
        }


def _in_runtime(
    embedding: Session, decoder: Session, features: Tensor, words: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Run graphs as the engine does, on the tokens [1, t] of each call, and yield the logits."""
    states, seen = decoder.empty_states(1), 0
    for ids in words:
        hidden = as_tensor(embedding({"input_ids": ids, FEATURES: features})[EMBEDDINGS])
        places = torch.arange(seen, seen + ids.shape[1])[None]
        seen += ids.shape[1]
        mask = torch.ones(1, seen, dtype=torch.int64)
        given = {EMBEDDINGS: hidden, "attention_mask": mask, "position_ids": places}
        outputs = decoder(given | states)
        yield as_tensor(outputs["logits"]).float()
        states = past_of(outputs)
        # The images are in the cache from now on.
        features = features[:0]
