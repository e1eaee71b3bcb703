"""Run the demo: search a policy for the reference model, compare, export, generate and report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaProcessor

from deos_fx import OnnxModel, export_onnx, reference, search
from deos_fx.cli.console import Console
from deos_fx.cli.demo_methods import BATCH, PresetTest, Tester, prompts, search_data, tested_presets
from deos_fx.cli.terminal import Advance, Stages, announced, results_table, stages, times_table
from deos_fx.files import fresh_folder, write_text
from deos_fx.models.facts import facts_of
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.presets import names as preset_names
from deos_fx.reference import Example
from deos_fx.results.methods import (
    SEARCHED,
    UNREDUCED,
    Method,
    OnnxCheck,
    Picture,
    versions,
)
from deos_fx.results.report import (
    DemoResult,
    demo_report,
)
from deos_fx.results.search_result import SearchResult
from deos_fx.results.token_drawing import TokenStep
from deos_fx.runtime.reduced_model import ReducedModel

__all__ = ["run_demo"]

COMPARED = 96
"""Number of test questions that ONNX Runtime answers too; all kinds in turn."""
SHOWN_ANSWERS = 6
"""Methods whose answers stand below an example, the most accurate ones."""

_FILES = ("policy.json", "policy.safetensors", "results.json", "report.html")


def run_demo(
    output: str | os.PathLike[str], budget: int | float, seed: int, console: Console
) -> DemoResult:
    """Run the whole path on the reference model and write a report.

    Args:
        output: Folder to write ``policy.json``, ``onnx/``, ``results.json`` and ``report.html`` in.
        budget: Visual tokens that may stay, mean over the decoder layers: a fraction or a number.
        seed: Seed of the search and of the scenes it sees.
        console: The console for progress and the comparison.

    Returns:
        All measurements.

    Raises:
        ValueError: If the budget makes no sense for the model.
        OSError: If the folder cannot be written.
    """
    # A mistake in the budget shows before anything runs; a failure leaves no half-written folder.
    limits = Budget(visual_tokens=budget)
    with fresh_folder(output, _FILES) as folder:
        with _one_thread(), stages(console) as stage:
            result = _measure(folder, limits, seed, stage)
        result.search.policy.save(folder / "policy.json")
        demo_report(result, folder / "report.html")
        write_text(folder / "results.json", json.dumps(_figures(result), indent=2) + "\n")
    _print(result, output, console)
    return result


def _measure(folder: Path, budget: Budget, seed: int, stage: Stages) -> DemoResult:
    # 1. The model, and what to search and test with.
    with stage("load the reference model"):
        model, processor = reference.load()
        data = search_data(processor, seed)
        tester = Tester(model, processor)
        # A budget that makes no sense is refused here.
        limit = tester.limit(budget)
    # 2. Presets at the same cost run beside everything else.
    with tested_presets(budget, seed) as others:
        # 3. Search, and compare with the unreduced model.
        with stage.phased("search") as progress:
            shown = announced(progress, stage.progress.console)
            found = search(model, data, budget=budget, seed=seed, progress=shown)
        reduced = ReducedModel(model, found.policy)
        measured = []
        for name, policy, runs in (
            (UNREDUCED, Policy(), model),
            (SEARCHED, found.policy, reduced),
        ):
            with stage(f"test {name}") as advance:
                measured.append(tester.test(name, policy, runs, advance))
        # 4. Export, and compare ONNX Runtime with PyTorch.
        tests = tester.questions
        with stage.phased("export to ONNX") as progress:
            example = prompts(processor, tests[:2])
            export_onnx(reduced, folder / "onnx", example, progress=progress)
        with stage("run in ONNX Runtime") as advance:
            onnx = _check_onnx(folder / "onnx", reduced, processor, tests[:COMPARED], advance)
        with stage("wait for the presets") as advance:
            presets = _collected(others, advance)
    measured += [each.method for each in presets]
    # 5. Look at the first question of every kind.
    with stage("draw examples"):
        pictures = _pictures(reduced, processor, tests[: len(reference.KINDS)], measured)
    return DemoResult(
        limit=limit,
        search=found,
        methods=measured,
        tuning=sum(each.evaluations for each in presets),
        questions=len(tests),
        grid=facts_of(model).grid,
        pictures=pictures,
        onnx=onnx,
        seconds=stage.seconds,
        settings=_settings(seed, len(data)),
    )


def _collected(others: Iterator[PresetTest], advance: Advance) -> list[PresetTest]:
    """Wait for all presets."""
    total = len(preset_names())
    found = []
    for each in others:
        found.append(each)
        advance(len(found), total)
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch and ONNX Runtime on one thread.

    The model is so small that more threads hardly help, and next to another busy program, threads
    that wait for each other cost far more than they gain: on two cores, a step of the search took
    21 s with two threads and 0.9 s with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# *** ONNX ***


def _check_onnx(
    folder: Path,
    reduced: ReducedModel,
    processor: LlavaProcessor,
    examples: Sequence[Example],
    advance: Advance,
) -> OnnxCheck:
    """Let PyTorch and ONNX Runtime answer the same questions, and count equal token sequences."""
    runtime = OnnxModel.from_pretrained(folder)
    equal = done = 0
    for inputs in reference.batches(processor, examples, BATCH, answers=False):
        expected, got = reduced.generate(**inputs), runtime.generate(**inputs)
        # One of the two may end earlier, so pad both to one width.
        width = max(expected.shape[1], got.shape[1])
        pad = processor.tokenizer.pad_token_id
        padded = [
            torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=pad)
            for ids in (expected, got)
        ]
        equal += int((padded[0] == padded[1]).all(dim=1).sum())
        done += len(expected)
        advance(done, len(examples))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return OnnxCheck(done, equal, str(runtime.device), files)


# *** examples ***


def _pictures(
    reduced: ReducedModel,
    processor: LlavaProcessor,
    examples: Sequence[Example],
    methods: Sequence[Method],
) -> list[Picture]:
    """Return the examples, the first test questions, with everything that the report draws."""
    best = sorted(methods, key=lambda method: -method.accuracy.get("overall", 0.0))[:SHOWN_ANSWERS]
    shown = [method for method in methods if method.accuracy and method in best]
    steps = _steps(reduced, processor, examples)
    return [
        Picture(
            image=example.scene.image,
            kind=example.question.kind,
            question=example.question.text,
            expected=example.question.answer,
            answers={method.name: method.answers[i] for method in shown},
            steps=steps[i],
        )
        for i, example in enumerate(examples)
    ]


def _steps(
    reduced: ReducedModel, processor: LlavaProcessor, examples: Sequence[Example]
) -> list[list[TokenStep]]:
    inputs = prompts(processor, examples)
    explanation = reduced.explain(**inputs)
    # Every prompt has one image.
    return [explanation.steps(row)[0] for row in range(len(examples))]


# *** reporting ***


def _settings(seed: int, batches: int) -> dict[str, str]:
    return {
        "seed": str(seed),
        "search": f"{batches} batches of {BATCH} questions, a quarter on validation scenes",
        "threads": str(torch.get_num_threads()),
        **versions(),
    }


def _figures(result: DemoResult) -> dict[str, Any]:
    """Return everything that was measured, for other programs."""
    return {
        "limit_visual_tokens": result.limit,
        "questions": result.questions,
        "methods": [
            {
                "name": method.name,
                "accuracy": dict(method.accuracy),
                # A method without a measurement has the empty policy as a filler, so none is shown.
                "cost": asdict(method.cost) if method.accuracy else None,
                "policy": json.loads(method.policy.to_json()) if method.accuracy else None,
                "reason": method.reason,
            }
            for method in result.methods
        ],
        "search": _search_figures(result.search),
        "presets": {"tuned": result.tuning > 0, "evaluations": result.tuning},
        "onnx": asdict(result.onnx),
        "seconds": dict(result.seconds),
        "settings": dict(result.settings),
    }


def _search_figures(found: SearchResult) -> Mapping[str, Any]:
    return {
        "static_loss": found.best.loss,
        "relaxed_loss": found.relaxed_loss,
        "unreduced_loss": found.unreduced_loss,
        "source": found.best.source,
        "evaluations": found.evaluations,
        "candidates": len(found.candidates),
        "history": found.history,
    }


def _print(result: DemoResult, output: str | os.PathLike[str], console: Console) -> None:
    console.print_figures(results_table(result))
    for method in result.methods:
        if method.reason:
            console.print(f"{method.name}: {method.reason}", highlight=False)
    console.print(f"Presets: {result.presets_in_words}.", highlight=False)
    console.print(result.search.policy, highlight=False, markup=False)
    console.print(
        f"The policy comes from: {result.search.best.source}, in {result.search.evaluations:,} "
        "evaluations (forward passes of a batch; a backward pass counts two).",
        highlight=False,
    )
    onnx = result.onnx
    console.print(f"ONNX Runtime gave the same tokens for {onnx.equal} of {onnx.compared} prompts.")
    console.print(times_table(result.seconds))
    console.print(f"Wrote {Path(output) / 'report.html'}", highlight=False)
