"""Starting points of a search, and the cost of its relaxed reductions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deos_fx.cost.latency import LatencyTable
from deos_fx.cost.model import CostModel
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.passes.analyse.sites import Site
from deos_fx.policy.counts import along
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import first_layer, split_site
from deos_fx.tokens.layout import PromptLayout

__all__ = ["keep_fractions", "relaxed_costs", "start_reductions"]

# Activation, at the start, of the sites of the policy that the search starts from, and of others.
_ACTIVE, _DORMANT = 0.95, 0.1


def start_reductions(
    sites: Sequence[Site], policy: Policy, layout: PromptLayout
) -> dict[str, RelaxedReduction]:
    """Make one relaxed reduction for each site, near that of a policy where it has one.

    The search starts at the best hand-designed policy. Its sites are active, with its counts and
    its treatment; all others are nearly dormant, halfway between the regimes. Gates, gains and
    weights have no gradient at the ends of their ranges, so all of them start a little inside.

    Args:
        sites: The sites to search.
        policy: The policy to start from; the empty policy starts with every site half active.
        layout: The prompts.

    Returns:
        Site name -> relaxed reduction, in order of depth.
    """
    known = {reduction.site: reduction for reduction in policy.reductions}
    present = visual_tokens = layout.tokens_per_image
    reductions = {}
    for site in sites:
        start = _undecided(site, layout.placed)
        activation, retention = (0.5 if policy.is_empty else _DORMANT), 0.5
        if site.name in known:
            # Retention is relative to the tokens that reach the site.
            count = known[site.name].count(visual_tokens)
            activation, retention = _ACTIVE, min(0.99, count / present)
            start, present = _inside(known[site.name], start), count
        reductions[site.name] = RelaxedReduction(start, activation=activation, retention=retention)
    return reductions


def _undecided(site: Site, placed: bool) -> Reduction:
    """Make a reduction between all regimes that ranks mostly by attention."""
    in_decoder = split_site(site.name)[0] == "decoder"
    # The scores that published methods rank by, as far as the site has them.
    attention = ("last_text_attention", "text_attention") if in_decoder else ("cls_attention",)
    by_grid = placed and not in_decoder
    weights = dict.fromkeys(attention, 3.0) | {"feature_norm": 1.0, "novelty": 1.0}
    return Reduction(
        site.name,
        0.5,
        scores={name: weight for name, weight in weights.items() if name in site.scores},
        gain=0.5,
        temperature=0.1,
        mass_bias=0.25,
        similarity={"feature": 0.5, "grid": 0.5} if by_grid else {"feature": 1.0},
    )


def _inside(policy: Reduction, undecided: Reduction) -> Reduction:
    """Move the parameters of a policy's reduction off the ends of their ranges."""
    # Scores of the undecided reduction join with little weight, so that the gradient can raise
    # them.
    scores = _mixed(policy.scores, undecided.scores) if policy.uses_scores else {}
    return replace(
        policy,
        scores=scores,
        similarity=_mixed(policy.similarity, undecided.similarity),
        gain=min(0.9, max(0.1, policy.gain)),
        temperature=min(1.0, max(0.05, policy.temperature)),
        mass_bias=max(0.05, policy.mass_bias),
    )


def _mixed(mostly: Mapping[str, float], little: Mapping[str, float]) -> dict[str, float]:
    """Mix weights by name, 9 to 1."""
    names = (*mostly, *(name for name in little if name not in mostly))
    return {name: 0.9 * mostly.get(name, 0.0) + 0.1 * little.get(name, 0.0) for name in names}


def keep_fractions(reductions: Mapping[str, RelaxedReduction]) -> dict[str, float]:
    """Return site -> fraction of the original visual tokens after it."""
    fraction: Tensor | float = 1.0
    fractions = {}
    for site, reduction in reductions.items():
        fraction = reduction.keep_fraction(fraction)
        fractions[site] = fraction.item()
    return fractions


def relaxed_costs(
    reductions: Mapping[str, RelaxedReduction], cost: CostModel, latency: LatencyTable | None
) -> dict[str, Tensor]:
    """Compute differentiable costs of one prompt from the expected counts of every layer.

    Args:
        reductions: Site -> relaxed reduction, in order of depth.
        cost: The model's costs.
        latency: Measured times, if there is a limit on latency.

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
    if latency is not None:
        costs["latency_ms"] = latency.predict(counts)
    return {name: torch.as_tensor(amount) for name, amount in costs.items()}
