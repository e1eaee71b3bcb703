"""Reductions put into a graph built by hand: the walk over the sites, and what both forms emit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from closeness import assert_close
from handmade import LAYOUT, PATCHES, PROMPT, Attending, Handmade
from torch import Tensor, fx
from torch.nn import functional

from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.passes.analyse.check_reduction import check_reduction
from deos_fx.passes.analyse.find_sites import find_sites
from deos_fx.passes.lower.insert_relaxed import insert_relaxed
from deos_fx.passes.lower.lower_reductions import lower_reductions
from deos_fx.passes.lower.site_walk import SiteWalk
from deos_fx.passes.lower.steps import Group, Place, Step
from deos_fx.passes.observe.site_features import TowerFeatures
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction

NORM: dict[str, Any] = {"scores": {"feature_norm": 1.0}}
VISUAL = slice(1, 1 + PATCHES)


def largest(own: Tensor, count: int) -> list[int]:
    """The tokens of one image with the largest norms, in the order of the image."""
    return own.norm(dim=-1).topk(count).indices.sort().values.tolist()


def run(made: Handmade, *names: str, on: Tensor) -> Tensor:
    """Some modules, one after the other."""
    for name in names:
        on = made.modules[name](on)
    return on


def merged(made: Handmade, features: Tensor, places: list[int]) -> Tensor:
    """The embeddings with features at some places."""
    embeddings = run(made, "embedding", on=PROMPT).clone()
    embeddings[0, places] = features
    return embeddings


def features_of(made: Handmade) -> Tensor:
    pixels = made.inputs["pixel_values"]
    return run(made, "vision_0", "vision_1", "projector", on=pixels)[0].detach()


# *** static ***


def lowered(made: Handmade, *reductions: Reduction) -> dict[str, Any]:
    graph_module = made.placed()
    sites = find_sites(graph_module)
    lower_reductions(graph_module, sites, Policy(reductions), LAYOUT)
    return graph_module(**made.inputs)


def test_the_empty_policy_changes_nothing() -> None:
    made = Handmade()
    graph_module = made.placed()
    code = graph_module.code
    assert lower_reductions(graph_module, find_sites(graph_module), Policy(), LAYOUT).code == code


def test_layers_after_a_site_run_on_what_is_left() -> None:
    made = Handmade()
    made.modules["decoder_1"] = Attending()
    output = lowered(made, Reduction("decoder.0", 2, **NORM))
    every = list(range(1, 1 + PATCHES))
    hidden = run(made, "decoder_0", on=merged(made, features_of(made), every))
    left = [0, *(1 + i for i in largest(hidden[0, VISUAL], 2)), 5, 6]
    assert output["spaces"][0]["origin"].tolist() == [left]
    assert_close(output["logits"], run(made, "decoder_1", "head", on=hidden[:, left]))


def test_dropped_features_take_their_placeholders_along() -> None:
    made = Handmade()
    output = lowered(made, Reduction("projector", 3, **NORM))
    features = features_of(made)
    kept = largest(features, 3)
    left = [0, *(1 + i for i in kept), 5, 6]
    hidden = merged(made, features[kept], [1 + i for i in kept])[:, left]
    assert output["spaces"][0]["origin"].tolist() == [left]
    assert_close(output["logits"], run(made, "decoder_0", "decoder_1", "head", on=hidden))


def test_what_is_merged_is_the_mean_of_the_nearest() -> None:
    made = Handmade()
    output = lowered(made, Reduction("projector", 2, gain=1.0, **NORM))
    features = features_of(made)
    kept = largest(features, 2)
    groups = {i: [i] for i in kept}
    for j in set(range(PATCHES)) - set(kept):
        like = [float(functional.cosine_similarity(features[i], features[j], 0)) for i in kept]
        groups[kept[like.index(max(like))]].append(j)
    means = torch.stack([features[group].mean(dim=0) for group in groups.values()])
    places = [1 + i for i in kept]
    hidden = merged(made, means, places)[:, [0, *places, 5, 6]]
    assert_close(output["logits"], run(made, "decoder_0", "decoder_1", "head", on=hidden))


def test_patches_leave_the_tower_where_they_are_dropped() -> None:
    made = Handmade(class_tokens=1)
    output = lowered(made, Reduction("vision.0", 2, **NORM))
    hidden = run(made, "vision_0", on=made.inputs["pixel_values"])[0]
    kept = largest(hidden[1:], 2)
    features = run(made, "vision_1", "projector", on=hidden[1:][kept])
    places = [1 + i for i in kept]
    hidden = merged(made, features, places)[:, [0, *places, 5, 6]]
    assert_close(output["logits"], run(made, "decoder_0", "decoder_1", "head", on=hidden))


# *** relaxed ***


def relaxed(made: Handmade, reduction: RelaxedReduction) -> fx.GraphModule:
    graph_module = made.placed()
    reductions = {reduction.start.site: reduction}
    return insert_relaxed(graph_module, find_sites(graph_module), reductions, LAYOUT)


def test_closed_gates_are_masked_keys() -> None:
    # Two norms must not be closer than the gates are wide.
    torch.manual_seed(0)
    made = Handmade()
    made.modules["decoder_1"] = Attending()
    start = Reduction("decoder.0", 2, **NORM)
    output = relaxed(made, RelaxedReduction.from_reduction(start, 0.5))(**made.inputs)
    every = list(range(1, 1 + PATCHES))
    hidden = run(made, "decoder_0", on=merged(made, features_of(made), every))
    kept = largest(hidden[0, VISUAL], 2)
    gates = torch.zeros(1, PATCHES).index_fill(1, torch.tensor(kept), 1.0)
    # The gates are saturated to 1e-5, no further.
    torch.testing.assert_close(output["gates"][0], gates, atol=1e-5, rtol=0)
    left = [0, *(1 + i for i in kept), 5, 6]
    sees = torch.zeros(7, 7, dtype=torch.bool)
    sees[:, left] = True
    sees = sees.tril()
    attended = functional.scaled_dot_product_attention(hidden, hidden, hidden, sees[None])
    expected = run(made, "head", on=attended)[:, left]
    torch.testing.assert_close(output["logits"][:, left], expected, atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_parameters_of_the_given_reduction() -> None:
    made = Handmade()
    made.modules["decoder_1"] = Attending()
    start = Reduction("decoder.0", 2, scores={"feature_norm": 1.0, "novelty": 1.0})
    reduction = RelaxedReduction(start, activation=0.5, retention=0.5)
    output = relaxed(made, reduction)(**made.inputs)
    output["logits"].square().sum().backward()
    gradients = [parameter.grad for parameter in reduction.parameters()]
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_gates_need_a_block_that_takes_a_mask() -> None:
    start = Reduction("decoder.0", 2, **NORM)
    with pytest.raises(ValueError, match="decoder_1 .Linear. takes no attention_mask"):
        relaxed(Handmade(), RelaxedReduction.from_reduction(start, 0.5))


# *** the walk ***


class Seen(SiteWalk):
    """Reduces nothing, and returns the visual tokens of each site in the order of the walk."""

    def __init__(self, made: Handmade, *names: str) -> None:
        graph_module = made.placed()
        sites = find_sites(graph_module)
        steps = []
        for name in names:
            reduction = Reduction(name, 2, **NORM)
            site = check_reduction(graph_module, sites, reduction, LAYOUT)
            steps.append(Step(reduction, site, frozenset(), (2,)))
        self.order: list[str] = []
        self.own: dict[str, fx.Node] = {}
        super().__init__(graph_module, sites, LAYOUT, steps)

    def _note(self, step: Step, place: Place) -> None:
        self.order.append(step.site.name)
        self.own[step.site.name] = place.own

    def reduce_images(
        self, step: Step, place: Place, put_back: Callable[[fx.Node], fx.Node]
    ) -> None:
        self._note(step, place)
        # Everything after the site reads what is put back.
        put_back(self.call(torch.mul, place.own, 2.0))

    def reduce_inside(self, steps: Sequence[Step]) -> None:
        raise AssertionError("the image encoder of this model is not one node")

    def reduce_merged(self, step: Step, groups: Sequence[Group]) -> None:
        raise AssertionError("the images of this model are not in the prompt yet")

    def enter_prompt(self, steps: Sequence[Step]) -> None:
        self.order.append("prompt")

    def reduce_prompt(self, step: Step, place: Place) -> None:
        self._note(step, place)

    def reread(self, features: TowerFeatures, name: str) -> fx.Node:
        raise AssertionError("nothing is observed")

    def outputs(self) -> dict[str, Any]:
        return {"own": self.own}


@pytest.mark.parametrize("class_tokens", [0, 1])
def test_a_walk_goes_from_front_to_back_and_finds_the_visual_tokens(class_tokens: int) -> None:
    made = Handmade(class_tokens)
    walk = Seen(made, "vision.0", "projector", "decoder.0")
    output = walk.walk()(**made.inputs)
    assert walk.order == ["vision.0", "projector", "prompt", "decoder.0"]
    hidden = run(made, "vision_0", on=made.inputs["pixel_values"])[:, class_tokens:]
    assert_close(output["own"]["vision.0"], hidden)
    features = run(made, "vision_1", "projector", on=2 * hidden)
    assert_close(output["own"]["projector"], features)
    every = list(range(1, 1 + PATCHES))
    hidden = run(made, "decoder_0", on=merged(made, 2 * features[0], every))
    assert_close(output["own"]["decoder.0"], hidden[:, VISUAL])
    assert_close(output["logits"], run(made, "decoder_1", "head", on=hidden))
