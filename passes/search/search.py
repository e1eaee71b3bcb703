"""Search a policy by gradient, for one budget or for several in one go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, overload

from transformers import PreTrainedModel

from deos_fx.passes.search import processes
from deos_fx.passes.search.budgets import check_budgets, in_words, loosest_first, pooled
from deos_fx.passes.search.checkpoints import Checkpoints
from deos_fx.passes.search.estimate import Estimate
from deos_fx.passes.search.foreign import check_checkpoint
from deos_fx.passes.search.outcome import check_can_be_met
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.processes import Progress
from deos_fx.passes.search.run import SearchRun
from deos_fx.passes.search.scales import ScaledData, check_scales, search_scales
from deos_fx.policy.budget import Budget, check_budget
from deos_fx.policy.tier import check_count
from deos_fx.presets.tuning import require_optuna
from deos_fx.progress import shows_progress
from deos_fx.results.search_front import SearchFront
from deos_fx.results.search_result import SearchResult

__all__ = ["default_steps", "search"]

# Steps by default: so many passes over the data, within limits.
_EPOCHS, _FEWEST, _MOST = 8, 60, 240


@overload
def search(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]] | ScaledData,
    *,
    budget: Budget,
    sites: Sequence[str] | None = None,
    steps: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    preset_evaluations: int = 0,
    progress: Progress | None = None,
) -> SearchResult: ...


@overload
def search(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    *,
    budgets: Sequence[Budget],
    sites: Sequence[str] | None = None,
    steps: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    preset_evaluations: int = 0,
    progress: Progress | None = None,
) -> SearchFront: ...


@shows_progress
def search(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]] | ScaledData,
    *,
    budget: Budget | None = None,
    budgets: Sequence[Budget] | None = None,
    sites: Sequence[str] | None = None,
    steps: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    preset_evaluations: int = 0,
    progress: Progress | None = None,
) -> SearchResult | SearchFront:
    """Find the policy with the lowest task loss that meets a budget, or one for each of several.

    Several budgets are searched together, from the loosest to the tightest: the data is captured
    and the places are tried once, and each budget starts from what the looser ones have found.

    Where torch.distributed is initialised, as by ``accelerate launch``, all processes have to make
    the same call with the same data. They share out the batches of each step, of which a step takes
    as many as have 16 prompts, and the scoring; all return the same result, that of one process.
    The model may be larger than one device: sharded over the processes by
    `torch.distributed.fsdp.fully_shard`, as transformers' ``distributed_config`` does.

    Args:
        model: An unmodified transformers vision-language model.
        data: Model input dicts (batches). The prompts of a batch have equally many images or tiles,
            and all images of a batch are of one size. Batches may differ in both where the model
            makes more visual tokens of larger images; the policy then keeps a share of each image
            or a number of each tile, and meets every limit for each kind of prompt: a share of its
            own tokens, and a number of tokens even for the largest. With
            ``labels`` the task is cross-entropy on them. Without, prompts have to end where an
            answer begins: the unreduced model answers them, greedily and with at most 16 tokens,
            and the task is the distance to its predictions along its answers. From four batches
            on, the last quarter is held back for scoring candidates, so shuffle data that come in
            an order. Reductions see no token of an answer.
            The batches are held where they are given, usually in the memory of the host, and each
            is moved to the model's device when it is used. There, up to 4 GiB of hidden states are
            held: what precedes the first reduction, which is computed once for a batch.

            To choose the scale at which images enter as well, give such batches by scale, as
            ``{1.0: ..., 0.7: ..., 0.5: ...}``: of the same prompts with labels, in the same order,
            made by `deos_fx.data.scaled_processor`. Scales at which presets are worst are not
            searched further, and fractions of the budget refer to scale 1.
        budget: At least one limit.
        budgets: In place of `budget`, several budgets for a front.
        sites: Names of the sites to search, such as ``vision.11`` or ``decoder.2``; no policy has
            others. Left out, the projector and all sites in the decoder. Where groups of patches
            make a visual token, settings at sites of the vision tower are tried, alone and before
            what is best otherwise, but not trained: they have no relaxed form.
        steps: Number of gradient steps at the best place; left out, it follows from the data:
            eight passes, at least 60 and at most 240 steps. Budgets that start from what a looser
            one has found take half as many.
        seed: Seed of the order of the batches.
        checkpoint: Folder to save the state of the steps in, every ten steps and where they end. A
            search that finds a state there continues it, bit-identically, however it was ended. If
            the disk fills up meanwhile, the search warns and goes on.
        preset_evaluations: How many losses on the scored batches may be spent at the end on all
            presets and on the options of the best three (this needs Optuna), to tell what the
            search has gained over them; of several budgets, for each. A preset that wins is
            returned. With 0, five presets in their published settings are all there is.
        progress: Called as the search advances, with a stage, the number done and the total. When
            the first step is done, the stage is ``estimate``: then these are the seconds that the
            search has taken so far, and those that it will take in all. By default, there are bars
            on a terminal, and lines of the logger ``deos_fx`` elsewhere.

    Returns:
        The result; its policy meets every limit exactly. With `budgets`, a front of such results.

    Raises:
        ImportError: If presets are to be tuned and Optuna is not installed.
        ValueError: If the data is empty or uneven, a site cannot be reduced, the budget cannot be
            met, the losses are NaN, the model is sharded, or the checkpoint is of another search.
        TypeError: If an argument is of a wrong type.
        OSError: If the checkpoint folder cannot be written; this is checked before the work starts.

    Ctrl-C ends the search, at any time after the first batch is captured, with the best policy so
    far. Ten steps in a row whose gradients are not finite end the steps with a warning.
    """
    # Mistakes in the arguments are found before anything expensive.
    if (budget is None) == (budgets is None):
        raise TypeError("Give either budget, or budgets for a front.")
    if budgets is None:
        check_budget(budget)
    wanted = [budget.require()] if budget is not None else check_budgets(budgets)
    if steps is not None:
        check_count("steps", steps, 1)
    check_count("seed", seed, -(2**31))
    if isinstance(sites, str):
        raise TypeError(f"sites is the text {sites!r}; give a list of names.")
    if sites is not None and not sites:
        raise ValueError("sites is empty; name at least one, or leave it out.")
    if isinstance(data, Mapping) and budgets is not None:
        raise TypeError("Batches by scale are searched for one budget; give budget.")
    check_count("preset_evaluations", preset_evaluations)
    if preset_evaluations:
        require_optuna()
    if not isinstance(data, Iterable):
        raise TypeError(f"data is a {type(data).__name__}; give dicts of model inputs (batches).")
    if isinstance(data, Mapping):
        data = check_scales(data)
    progress = processes.on_main(progress)
    with processes.agreeing():
        saved = None if checkpoint is None else Checkpoints.at(checkpoint)
        if isinstance(data, Mapping):
            return search_scales(
                model,
                data,
                wanted[0],
                sites,
                lambda problem: steps or default_steps(problem),
                seed,
                saved,
                preset_evaluations,
                progress,
            )
        known = None if checkpoint is None else partial(check_checkpoint, checkpoint, seed)
        problem = SearchProblem.of(model, data, wanted[0], progress, known, sites)
        steps = steps or default_steps(problem)
        if budgets is not None:
            return _front(problem, wanted, steps, seed, saved, preset_evaluations, progress)
        run = SearchRun(
            problem, steps, seed, saved, progress, preset_evaluations=preset_evaluations
        )
        run.advance()
        return run.result()


def _front(
    problem: SearchProblem,
    budgets: Sequence[Budget],
    steps: int,
    seed: int,
    checkpoint: Checkpoints | None,
    preset_evaluations: int,
    progress: Progress | None,
) -> SearchFront:
    """Search under each budget from the loosest on; each starts from what the looser ones found."""
    runs: dict[Budget, SearchRun] = {}
    estimate = Estimate(progress)
    budgets = loosest_first(problem, budgets)
    for budget in budgets:
        # Before anything expensive: the tightest comes last.
        check_can_be_met(problem.under(budget))
    for i, budget in enumerate(budgets):
        saved = None if checkpoint is None else checkpoint.within(in_words(budget))
        own = None if progress is None else _labelled(progress, in_words(budget))
        run = SearchRun(
            problem.under(budget),
            steps,
            seed,
            saved,
            own,
            reached=[policy for each in runs.values() for policy in each.at_places()],
            interrupted=any(each.interrupted for each in runs.values()),
            further=len(budgets) - i - 1,
            estimate=estimate,
            preset_evaluations=preset_evaluations,
        )
        run.advance()
        runs[budget] = run
    everything = [each for run in runs.values() for each in run.scoring.candidates]
    for run in runs.values():
        # A policy of a tighter budget that is as good as one of a looser budget replaces it.
        run.scoring.candidates = pooled(run.problem, everything)
    return SearchFront({budget: run.result() for budget, run in runs.items()})


def _labelled(progress: Progress, label: str) -> Progress:
    return lambda stage, done, total: progress(f"{label}: {stage}", done, total)


def default_steps(problem: SearchProblem) -> int:
    """Return how many steps the data is good for."""
    prompts = sum(len(batch.call.inputs["input_ids"]) for batch in problem.training)
    return min(_MOST, max(_FEWEST, _EPOCHS * prompts // 16))
