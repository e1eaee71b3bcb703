"""Fit presets to a model and a budget: the largest counts it allows, at the published depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deos_fx.policy.counts import tokens_per_layer
from deos_fx.policy.policy import Policy
from deos_fx.policy.tier import MOST_TOKENS, check_number
from deos_fx.presets.rule import Option, Rule
from deos_fx.presets.rules import RULES
from deos_fx.presets.shape import ImageSize, Shape
from deos_fx.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["fit", "fit_to_shape", "mean_visual_tokens", "options"]

FEWEST = 1 / 32
"""A preset stays at its published layer only if it can keep this share of the tokens there."""

# Halvings of the size of a preset. Far less than a token is left of it then.
_HALVINGS = 30


def mean_visual_tokens(policy: Policy, decoder_layers: int, visual_tokens: int) -> float:
    """Compute the mean over the decoder layers of the visual tokens a layer processes, per image.

    Layers 0 to i process the tokens that are there before the site ``decoder.i``; a reduction
    before the decoder shortens all layers.
    """
    return sum(tokens_per_layer(policy, (visual_tokens,), decoder_layers)) / decoder_layers


def options(
    name: str,
    model: PreTrainedModel,
    visual_tokens: ImageSize | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> dict[str, Option]:
    """Return the options of a preset that `fit` takes, with their ranges for a model.

    Args:
        name: Name of a preset.
        model: The model.
        visual_tokens: As in `fit`.
        example_inputs: As in `fit`.

    Raises:
        ValueError: If there is no such preset, or the number of visual tokens is not known.
    """
    return _rule(name).options(Shape.of(model, visual_tokens, example_inputs))


def fit(
    name: str,
    budget_tokens: float,
    model: PreTrainedModel,
    visual_tokens: ImageSize | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    **values: float,
) -> Policy:
    """Return a preset for a model, with the largest counts that a budget allows.

    Every option has its published value, in proportion to the depth of the model, unless another
    is given.

    1. Presets of the vision tower end at the last block whose output the language model uses; those
       of PruMerge need a block after that, and end at the last but one where there is none. Where
       the features are read from several blocks, the last one's reduction moves to the projector.
    2. Where no CLS token attends to the patches, these presets rank by the attention that a token
       gets from all patches. `merge` and `redistribute` then rank by novelty. Where groups of
       patches make a token, their attention is that of the site's own block, they stay in the order
       of the image, and masses do not bias attention.
    3. A preset inside the decoder stays at its published depth as long as it can keep a 32nd of the
       tokens there; otherwise its first site moves to an earlier layer, down to ``decoder.0``.
       Stages keep their proportions, and move to the nearest layers that attend and have a site.
    4. Pools take windows at most 1.5 times as long as wide.
    5. Where a position has several coordinates (mRoPE), tokens keep theirs, as the ports of these
       methods do; where layers count positions themselves, all are compact.

    Args:
        name: Name of a preset.
        budget_tokens: Limit on ``mean_visual_tokens``.
        model: The model.
        visual_tokens: Visual tokens of an image, or their rows and columns; needed only where the
            size of an image decides how many there are.
        example_inputs: Inputs of one call with images; needed only by presets of the vision tower,
            where several patches make a token and only a processor knows how an image enters.
        **values: Options of the preset, see `options`.

    Raises:
        TypeError: If ``model`` is not a transformers model.
        ValueError: If there is no such preset or option, the model lacks something that the preset
            needs (the message names the preset that comes nearest), or none of its settings meets
            the budget.
    """
    shape = Shape.of(model, visual_tokens, example_inputs)
    return fit_to_shape(name, budget_tokens, shape, values)[0]


def fit_to_shape(
    name: str, budget_tokens: float, shape: Shape, values: Mapping[str, float]
) -> tuple[Policy, dict[str, Any]]:
    """Fit a preset as `fit` does.

    Args:
        name: Name of a preset.
        budget_tokens: Limit on ``mean_visual_tokens``.
        shape: The sizes of the model.
        values: Options of the preset.

    Returns:
        The policy, and the value of every option.

    Raises:
        ValueError: As for `fit`.
    """
    rule = _rule(name)
    check_number("budget_tokens", budget_tokens, 1, MOST_TOKENS)
    _check_needs(name, rule, shape)
    ranges = rule.options(shape)
    _check_values(name, values, ranges)
    chosen = {key: option.published for key, option in ranges.items()} | dict(values)
    for setting in _settings(rule, chosen, moving=rule.moves not in values):
        policy = _largest(rule, shape, budget_tokens, setting)
        # The last place is taken whatever it keeps, since there is no better one.
        last = not rule.moves or setting[rule.moves] == 1 or rule.moves in values
        if policy is not None and (last or _left(policy, shape) >= FEWEST * shape.visual_tokens):
            return _with_positions(policy, shape), setting
    raise ValueError(
        f"{name} cannot meet a mean of {counted(f'{budget_tokens:g}', 'visual token')} over "
        f"{counted(shape.decoder_layers, 'decoder layer')}: even with the fewest tokens that it "
        f"can keep, too many of the {shape.visual_tokens} are processed; raise the budget or "
        f"choose another preset{_advice(rule, shape)}"
    )


def _rule(name: str) -> Rule:
    if name not in RULES:
        raise ValueError(f"no preset {name!r}; choose from {', '.join(RULES)}")
    return RULES[name]


def _check_needs(name: str, rule: Rule, shape: Shape) -> None:
    for need in rule.needs:
        if not need.met(shape):
            raise ValueError(f"{name} cannot be fitted: {need.lacking}{_advice(rule, shape)}")


def _advice(rule: Rule, shape: Shape) -> str:
    """Name the preset that comes nearest to one that cannot be fitted."""
    fine = (other for other in rule.nearest if all(n.met(shape) for n in RULES[other].needs))
    nearest = next(fine, None)
    return f"; {nearest} comes nearest" if nearest else ""


def _check_values(name: str, values: Mapping[str, float], ranges: Mapping[str, Option]) -> None:
    for key, value in values.items():
        if key not in ranges:
            known = ", ".join(ranges) or "none"
            raise ValueError(f"{name} has no option {key!r} to fit with; it has {known}")
        option = ranges[key]
        whole = isinstance(option.published, int)
        kinds = (int,) if whole else (int, float)
        fine = isinstance(value, kinds) and not isinstance(value, bool)
        if not fine or not option.low <= value <= option.high:
            kind = "a whole number" if whole else "a number"
            raise ValueError(
                f"{name}: {key} is {value!r}; give {kind} from {option.low} to {option.high}"
            )


def _settings(rule: Rule, chosen: dict[str, Any], moving: bool) -> Iterable[dict[str, Any]]:
    """Yield the options with the first site at its place, and then at every earlier layer."""
    if not rule.moves or not moving:
        yield chosen
        return
    for layer in range(chosen[rule.moves], 0, -1):
        yield chosen | {rule.moves: layer}


def _largest(rule: Rule, shape: Shape, budget: float, setting: Mapping[str, Any]) -> Policy | None:
    """Return the policy of the largest size within the budget; None if there is none."""

    def sized(size: float) -> Policy | None:
        policy = rule.build(shape, size, setting)
        mean = mean_visual_tokens(policy, shape.decoder_layers, shape.visual_tokens)
        return policy if mean <= budget + 1e-9 else None

    # Counts grow with the size, so bisection finds the largest.
    best, high = sized(0.0), sized(1.0)
    if best is None or high is not None:
        return high
    low, above = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + above) / 2
        policy = sized(middle)
        if policy is None:
            above = middle
        else:
            low, best = middle, policy
    # The tiers of a reduction have to share its count; the message of a policy says what is wrong.
    for step in best.reductions:
        step.tier_counts(step.count(shape.visual_tokens))
    return best


def _with_positions(policy: Policy, shape: Shape) -> Policy:
    """Let tokens keep their positions where these cannot be renumbered, or the other way round."""
    if shape.counting:
        steps = [replace(step, position="compact") for step in policy.reductions]
        return replace(policy, reductions=tuple(steps))
    if not shape.coordinates:
        return policy
    # Tokens out of the order of the image have no positions to keep; lowering says so.
    steps = [
        replace(step, position="keep") if step.order == "position" else step
        for step in policy.reductions
    ]
    return replace(policy, reductions=tuple(steps))


def _left(policy: Policy, shape: Shape) -> int:
    """Return the tokens of an image after the last reduction."""
    return policy.counts(shape.visual_tokens)[-1] if policy.reductions else shape.visual_tokens
