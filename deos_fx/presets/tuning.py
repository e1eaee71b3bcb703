"""Tune the options of a preset: the best setting by a given loss, in a number of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deos_fx.policy.policy import Policy
from deos_fx.policy.tier import check_count
from deos_fx.presets.fitting import fit_to_shape
from deos_fx.presets.rule import Option
from deos_fx.presets.rules import RULES
from deos_fx.presets.shape import ImageSize, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Tuned", "require_optuna", "tune"]

# Settings that cannot be fitted or give a policy that is known already cost no evaluation. A preset
# with few settings is done when so many attempts in a row have brought nothing new.
_PATIENCE = 50


@dataclass(frozen=True)
class Tuned:
    """A preset with its best setting.

    Attributes:
        policy: The policy of that setting.
        values: Its options.
        loss: Its loss.
        losses: The loss of every policy that was evaluated, in order; the first is that of the
            published setting.
    """

    policy: Policy
    values: Mapping[str, float]
    loss: float
    losses: tuple[float, ...] = field(repr=False)

    @property
    def evaluations(self) -> int:
        """Return how often the loss was computed."""
        return len(self.losses)


def tune(
    name: str,
    budget_tokens: float,
    model: PreTrainedModel,
    evaluate: Callable[[Policy], float],
    evaluations: int,
    *,
    seed: int = 0,
    visual_tokens: ImageSize | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> Tuned:
    """Find the setting of a preset's own options with the lowest loss within a budget.

    The published setting comes first; Optuna's tree-structured Parzen estimator proposes the
    others. Equal policies are evaluated once. A preset without options is evaluated once.

    Args:
        name: Name of a preset.
        budget_tokens: Limit on ``mean_visual_tokens``.
        model: The model.
        evaluate: Returns the loss of a policy; a ``ValueError`` says that the model cannot run it.
        evaluations: Largest number of losses that are computed.
        seed: Seed of the proposals.
        visual_tokens: As in `fit`.
        example_inputs: As in `fit`.

    Raises:
        ImportError: If the preset has options and Optuna is not installed.
        ValueError: If the preset cannot be fitted or run with its published setting, or
            ``evaluations`` is below 1.
    """
    check_count("evaluations", evaluations, 1)
    shape = Shape.of(model, visual_tokens, example_inputs)
    # 1. The published setting. Whatever is wrong with it is wrong with the preset.
    policy, published = fit_to_shape(name, budget_tokens, shape, {})
    best = Tuned(policy, published, evaluate(policy), ())
    # By its text: a policy holds dicts, which have no hash.
    losses = {policy.to_json(): best.loss}
    ranges = {key: option for key, option in RULES[name].options(shape).items() if option.tuned}
    ranges = {key: option for key, option in ranges.items() if option.low < option.high}
    # 2. The others, if there are any.
    if ranges and evaluations > 1:
        study = _study(seed)
        study.enqueue_trial({key: published[key] for key in ranges})
        idle = 0
        while len(losses) < evaluations and idle < _PATIENCE:
            trial = study.ask()
            values = {key: _suggest(trial, key, option) for key, option in ranges.items()}
            try:
                policy, setting = fit_to_shape(name, budget_tokens, shape, values)
                key = policy.to_json()
                new = key not in losses
                if new:
                    losses[key] = evaluate(policy)
            except ValueError:
                # Case: a setting that does not go with this model or budget.
                study.tell(trial, state=_pruned())
                idle += 1
                continue
            idle = 0 if new else idle + 1
            study.tell(trial, losses[key])
            if losses[key] < best.loss:
                best = Tuned(policy, setting, losses[key], ())
    return Tuned(best.policy, best.values, best.loss, tuple(losses.values()))


def _suggest(trial: Any, key: str, option: Option) -> float:
    # A whole number asks for the integers of a range.
    suggest = trial.suggest_int if isinstance(option.published, int) else trial.suggest_float
    return suggest(key, option.low, option.high, log=option.logarithmic)


def _study(seed: int) -> Any:
    """Make a study in memory."""
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))


def _pruned() -> Any:
    # Optuna takes a pruned trial for a bad one, and would propose a failed one again.
    return require_optuna().trial.TrialState.PRUNED


def require_optuna() -> Any:
    """Return the module Optuna, which only tuning needs.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "Optuna is not installed, which tunes presets: pip install 'deos-fx[compare]'"
        ) from error
    return optuna
