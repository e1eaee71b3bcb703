"""Compare an export with the reduced model before it is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deos_fx.exporters.graphs.example import BATCH, Example, word_of
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.runtime.reduced_model import ReducedModel

__all__ = ["check_export"]

# A right export differs by 1e-6 of the largest logit in float32 and by 1e-3 in float16, a wrong one
# by far more than these limits.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 3e-2}
# Tokens that are decoded after each prefill, one by one.
_STEPS = 3
# Different words in the text of the second batch.
_WORDS = 32
# How many more text tokens the second batch has than the first.
_MORE = 3


def check_export(
    reduced: ReducedModel, example: Example, runtime: str, load: Callable[[], Any]
) -> None:
    """Refuse an export whose logits are not those of the reduced model.

    Logits are compared at every position that is left of the prompts and over a few decode steps,
    for the batch that was traced and for another one: a single prompt, with more text and other
    words. The export runs in its own precision, on the CPU. There runtimes have no bfloat16, so an
    export in bfloat16 is not compared.

    Args:
        reduced: The reduced model.
        example: What its graphs were traced with.
        runtime: The name of what runs the export, for messages.
        load: Loads the export to the CPU, as something that is called like the reduced model and
            returns logits and a cache with its `spaces`.

    Raises:
        ValueError: If the runtime fails or gives other logits.
    """
    rounding = _ROUNDING.get(reduced.model.dtype)
    if rounding is None:
        return
    # The runtime counts positions itself.
    traced = {name: value for name, value in example.inputs.items() if name != "position_ids"}
    batches = [traced, _another(reduced, example, traced)]
    # The runtime decodes the tokens that PyTorch chose: where two are nearly equally likely, its
    # own choice could differ.
    right = [_answers(reduced, batch) for batch in batches]
    try:
        exported = load()
        answers = [
            _answers(exported, {name: x.cpu() for name, x in batch.items()}, expected.tokens)
            for batch, expected in zip(batches, right, strict=True)
        ]
    except Exception as error:
        # Runtimes raise errors of many types; each means that it cannot run this model.
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(
            f"{runtime} does not run {type(reduced.model).__name__} ({reason}). Run the reduced "
            "model in PyTorch."
        ) from error
    for batch, found, expected in zip(batches, answers, right, strict=True):
        if reduced.model.dtype == torch.float16 and not found.kept_like(expected):
            # Case: other tokens were kept. In float16, nearly equal scores may fall either way, and
            # then the logits differ rightly.
            continue
        worst = found.difference(expected)
        # Not ``worst >= rounding``, which is false for NaN.
        if not worst < rounding:
            raise ValueError(
                f"{type(reduced.model).__name__} is not the same in {runtime}: logits of "
                f"{len(batch['input_ids'])} prompts of {batch['input_ids'].shape[1]} tokens differ "
                f"by {worst:.1g} of the largest. Run the reduced model in PyTorch."
            )


class _Answers:
    """The answers of a model to a batch.

    Attributes:
        logits: [B, M, vocabulary] of what is left of the prompts, then of each decode step.
        tokens: The decoded tokens [B, t].
        origins: Of each token space, the prompt positions [B, M] that are left.
    """

    def __init__(self, logits: list[Tensor], tokens: Tensor, origins: list[Tensor]) -> None:
        self.logits = logits
        self.tokens = tokens
        self.origins = origins

    def kept_like(self, other: _Answers) -> bool:
        """Return whether both kept the same tokens."""
        return all(map(torch.equal, self.origins, other.origins))

    def difference(self, other: _Answers) -> float:
        """Return the largest difference of logits, as a share of the other's largest logit.

        Infinite if the shapes differ.
        """
        if [a.shape for a in self.logits] != [b.shape for b in other.logits]:
            return float("inf")
        pairs = zip(self.logits, other.logits, strict=True)
        worst = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
        return (worst / torch.stack([b.abs().max() for b in other.logits]).max()).item()


@torch.no_grad()
def _answers(
    model: Callable[..., Any], batch: Mapping[str, Tensor], tokens: Tensor | None = None
) -> _Answers:
    """Run a prefill, then a decode step for each token; if None are given, for the likeliest."""
    output = model(**batch)
    cache, mask = output[CACHE], batch["attention_mask"]
    origins = [space.origin.cpu() for space in cache.spaces]
    logits, chosen = [output.logits.float().cpu()], []
    for step in range(_STEPS):
        likely = logits[-1][:, -1:].argmax(dim=-1)
        token = likely if tokens is None else tokens[:, step : step + 1]
        chosen.append(token)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        output = model(input_ids=token.to(mask.device), attention_mask=mask, **{CACHE: cache})
        logits.append(output.logits.float().cpu())
    return _Answers(logits, torch.cat(chosen, dim=1), origins)


def _another(
    reduced: ReducedModel, example: Example, traced: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return one prompt with the same images, more text and other words.

    An export that has baked in the batch, the text or its length gives other logits for it.
    """

    def longer(value: Tensor) -> Tensor:
        # A prompt that ends in an image has to go on ending in one: its text gets longer in front.
        row, ends = value[:1], example.layout.ends
        more = (row[:, :1] if ends else row[:, -1:]).expand(-1, _MORE)
        return torch.cat([more, row] if ends else [row, more], dim=1)

    batch = {
        name: value[: len(value) // BATCH] if name in example.images else longer(value)
        for name, value in traced.items()
    }
    facts, ids = facts_of(reduced.model), batch["input_ids"]
    # Small ids are words in any vocabulary. Ids that the prompt already has may have a purpose (an
    # image, the end of a row), so they are not used.
    words = torch.arange(ids.shape[1], device=ids.device) % _WORDS + 3
    words = torch.where(torch.isin(words, ids), word_of(facts), words)
    batch["input_ids"] = torch.where(ids == word_of(facts), words, ids)
    return batch
