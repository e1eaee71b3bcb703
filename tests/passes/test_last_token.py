"""A prompt that ends in an image: its last token stays, since what comes next is read from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from closeness import assert_close
from families import FAMILIES, IMAGE, PAD, shared
from in_pytorch import without_tracing
from masked import alive_of, generate, masked_from
from test_families import NORM, PRUNED
from test_relaxed_graph import REGIMES, assert_relaxed_is_static
from tiny import shared_llava
from torch import Tensor

from deos_fx import presets
from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.models.upstream import CACHE
from deos_fx.passes.search.answers import LONGEST
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier
from deos_fx.runtime.reduced_model import ReducedModel


def ending(name: str, text: int = 6, images: int = 1, behind: int = 0) -> dict[str, Tensor]:
    """One prompt of text, images right after each other, and perhaps text again."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(1, 100, (text + behind,), generator=generator).tolist()
    block = [token for token in FAMILIES[name].block if token == IMAGE]
    ids = torch.tensor([words[:text] + block * images + words[text:]])
    return {"input_ids": ids, **FAMILIES[name].pixels(images), **FAMILIES[name].extra(ids)}


def of_llava(text: int, images: int = 1, batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    words = torch.randint(1, 100, (batch, text), generator=generator)
    ids = torch.nn.functional.pad(words, (0, 64 * images), value=IMAGE)
    pixels = torch.randn(batch * images, 3, 64, 64, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels}


def padded(*prompts: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    rows = [prompt["input_ids"][0] for prompt in prompts]

    def pad(values: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            values, batch_first=True, padding_value=value, padding_side=side
        )

    return {
        "input_ids": pad(rows, PAD),
        "attention_mask": pad([torch.ones_like(row) for row in rows], 0),
        "pixel_values": torch.cat([prompt["pixel_values"] for prompt in prompts]),
    }


# *** in every family, as the original model with the dropped keys masked ***


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("policy", ["both", "decoder"])
@pytest.mark.parametrize("text", [6, 0])
def test_the_last_token_stays(name: str, policy: str, text: int) -> None:
    model, prompt = shared(name), ending(name, text)
    reduced = ReducedModel(model, Policy(PRUNED[policy]))
    output = reduced(**prompt)
    spaces = output[CACHE].spaces
    visual = int((prompt["input_ids"] == IMAGE).sum())
    for reduction, space in zip(PRUNED[policy], spaces, strict=True):
        assert space.origin[0, -1] == prompt["input_ids"].shape[1] - 1
        assert space.origin.shape[1] == text + reduction.count(visual)
    with masked_from(model, alive_of(output[CACHE], prompt["input_ids"])):
        whole = model(**prompt).logits
        tokens, logits = generate(model, prompt)
    assert_close(output.logits[0], whole[0, spaces[-1].origin[0]])
    our_tokens, our_logits = generate(reduced, prompt)
    assert torch.equal(our_tokens, tokens)
    assert_close(our_logits, logits)


@pytest.mark.parametrize("policy", ["both", "projector"])
def test_of_several_images_only_the_last_is_read_from(policy: str) -> None:
    prompt = of_llava(5, images=2)
    longer = prompt | {"input_ids": torch.nn.functional.pad(prompt["input_ids"], (0, 1), value=7)}
    (first,) = PRUNED[policy][:1]
    with_text, without = (
        ReducedModel(shared_llava(), Policy((first,))).explain(**given)[0].kept[0]
        for given in (longer, prompt)
    )
    per_image = len(without) // 2
    assert torch.equal(without[:per_image], with_text[:per_image])
    # The best but one of the last image, and its last token.
    last = {*without[per_image:].tolist()}
    assert 5 + 127 in last and len({*with_text[per_image:].tolist()} - last) <= 1


def test_ends_of_rows_stay_anyway() -> None:
    prompt = {"input_ids": torch.tensor([[5, 6, *FAMILIES["llava_next"].block]])}
    prompt |= FAMILIES["llava_next"].pixels(1)
    behind = prompt | {"input_ids": torch.nn.functional.pad(prompt["input_ids"], (0, 2), value=9)}
    reduced = ReducedModel(shared("llava_next"), Policy(PRUNED["projector"]))
    kept = [reduced(**given)[CACHE].spaces[0].origin[0] for given in (prompt, behind)]
    assert torch.equal(kept[0], kept[1][:-2])


# *** whatever selects ***

_HALF = Tier(keep=0.5, selector="strided")
_COMPACT = {"order": "selection", "position": "compact"}
POLICIES: dict[str, tuple[Reduction, ...]] = {
    "grid": (Reduction("decoder.1", 16, selector="grid"),),
    "pool, twice": (
        Reduction("projector", 16, selector="grid", gain=1.0, similarity={"grid": 1.0}),
        Reduction("decoder.1", 4, selector="grid", gain=1.0, similarity={"grid": 1.0}),
    ),
    "bilinear": (Reduction("decoder.1", 16, selector="grid", assignment="window", gain=1.0),),
    "greedy": (Reduction("decoder.1", 16, selector="greedy", diversity=0.5),),
    "bipartite": (Reduction("decoder.1", 64, selector="bipartite", gain=1.0, receivers="last"),),
    "bipartite, the other half": (
        Reduction("projector", 40, selector="bipartite", gain=1.0, options={"first": 1}),
    ),
    "tiers": (Reduction("decoder.1", 16, tiers=(_HALF,), receivers="last", gain=1.0),),
    "tiers of the tower, residual": (
        Reduction("vision.1", 16, tiers=(_HALF,), residual=True, order="tier", position="compact"),
    ),
    "tower, residual": (Reduction("vision.1", 16, residual=True, **_COMPACT),),
    "tower twice": (
        Reduction("vision.0", 32, tiers=(_HALF,), **_COMPACT),
        Reduction("vision.1", 16, keep_class=True, **_COMPACT),
    ),
    "residual": (Reduction("decoder.1", 16, residual=True),),
    "one of all, residual": (Reduction("decoder.1", 1, residual=True),),
    "nearest take": (Reduction("projector", 16, assignment="k_nearest", neighbours=3, gain=1.0),),
    "grid positions": (Reduction("decoder.1", 16, position="grid", mass_bias=1.0, gain=1.0),),
    "everything": (Reduction("decoder.1", 1.0, **NORM),),
    **{
        name: preset.reductions
        for name, preset in {
            "cdpruner": presets.cdpruner(16),
            "divprune": presets.divprune(16),
            "dart": presets.dart(keep=16),
            "holov": presets.holov(16),
            "prumerge": presets.prumerge(16, 1),
            "random": presets.random(16),
            "visionzip": presets.visionzip(20, 8, 1),
            "vispruner": presets.vispruner(16, 0.5, 1),
        }.items()
    },
}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", POLICIES)
def test_whatever_selects(name: str, images: int) -> None:
    prompts = of_llava(6, images, batch=2)
    with_text = {**prompts, "input_ids": prompts["input_ids"].roll(-1, dims=1)}
    reduced = ReducedModel(shared_llava(), Policy(POLICIES[name]))
    output, others = reduced(**prompts), reduced(**with_text)
    for space, other in zip(output[CACHE].spaces, others[CACHE].spaces, strict=True):
        assert space.origin.shape == other.origin.shape
        assert (space.origin[:, -1] == 5 + 64 * images).all()
        assert (space.origin.diff() > 0).all()
    explained = reduced.explain(**prompts)
    for site, other in zip(explained, reduced.explain(**with_text), strict=True):
        assert (site.kept[:, -1] == 5 + 64 * images).all()
        assert (site.remaining[:, -1] == 5 + 64 * images).all()
        if name != "nearest take" and name != "prumerge":
            # There, one token may give to several.
            assert_close(site.mass.sum(dim=1), other.mass.sum(dim=1))
    own = reduced(**{key: value[: len(value) // 2] for key, value in prompts.items()})
    assert_close(own.logits[0], output.logits[0])


def test_a_pool_is_that_of_its_windows() -> None:
    # Windows of 2 x 2: which of its tokens stands for a window makes no difference to the mean.
    prompt = of_llava(6)
    longer = prompt | {"input_ids": torch.nn.functional.pad(prompt["input_ids"], (0, 1), value=7)}
    for reductions in (presets.avg_pool(keep=16).reductions, POLICIES["pool, twice"][:1]):
        reduced = ReducedModel(shared_llava(), Policy(reductions))
        here, there = (reduced.explain(**given)[0] for given in (prompt, longer))
        windows = [site.destination[0] > 0 for site in (here, there)]
        for window, site in zip(windows, (here, there), strict=True):
            window[torch.arange(16), site.kept[0] - 6] = True
        assert torch.equal(*windows)


def test_in_the_place_of_the_last_choice() -> None:
    norms = {**NORM, "selector": "top_k"}
    prompt = of_llava(6)
    longer = prompt | {"input_ids": torch.nn.functional.pad(prompt["input_ids"], (0, 1), value=7)}
    for count in (1, 5, 16):
        reduced = ReducedModel(shared_llava(), Policy((Reduction("projector", count, **norms),)))
        scores = reduced.explain(**longer)[0].scores[0]
        best = scores[:-1].topk(count - 1).indices
        expected = sorted([*(best + 6).tolist(), 69])
        assert reduced.explain(**prompt)[0].kept[0].tolist() == expected


# *** batches ***


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("policy", ["both", "decoder"])
def test_rows_of_a_batch_end_as_alone(policy: str, side: str) -> None:
    text = of_llava(4)
    text["input_ids"] = text["input_ids"].roll(-2, dims=1)
    prompts = [of_llava(6), of_llava(2), text, of_llava(3, images=2), of_llava(0)]
    reduced = ReducedModel(shared_llava(), Policy(PRUNED[policy]))
    batch = padded(*prompts, side=side)
    output = reduced(**batch)
    origin = output[CACHE].spaces[-1].origin
    for row, prompt in enumerate(prompts):
        own = reduced(**prompt)
        real = batch["attention_mask"][row].bool()
        left = (origin[row] >= 0) & real[origin[row].clamp(min=0)]
        assert_close(output.logits[row][left], own.logits[0])
        before = int((~real).sum()) if side == "left" else 0
        mine = own[CACHE].spaces[-1].origin[0]
        assert torch.equal(origin[row][left] - before, mine)
    if side == "left":
        tokens, logits = generate(reduced, batch)
        for row, prompt in enumerate(prompts):
            own_tokens, own_logits = generate(reduced, prompt)
            assert torch.equal(tokens[row], own_tokens[0])
            assert_close(logits[row], own_logits[0])


def test_batches_that_do_not_end_alike_are_named() -> None:
    text = of_llava(4)
    text["input_ids"] = text["input_ids"].roll(-2, dims=1)
    batch = padded(of_llava(4), text, side="left")
    reduced = ReducedModel(shared_llava(), Policy(PRUNED["both"]))
    with pytest.raises(ValueError, match="an image ends 1 of 2"):
        reduced.explain(**batch)
    with pytest.raises(ValueError, match="some end in an image and others in text"):
        reduced(**batch, labels=batch["input_ids"])


# *** the relaxed form and the search ***


@pytest.mark.parametrize("site", ["vision.1", "projector", "decoder.1"])
@pytest.mark.parametrize("regime", ["prune", "pool", "residual", "diverse", "weighted by score"])
def test_the_relaxed_form_keeps_it_too(site: str, regime: str) -> None:
    prompts = of_llava(6, batch=2)
    prompts["attention_mask"] = torch.ones_like(prompts["input_ids"])
    policy = Policy((Reduction(site, 16, **REGIMES[regime]),))
    assert_relaxed_is_static(shared_llava(), policy, prompts)


def test_a_search_takes_prompts_of_both_kinds() -> None:
    text = of_llava(6, batch=2)
    text["input_ids"] = text["input_ids"].roll(-2, dims=1)
    data = [of_llava(6, batch=2), text]
    problem = SearchProblem.of(shared_llava(), data, Budget(visual_tokens=0.25))
    # The model's own answers follow. The first token of those behind an image does not count: it is
    # predicted at the image's last token, which may be dropped.
    counted = (LONGEST - 1, LONGEST)
    policy, expected = Policy(PRUNED["decoder"]), []
    for batch, tokens in zip(problem.scoring, counted, strict=True):
        assert batch.target.positions.sum(dim=1).tolist() == [tokens, tokens]
        prompts = {name: batch.inputs[name] for name in ("input_ids", "pixel_values")}
        whole, ours = (
            model(**prompts, use_cache=False).logits[:, -tokens - 1 : -1].log_softmax(-1)
            for model in (shared_llava(), ReducedModel(shared_llava(), policy))
        )
        expected.append((whole.exp() * (whole - ours)).sum(dim=-1).mean())
    assert problem.static_loss(policy) == pytest.approx(sum(expected).item() / 2, rel=1e-4)


# *** ONNX Runtime ***


def test_an_export_is_for_prompts_that_end_in_an_image_too(tmp_path: Path) -> None:
    pool = {"selector": "grid", "gain": 1.0, "similarity": {"grid": 1.0}}
    merged = Reduction("decoder.0", 8, gain=1.0, mass_bias=0.5, **NORM)
    policy = Policy((Reduction("projector", 16, **pool), merged))
    reduced = ReducedModel(shared_llava(2), policy)
    prompts = padded(of_llava(3), of_llava(5), of_llava(4), side="left")
    with without_tracing():
        folder = export_onnx(reduced, tmp_path / "onnx", example_inputs=of_llava(6))
        exported = OnnxModel.from_pretrained(folder, "cpu")
    tokens, logits = generate(exported, prompts)
    our_tokens, our_logits = generate(reduced, prompts)
    assert torch.equal(tokens, our_tokens)
    assert_close(logits, our_logits)
    text = of_llava(6)
    text["input_ids"] = text["input_ids"].roll(-1, dims=1)
    with pytest.raises(ValueError, match="end in text, .* that end in an image. Export it again"):
        exported(**text)
    with pytest.raises(ValueError, match="exported graphs take flags of real tokens"):
        exported(**of_llava(6), attention_mask=torch.ones(1, 1, 70, 70, dtype=torch.bool))
    with pytest.raises(ValueError, match="position_ids go back inside a row"):
        exported(**of_llava(6), position_ids=torch.arange(35).repeat(2)[None])
