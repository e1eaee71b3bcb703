"""Choose the policy of a command, and refuse it before anything expensive if it cannot run.

Everything here happens on a model without weights: the call that is captured is the one that would
be captured first, so what it would refuse is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deos_fx.cli.limits import DEFAULT_LIMIT
from deos_fx.cli.processors import example_of, scaled_example
from deos_fx.contents import RECORD, record_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deos_fx.data import Record
    from deos_fx.policy.policy import Policy

    _Inputs = Mapping[str, Any] | None
    # Scale of images -> a prompt with an image of full size, and the same at the scale.
    Examples = Callable[[float], tuple[_Inputs, _Inputs]]

__all__ = ["Choice", "examples_of", "named_policies", "own_policy", "policy_of"]


@dataclass(frozen=True)
class Choice:
    """What the options ``--policy``, ``--preset``, ``--budget`` and ``--image-scale`` say.

    Attributes:
        path: A policy file.
        preset: Name of a preset, which is fitted to the budget.
        budget: Limit on visual tokens; alone, it is that of the default policy.
        image_scale: Scale at which images enter; alone, nothing else is reduced.
    """

    path: Path | None = None
    preset: str | None = None
    budget: int | float | None = None
    image_scale: float | None = None

    @property
    def is_empty(self) -> bool:
        """Return whether no option is given."""
        return self == Choice()


def own_policy(model_dir: str) -> Policy | None:
    """Return the policy of a folder that holds a reduced model; None of any other folder.

    Raises:
        ValueError: If its policy is damaged, or the folder is incomplete.
    """
    from deos_fx.policy.policy import Policy

    if not (Path(model_dir) / RECORD).is_file():
        return None
    # Called for its checks: the policy may be another one than that of the other files.
    record_of(Path(model_dir))
    return Policy.load(Path(model_dir) / "policy.json")


def policy_of(
    model: PreTrainedModel,
    examples: Examples,
    own: Policy | None,
    choice: Choice,
) -> Policy | None:
    """Return the policy that the options of a command name, checked, or that of the folder.

    Args:
        model: The model on the meta device.
        examples: Its examples, see `examples_of`.
        own: The policy of the folder, if it is that of a reduced model.
        choice: The options.

    Returns:
        The policy; None if the options name none and the folder has none.

    Raises:
        ValueError: If the options do not go together, or the model cannot run the policy.
    """
    from deos_fx.policy.policy import Policy

    if choice.path is not None and choice != Choice(choice.path):
        raise ValueError("--policy says where to keep how much; give it without the others")
    if choice.path is not None:
        policy: Policy | None = Policy.load(_one_policy(choice.path))
    elif choice.image_scale is not None:
        policy = _scaled(model, choice, choice.image_scale, examples)
    elif choice.preset is not None:
        policy = _fitted(model, choice.preset, choice.budget, *examples(1.0))
    elif choice.budget is not None:
        return _default(model, choice.budget, examples)
    else:
        policy = own
    if policy is not None:
        _check_runs(model, policy, examples)
    return policy


def examples_of(model: PreTrainedModel, model_dir: str, record: Record | None = None) -> Examples:
    """Return a function that makes prompts with an image, each once.

    Args:
        model: The model on the meta device.
        model_dir: Its folder, or a hub id.
        record: What the prompts are to be made of; by default a grey image.

    Returns:
        For a scale, a prompt with an image of full size, and the same with the image at that scale.
        At scale 1 both are one, and None if no such prompt can be made.
    """

    # A processor takes a while, and a fit, a check and an outline need what it makes.
    @functools.cache
    def examples(image_scale: float) -> tuple[_Inputs, _Inputs]:
        if image_scale != 1:
            return scaled_example(model, model_dir, image_scale, record)
        inputs = example_of(model, model_dir, record)
        return inputs, inputs

    return examples


def _default(model: PreTrainedModel, budget: int | float, examples: Examples) -> Policy:
    """Return the default policy at a budget; `transform` checks it on the example."""
    from deos_fx.api import transform
    from deos_fx.policy.budget import Budget

    _, inputs = examples(1.0)
    return transform(model, budget=Budget(visual_tokens=budget), example_inputs=inputs).policy


def _scaled(
    model: PreTrainedModel, choice: Choice, image_scale: float, examples: Examples
) -> Policy:
    """Return a policy for smaller images, of which a preset removes what a budget does not allow.

    Without a preset it is ``merge``, and without a budget and a preset nothing else is reduced.
    """
    from deos_fx.policy.policy import Policy

    alone = Policy(name="resize", image_scale=image_scale)
    if image_scale == 1:
        raise ValueError("--image-scale 1 changes nothing; leave it out")
    if choice.preset is None and choice.budget is None:
        return alone
    fitted = _fitted(model, choice.preset or "merge", choice.budget, *examples(image_scale))
    return replace(fitted, image_scale=image_scale)


def _check_runs(model: PreTrainedModel, policy: Policy, examples: Examples) -> None:
    """Refuse a policy that the first call of the reduced model would refuse.

    Raises:
        ValueError: If the model cannot run the policy; the message says why.
    """
    from deos_fx.runtime.reduced_model import ReducedModel

    reduced = ReducedModel(model, policy)
    _, inputs = examples(policy.image_scale)
    # Without a prompt with an image, only what the config says is checked.
    if inputs is not None:
        reduced.capture(**inputs)


def _fitted(
    model: PreTrainedModel,
    preset: str,
    budget: int | float | None,
    whole: Mapping[str, Any] | None,
    inputs: Mapping[str, Any] | None,
) -> Policy:
    """Fit a preset: in counts where all images have one size, and in shares of each image else.

    Args:
        model: The model.
        preset: Name of the preset.
        budget: Limit on visual tokens, of which a share refers to `whole`; None for the default.
        whole: A prompt with an image of full size.
        inputs: The same as images enter.
    """
    from deos_fx import presets
    from deos_fx.cost.model import CostModel
    from deos_fx.inputs.call import Call
    from deos_fx.inputs.complete import completed
    from deos_fx.models.facts import facts_of
    from deos_fx.policy.budget import Budget
    from deos_fx.policy.policy import Policy

    facts = facts_of(model)
    if whole is None or inputs is None:
        raise ValueError(
            f"--preset is fitted to an image, and how one becomes inputs of {facts.name} does not "
            "follow from its config; save its processor in the model's folder, or give --policy"
        )
    unreduced = CostModel.of_call(completed(Call.of(facts, whole))).predict(Policy())
    costs = CostModel.of_call(completed(Call.of(facts, inputs)))
    limit = Budget(visual_tokens=DEFAULT_LIMIT if budget is None else budget)
    tokens = limit.limits(unreduced)["visual_tokens"] / costs.images
    if whole is not inputs and tokens >= costs.tokens_per_image:
        # Case: smaller images alone are within the limit.
        return Policy(name="resize")
    size = costs.layout.grid if facts.sizes_vary else None
    return costs.for_any_size(presets.fit(preset, tokens, model, size, inputs))


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


def _one_policy(path: Path) -> Path:
    """Return a policy file, or that of the folder of a search.

    Raises:
        ValueError: If a folder has none or several.
    """
    found = _policies_in(path) if path.is_dir() else [path]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{path} has the policies {names}; give one, as {found[0]}")
    return found[0]


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
