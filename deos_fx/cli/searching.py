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

__all__ = [
    "batches_by_scale",
    "limits_of",
    "placed",
    "scales_of",
    "search_processes",
    "timed",
    "write_found",
]

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


def batches_by_scale(
    model: PreTrainedModel,
    processor: Any,
    records: Sequence[Record],
    size: int,
    scales: Sequence[float],
) -> dict[float, list[dict[str, Tensor]]]:
    """Turn records into batches of prompts whose images are alike, as a search needs them.

    Args:
        model: The model.
        processor: Its processor.
        records: The questions.
        size: Prompts of a batch; of each kind of images, the last batch may be smaller.
        scales: The scales at which images enter.

    Returns:
        Scale -> batches, which have the same prompts at every scale; kinds of images come in the
        order of their first records.

    Raises:
        ValueError: If the model takes images of one size only.
    """
    from deos_fx.data import batches, scaled_processor
    from deos_fx.inputs.call import Call
    from deos_fx.models.facts import facts_of

    facts = facts_of(model)
    processors = {scale: scaled_processor(processor, scale) for scale in scales}
    alike: dict[Hashable, list[Record]] = {}
    for record in records:
        # What an image becomes, the processor alone knows.
        kind = []
        for own in processors.values():
            (inputs,) = batches(own, [replace(record, answer=None)], 1)
            (prompt,) = Call.of(facts, inputs).prompts
            kind.append(prompt.alike)
        alike.setdefault(tuple(kind), []).append(record)
    return {
        scale: [batch for group in alike.values() for batch in batches(own, group, size)]
        for scale, own in processors.items()
    }


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
    if not all(0 < scale <= 1 for scale in scales):
        raise ValueError(
            f"--image-scale is {scales[0]:g} or {scales[-1]:g}; give numbers in (0, 1]"
        )
    if "budgets" in limits:
        raise ValueError("--image-scale is searched for one budget; give --budget once")
    if any(record.answer is None for record in records):
        raise ValueError("--image-scale needs answers, by which scales are compared")
    return scales


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
    result: SearchResult | SearchFront,
    model: PreTrainedModel,
    inputs: Mapping[float, Mapping[str, Any]],
) -> SearchResult | SearchFront:
    """Measure the prefill of a batch, with each policy that was found and without reduction.

    Args:
        result: What was found.
        model: The unreduced model.
        inputs: Scale of images -> the batch as it enters at this scale.

    Returns:
        The result, with milliseconds.
    """
    import torch

    from deos_fx.comparison.answers import inputs_for
    from deos_fx.cost.latency import in_turns
    from deos_fx.results.search_front import SearchFront
    from deos_fx.runtime.reduced_model import ReducedModel

    given = {
        scale: inputs_for(model, {name: one for name, one in batch.items() if name != "labels"})
        for scale, batch in inputs.items()
    }
    found = [*result.results.values()] if isinstance(result, SearchFront) else [result]

    def call(one: Any, scale: float) -> Callable[[], object]:
        return lambda: one(**given[scale])

    calls = [call(model, 1.0)]
    for each in found:
        # The batch has entered at its scale, so the policy's own is left out.
        reduced = ReducedModel(model, replace(each.policy, image_scale=1.0))
        calls.append(call(reduced, each.policy.image_scale))
    with torch.no_grad():
        before, *after = in_turns(calls, model.device)
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
