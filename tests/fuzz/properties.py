"""What must hold for every case, by oracles that are not the code under test."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from closeness import assert_close, assert_onnx_close, difference, roundings_of
from drawing import Case
from families import alone, prompts
from masked import assert_pruning_is_masking
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.models.upstream import CACHE
from deos_fx.policy.policy import Policy
from deos_fx.runtime.reduced_model import ReducedModel

__all__ = ["PROPERTIES"]

NEW = 3
"""Tokens that are decoded."""
NUDGE = 3e-6
"""By how much an image is changed to tell what rounding decides, relative to its values."""
TIED = 1e-6
"""Scores that differ by less, relative to the largest, are the same but for rounding."""
UNEQUAL_EXPERTS = {"ernie4_5_vl_moe"}
"""Families whose visual tokens go to smaller experts, which costs count as those of the text."""
WORDS_OF_MEDIA = {"gemma3n"}
"""Families that look for words of images and sounds in all of a prompt, by products not counted."""
UNEVEN_STEPS = {"llava_jamba", "nemotron_h_omni"}
"""Families whose own layers compute several new tokens in another way than one; Jamba forgets."""


def pruning_is_masking(case: Case, reduced: ReducedModel) -> None:
    """The original model with the dropped keys masked computes the same."""
    if case.prunes:
        assert_pruning_is_masking(case.model, reduced, case.batch, _roundings(case))


def rows_are_independent(case: Case, reduced: ReducedModel) -> None:
    """Every prompt of a batch gives what it gives alone, without padding."""
    together = reduced(**case.batch).logits
    for row in range(case.rows):
        inputs = alone(case.family, case.batch, row)
        own = reduced(**inputs).logits
        # Padding is on the left.
        found = together[row : row + 1, -own.shape[1] :]
        try:
            assert_close(found, own, _roundings(case))
        except AssertionError:
            tied = _tie(case, reduced, row, inputs)
            if not tied and difference(found, own) > 4 * _by_rounding(reduced, inputs, own):
                raise


def _tie(case: Case, reduced: ReducedModel, row: int, inputs: dict[str, Tensor]) -> bool:
    """Whether a prompt keeps other tokens in a batch than alone, and rounding alone decides.

    The ends of rows of an image are one learned vector (Phi-4), which no other image tells apart.
    """
    padding = case.batch["input_ids"].shape[1] - inputs["input_ids"].shape[1]
    both = zip(reduced.explain(**case.batch), reduced.explain(**inputs), strict=True)
    for together, own in both:
        (scores, *_), (places, *_), (kept, *_) = own.scores, own.positions_in, own.kept
        found = together.kept[row] - padding
        if not torch.equal(found, kept):
            # The first site that differs; later ones follow from it.
            stays, lost = torch.isin(places, found), torch.isin(places, kept)
            apart = (scores[stays & ~lost][:, None] - scores[lost & ~stays]).abs()
            return bool((apart <= TIED * scores.abs().max()).any())
    return False


def _by_rounding(reduced: ReducedModel, inputs: dict[str, Tensor], own: Tensor) -> float:
    """How far logits go when an image is rounded otherwise: far, if two tokens nearly tie."""
    random, found = torch.Generator().manual_seed(0), []
    for _ in range(8):
        nudged = {
            name: x * (1 + NUDGE * torch.randn(x.shape, generator=random))
            if x.is_floating_point()
            else x
            for name, x in inputs.items()
        }
        found.append(difference(reduced(**nudged).logits, own))
    return max(found)


def steps_are_one_call(case: Case, reduced: ReducedModel) -> None:
    """New tokens in one call give what they give one by one."""
    if case.family in UNEVEN_STEPS:
        return
    words = torch.randint(1, 100, (case.rows, NEW), generator=torch.Generator().manual_seed(1))
    at_once = _continued(reduced, case.batch, [words])
    by_steps = _continued(reduced, case.batch, list(words.split(1, dim=1)))
    assert_close(at_once, by_steps, _roundings(case))


def costs_are_measured(case: Case, reduced: ReducedModel) -> None:
    """Predicted bytes are those of the cache, predicted FLOPs those of torch's counter."""
    predicted = reduced.cost(**case.batch).after
    # The counter knows no fused attention on a CPU.
    with FlopCounterMode(display=False) as counter:
        layers = reduced(**case.batch)[CACHE].layers
    held = [
        x for x in pytree.tree_leaves([vars(layer) for layer in layers]) if isinstance(x, Tensor)
    ]
    assert predicted.kv_bytes == sum(x.nbytes for x in held if x.is_floating_point())
    if case.eager and case.family not in UNEQUAL_EXPERTS | WORDS_OF_MEDIA:
        counted = counter.get_total_flops()
        assert abs(predicted.flops - counted) <= 0.01 * counted, (predicted.flops, counted)


def files_keep_everything(case: Case, reduced: ReducedModel) -> None:
    """A policy and a model come back from files as they were."""
    assert Policy.from_json(case.policy.to_json()) == case.policy
    # Weights on a disk take longer than everything else. They come back with the implementations of
    # attention and experts that are the default.
    if case.number % 10 or case.eager:
        return
    with tempfile.TemporaryDirectory() as folder:
        reduced.save_pretrained(folder)
        loaded = ReducedModel.from_pretrained(folder)
    assert torch.equal(loaded(**case.batch).logits, reduced(**case.batch).logits)


def onnxruntime_agrees(case: Case, reduced: ReducedModel) -> None:
    """ONNX Runtime gives what PyTorch gives, or the export is refused."""
    # An export takes as long as a hundred cases.
    if case.number % 500 != 499:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_onnx(reduced, folder, prompts(case.family, 1), device="cpu", verify=False)
        except ValueError:
            # Case: the families that transformers' exporters cannot export, for example.
            return
        exported = OnnxModel.from_pretrained(folder, "cpu")
        words = torch.randint(1, 100, (case.rows, NEW), generator=torch.Generator().manual_seed(1))
        found = _continued(exported, case.batch, [words[:, :1], words[:, 1:]])
    assert_onnx_close(found, _continued(reduced, case.batch, [words]))


PROPERTIES: tuple[Callable[[Case, ReducedModel], None], ...] = (
    pruning_is_masking,
    rows_are_independent,
    steps_are_one_call,
    costs_are_measured,
    files_keep_everything,
    onnxruntime_agrees,
)


def _continued(reduced: Any, batch: dict[str, Tensor], parts: list[Tensor]) -> Tensor:
    """Logits [B, NEW, vocabulary] of new tokens after a prompt, given part by part."""
    cache: Any = reduced(**batch)[CACHE]
    mask, logits = batch["attention_mask"], []
    for part in parts:
        mask = torch.cat([mask, torch.ones_like(part)], dim=1)
        output = reduced(input_ids=part, attention_mask=mask, **{CACHE: cache})
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _roundings(case: Case) -> float:
    # Merging and reweighting carry rounding on, by far less than a wrong token would.
    return roundings_of(case.family) * (1 if case.prunes else 8)
