"""What the command ``search`` needs besides the search: its limits, its processes and its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from deos_fx.cli.limits import DEFAULT_LIMIT

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from deos_fx.data import Record
    from deos_fx.results.search_front import SearchFront
    from deos_fx.results.search_result import SearchResult

__all__ = ["like_batches", "limits_of", "placed", "search_processes", "timed", "write_found"]

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


def like_batches(
    model: PreTrainedModel, processor: Any, records: Sequence[Record], size: int
) -> list[dict[str, Tensor]]:
    """Turn records into batches of prompts whose images are alike, as a search needs them.

    Args:
        model: The model.
        processor: Its processor.
        records: The questions.
        size: Prompts of a batch; of each kind of images, the last batch may be smaller.

    Returns:
        The batches; kinds come in the order of their first records.
    """
    from deos_fx.data import batches
    from deos_fx.inputs.call import Call
    from deos_fx.models.facts import facts_of

    facts = facts_of(model)
    alike: dict[Hashable, list[Record]] = {}
    for record in records:
        # What an image becomes, the processor alone knows.
        (inputs,) = batches(processor, [replace(record, answer=None)], 1)
        (prompt,) = Call.of(facts, inputs).prompts
        alike.setdefault(prompt.alike, []).append(record)
    return [batch for group in alike.values() for batch in batches(processor, group, size)]


@contextmanager
def search_processes(
    output: Path, console: Console
) -> Iterator[tuple[Path | None, torch.device | None, Console]]:
    """Join the processes of ``accelerate launch``, if it has started this one.

    Args:
        output: The folder of the results.
        console: Where the main process reports.

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
    from accelerate import PartialState

    state = PartialState()
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


def timed(
    result: SearchResult | SearchFront, model: PreTrainedModel, inputs: Mapping[str, Any]
) -> SearchResult | SearchFront:
    """Measure the prefill of a batch, with each policy that was found and without reduction.

    Args:
        result: What was found.
        model: The unreduced model.
        inputs: The batch.

    Returns:
        The result, with milliseconds.
    """
    import torch

    from deos_fx.comparison.answers import inputs_for
    from deos_fx.cost.latency import in_turns
    from deos_fx.results.search_front import SearchFront
    from deos_fx.runtime.reduced_model import ReducedModel

    batch = inputs_for(model, {name: one for name, one in inputs.items() if name != "labels"})
    found = [*result.results.values()] if isinstance(result, SearchFront) else [result]
    models = [model, *(ReducedModel(model, one.policy) for one in found)]

    def call(one: Any) -> Callable[[], object]:
        return lambda: one(**batch)

    with torch.no_grad():
        before, *after = in_turns([call(one) for one in models], model.device)
    measured = [
        replace(one, milliseconds=(own, before)) for one, own in zip(found, after, strict=True)
    ]
    if isinstance(result, SearchFront):
        return SearchFront(dict(zip(result.results, measured, strict=True)))
    return measured[0]


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
        The names of the policies' files.
    """
    from deos_fx.results.search_front import SearchFront

    if isinstance(result, SearchFront):
        results = result.results.items()
        found = {f"policy-{budget.visual_tokens}.json": one for budget, one in results}
    else:
        found = {"policy.json": result}
    for name, one in found.items():
        one.policy.save(folder / name)
        console.print(one.policy, highlight=False, markup=False)
        console.print(one.basis, highlight=False, markup=False)
        for doubt in one.doubts:
            console.print(f"Warning: {doubt}", style="yellow", highlight=False, markup=False)
    evaluations = sum(one.evaluations for one in found.values())
    # Presets are tuned by their loss on all of the data.
    losses = max(1, evaluations // batches)
    console.print(
        f"The search took {evaluations:,} forward passes of a batch; a backward pass counts two. "
        f"deos-fx compare --evaluations {losses} lets presets be tuned with as many.",
        highlight=False,
    )
    result.report(folder / "report.html")
    return list(found)
