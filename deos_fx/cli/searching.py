"""What the command ``search`` needs besides the search: its limits, its processes and its files."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deos_fx.cli.console import Console
from deos_fx.cli.limits import DEFAULT_LIMIT
from deos_fx.words import counted

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from deos_fx.comparison.compare import Given
    from deos_fx.data import Record
    from deos_fx.policy.policy import Policy
    from deos_fx.results.search_front import SearchFront
    from deos_fx.results.search_result import SearchResult

__all__ = [
    "limits_of",
    "measured",
    "placed",
    "presets_tuned",
    "scales_of",
    "search_processes",
    "write_found",
]

# Losses for all presets, of which there are 23, and for other settings of the best.
_PRESET_EVALUATIONS = 48
# Questions that are asked at the end; so many give a share within 9 points.
_MOST_ASKED = 128
# What the command writes: policies with their learned parts, and a page.
_FILES = ("policy*.json", "policy*.safetensors", "report.html")


def limits_of(
    tokens: Sequence[int | float] | None, *others: Any, table: Path | None = None
) -> dict[str, Any]:
    """Return the budget of a search, or the budgets, as its argument.

    Args:
        tokens: Limits on visual tokens; of several, each makes a budget.
        *others: Limits on FLOPs, the KV cache and milliseconds, for every budget.
        table: File with the latency table that milliseconds refer to, if there is one.

    Returns:
        ``budget`` or ``budgets``.
    """
    from deos_fx.policy.budget import Budget
    from deos_fx.policy.latency import LatencyTable

    names = ("flops", "kv_cache", "latency_ms")
    shared = dict(zip(names, others, strict=True))
    if table is not None:
        shared["latency_table"] = LatencyTable.load(table)
    if not tokens:
        # Case: no limit on visual tokens; without any limit, the default one.
        alone = Budget(**shared)
        return {"budget": Budget(visual_tokens=DEFAULT_LIMIT) if alone.is_empty else alone}
    budgets = [Budget(visual_tokens=limit, **shared) for limit in tokens]
    return {"budget": budgets[0]} if len(budgets) == 1 else {"budgets": budgets}


def presets_tuned(wanted: int | None, console: Console) -> int:
    """Return how many losses tuning presets may take: 48 by default, and 0 without Optuna."""
    if wanted is not None:
        return wanted
    if importlib.util.find_spec("optuna") is not None:
        return _PRESET_EVALUATIONS
    console.print(
        "Optuna is not installed: presets have their published settings. "
        "pip install 'deos-fx[compare]' lets them be tuned.",
        highlight=False,
        markup=False,
    )
    return 0


def scales_of(
    given: Sequence[float] | None, limits: Mapping[str, Any], records: Sequence[Record]
) -> list[float]:
    """Return the scales of a search, the largest first, with 1 among them.

    Args:
        given: Those of the options.
        limits: What `limits_of` returns.
        records: The data.

    Raises:
        ValueError: If a scale is out of range, or there are several budgets or no answers.
    """
    scales = sorted({1.0, *(given or ())}, reverse=True)
    if len(scales) == 1:
        return scales
    wrong = [scale for scale in scales if not 0 < scale <= 1]
    if wrong:
        raise ValueError(f"--image-scale is {wrong[0]:g}; give a number in (0, 1]")
    if "budgets" in limits:
        raise ValueError("--image-scale is searched for one budget; give --budget once")
    if any(record.answer is None for record in records):
        raise ValueError("--image-scale needs answers, by which scales are compared")
    return scales


@contextmanager
def search_processes(
    output: Path, console: Console, device: str | None = None
) -> Iterator[tuple[Path | None, torch.device | None, Console]]:
    """Join the processes of ``accelerate launch`` or ``torchrun``, if it has started this one.

    Args:
        output: The folder of the results.
        console: Where the main process reports.
        device: Where the model is to be; without one, on an accelerator if there is any.

    Yields:
        A folder for the results in the main process, None in others; the device of this process,
        if it is one of several; and a console, which is silent in others than the main one.
    """
    from deos_fx.files import fresh_folder

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        with fresh_folder(output, _FILES) as folder:
            yield folder, None, console
        return
    # Case: one of several processes.
    import torch
    from accelerate import PartialState

    # Left to itself, accelerate takes processes without an accelerator for one alone each.
    state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
    try:
        if state.is_main_process:
            with fresh_folder(output, _FILES) as folder:
                yield folder, state.device, console
        else:
            yield None, state.device, Console(quiet=True)
    finally:
        state.destroy_process_group()


def placed(model: Any, device: torch.device | None) -> Any:
    """Put a model on the device of a process; where there is none, it stays where it is."""
    return model if device is None else model.to(device)


def measured(
    result: SearchResult | SearchFront,
    model: PreTrainedModel,
    processor: Any,
    groups: Sequence[Sequence[Record]],
    progress: Callable[[str, int, int], None],
) -> SearchResult | SearchFront:
    """Let the model answer questions of the data: with each policy, with presets, and unreduced.

    Args:
        result: What was found.
        model: The unreduced model.
        processor: Its processor.
        groups: The records of each batch of the search, of which those that were held back are
            asked, at most 128.
        progress: Called with the methods that have answered.

    Returns:
        The result, with answers, costs and times. If the policies cannot answer, or Ctrl-C ends
        that, a warning says so, and the result is as it was.
    """
    from deos_fx.comparison.compare import evaluate
    from deos_fx.passes.search.batches import parted
    from deos_fx.results.search_front import SearchFront

    _, held_back = parted(groups)
    records = [record for group in held_back for record in group][:_MOST_ASKED]
    # With several budgets, names say which one a policy is for.
    policies: dict[str, Given] = {}
    for at, one in _named(result, "", " at {}").items():
        policies[f"searched{at}"] = one.policy
        if one.best_preset is not None:
            policies[f"{one.best_preset.source}{at}"] = one.best_preset.policy
    try:
        answers = evaluate(
            model,
            processor,
            records,
            policies=policies,
            batch_size=max(map(len, groups)),
            progress=progress,
        )
    except (KeyboardInterrupt, RuntimeError, ValueError) as error:
        # A search may have taken hours, so what is known of it is written in any case.
        message = "answers and times were not measured: %s"
        logging.getLogger("deos_fx").warning(message, str(error) or "interrupted")
        return result
    if isinstance(result, SearchFront):
        each = {budget: replace(one, measured=answers) for budget, one in result.results.items()}
        return SearchFront(each)
    return replace(result, measured=answers)


def _named(
    result: SearchResult | SearchFront, single: str, several: str
) -> dict[str, SearchResult]:
    """Return the result by a name, or those of several budgets, which have their limits in it."""
    from deos_fx.results.search_front import SearchFront

    if isinstance(result, SearchFront):
        results = result.results.items()
        return {several.format(budget.visual_tokens): one for budget, one in results}
    return {single: result}


def write_found(
    result: SearchResult | SearchFront, folder: Path, console: Console, batches: int
) -> list[str]:
    """Write the policies and the page of a search.

    A policy for one budget is ``policy.json``. Of several, each has the limit on visual tokens in
    its name, as ``policy-0.25.json`` or ``policy-18.json``.

    Args:
        result: What was found.
        folder: The folder to write to.
        console: Where the policies are shown.
        batches: Number of batches of the data.

    Returns:
        The names of the files.
    """
    from deos_fx.cli.terminal import evaluation_table

    found = _named(result, "policy.json", "policy-{}.json")
    for name, one in found.items():
        # Shown first: a disk may be full.
        console.print(one.policy, highlight=False, markup=False)
        _save(one.policy, folder / name)
        console.print(one.basis, highlight=False, markup=False)
        for doubt in one.doubts:
            console.print(f"Warning: {doubt}", style="yellow", highlight=False, markup=False)
    answers = next(iter(found.values())).measured
    if answers is not None:
        console.print_figures(evaluation_table(answers))
    evaluations = sum(one.evaluations for one in found.values())
    # Presets are tuned by their loss on all of the data.
    losses = max(1, evaluations // batches)
    console.print(
        f"The search took {counted(f'{evaluations:,}', 'forward pass', 'forward passes')} of a "
        f"batch; a backward pass counts two. deos-fx compare --evaluations {losses} lets presets "
        "be tuned with as many.",
        highlight=False,
    )
    try:
        result.report(folder / "report.html")
    except OSError as error:
        # The policies are written, and a search may have taken hours.
        logging.getLogger("deos_fx").warning("there is no report: %s", error)
        return list(found)
    return [*found, "report.html"]


def _save(policy: Policy, path: Path) -> None:
    """Save a policy, or learned parts elsewhere: nobody can copy these from the screen.

    Raises:
        OSError: If it cannot be written; the message says where it is instead.
    """
    try:
        policy.save(path)
    except OSError as error:
        if not policy.tensors:
            raise
        # The policies are all that hours of search have found, and take kilobytes.
        rescued = Path(tempfile.mkdtemp(prefix="deos-fx-")) / path.name
        policy.save(rescued)
        message = f"{error}. The policy is in {rescued}, with its learned parts beside it"
        raise OSError(message) from error
