"""Starting points of a search, and the cost of its relaxed reductions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deos_fx.cost.model import CostModel
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.passes.analyse.sites import Site
from deos_fx.policy.counts import along
from deos_fx.policy.learned import Learned
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import first_layer, split_site

__all__ = ["keep_fractions", "relaxed", "relaxed_costs", "start_reduction"]

# A trained share of kept tokens starts inside its range, where it has a gradient.
_MOST = 0.99


# Directions that a learned similarity compares, and its share beside the similarity of the whole
# hidden states.
_DIRECTIONS, _LEARNED_SHARE = 32, 0.5
# How a site chooses before the first step, and what it does with the rest. Numbers that published
# methods leave out were found by trying a few on the reference model; the steps change all of them.
_START: dict[str, Any] = {
    "selector": "greedy",
    "diversity": 4.0,
    "gain": 0.88,
    "temperature": 0.05,
    "weighting": "score",
    "sharpness": 3.0,
    "mass_bias": 0.9,
}
# Weights of the scores at the start, as far as a site has them.
_SCORES = {
    "cls_attention": 2.0,
    "last_text_attention": 1.0,
    "text_attention": 1.0,
    "text_relevance": 0.5,
}
# Scores of sites that have none of these.
_OTHERWISE = {"novelty": 1.0}


def start_reduction(site: Site, tokens: Tensor) -> Reduction:
    """Make the reduction that the steps start from at a site: every regime is within reach.

    It ranks by attention and by likeness to the question, keeps tokens that differ, and merges most
    of the others into them. Its learned parts have no effect yet: the probe is 0, and the learned
    similarity compares the principal directions of the tokens.

    Args:
        site: The site.
        tokens: Some hidden states there, [B, V, d].

    Returns:
        The reduction, with any count.
    """
    flat = tokens.detach().flatten(0, 1).float()
    rank = min(_DIRECTIONS, *flat.shape)
    # Images that became NaN or infinite say nothing of directions.
    flat = flat.where(flat.isfinite().all(dim=1, keepdim=True), 0.0)
    # Rows of V^T, the strongest first.
    directions = torch.linalg.svd(flat, full_matrices=False)[2][:rank].mT.cpu()
    scores = {name: weight for name, weight in _SCORES.items() if name in site.scores}
    return Reduction(
        site.name,
        0.5,
        scores=scores or _OTHERWISE,
        similarity={"feature": 1 - _LEARNED_SHARE, "learned": _LEARNED_SHARE},
        learned=Learned({"probe": torch.zeros(flat.shape[1]), "metric": directions}),
        **_START,
    )


def relaxed(policy: Policy, visual_tokens: int, **settings: Any) -> dict[str, RelaxedReduction]:
    """Make the relaxed form of a policy, whose parameters can be trained.

    The count of a single site is given by the limits; of several sites, each count is trained.

    Args:
        policy: The policy.
        visual_tokens: Visual tokens of one image.
        **settings: See `RelaxedReduction`.

    Returns:
        Site name -> relaxed reduction, in order of depth.
    """
    present = visual_tokens
    reductions = {}
    for reduction, count in zip(policy.reductions, policy.counts(visual_tokens), strict=True):
        # Retention is relative to the tokens that reach the site.
        single = len(policy.reductions) == 1
        retention = count / present if single else min(_MOST, max(1 - _MOST, count / present))
        each = RelaxedReduction(reduction, activation=1.0, retention=retention, **settings)
        each.activation.requires_grad_(False)
        each.retention.requires_grad_(not single)
        # Scaling tokens up is what soft gates are most easily misled to.
        each.reweight.requires_grad_(reduction.reweight != 0)
        reductions[reduction.site] = each
        present = count
    return reductions


def keep_fractions(reductions: Mapping[str, RelaxedReduction]) -> dict[str, float]:
    """Return site -> fraction of the original visual tokens after it."""
    fraction: Tensor | float = 1.0
    fractions = {}
    for site, reduction in reductions.items():
        fraction = reduction.keep_fraction(fraction)
        fractions[site] = fraction.item()
    return fractions


def relaxed_costs(reductions: Mapping[str, RelaxedReduction], cost: CostModel) -> dict[str, Tensor]:
    """Compute differentiable costs of one prompt from the expected counts of every layer.

    Args:
        reductions: Site -> relaxed reduction, in order of depth.
        cost: The model's costs, with measured times if there is a limit on latency.

    Returns:
        0-dim costs under the names of the budget's limits.
    """
    images = cost.images
    # Visual tokens of a prompt, as many as reach the site.
    present = torch.tensor(float(images * cost.tokens_per_image))
    # First layer or block after each site, and the tokens from there on.
    in_layers: list[tuple[int, Tensor]] = []
    in_blocks: list[tuple[int, Tensor]] = []
    before, overhead = present, torch.zeros(())
    for site, reduction in reductions.items():
        after = reduction.keep_fraction(present)
        stage, layer = split_site(site)
        # In the decoder, a prompt is reduced as a whole; before it, each image alone.
        share = 1 if stage == "decoder" else images
        flops = cost.reduction_flops(reduction.start, present / share, after / share)
        # A site that is half active costs half of its reduction.
        overhead = overhead + reduction.activation.sigmoid() * flops
        # Reductions in the tower and at the projector shorten all decoder layers.
        in_layers.append((first_layer(site), after))
        if stage == "vision":
            in_blocks.append((layer + 1, after / images))
        present = after
    # Tokens of a prompt in each decoder layer, and of an image in each block of the tower.
    counts = along(before, in_layers, cost.signature.decoder_layers)
    patches = along(before / images, in_blocks, cost.tower_blocks + 1)
    costs = {
        "visual_tokens": cost.mean_tokens(counts),
        "flops": cost.flops(counts, overhead, patches),
        "kv_cache": cost.kv_bytes(counts),
    }
    # Only if there is a limit on it.
    if cost.latency is not None:
        costs["latency_ms"] = cost.latency_ms(counts, overhead, patches)
    return {name: torch.as_tensor(amount) for name, amount in costs.items()}
