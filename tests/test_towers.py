"""Groups of patches in vision towers: reductions against the original tower with masked keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import batch_of as videos_of
from closeness import assert_close, difference, roundings_of
from families import FAMILIES, IMAGE, TWINS, VIDEO, alone, built, prompts, shared
from masked import alive_of, assert_pruning_is_masking, generate, masked_from
from masked_tower import blocks_of, tower_masked
from tiny import call_of
from torch import Tensor
from torch.utils import _pytree as pytree
from videos import VIDEOS

import deos_fx
from deos_fx.inputs.items import IMAGES, encoding
from deos_fx.models.facts import facts_of
from deos_fx.models.families import features_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.lower.reduced_encoder import LEFT
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

NORM = {"scores": {"feature_norm": 1.0}}


# *** which patches make which token, by hand: flags of tokens -> flags [R, P] of patches ***


def in_runs(kept: Tensor) -> Tensor:
    """Each token is made of the next four patches; images are one row."""
    return kept.flatten().repeat_interleave(4)[None]


def in_windows(kept: Tensor) -> Tensor:
    """As `in_runs`, in the order of windows of 2 x 2 tokens of images of 4 x 8."""
    order = torch.arange(kept.numel()).reshape(-1, 2, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten()
    return in_runs(kept.flatten()[order])


def in_squares(kept: Tensor, width: int, first: int = 0, rows: int = 0, last: int = 0) -> Tensor:
    """Each token is made of 2 x 2 patches of a grid, row by row; some patches are no token's."""
    grid = kept.reshape(len(kept), -1, width)
    patches = grid.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    alone = (torch.ones(len(patches), count).bool() for count in (first, last))
    patches = torch.cat([next(alone), patches, next(alone)], dim=1)
    return patches.reshape(rows, -1) if rows else patches


def in_one_row(kept: Tensor) -> Tensor:
    """Each token is a patch; all images are one row."""
    return kept.reshape(1, -1)


def in_tiles(kept: Tensor, first: int) -> Tensor:
    """The whole image in 4 x 4 patches, then four tiles of it, whose rows end in a token each."""
    whole, parts = kept[:, :16], kept[:, 16:].reshape(-1, 8, 9)[:, :, :8]
    tiles = parts.reshape(-1, 2, 4, 2, 4).permute(0, 1, 3, 2, 4).reshape(-1, 4, 16)
    rows = torch.cat([whole[:, None], tiles], dim=1).reshape(-1, 16)
    return torch.cat([torch.ones(len(rows), first).bool(), rows], dim=1)


_SQUARES = functools.partial(in_squares, width=8)

TOWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "qwen2_vl": in_runs,
    "qwen2_5_vl": in_windows,
    "qwen3_vl": in_runs,
    "qwen3_5": in_runs,
    "glm4v": in_runs,
    "ernie4_5_vl_moe": in_runs,
    "internvl": functools.partial(_SQUARES, first=1),
    "aya_vision": _SQUARES,
    "idefics3": _SQUARES,
    "smolvlm": _SQUARES,
    "lfm2_vl": _SQUARES,
    "lfm3_vl": in_runs,
    "gemma4": _SQUARES,
    "kimi_k25": functools.partial(_SQUARES, rows=1),
    "minicpmv4_6": functools.partial(_SQUARES, rows=1),
    "mistral3": functools.partial(_SQUARES, rows=1),
    "gemma3_pooled": _SQUARES,
    "pixtral": in_one_row,
    "llava_next": functools.partial(in_tiles, first=1),
    "llava_onevision": functools.partial(in_tiles, first=0),
    # Its blocks are given hidden states by name, and one table of positions for all rows.
    "llama4": functools.partial(_SQUARES, last=1),
}
if "llama4" not in FAMILIES:
    # transformers 5.24.0 fails in Llama 4 itself.
    del TOWERS["llama4"]


# Blocks before the second one are no sites.
_LATE = {
    "minicpmv4_6": "later blocks of the tower have other patches",
    "lfm3_vl": "Lfm3VlVisionLayer convolves patches with those beside them",
}


@functools.cache
def model_of(name: str) -> Any:
    """A model of `families`, or a gemma3 that pools 2 x 2 patches."""
    if name == "gemma3_pooled":
        config = FAMILIES["gemma3"].config()
        config.vision_config.patch_size = 2
    elif name == "minicpmv4_6":
        # Patches are merged after the first block, which leaves two sites.
        config = TWINS[name].config()
        config.vision_config.num_hidden_layers = 3
    elif name == "lfm3_vl":
        # The second block is a convolution of patches in their places.
        config = TWINS[name].config()
        config.vision_config.num_hidden_layers = 3
        config.vision_config.layer_types = ["full_attention", "conv", "full_attention"]
    else:
        return shared(name)
    return built(config)


def batch_of(name: str, count: int) -> dict[str, Tensor]:
    return prompts(name.removesuffix("_pooled"), count)


def reduce(name: str, *reductions: Reduction) -> ReducedModel:
    if facts_of(model_of(name)).counts_positions:
        reductions = tuple(replace(step, position="compact") for step in reductions)
    return ReducedModel(model_of(name), Policy(reductions))


def encoder_of(reduced: ReducedModel, batch: dict[str, Tensor]) -> Any:
    """What the encoder gives in the graph that a reduced model has used last."""
    call, graph = call_of(reduced.model, batch), reduced.graphs.latest
    assert graph is not None
    _, given = encoding(call.facts, call.inputs, IMAGES)
    with torch.no_grad():
        return graph.get_submodule("image_encoder")(**given)


def features_in(output: Any) -> list[Tensor]:
    """The features [T, d] that enter the prompt, and those of other depths."""
    levels = [features_of(output), *(output.get("deepstack_features") or ())]
    leaves = [[x for x in pytree.tree_leaves(level) if isinstance(x, Tensor)] for level in levels]
    return [torch.cat([x.flatten(0, -2) for x in level]) for level in leaves]


def encoded(name: str, batch: dict[str, Tensor]) -> list[Tensor]:
    """The features of the original."""
    call = call_of(model_of(name), batch)
    method, given = encoding(call.facts, call.inputs, IMAGES)
    with torch.no_grad():
        return features_in(getattr(model_of(name).base_model, method)(**given, return_dict=True))


def placeholders_kept(batch: dict[str, Tensor], reduced: ReducedModel) -> Tensor:
    """Flags of the placeholders of each prompt that reach the decoder."""
    alive = alive_of(reduced(**batch)[CACHE], batch["input_ids"])[0]
    return alive[batch["input_ids"] == IMAGE].reshape(len(alive), -1)


@pytest.mark.parametrize("name", TOWERS)
def test_dropped_groups_are_masked_keys(name: str) -> None:
    batch, first = batch_of(name, 2), int(name in _LATE)
    reduced = reduce(name, Reduction(f"vision.{first}", 0.25, **NORM))
    kept = placeholders_kept(batch, reduced)
    assert kept.float().mean() < 0.35
    with tower_masked(model_of(name), first, TOWERS[name](kept)):
        expected = encoded(name, batch)
    found = features_in(encoder_of(reduced, batch))
    assert len(found) == len(expected)
    of_kept = kept.flatten()
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours[of_kept], theirs[of_kept], roundings_of(name.removesuffix("_pooled")))
    # The mask matters, so the comparison says something.
    assert difference(encoded(name, batch)[0][of_kept], expected[0][of_kept]) > 1e-3


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_the_decoder_gets_what_is_left(name: str) -> None:
    batch = batch_of(name, 2)
    reduced = reduce(name, Reduction("vision.0", 0.5, **NORM), Reduction("decoder.1", 0.25, **NORM))

    def tower(alive: Tensor) -> Any:
        kept = alive[batch["input_ids"] == IMAGE].reshape(len(alive), -1)
        return tower_masked(model_of(name), 0, TOWERS[name](kept))

    assert_pruning_is_masking(model_of(name), reduced, batch, roundings_of(name), tower)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "llava_next"])
def test_what_is_left_of_the_tower_is_reduced_before_the_decoder(name: str) -> None:
    batch = batch_of(name, 1)
    reduced = reduce(name, Reduction("vision.0", 0.5, **NORM), Reduction("projector", 0.25, **NORM))
    in_tower, _ = reduced.explain(**batch)
    places = (batch["input_ids"] == IMAGE).nonzero()[:, 1]
    # Ends of rows have no patches, and are never reduced.
    kept = torch.isin(places, in_tower.kept) | ~torch.isin(places, in_tower.positions_in)

    def tower(alive: Tensor) -> Any:
        assert not (alive[0, places] & ~kept).any()
        return tower_masked(model_of(name), 0, TOWERS[name](kept[None]))

    assert_pruning_is_masking(model_of(name), reduced, batch, roundings_of(name), tower)


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_next", "pixtral"])
def test_an_encoder_for_exports_does_the_same(name: str) -> None:
    batch = batch_of(name, 2)
    score: dict[str, Any] = {
        "scores": {"mutual_attention": 0.5, "key_norm": 0.5},
        "similarity": {"key": 1.0},
    }
    steps = (Reduction(f"vision.{i}", 0.5 - i / 4, gain=1.0, **score) for i in range(2))
    reduced = reduce(name, *steps)
    reduced(**batch)
    expected = encoder_of(reduced, batch)
    assert reduced.graphs.latest is not None
    encoder: Any = reduced.graphs.latest.get_submodule("image_encoder")
    call = call_of(reduced.model, batch)
    with torch.no_grad():
        found = encoder.exportable()(**encoding(call.facts, call.inputs, IMAGES)[1])
    assert torch.equal(found[LEFT]["kept"], expected[LEFT]["kept"])
    for ours, theirs in zip(*map(features_in, (found, expected)), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5", "internvl", "pixtral", "llava_next"])
def test_keeping_all_groups_changes_nothing(name: str) -> None:
    batch = batch_of(name, 2)
    kept_all = reduce(name, Reduction("vision.0", 1.0, gain=1.0, **NORM))
    real = batch["attention_mask"].bool()
    assert_close(kept_all(**batch).logits[real], model_of(name)(**batch).logits[real])


@pytest.mark.parametrize(
    "name", ["qwen2_vl", "qwen2_5_vl", "idefics3", "pixtral", "llava_next", "internvl"]
)
def test_groups_are_ranked_by_attention(name: str) -> None:
    batch = batch_of(name, 1)
    reduced = reduce(name, Reduction("vision.0", 0.25, scores={"mutual_attention": 1.0}))
    kept, received = placeholders_kept(batch, reduced)[0], list[Tensor]()
    patches_of = TOWERS[name]
    with tower_masked(model_of(name), 0, patches_of(torch.ones(1, len(kept)).bool()), received):
        encoded(name, batch)
    scores, nothing = torch.cat(received, dim=1), patches_of(torch.zeros(1, len(kept)).bool())
    own = {
        i: float(scores[patches].mean())
        for i, one in enumerate(torch.eye(len(kept)).bool())
        # The end of a row has no patches.
        if (patches := patches_of(one[None]) & ~nothing).any()
    }
    best = sorted(own, key=own.__getitem__)[-round(0.25 * len(own)) :]
    assert {*best} == {i for i in own if kept[i]}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3", "pixtral"])
def test_attention_in_one_image_does_not_depend_on_others(name: str) -> None:
    batch = prompts(name, 3)
    weights: dict[str, Any] = {"weighting": "raw", "gain": 0.5, "temperature": 0.5}
    first = Reduction("vision.0", 0.5, scores={"mutual_attention": 1.0}, **weights)
    reduced = reduce(name, first, replace(first, site="vision.1", keep=0.25))
    together = reduced.explain(**batch)
    for row in range(3):
        for site, own in zip(together, reduced.explain(**alone(name, batch, row)), strict=True):
            assert site.scores is not None and own.scores is not None
            assert_close(site.scores[row], own.scores[0])


def test_groups_are_merged_patch_by_patch() -> None:
    model, batch = model_of("qwen2_vl"), batch_of("qwen2_vl", 1)
    reduced = reduce("qwen2_vl", Reduction("vision.0", 8, gain=1.0, **NORM))
    kept = placeholders_kept(batch, reduced)[0]

    def merge(block: Any, args: Any, hidden: Tensor) -> Tensor:
        groups = hidden.reshape(32, 4, -1).clone()
        wide = torch.nn.functional.normalize(groups.flatten(1), dim=1)
        own, left = {i: [groups[i]] for i in range(32) if kept[i]}, range(32)
        assert groups.flatten(1).norm(dim=1).topk(8).indices.sort().values.tolist() == [*own]
        for j in (j for j in left if not kept[j]):
            own[max(own, key=lambda i, j=j: float(wide[i] @ wide[j]))].append(groups[j])
        for i, members in own.items():
            groups[i] = torch.stack(members).mean(dim=0)
        return groups.reshape(hidden.shape)

    handle = blocks_of(model)[0].register_forward_hook(merge)
    try:
        with tower_masked(model, 0, in_runs(kept)):
            (expected,) = encoded("qwen2_vl", batch)
    finally:
        handle.remove()
    (found,) = features_in(encoder_of(reduced, batch))
    assert_close(found[kept], expected[kept])


def test_images_of_several_sizes() -> None:
    # A prompt of images of 4 x 8 and 2 x 4 tokens, and one of an image of 4 x 4.
    first, second = [5, *[IMAGE] * 32, 6, *[IMAGE] * 8, 7], [5, *[IMAGE] * 16, 7]
    ids = torch.tensor([first, [0] * (len(first) - len(second)) + second])
    sizes = torch.tensor([[1, 8, 16], [1, 4, 8], [1, 8, 8]])
    pixels = torch.randn(128 + 32 + 64, 96, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels}
    batch |= {"image_grid_thw": sizes, "mm_token_type_ids": (ids == IMAGE).int()}
    one = {name: value[:1] for name, value in batch.items()}
    one |= {"pixel_values": pixels[:160], "image_grid_thw": sizes[:2]}
    reduced = reduce("qwen2_vl", Reduction("vision.0", 0.25, **NORM))
    merge: dict[str, Any] = {"gain": 1.0, "mass_bias": 1.0, **NORM}
    later = Reduction("projector", 0.125, similarity={"grid": 1.0}, **merge)
    twice = reduce("qwen2_vl", replace(reduced.policy.reductions[0], gain=1.0), later)

    def tower(alive: Tensor) -> Any:
        kept = alive[one["input_ids"] == IMAGE]
        assert [int(part.sum()) for part in kept.split([32, 8])] == [8, 2]
        return tower_masked(model_of("qwen2_vl"), 0, in_runs(kept))

    assert_pruning_is_masking(model_of("qwen2_vl"), reduced, one, tower=tower)
    for each in (reduced, twice):
        own = each(**one).logits[0]
        assert_close(each(**batch).logits[0, -len(own) :], own)


def test_a_table_as_wide_as_there_are_patches_is_no_mask() -> None:
    # Four tokens of four patches, and angles of 16 channels.
    ids = torch.tensor([[5, *[IMAGE] * 4, 6, 7]])
    pixels = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    batch |= {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    batch |= {"mm_token_type_ids": (ids == IMAGE).int()}
    reduced = reduce("qwen2_vl", Reduction("vision.0", 0.5, **NORM))
    kept = placeholders_kept(batch, reduced)[0]
    with tower_masked(model_of("qwen2_vl"), 0, in_runs(kept)):
        (expected,) = encoded("qwen2_vl", batch)
    (found,) = features_in(encoder_of(reduced, batch))
    assert kept.sum() == 2
    assert_close(found[kept], expected[kept])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_frames_of_videos_are_reduced_each(name: str) -> None:
    batch = videos_of(name, [[VIDEOS[name](2), VIDEOS[name](3)]])
    reduced = reduce(name, Reduction("vision.0", 0.5, **NORM))
    # GLM writes frames with the placeholders of images.
    visual = (batch["input_ids"] == VIDEO) | (batch["input_ids"] == IMAGE)

    def tower(alive: Tensor) -> Any:
        kept = alive[visual]
        assert {int(frame.sum()) for frame in kept.split(6)} == {3}
        return tower_masked(model_of(name), 0, in_runs(kept))

    assert_pruning_is_masking(model_of(name), reduced, batch, roundings_of(name), tower)


def test_beams_and_answers_share_a_reduced_tower() -> None:
    batch, model = batch_of("qwen2_vl", 2), model_of("qwen2_vl")
    reduced = reduce("qwen2_vl", Reduction("vision.0", 0.5, **NORM))
    alive = alive_of(reduced(**batch)[CACHE], batch["input_ids"])
    several = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    with (
        masked_from(model, alive),
        tower_masked(model, 0, in_runs(alive[0][batch["input_ids"] == IMAGE])),
    ):
        expected = model.generate(**batch, **several)
    assert torch.equal(reduced.generate(**batch, **several), expected)


def test_images_and_videos_in_one_prompt_are_not_reduced_in_the_tower() -> None:
    family = FAMILIES["qwen2_vl"]
    both = videos_of("qwen2_vl", [[VIDEOS["qwen2_vl"](2), (family.block, family.pixels(1))]])
    reduced = reduce("qwen2_vl", Reduction("vision.0", 0.5, **NORM))
    with pytest.raises(ValueError, match="vision.0 cannot be reduced: the video encoder reads"):
        reduced(**both)


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_what_is_left_is_explained(gain: float) -> None:
    batch = batch_of("qwen3_vl", 2)
    sites = {"vision.0": 16, "vision.1": 8, "projector": 4}
    merge: dict[str, Any] = {"gain": gain, "mass_bias": 0.0, **NORM}
    reduced = reduce("qwen3_vl", *(Reduction(*site, **merge) for site in sites.items()))
    found = reduced.explain(**batch)
    assert [site.kept.shape for site in found] == [(2, count) for count in sites.values()]
    for row in range(2):
        first, second, third = ({*site.kept[row].tolist()} for site in found)
        assert third < second < first
    for site, count in zip(found, sites.values(), strict=True):
        assert_close(site.mass.sum(dim=1), torch.full((2,), 32.0 if gain else float(count)))
    origin = reduced(**batch)[CACHE].spaces[0].origin
    assert all({*found[2].kept[row].tolist()} < {*origin[row].tolist()} for row in range(2))


def test_several_reductions_in_a_tower_and_the_decoder_are_saved(tmp_path: Path) -> None:
    batch = batch_of("qwen2_5_vl", 2)
    merge: dict[str, Any] = {"gain": 1.0, **NORM}
    steps = Reduction("vision.0", 0.5, **merge), Reduction("decoder.1", 4, **merge)
    reduced = reduce("qwen2_5_vl", *steps)
    reduced.save_pretrained(tmp_path)
    again = ReducedModel.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, reduced(**batch).logits)
    assert torch.equal(generate(again, batch)[0], generate(reduced, batch)[0])


@pytest.mark.parametrize(
    ("reductions", "reason"),
    [
        ([Reduction("vision.0", 4)], "has no score 'cls_attention'"),
        ([Reduction("vision.0", 4, mass_bias=1.0, gain=1.0, **NORM)], "Use mass_bias=0"),
        (
            [Reduction("vision.0", 4, gain=1.0, similarity={"key": 1}, observe="next", **NORM)],
            "vision.0 has no keys@next",
        ),
    ],
)
def test_what_groups_do_not_have_is_refused(reductions: list[Reduction], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        reduce("qwen2_vl", *reductions)(**batch_of("qwen2_vl", 1))


def test_a_preset_of_the_last_block_keeps_what_its_attention_says() -> None:
    batch = batch_of("qwen3_vl", 1)
    policy = deos_fx.presets.fit("fastervlm", 8, model_of("qwen3_vl"), (4, 8))
    (step,) = policy.reductions
    assert step.site == "vision.2" and step.scores == {"mutual_attention": 1.0}
    kept = placeholders_kept(batch, ReducedModel(model_of("qwen3_vl"), policy))
    received = list[Tensor]()
    with tower_masked(model_of("qwen3_vl"), 2, in_runs(torch.ones(1, 32).bool()), received):
        encoded("qwen3_vl", batch)
    scores = torch.cat(received, dim=1).reshape(32, 4).mean(dim=1)
    assert {*scores.topk(8).indices.tolist()} == {*kept[0].nonzero()[:, 0].tolist()}


@pytest.mark.parametrize(("name", "reason"), _LATE.items())
def test_blocks_before_one_that_needs_all_patches_are_no_sites(name: str, reason: str) -> None:
    reduced = reduce(name, Reduction("vision.0", 0.25, **NORM))
    with pytest.raises(ValueError, match=reason):
        reduced(**batch_of(name, 1))


def test_counts_of_groups_are_no_inputs_of_an_export(tmp_path: Path) -> None:
    reduced = reduce("qwen2_vl", Reduction("vision.0", 0.5, **NORM))
    with pytest.raises(ValueError, match="in the vision tower, whose counts cannot be inputs"):
        deos_fx.export_onnx(
            reduced, tmp_path / "x", example_inputs=batch_of("qwen2_vl", 1), elastic=True
        )


def test_images_of_new_sizes_are_followed_anew() -> None:
    batch = batch_of("qwen2_vl", 1)
    reduced = reduce("qwen2_vl", Reduction("vision.0", 0.5, **NORM))
    reduced(**batch)
    batch["image_grid_thw"] = torch.tensor([[1, 16, 8]])

    def tower(alive: Tensor) -> Any:
        return tower_masked(model_of("qwen2_vl"), 0, in_runs(alive[batch["input_ids"] == IMAGE]))

    assert_pruning_is_masking(model_of("qwen2_vl"), reduced, batch, tower=tower)


def test_what_follows_a_reduced_tower_is_compiled() -> None:
    batch = batch_of("qwen3_vl", 2)
    reduced, compiled = (reduce("qwen3_vl", Reduction("vision.0", 0.5, **NORM)) for _ in range(2))
    compiled.compile(backend="eager")
    assert_close(compiled(**batch).logits, reduced(**batch).logits)
