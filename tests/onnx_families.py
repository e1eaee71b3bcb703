"""Whether a family can be exported to ONNX, found out by doing it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from closeness import assert_onnx_close
from families import PAD, STATEFUL, prompts, shared
from torch import Tensor

from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

__all__ = ["LAYERS", "POLICY", "assert_a_chat_is_the_same", "check_onnx", "generate", "reduced"]

LAYERS = 3
# Layer 0 of some has a window, in which most visual tokens have the same score: none.
POLICY = Policy(
    (
        # Norms of features would be alike where the projector ends in a normalisation.
        Reduction("projector", 0.5, scores={"novelty": 1.0}),
        Reduction("decoder.1", 0.25, gain=1.0, mass_bias=0.5),
    )
)


def reduced(name: str) -> ReducedModel:
    """The model of a family that is exported."""
    # Layers with a state may not attend, and so have no score by attention.
    model = shared(name, LAYERS)
    steps = POLICY.reductions[:1] if name in STATEFUL else POLICY.reductions
    if name == "git":
        # The attention of its layers cannot be observed.
        steps = (steps[0], replace(steps[1], scores={"novelty": 1.0}))
    if name in ("apertus1p5", "chameleon", "emu3"):
        # Tokens with the same code tie in every score of their features, and resemble others alike.
        steps = (
            replace(steps[0], scores={"random": 1.0}),
            replace(steps[1], gain=0.0, mass_bias=0.0),
        )
    if facts_of(model).counts_positions:
        steps = tuple(replace(step, position="compact") for step in steps)
    return ReducedModel(model, Policy(steps))


def generate(model: Any, batch: dict[str, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Tokens and logits [B, steps, vocabulary] of greedy decoding."""
    output = model.generate(
        **{name: value.clone() for name, value in batch.items()},
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, torch.stack(output.logits, dim=1)


def assert_a_chat_is_the_same(
    model: Any,
    runtime: Any,
    batch: dict[str, Tensor],
    extra: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {},
    steps: int = 128,
) -> None:
    """Compare ONNX Runtime with PyTorch over two turns of a chat with answers of 128 tokens.

    Tokens have to be equal up to one that PyTorch finds nearly as likely as another; the rest of
    such a row is about another text. The shorter words of the second row are padded in the middle.

    Args:
        model: The reduced model.
        runtime: Its export.
        batch: The prompts of the first turn.
        extra: Makes further inputs from token ids.
        steps: New tokens of each turn.
    """
    words = torch.randint(1, 100, (len(batch["input_ids"]), 5), generator=torch.manual_seed(5))
    words[1:2, :2] = PAD
    answers = []
    for answering in (model, runtime):
        given, cache = dict(batch), dict[str, Any]()
        tokens, logits = [], []
        for _ in range(2):
            output = answering.generate(
                **{name: value.clone() for name, value in given.items()},
                **cache,
                max_new_tokens=steps,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            tokens.append(output.sequences[:, -steps:])
            logits.append(torch.stack(output.logits, dim=1))
            cache = {CACHE: output[CACHE]}
            ids = torch.cat([output.sequences, words], dim=1)
            answered = torch.nn.functional.pad(given["attention_mask"], (0, steps), value=1)
            mask = torch.cat([answered, (words != PAD).long()], dim=1)
            given = {"input_ids": ids, "attention_mask": mask, **extra(ids)}
        answers.append((torch.cat(tokens, dim=1), torch.cat(logits, dim=1)))
    (expected, right), (found, ours) = answers
    assert found.shape == (len(words), 2 * steps)
    for row in range(len(words)):
        differs = (found[row] != expected[row]).nonzero()[:, 0].tolist()
        # The logits of the first other token are about the same text, too.
        same = differs[0] + 1 if differs else 2 * steps
        assert_onnx_close(ours[row, :same], right[row, :same])
        if differs:
            best, next_best = right[row, differs[0]].topk(2).values
            assert best - next_best <= 2e-4 * right.abs().max(), f"row {row}: {differs[0]}"


def check_onnx(name: str, steps: int = 30) -> str:
    """Export a family and compare ONNX Runtime with PyTorch.

    The graphs are traced with 2 prompts and run with 3 that are shorter, of different lengths and
    padded, for more steps than a window is long.

    Args:
        name: A family of `families.FAMILIES`.
        steps: New tokens.

    Returns:
        ``yes``, or ``no: `` and the reason that the export is refused with.

    Raises:
        AssertionError: If it is exported and says anything else than PyTorch.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = reduced(name)
            target = export_onnx(model, Path(folder) / "onnx", prompts(name, 1))
        except ValueError as error:
            return f"no: {error}"
        runtime = OnnxModel.from_pretrained(target, "cpu")
        batch = prompts(name, 3)
        tokens, logits = generate(runtime, batch, steps)
        expected_tokens, expected = generate(model, batch, steps)
        assert torch.equal(tokens, expected_tokens), f"{name}: other tokens"
        assert_onnx_close(logits, expected)
        return "yes"
