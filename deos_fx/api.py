"""`transform`: turn a model into a reduced model in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from deos_fx import presets
from deos_fx.cost.model import CostModel
from deos_fx.inputs.call import Call
from deos_fx.models.facts import ModelFacts, facts_of
from deos_fx.policy.budget import Budget, check_budget
from deos_fx.policy.counts import fit_counts
from deos_fx.policy.policy import Policy
from deos_fx.presets.shape import Shape
from deos_fx.runtime.reduced_model import ReducedModel

__all__ = ["transform"]

DEFAULT_BUDGET = Budget(visual_tokens=0.5)
"""The budget if none is given: half of the visual tokens."""


def transform(
    model: PreTrainedModel,
    *,
    policy: Policy | None = None,
    budget: Budget | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> ReducedModel:
    """Reduce the visual tokens of a vision-language model.

    1. With `policy`, that policy is applied.
    2. With `data`, a policy is searched for under the budget; see `deos_fx.search`.
    3. With neither, every dropped token is merged before the decoder into the kept token that it
       resembles most (`presets.merge`). As many tokens are kept as the budget allows.

    If no budget is given, it is half of the visual tokens. Where the number of visual tokens
    depends on the size of an image, the policy keeps a share of each image, rounded to the nearest
    token; with example inputs or data, the limits hold exactly for images of those sizes.

    Args:
        model: An unmodified transformers vision-language model; it is put in eval mode and shares
            its weights with the result.
        policy: Where and how to reduce; it is applied as it is.
        budget: Limits on the cost.
        data: Model input dicts (batches) to search with, with or without ``labels``.
        example_inputs: Inputs of one call. The model is captured with them at once instead of at
            the first call, and limits other than ``visual_tokens`` refer to prompts of their
            length.

    Returns:
        The reduced model, called like the model.

    Raises:
        TypeError: If an argument, including the model, has the wrong type.
        ValueError: If the model reads no images, the policy does not fit it, the budget cannot be
            met, or arguments contradict each other.
    """
    facts = facts_of(model)
    _check_arguments(policy, budget, data)
    wanted = budget or DEFAULT_BUDGET
    if policy is None and data is not None:
        # Case 2. The import is here, since the search needs much that the other cases do not.
        from deos_fx.passes.search.search import search

        policy = search(model, data, budget=wanted).policy
    elif policy is None:
        # Case 3.
        call = None if example_inputs is None else Call.of(facts, example_inputs)
        policy = _default_policy(facts, wanted, call)
    reduced = ReducedModel(model, policy)
    if example_inputs is not None:
        reduced.capture(**example_inputs)
    return reduced


def _check_arguments(policy: object, budget: object, data: object) -> None:
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(
            f"policy is a {type(policy).__name__}; give a Policy: Policy.load(path), one of "
            "deos_fx.presets such as presets.fastv(), or the .policy of a search."
        )
    if budget is not None:
        check_budget(budget)
    if policy is not None and (budget is not None or data is not None):
        other = "a budget" if data is None else "data"
        raise ValueError(
            f"Both a policy and {other} are given: a policy is applied as it is. Leave the policy "
            f"out to have one made, or leave out {other}."
        )


def _default_policy(facts: ModelFacts, budget: Budget, call: Call | None) -> Policy:
    """Return merging before the decoder, with the largest count that meets the budget."""
    if budget.require().latency_ms is not None and budget.latency_table is None:
        raise ValueError(
            f"budget latency_ms={budget.latency_ms}: latency is measured by the search. Give data "
            "to search with, a latency_table of deos_fx.profile, or limit something else."
        )
    ranking = _ranking(facts)
    if call is None and facts.sizes_vary:
        # Case: no image size is known, so only a share of each image can be promised.
        return _merge(facts, ranking, _share(facts, budget))
    # Case: image sizes are known. A count may be tried out, and is made a share in the end if other
    # images may have other sizes.
    costs = _cost_model(facts, budget, call)
    limits = budget.limits(costs.predict(Policy()))
    policy = fit_counts(
        _merge(facts, ranking, 0.5),
        costs.tokens_of_first_image,
        lambda candidate: costs.amounts(costs.for_any_size(candidate), limits),
        limits,
    )
    if policy is None:
        # Case: even one token per image exceeds a limit; the message says by how much.
        fewest = costs.amounts(_merge(facts, ranking, 1), limits)
        missed = [f"{name}={limit:g} ({fewest[name]:g})" for name, limit in limits.items()]
        raise ValueError(
            f"The budget cannot be met: {', '.join(missed)}; in brackets what the model needs with "
            "one visual token per image. Raise the budget."
        )
    return costs.for_any_size(policy)


def _share(facts: ModelFacts, budget: Budget) -> float:
    """Return the share of every image that a budget allows to keep, whatever the image's size."""
    others = (budget.flops, budget.kv_cache, budget.latency_ms) != (None, None, None)
    if others or not isinstance(budget.visual_tokens, float):
        raise ValueError(
            f"How many visual tokens an image of a {facts.signature.model_type} model has depends "
            "on its size, and what it costs does too: give example_inputs (or data to search "
            "with), or limit visual_tokens by a fraction and nothing else, as "
            "Budget(visual_tokens=0.25)."
        )
    return budget.visual_tokens


def _merge(facts: ModelFacts, ranking: str, keep: int | float) -> Policy:
    """Return `presets.merge` with the score `ranking` to rank tokens by."""
    # Masses bias attention where that has the keys it is given.
    policy = presets.merge(keep=keep, mass_bias=0.0 if facts.indexes_keys else 1.0)
    (reduction,) = policy.reductions
    reduction = replace(reduction, scores={ranking: 1.0}, position=facts.position)
    return replace(policy, reductions=(reduction,))


def _ranking(facts: ModelFacts) -> str:
    """Return the score to rank by: CLS attention if exactly the visual tokens follow the CLS token.

    Otherwise it is `novelty`, also for models that read videos: a video encoder is one node of the
    graph, so its attention cannot be observed.
    """
    videos = "video" in facts.model.input_modalities
    if videos or facts.sizes_vary or not facts.has_class_token:
        return "novelty"
    return "cls_attention" if Shape.of(facts.model).class_token else "novelty"


def _cost_model(facts: ModelFacts, budget: Budget, call: Call | None) -> CostModel:
    if call is not None:
        costs = CostModel.of_call(call)
        table = budget.latency_table
        return costs if table is None else costs.with_latency(table)
    if (budget.flops, budget.kv_cache, budget.latency_ms) != (None, None, None):
        raise ValueError(
            "FLOPs, KV cache and latency of a prompt depend on its length: give example_inputs (or "
            "data to search with), or limit visual_tokens only."
        )
    # Case: only visual tokens are limited, and their number does not depend on the text.
    return CostModel.of_images(facts.model, images=1, text_tokens=0)
