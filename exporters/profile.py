"""Profile: measure what each decoder layer takes at each length, in PyTorch or ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.cost.latency import in_turns, latency_table
from deos_fx.cost.model import CostModel
from deos_fx.exporters.fuse import DEVICES
from deos_fx.exporters.graphs.example import word_of
from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.exporters.session import HOST
from deos_fx.inputs.call import Call
from deos_fx.inputs.example import example_inputs as prompt_with_image
from deos_fx.models.facts import facts_of
from deos_fx.passes.search.batches import moved
from deos_fx.policy.latency import LatencyTable
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.words import counted

__all__ = ["RUNTIMES", "profile"]

RUNTIMES = ("torch", "onnxruntime")

# Lengths to measure at, as shares of the whole prompt.
_SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


def profile(
    model: PreTrainedModel,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    runtime: str = "torch",
    device: str | None = None,
) -> LatencyTable:
    """Measure the prefill of a model on this machine, at many numbers of tokens in its layers.

    One visual token of each image is kept at the projector, and text takes the place of the others,
    so that one graph serves all lengths. Encoding is the difference to a prompt without images.

    Args:
        model: An unmodified transformers vision-language model.
        example_inputs: A call with as many images, and of such sizes, as prompts are to have; its
            first prompt is used. Left out, a prompt with one image that follows from the config.
        runtime: ``torch``, where the model is, or ``onnxruntime``, for which it is exported.
        device: ``cpu`` or ``cuda``, for ONNX Runtime.

    Returns:
        The table, which `Budget` takes as ``latency_table``.

    Raises:
        TypeError: If `model` is not a transformers model.
        ValueError: If the runtime or the device is none of the above, the model reads no images, or
            what an image costs is not known.
        RuntimeError: If CUDA is asked for and cannot be used.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime is {runtime!r}; give {' or '.join(map(repr, RUNTIMES))}")
    if device is not None and runtime == "torch":
        raise ValueError("device is for ONNX Runtime; for torch, move the model there")
    if device not in (None, *DEVICES):
        raise ValueError(f"device is {device!r}; give {' or '.join(map(repr, DEVICES))}")
    facts = facts_of(model)
    given = prompt_with_image(model) if example_inputs is None else example_inputs
    call = Call.of(facts, given).first_prompt()
    cost = CostModel.of_call(call)
    fewest = Policy((Reduction("projector", 1, scores={"feature_norm": 1.0}),))
    reduced = ReducedModel(model, fewest)
    if runtime == "torch":
        name = f"torch {torch.__version__} on {_name(model.device)}"
        return _table(cost, reduced, _on_device(call, model.device), f"{name}, {model.dtype}")
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        export_onnx(reduced, folder, call.inputs, device=device, verify=False)
        exported = OnnxModel.from_pretrained(folder, device)
        name = f"onnxruntime {onnxruntime.__version__} on {_name(exported.device)}"
        return _table(cost, exported, _on_device(call, HOST), f"{name}, {model.dtype}")


def _on_device(call: Call, device: torch.device) -> Call:
    """Return a call whose tensors are on a device."""
    return replace(call, inputs=moved(call.inputs, device))


def _table(cost: CostModel, run: Callable[..., object], call: Call, machine: str) -> LatencyTable:
    """Time prompts of many lengths, and a text without images, in turns.

    Args:
        cost: Costs of the prompt of the call.
        run: Runs a prefill that keeps one visual token of each image.
        call: A call of one prompt.
        machine: What it runs on.
    """
    text = cost.text_tokens
    longest = text + sum(cost.layout.sizes)
    shortest = text + cost.layout.images
    wanted = {shortest, *(round(longest * share) for share in _SHARES)}
    lengths = sorted(length for length in wanted if length >= shortest)
    prompts = [_longer(call, length - shortest) for length in lengths]
    word = call.inputs["input_ids"].new_full((1, shortest), word_of(call.facts))
    prompts.append({"input_ids": word, "attention_mask": torch.ones_like(word)})
    # As in generation: the logits of the last position are enough.
    calls = [torch.no_grad()(partial(run, **prompt, logits_to_keep=1)) for prompt in prompts]
    *times, alone = in_turns(calls, call.model.device)
    encoder = max(0.0, times[0] - alone)
    return latency_table(cost, machine, dict(zip(lengths, times, strict=True)), encoder)


def _longer(call: Call, words: int) -> dict[str, Any]:
    """Return the inputs of a call of one prompt with so many more words at the end."""
    length = call.inputs["input_ids"].shape[-1]
    ends = {"input_ids": word_of(call.facts), "attention_mask": 1}

    def longer(name: str, value: Any) -> Any:
        # A number for each token: kinds of tokens, besides ids and padding.
        if not isinstance(value, Tensor) or value.shape != (1, length):
            return value
        return torch.nn.functional.pad(value, (0, words), value=ends.get(name, 0))

    return {name: longer(name, value) for name, value in call.inputs.items()}


def _name(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"
