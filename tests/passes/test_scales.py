"""A search at several scales of images: same prompts, same budget, and the best of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from real_processors import noise, write_qwen
from searches import SHORT

from deos_fx import Budget, Policy, ReducedModel, search
from deos_fx.data import Record, batches, scaled_processor
from deos_fx.passes.search import run as run_module
from deos_fx.passes.search.scales import ALONE, check_scales

SCALES = (1.0, 0.75, 0.5)
RECORDS = [Record(noise(64, 64, i), "what is at the top", answer) for i, answer in enumerate("ab")]


@pytest.fixture(scope="module", name="found")
def _found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, its batches by scale, and what a search finds with a quarter of the tokens."""
    model, processor = write_qwen(tmp_path_factory.mktemp("qwen"))
    data = {scale: [*batches(scaled_processor(processor, scale), RECORDS, 1)] for scale in SCALES}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setattr(run_module, name, value)
        budget = Budget(visual_tokens=0.25)
        result = search(model, data, budget=budget, sites=["projector"], steps=2)
    return model, data, result


def test_every_scale_meets_the_budget_of_the_unscaled_model(found: Any) -> None:
    model, data, result = found
    # 64, 36 and 16 visual tokens.
    assert result.limits == {"visual_tokens": 16}
    assert result.unreduced.visual_tokens == 64
    assert {*result.scales} == {*SCALES}
    for candidate in result.candidates:
        inputs = data[candidate.policy.image_scale][0]
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        cost = ReducedModel(model, candidate.policy).cost(**inputs).after
        assert cost.visual_tokens <= 16
        assert candidate.cost.flops == pytest.approx(cost.flops, rel=0.2)


def test_losses_compare(found: Any) -> None:
    model, data, result = found
    assert result.candidates[0].policy == result.policy
    assert result.policy.image_scale == min(result.scales, key=result.scales.get)
    # Oracle: the original model's own loss.
    (alone,) = [each for each in result.candidates if each.source.startswith(ALONE)]
    assert alone.policy == Policy(image_scale=0.5)
    for scale, loss in ((1.0, result.unreduced_loss), (0.5, alone.loss)):
        with torch.no_grad():
            expected = torch.stack([model(**batch).loss for batch in data[scale]]).mean()
        assert_close(torch.tensor(loss), expected)
    # The best preset of all scales is what the result has to beat.
    presets = [each for each in result.candidates[1:] if each.source.startswith("preset ")]
    assert result.best_preset == min(presets, key=lambda each: each.loss)
    assert result.evidence.lead == pytest.approx(result.best_preset.loss - result.best.loss)


def test_the_worse_half_of_the_scales_ends_early(found: Any) -> None:
    _, _, result = found
    by_gradient = {
        candidate.policy.image_scale
        for candidate in result.candidates
        if candidate.source.startswith("gradient")
    }
    presets = {
        scale: min(
            each.loss
            for each in result.candidates
            if each.policy.image_scale == scale and each.source.startswith("preset")
        )
        for scale in (1.0, 0.75)
    }
    assert by_gradient <= {min(presets, key=lambda scale: presets[scale])}
    assert "the lowest loss at each scale: 1 " in result.basis


def test_data_that_does_not_compare(found: Any) -> None:
    model, data, _ = found
    with pytest.raises(ValueError, match="those of 1 as well"):
        check_scales({0.5: data[0.5]})
    with pytest.raises(ValueError, match="at scale 0.5 have other answers"):
        check_scales({1: data[1.0], 0.5: data[0.5][::-1]})
    bare = [{name: x for name, x in batch.items() if name != "labels"} for batch in data[1.0]]
    with pytest.raises(ValueError, match="has no labels, without which scales"):
        check_scales({1: bare, 0.5: bare})
    with pytest.raises(ValueError, match=r"a batch at scale 0\.5 has no labels"):
        check_scales({1: data[1.0], 0.5: bare})
    with pytest.raises(TypeError, match="keys are no scales"):
        search(model, data[1.0][0], budget=Budget(visual_tokens=0.5))
    with pytest.raises(TypeError, match="searched for one budget"):
        search(model, data, budgets=[Budget(visual_tokens=0.5)])


def interrupt(stage: str, done: int, total: int) -> None:
    """Interrupt a search when it comes to the second scale."""
    if stage.startswith("scale 0.75"):
        raise KeyboardInterrupt


def test_an_interruption_leaves_what_is_known(found: Any) -> None:
    model, data, _ = found
    budget = Budget(visual_tokens=0.25)
    result = search(model, data, budget=budget, sites=["projector"], steps=2, progress=interrupt)
    assert result.interrupted and 1.0 in result.scales and 0.5 not in result.scales
    assert result.best.cost.visual_tokens <= 16


def test_sites_of_the_tower_are_searched(found: Any) -> None:
    model, data, _ = found
    budget = Budget(visual_tokens=0.25)
    result = search(model, data, budget=budget, sites=["vision.0"], steps=1, progress=interrupt)
    assert {step.site for step in result.policy.reductions} == {"vision.0"}
