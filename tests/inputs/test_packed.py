"""Packed samples, and masks of queries and keys: each sample as alone, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from families import FAMILIES, shared
from masked import alive_of, masked_from
from test_families import NORM, PRUNED
from torch import Tensor

from deos_fx.inputs.packed import packed_by
from deos_fx.models.upstream import CACHE
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

POOLED = Reduction(
    "projector", 16, selector="grid", gain=1.0, similarity={"grid": 1.0}, mass_bias=1.0
)
LENGTHS = (3, 6), (5, 4)


def samples_of(name: str) -> list[dict[str, Tensor]]:
    """Two prompts of one image each."""
    generator, family = torch.Generator().manual_seed(5), FAMILIES[name]
    images, samples = family.pixels(2), []
    for i, (before, behind) in enumerate(LENGTHS):
        words = torch.randint(1, 100, (before + behind,), generator=generator).tolist()
        ids = torch.tensor([words[:before] + family.block + words[before:]])
        own = {key: value.unflatten(0, (2, -1))[i] for key, value in images.items()}
        samples.append({"input_ids": ids, **own, **family.extra(ids)})
    return samples


def packed(name: str, samples: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The samples in one row, whose positions start again."""
    images = FAMILIES[name].pixels(1)
    row: dict[str, Any] = {
        key: torch.cat([sample[key] for sample in samples], dim=0 if key in images else 1)
        for key in samples[0]
    }
    places = [torch.arange(sample["input_ids"].shape[1]) for sample in samples]
    return row | {"position_ids": torch.cat(places)[None], "use_cache": False}


def seen(samples: list[dict[str, Tensor]], dtype: torch.dtype) -> Tensor:
    """The mask [1, 1, N, N] by which every sample sees itself alone."""
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    flags = torch.block_diag(*[torch.ones(length, length).tril() for length in lengths]).bool()
    if dtype != torch.bool:
        return torch.zeros(flags.shape).masked_fill(~flags, torch.finfo(dtype).min)[None, None]
    return flags[None, None]


@pytest.mark.parametrize("name", ["llava", "aya_vision", "llava_next", "mistral3"])
@pytest.mark.parametrize("reduction", [Reduction("projector", 0.25, **NORM), POOLED])
def test_packed_samples_are_what_they_are_alone(name: str, reduction: Reduction) -> None:
    if reduction is POOLED and name == "llava_next":
        reduction = Reduction("projector", 16, gain=1.0, mass_bias=1.0, **NORM)
    samples, reduced = samples_of(name), ReducedModel(shared(name), Policy((reduction,)))
    alone = [reduced(**sample, use_cache=False).logits for sample in samples]
    # An unpacked call first: graphs of the one kind are not taken for the other.
    assert_close(reduced(**packed(name, samples)).logits, torch.cat(alone, dim=1))
    assert torch.equal(reduced(**samples[0], use_cache=False).logits, alone[0])


@pytest.mark.parametrize("site", ["vision.0", "vision.1"])
def test_packed_samples_are_reduced_in_the_tower(site: str) -> None:
    samples = samples_of("llava")
    merged = Reduction(site, 16, gain=1.0, mass_bias=1.0, scores={"key_norm": 1.0})
    reduced = ReducedModel(shared("llava"), Policy((merged,)))
    alone = [reduced(**sample).logits for sample in samples]
    assert_close(reduced(**packed("llava", samples)).logits, torch.cat(alone, dim=1))


def test_packed_samples_with_the_place_in_the_text() -> None:
    # As generate makes them where positions have coordinates: the place comes first.
    samples = samples_of("qwen2_vl")
    reduced = ReducedModel(shared("qwen2_vl"), Policy(PRUNED["projector"]))
    row = packed("qwen2_vl", samples)
    row["position_ids"] = row["position_ids"].expand(4, 1, -1)
    places = [torch.arange(sample["input_ids"].shape[1]) for sample in samples]
    alone = [
        reduced(**sample, position_ids=place.expand(4, 1, -1), use_cache=False).logits
        for sample, place in zip(samples, places, strict=True)
    ]
    assert_close(reduced(**row).logits, torch.cat(alone, dim=1))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_without_reductions_packed_samples_are_the_models(name: str) -> None:
    row, model = packed(name, samples_of(name)), shared(name)
    empty = ReducedModel(model, Policy())
    assert torch.equal(empty(**row).logits, model(**row).logits)
    lengths = {"cu_seq_lens_q": torch.tensor([0, 73, 146], dtype=torch.int32), "max_length_q": 73}
    assert torch.equal(empty(**row, **lengths).logits, model(**row, **lengths).logits)
    mask = {"attention_mask": seen(samples_of(name), torch.bool), "use_cache": True}
    assert torch.equal(empty(**row | mask).logits, model(**row | mask).logits)


# *** masks of queries and keys ***


# Their masks know blocks of image tokens, not where samples begin, or layers are convolutions.
@pytest.mark.parametrize("name", ["gemma3", "paligemma", "qwen2_vl", "lfm2_vl"])
def test_packed_samples_that_the_model_mixes_are_refused(name: str) -> None:
    reduced = ReducedModel(shared(name), Policy(PRUNED["projector"]))
    with pytest.raises(ValueError, match="does not keep the samples of a row apart"):
        reduced(**packed(name, samples_of(name)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["llava", "llava_next", "mistral3"])
def test_a_mask_keeps_samples_apart(name: str, dtype: torch.dtype) -> None:
    samples = samples_of(name)
    reduced = ReducedModel(shared(name), Policy(PRUNED["projector"]))
    alone = [reduced(**sample).logits for sample in samples]
    row = packed(name, samples) | {"attention_mask": seen(samples, dtype), "use_cache": True}
    assert_close(reduced(**row).logits, torch.cat(alone, dim=1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("policy", ["projector", "decoder", "both"])
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_pruning_under_a_mask_is_masking(name: str, policy: str, dtype: torch.dtype) -> None:
    # Text in front does not see itself causally: no mask that transformers would make.
    sample, model = samples_of(name)[0], shared(name)
    mask = torch.ones(1, 1, *[sample["input_ids"].shape[1]] * 2).tril().bool()
    mask[..., :3, :3] = True
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    places = torch.arange(mask.shape[-1])
    given = sample | {"attention_mask": mask, "position_ids": places.expand(1, -1)}
    if name == "qwen2_5_vl":
        given["position_ids"] = places.expand(3, 1, -1)
    reduced = ReducedModel(model, Policy(PRUNED[policy]))
    output = reduced(**given)
    with masked_from(model, alive_of(output[CACHE], sample["input_ids"])):
        whole = model(**given).logits
    origin = output[CACHE].spaces[-1].origin[0]
    assert_close(output.logits[0], whole[0, origin])


def test_a_plain_mask_is_as_none() -> None:
    sample = samples_of("llava")[0]
    reduced = ReducedModel(shared("llava"), Policy(PRUNED["both"]))
    mask = torch.ones(1, 1, *[sample["input_ids"].shape[1]] * 2).tril().bool()
    assert_close(reduced(**sample, attention_mask=mask).logits, reduced(**sample).logits)


# *** what is refused ***

_LLAVA = "llava"
REFUSED: dict[str, tuple[Reduction, dict[str, Any], str]] = {
    "ranked together": (
        Reduction("decoder.1", 0.5),
        {},
        "ranked together in the decoder, and there is position_ids that start again .* of its own",
    ),
    "text of all": (
        Reduction("projector", 0.5, scores={"text_relevance": 1.0}),
        {},
        "are of all text of a row, and there is position_ids that start again",
    ),
    "positions": (
        Reduction("projector", 0.5, position="compact", **NORM),
        {},
        "position 'compact' counts what is dropped in the whole row",
    ),
    "a cache": (
        Reduction("projector", 0.5, **NORM),
        {"use_cache": True},
        "position_ids go back inside a row, .* use_cache=False and no attention_mask",
    ),
    "flags": (
        Reduction("projector", 0.5, **NORM),
        {"attention_mask": torch.ones(1, 146, dtype=torch.int64)},
        "position_ids go back inside a row, .* use_cache=False and no attention_mask",
    ),
    "lengths": (
        Reduction("projector", 0.5, **NORM),
        {"cu_seq_lens_q": torch.tensor([0, 73, 146]), "max_length_q": 73},
        "cu_seq_lens_q, max_length_q say how long packed samples are",
    ),
    "whole numbers": (
        Reduction("projector", 0.5, **NORM),
        {"attention_mask": torch.ones(1, 1, 146, 146, dtype=torch.int64)},
        r"attention_mask is torch.int64 \(1, 1, 146, 146\); for 146 tokens give flags",
    ),
    "three axes": (
        Reduction("projector", 0.5, **NORM),
        {"attention_mask": torch.ones(1, 146, 146, dtype=torch.bool)},
        r"attention_mask is \(1, 146, 146\); give flags of real tokens \[B, N\]",
    ),
}


def test_coordinates_that_start_again_are_refused() -> None:
    samples = samples_of("qwen2_vl")
    row = packed("qwen2_vl", samples)
    row["position_ids"] = row["position_ids"].expand(3, 1, -1)
    with pytest.raises(ValueError, match="position_ids go back inside a row"):
        ReducedModel(shared("qwen2_vl"), Policy(PRUNED["projector"]))(**row)


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_is_refused(case: str) -> None:
    reduction, others, said = REFUSED[case]
    reduced = ReducedModel(shared(_LLAVA), Policy((reduction,)))
    with pytest.raises(ValueError, match=said):
        reduced(**packed(_LLAVA, samples_of(_LLAVA)) | others)


def test_a_mask_with_borders_is_refused_in_the_decoder() -> None:
    samples = samples_of(_LLAVA)
    row = packed(_LLAVA, samples) | {"attention_mask": seen(samples, torch.bool)}
    reduced = ReducedModel(shared(_LLAVA), Policy(PRUNED["decoder"]))
    with pytest.raises(ValueError, match="by which the last token does not see all others"):
        reduced(**row)


def test_a_sample_that_ends_in_an_image_is_refused() -> None:
    samples = samples_of(_LLAVA)
    samples[0]["input_ids"] = samples[0]["input_ids"][:, : -LENGTHS[0][1]]
    reduced = ReducedModel(shared(_LLAVA), Policy(PRUNED["projector"]))
    row = packed(_LLAVA, samples)
    with pytest.raises(ValueError, match="A sample ends in an image, with another sample after"):
        reduced(**row)
    with pytest.raises(ValueError, match="A sample ends in an image, with another sample after"):
        reduced(**row | {"attention_mask": seen(samples, torch.bool)})
    # The last of a row may.
    samples.reverse()
    alone = [reduced(**sample).logits for sample in samples]
    assert_close(reduced(**packed(_LLAVA, samples)).logits, torch.cat(alone, dim=1))


def test_a_later_turn_takes_flags_only() -> None:
    sample = samples_of(_LLAVA)[0]
    reduced = ReducedModel(shared(_LLAVA), Policy(PRUNED["both"]))
    cache = reduced(**sample)[CACHE]
    mask = torch.ones(1, 1, 1, 74, dtype=torch.bool)
    with pytest.raises(ValueError, match="goes on with a cache"):
        reduced(input_ids=torch.tensor([[5]]), **{CACHE: cache}, attention_mask=mask)


# *** what keeps samples apart ***

VISUAL = torch.tensor([[0, 1, 1, 0, 0, 1, 0]]).bool()
STARTING_AGAIN = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])


def test_samples_are_told_apart_by_positions_alone() -> None:
    assert packed_by({}, VISUAL) == ""
    assert packed_by({"position_ids": torch.arange(7)[None]}, VISUAL) == ""
    assert "position_ids that start again" in packed_by({"position_ids": STARTING_AGAIN}, VISUAL)
    flags = torch.ones(1, 7, dtype=torch.int64)
    with pytest.raises(ValueError, match="position_ids go back inside a row"):
        packed_by({"position_ids": STARTING_AGAIN, "attention_mask": flags}, VISUAL)
    # Padding may have any position.
    flags[0, :4] = 0
    assert packed_by({"position_ids": STARTING_AGAIN, "attention_mask": flags}, VISUAL) == ""


def test_samples_are_told_apart_by_a_mask_of_pairs() -> None:
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    apart = causal & (torch.arange(7)[:, None] // 4 == torch.arange(7) // 4)
    for mask in (apart, torch.where(apart, 0.0, torch.finfo(torch.float32).min)):
        assert "[1, 1, 7, 7]" in packed_by({"attention_mask": mask[None, None]}, VISUAL)
    assert packed_by({"attention_mask": causal[None, None]}, VISUAL) == ""
    ending = torch.tensor([[0, 0, 1, 1, 0, 1, 0]]).bool()
    with pytest.raises(ValueError, match="A sample ends in an image"):
        packed_by({"attention_mask": apart[None, None]}, ending)
