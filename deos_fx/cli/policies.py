"""Choose the policy of a command, and refuse it before anything expensive if it cannot run.

Everything here happens on a model without weights: the call that is captured is the one that would
be captured first, so what it would refuse is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deos_fx.cli.limits import DEFAULT_LIMIT
from deos_fx.cli.processors import example_of
from deos_fx.contents import RECORD

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from deos_fx.policy.policy import Policy

__all__ = ["Choice", "check_runs", "chosen_policy", "named_policies", "own_policy", "policy_of"]


@dataclass(frozen=True)
class Choice:
    """What the options ``--policy``, ``--preset`` and ``--budget`` say.

    Attributes:
        path: A policy file.
        preset: Name of a preset, which is fitted to the budget.
        budget: Limit on visual tokens; alone, it is that of the default policy.
    """

    path: Path | None = None
    preset: str | None = None
    budget: int | float | None = None

    @property
    def is_empty(self) -> bool:
        """Return whether no option is given."""
        return self == Choice()


def own_policy(model_dir: str) -> Policy | None:
    """Return the policy of a folder that holds a reduced model; None of any other folder.

    Raises:
        ValueError: If its policy is damaged.
    """
    from deos_fx.policy.policy import Policy

    if not (Path(model_dir) / RECORD).is_file():
        return None
    return Policy.load(Path(model_dir) / "policy.json")


def chosen_policy(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor] | None,
    choice: Choice,
) -> Policy | None:
    """Return the policy that the options of a command name, checked; None if they name none.

    Args:
        model: The model, which may be on the meta device.
        inputs: A prompt with an image; None if none can be made.
        choice: The options.

    Raises:
        ValueError: If the options do not go together, or the model cannot run the policy.
    """
    from deos_fx.api import transform
    from deos_fx.policy.budget import Budget
    from deos_fx.policy.policy import Policy

    limit = choice.budget
    if choice.path is None and choice.preset is None:
        # Case: nothing is chosen, or a budget alone, to which the default policy is fitted.
        if limit is None:
            return None
        return transform(model, budget=Budget(visual_tokens=limit), example_inputs=inputs).policy
    if choice.path is None:
        limit = DEFAULT_LIMIT if limit is None else limit
        policy = _fitted(model, inputs, str(choice.preset), limit)
    elif choice.preset is None and limit is None:
        policy = Policy.load(choice.path)
    else:
        raise ValueError("--policy says where to keep how much; give it without the others")
    check_runs(model, inputs, policy)
    return policy


def policy_of(
    model: PreTrainedModel,
    model_dir: str,
    own: Policy | None,
    choice: Choice,
) -> Policy | None:
    """Return the chosen policy, or that of a folder of a reduced model; None if there is neither.

    Args:
        model: The model on the meta device.
        model_dir: Its folder, or a hub id.
        own: The policy of the folder, if it is that of a reduced model.
        choice: The options.

    Raises:
        ValueError: If the options do not go together, or the model cannot run the policy.
    """
    inputs = example_of(model, model_dir)
    chosen = chosen_policy(model, inputs, choice)
    if chosen is None and own is not None:
        check_runs(model, inputs, own)
    return own if chosen is None else chosen


def check_runs(model: PreTrainedModel, inputs: Mapping[str, Tensor] | None, policy: Policy) -> None:
    """Refuse a policy that the first call of the reduced model would refuse.

    Args:
        model: The model, which may be on the meta device.
        inputs: A prompt with an image; without one, only what the config says is checked.
        policy: The policy.

    Raises:
        ValueError: If the model cannot run the policy; the message says why.
    """
    from deos_fx.runtime.reduced_model import ReducedModel

    reduced = ReducedModel(model, policy)
    if inputs is not None:
        reduced.capture(**inputs)


def _fitted(
    model: PreTrainedModel, inputs: Mapping[str, Any] | None, preset: str, limit: int | float
) -> Policy:
    """Fit a preset: in counts where all images have one size, and in shares of each image else."""
    from deos_fx import presets
    from deos_fx.cost.model import CostModel
    from deos_fx.inputs.call import Call
    from deos_fx.inputs.complete import completed
    from deos_fx.models.facts import facts_of
    from deos_fx.policy.budget import Budget
    from deos_fx.policy.policy import Policy

    facts = facts_of(model)
    if inputs is None:
        raise ValueError(
            f"--preset is fitted to an image, and how one becomes inputs of {facts.name} does not "
            "follow from its config; save its processor in the model's folder, or give --policy"
        )
    costs = CostModel.of_call(completed(Call.of(facts, inputs)))
    whole = costs.predict(Policy())
    tokens = Budget(visual_tokens=limit).limits(whole)["visual_tokens"] / costs.images
    size = costs.layout.grid if facts.sizes_vary else None
    return costs.for_any_size(presets.fit(preset, tokens, model, size))


def named_policies(paths: Sequence[Path]) -> dict[str, Path]:
    """Name policy files: by their names, or where these are alike, by their folders.

    Args:
        paths: Files, or folders that a search wrote, for all policies in them.

    Raises:
        ValueError: If two files are the same, one does not exist, or a folder has no policy.
    """
    paths = [file for path in paths for file in _policies_in(path)]
    for names in ([path.stem for path in paths], [str(path) for path in paths]):
        if len({*names}) == len(names):
            return dict(zip(names, paths, strict=True))
    raise ValueError("a policy file is given twice; give each once")


def _policies_in(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(
            f"there is no policy {path}; give a policy file, or the folder of a search"
        )
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("policy*.json"))
    if not found:
        raise ValueError(f"there is no policy.json in {path}")
    return found
