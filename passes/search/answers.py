"""Answers of the unreduced model, for prompts that come without any.

What a reduced model should keep are the answers. The tokens of a question are no substitute: models
are not trained to predict these, and there are more of them than of the answer's, so a distance to
the unreduced model's predictions there would mostly measure noise. So the model answers first, and
is compared along its own answers (sequence-level distillation, Kim & Rush, arXiv 1606.07947).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from deos_fx.inputs.call import Call
from deos_fx.inputs.in_front import without_places
from deos_fx.inputs.media import padding_of

__all__ = ["LONGEST", "answered"]

LONGEST = 16
"""Most tokens of an answer; what follows them does not count."""


def answered(call: Call) -> Call:
    """Let the unreduced model answer the prompts of a call, and append its answers with labels.

    Args:
        call: Prompts that end where an answer begins, on the model's device.

    Returns:
        The call with prompts padded on the left, greedy answers of at most `LONGEST` tokens behind
        them, and ``labels``. Behind a shorter answer are tokens without a label.

    Raises:
        ValueError: If it has ``position_ids``, which do not say how they go on.
    """
    if "position_ids" in call.inputs:
        raise ValueError(
            "data has position_ids and no labels, so the model would have to answer at positions "
            "that are not given. Leave out position_ids, or give answers with labels."
        )
    if call.facts.in_front:
        call = replace(call, inputs=without_places(call.inputs))
    inputs = _padded_on_the_left(call)
    ids = inputs["input_ids"]
    mask = padding_of(inputs)
    with torch.no_grad():
        generate: Any = call.model.generate
        text = generate(
            **{**inputs, "attention_mask": torch.ones_like(ids) if mask is None else mask},
            generation_config=_greedy(call),
        )
    answers = text[:, ids.shape[1] :]
    for name, value in inputs.items():
        # Marks of tokens, such as their types: 0 is text. In the mask, every new token is real.
        if name != "input_ids" and _is_of_tokens(value, ids):
            new = answers.new_ones if name == "attention_mask" else answers.new_zeros
            inputs[name] = torch.cat([value, new(answers.shape).to(value)], dim=1)
    labels = torch.cat([torch.full_like(ids, -100), _until_the_end(call, answers)], dim=1)
    return Call.of(call.facts, inputs | {"input_ids": text, "labels": labels})


def _padded_on_the_left(call: Call) -> dict[str, Any]:
    """Return the inputs with padding moved in front of the prompts, where `generate` wants it."""
    ids, mask = call.inputs["input_ids"], padding_of(call.inputs)
    if mask is None:
        return dict(call.inputs)
    behind = mask.flip(1).long().argmax(dim=1, keepdim=True)
    places = (torch.arange(ids.shape[1], device=ids.device) - behind) % ids.shape[1]
    return {
        name: value.gather(1, places) if _is_of_tokens(value, ids) else value
        for name, value in call.inputs.items()
    }


def _is_of_tokens(value: Any, ids: Tensor) -> bool:
    """Return whether a value has one entry for each token of the prompts."""
    return isinstance(value, Tensor) and value.shape == ids.shape


def _ends(call: Call) -> list[int]:
    """Return the ids that end an answer."""
    end = call.model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _greedy(call: Call) -> GenerationConfig:
    ends, own = _ends(call), call.model.generation_config
    pad = own.pad_token_id if own.pad_token_id is not None else next(iter(ends), 0)
    facts = call.facts
    # A placeholder in an answer would want an image.
    images = [token for token in (facts.image_token, facts.video_token) if token is not None]
    return GenerationConfig(
        max_new_tokens=LONGEST,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=pad,
        suppress_tokens=images,
    )


def _until_the_end(call: Call, answers: Tensor) -> Tensor:
    """Return labels [B, T] of answers: their tokens up to the one that ends them, then -100."""
    ended = torch.isin(answers, torch.tensor(_ends(call), device=answers.device, dtype=torch.long))
    over = ended.long().cumsum(dim=1) - ended.long() > 0
    return answers.masked_fill(over, -100)
