"""Compare an export with the reduced model before it is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deos_fx.exporters.graphs.example import Example, pixels_of, word_of
from deos_fx.inputs.batch import from_first_patch
from deos_fx.models.facts import facts_of
from deos_fx.models.families import PATCH_NUMBERS
from deos_fx.models.upstream import CACHE
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.words import counted

__all__ = ["ROUNDING", "check_export"]

# A right export differs by 1e-6 of the largest logit in float32 and by 1e-3 in float16, a wrong one
# by far more than these limits. The one of bfloat16 is not measured: it has 3 bits fewer than
# float16, so about eight times the error.
ROUNDING = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
# Rounding the weights changes the logits of tiny random models by 1 to 14 % of the largest with 8
# bits and by 25 % with 4 bits; those of a wrong graph are others altogether.
_QUANTISED = {"int8": 3e-1, "int4": 7e-1}
# On the CPU, products with such weights round activations, too. Where one falls depends on the last
# place of its value, so the graphs of several new tokens and of one differ, by 2e-3 where that was
# measured.
_AGREEMENT = 5e-2
# New tokens of each call after a prefill: several take another graph than one.
_STEPS = (2, 1, 1)
# Different words in the text of the second batch.
_WORDS = 32
# How many more text tokens the second batch has than the first.
_MORE = 3
# What the pixels of each of its rows are multiplied by: images of which other tokens are kept.
_BRIGHTNESS = (1.0, -1.0, 0.5)


def check_export(
    reduced: ReducedModel,
    example: Example,
    runtime: str,
    device: torch.device,
    load: Callable[[], Any],
    weights: str | None = None,
) -> None:
    """Refuse an export whose logits are not those of the reduced model.

    Logits are compared at every position that is left of the prompts and over a few decode steps,
    for the batch that was traced and for another one, with other words, images and padding; the
    reduced model gets each prompt alone. The export runs in its own precision. On the CPU runtimes
    have no bfloat16, so there an export in bfloat16 is not compared.

    If weights were rounded, logits may differ as much as that explains, and those of several new
    tokens in one call have to be those of one after the other.

    Args:
        reduced: The reduced model.
        example: What its graphs were traced with.
        runtime: The name of what runs the export, for messages.
        device: The device that it runs on.
        load: Loads the export to this device, as something that is called like the reduced model,
            on CPU tensors, and returns logits and a cache with its `spaces`.
        weights: What the weights were rounded to: ``int8``, ``int4``, or None.

    Raises:
        ValueError: If the runtime fails or gives other logits.
    """
    dtype = reduced.model.dtype
    if dtype not in ROUNDING or dtype == torch.bfloat16 and device.type == "cpu":
        return
    rounding = ROUNDING[dtype] if weights is None else _QUANTISED[weights]
    # The runtime counts positions itself.
    traced = {name: value for name, value in example.inputs.items() if name != "position_ids"}
    batches = [traced, _another(reduced, example, traced)]
    # The runtime decodes the tokens that PyTorch chose: where two are nearly equally likely, its
    # own choice could differ.
    right = [_joined([_answers(reduced, row) for row in _rows(batch)]) for batch in batches]
    # How much new text each call gets; the first way is compared with PyTorch.
    ways = [_STEPS] if weights is None else [_STEPS, (1,) * sum(_STEPS)]
    try:
        exported = load()
        answers = [
            [
                _answers(exported, {name: x.cpu() for name, x in batch.items()}, expected.tokens, w)
                for w in ways
            ]
            for batch, expected in zip(batches, right, strict=True)
        ]
    except Exception as error:
        # Runtimes raise errors of many types; each means that it cannot run this model.
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(
            f"{runtime} does not run {type(reduced.model).__name__} ({reason}). Run the reduced "
            "model in PyTorch."
        ) from error
    for batch, (found, *others), expected in zip(batches, answers, right, strict=True):
        pairs = [(other, found, _AGREEMENT) for other in others]
        # Case: the same tokens were kept. If not, nearly equal scores may have fallen either way in
        # half precision or with rounded weights, and then the logits differ rightly.
        if dtype == torch.float32 and weights is None or found.kept_like(expected):
            pairs.append((found, expected, rounding))
        for ours, theirs, limit in pairs:
            worst = ours.difference(theirs)
            # Not ``worst >= limit``, which is false for NaN.
            if not worst < limit:
                prompts = counted(len(batch["input_ids"]), "prompt")
                tokens = counted(batch["input_ids"].shape[1], "token")
                raise ValueError(
                    f"{type(reduced.model).__name__} is not the same in {runtime}: logits of "
                    f"{prompts} of {tokens} differ by {worst:.1g} of the largest. Run the reduced "
                    "model in PyTorch."
                )


class _Answers:
    """The answers of a model to a batch.

    Attributes:
        logits: [B, M + t, vocabulary] of what is left of the prompts, and of each decoded token.
        tokens: The decoded tokens [B, t].
        origins: Of each token space, the prompt positions [B, M] that are left.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, origins: list[Tensor]) -> None:
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
        if self.logits.shape != other.logits.shape:
            return float("inf")
        return ((self.logits - other.logits).abs().max() / other.logits.abs().max()).item()


def _rows(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split a batch into its prompts. Alone, none can have anything of another."""
    rows = len(batch["input_ids"])
    parts = {name: value.chunk(rows) for name, value in batch.items()}
    for name in PATCH_NUMBERS & parts.keys():
        parts[name] = tuple(map(from_first_patch, parts[name]))
    return [{name: part[i] for name, part in parts.items()} for i in range(rows)]


def _joined(parts: Sequence[_Answers]) -> _Answers:
    """Put the answers to single prompts together."""
    origins = zip(*(part.origins for part in parts), strict=True)
    return _Answers(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.tokens for part in parts]),
        [torch.cat(rows) for rows in origins],
    )


@torch.no_grad()
def _answers(
    model: Callable[..., Any],
    batch: Mapping[str, Tensor],
    tokens: Tensor | None = None,
    steps: Sequence[int] = _STEPS,
) -> _Answers:
    """Run a prefill, then go on with some tokens; if None are given, with the likeliest."""
    # As many logits as there are tokens: all, in the graph that was captured for the last one.
    output = model(**batch, logits_to_keep=batch["input_ids"].shape[1])
    cache, mask = output[CACHE], batch["attention_mask"]
    origins = [space.origin.cpu() for space in cache.spaces]
    # What a model says at padding is nobody's business.
    real = mask.cpu().gather(1, origins[-1]) if origins else mask.cpu()
    logits = [output.logits.float().cpu() * real[..., None]]
    chosen: list[Tensor] = []
    for width in steps:
        done = sum(given.shape[1] for given in chosen)
        likely = logits[-1][:, -1:].argmax(dim=-1).expand(-1, width)
        new = likely if tokens is None else tokens[:, done : done + width]
        chosen.append(new)
        mask = torch.nn.functional.pad(mask, (0, width), value=1)
        output = model(
            input_ids=new.to(mask.device),
            attention_mask=mask,
            logits_to_keep=width,
            **{CACHE: cache},
        )
        logits.append(output.logits.float().cpu())
    return _Answers(torch.cat(logits, dim=1), torch.cat(chosen, dim=1), origins)


def _another(
    reduced: ReducedModel, example: Example, traced: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return three prompts with other words: one with more text, the others padded to its length.

    An export that has baked in the batch, the text or its length gives other logits for them, and
    so does one that takes the images, the padding or the positions of one row for those of all.
    """
    facts, ends = facts_of(reduced.model), example.layout.ends

    def longer(name: str, value: Tensor) -> Tensor:
        row = value[:1]
        # Words, which are of kind 0 where tokens have kinds, and real.
        word = {"input_ids": word_of(facts), "attention_mask": 1}.get(name, 0)
        more = torch.full_like(row[:, :1], word).expand(-1, _MORE)
        # A prompt that ends in an image has to go on ending in one: its text gets longer in front.
        # Padding always stands in front.
        text = torch.cat([more, row] if ends else [row, more], dim=1)
        return torch.cat([text, *[torch.cat([more, row], dim=1)] * (len(_BRIGHTNESS) - 1)])

    batch = {
        name: longer(name, value) for name, value in traced.items() if name not in example.images
    }
    batch["attention_mask"][1:, :_MORE] = 0
    for name, value in example.images.items():
        # Sizes are those of the traced images.
        pixels = name in pixels_of(example.images)
        batch[name] = torch.cat([value * x if pixels else value for x in _BRIGHTNESS])
    ids = batch["input_ids"]
    # Small ids are words in any vocabulary. Ids that the prompt already has may have a purpose (an
    # image, the end of a row), so they are not used.
    words = torch.arange(ids.shape[1], device=ids.device) % _WORDS + 3
    words = torch.where(torch.isin(words, ids), word_of(facts), words)
    batch["input_ids"] = torch.where(ids == word_of(facts), words, ids)
    return batch
