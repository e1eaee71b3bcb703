"""Show progress and tables of results in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from deos_fx.words import counted

if TYPE_CHECKING:
    from deos_fx.policy.latency import LatencyTable
    from deos_fx.presets import Method
    from deos_fx.results.compared import Compared
    from deos_fx.results.comparison import Comparison
    from deos_fx.results.report import DemoResult

__all__ = [
    "Advance",
    "Stages",
    "announced",
    "comparison_table",
    "evaluation_table",
    "presets_table",
    "profile_table",
    "results_table",
    "stages",
    "times_table",
]

Advance: TypeAlias = Callable[[int, int], None]
"""Called with the finished and the total amount of a stage."""


class Stages:
    """Stages of a longer piece of work, each with a bar and its wall time.

    If the output is not a terminal, a line at the end of each stage replaces the bars.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[Advance]:
        """Run one stage.

        Args:
            name: Name of the stage.

        Yields:
            A function to call as the stage advances; without a call, the bar only shows that the
            stage is busy.
        """
        with self.phased(name) as advance:
            advance("", 0, None)
            yield lambda done, total: advance("", done, total)

    @contextmanager
    def phased(self, name: str) -> Iterator[Callable[[str, int, int | None], None]]:
        """Run one stage that has several phases, each with a bar of its own.

        Args:
            name: Name of the stage.

        Yields:
            A function to call with a phase and its finished and total amount.
        """
        bars: dict[str, TaskID] = {}

        def advance(phase: str, done: int, total: int | None) -> None:
            if phase not in bars:
                title = f"{name}: {phase}" if phase else name
                bars[phase] = self.progress.add_task(title, total=total)
            self.progress.update(bars[phase], completed=done, total=total)

        # If the stage fails, its bar stays as it is: no `finally`.
        start = time.perf_counter()
        yield advance
        self._finish(name, time.perf_counter() - start, bars.values())

    def _finish(self, name: str, seconds: float, bars: Iterable[TaskID]) -> None:
        self.seconds[name] = seconds
        for bar in bars:
            # A phase may end early, or have no total; its bar becomes full all the same.
            done = self.progress.tasks[bar].completed or 1
            self.progress.update(bar, completed=done, total=done)
        if self.progress.disable:
            self.progress.console.print(f"{name}: {seconds:.1f} s", highlight=False)


@contextmanager
def stages(console: Console) -> Iterator[Stages]:
    """Show stages as they run.

    Args:
        console: The console to show them on.

    Yields:
        The stages, to call with the name of each.
    """
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Stages(progress)


def announced(
    progress: Callable[[str, int, int], None],
    console: Console,
    words: str = "The search will take about {} more; Ctrl-C ends it early.",
) -> Callable[[str, int, int], None]:
    """Return a progress that says in words how long a call will take.

    Args:
        progress: Called with every other stage.
        console: Where it is said.
        words: The sentence; ``{}`` stands for the time.
    """

    def report(stage: str, done: int, total: int) -> None:
        if stage != "estimate":
            progress(stage, done, total)
            return
        left = max(1, total - done)
        amount = counted(left, "second") if left < 90 else f"{round(left / 60)} minutes"
        console.print(words.format(amount))

    return report


def results_table(result: DemoResult) -> Table:
    """Make the comparison of the demo: one row for each method, to fit 80 characters."""
    methods = result.ranked()
    kinds = [kind for kind in methods[0].accuracy if kind != "overall"]
    table = Table(
        title=f"Right answers in % of {counted(result.questions, 'test question')}; "
        f"budget {counted(f'{result.limit:.4g}', 'visual token')}, mean over the decoder layers",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    for title in ("all", *(kind.replace("_", " ") for kind in kinds)):
        # A column is as wide as its longest word, and titles are broken between words.
        table.add_column(title, justify="right", width=max(5, *map(len, title.split())))
    for method in methods:
        # Case: not measured; the reason is printed below the table.
        cells = ["-"] * (len(kinds) + 1)
        if method.accuracy:
            cells = [f"{100 * method.accuracy[kind]:.1f}" for kind in ("overall", *kinds)]
        table.add_row(method.name, *cells, style="bold" if method.is_searched else None)
    return table


def comparison_table(result: Comparison) -> Table:
    """Make the table of a comparison: one row for each method, to fit 80 characters."""
    table = Table(
        title=f"Right answers of {counted(result.questions, 'question')}, with 95 % intervals in "
        f"points; budget {counted(f'{result.limit:.4g}', 'visual token')}, mean over the decoder "
        "layers",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    for title in ("right, %", "minus unreduced", "tokens", "GFLOPs", "KiB", "ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result.measured:
        ahead = result.against(row, result.unreduced)
        low, mean, high = (100 * share for share in (ahead.low, ahead.mean, ahead.high))
        table.add_row(
            row.name,
            f"{100 * result.accuracy(row).mean:.1f}",
            "" if row is result.unreduced else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})",
            f"{row.visual_tokens:.4g}",
            f"{row.flops / 1e9:.3g}",
            f"{row.kv_bytes / 1024:.0f}",
            f"{row.milliseconds:.3g}",
            style="bold" if row.group == "policy" else None,
        )
    return table


def evaluation_table(result: Compared) -> Table:
    """Make the table of an evaluation: one row for each policy, to fit 80 characters."""
    right = ["right, %"] if result.answered else []
    intervals = " with 95 % intervals" if result.answered else ""
    table = Table(
        title=f"Answers to {counted(result.questions, 'question')}{intervals}; the same are those "
        "of the unreduced model. Costs are of the first prompt's prefill, memory beside the model",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", overflow="fold")
    for title in (*right, "same, %", "tokens", "GFLOPs", "KV KiB", "ms", "MiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result.measured:
        cells = []
        if result.answered:
            found = result.accuracy(row)
            cells = [f"{100 * found.mean:.1f} ({100 * found.low:.0f} to {100 * found.high:.0f})"]
        peak = row.peak_bytes
        table.add_row(
            row.name,
            *cells,
            f"{100 * result.agreement(row):.1f}",
            f"{row.visual_tokens:.4g}",
            f"{row.flops / 1e9:.3g}",
            f"{row.kv_bytes / 1024:.0f}",
            f"{row.milliseconds:.3g}",
            "-" if peak is None else f"{peak / 2**20:.3g}",
        )
    return table


def times_table(seconds: Mapping[str, float]) -> Table:
    """Make a table of the wall time of every stage."""
    table = Table(title="Wall-clock seconds")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, value in seconds.items():
        table.add_row(stage, f"{value:.1f}")
    table.add_row("total", f"{sum(seconds.values()):.1f}", style="bold")
    return table


def profile_table(latency: LatencyTable) -> Table:
    """Make a table of measured times: a row for each length of the prompt."""
    table = Table(title=f"Milliseconds of {latency.machine}", box=box.SIMPLE_HEAD)
    for title in ("tokens in every layer", "images", "decoder", "prefill"):
        table.add_column(title, justify="right")
    for length, times in zip(latency.lengths, zip(*latency.layers, strict=True), strict=True):
        figures = latency.encoder, sum(times), latency.encoder + sum(times)
        table.add_row(str(length), *(f"{figure:.3g}" for figure in figures))
    return table


_WHERE = {
    "tower": "In the vision tower, or by its attention",
    "projector": "Where the visual tokens enter the prompt",
    "decoder": "Inside the decoder",
}


def presets_table(methods: Iterable[Method]) -> Table:
    """Make a table of published methods: what each does and where, and its source.

    Args:
        methods: The methods, in the order of the rows.
    """
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for method in methods:
        needs = f"; needs {method.needs}" if method.needs else ""
        source = f"{method.source} (licence of its code: {method.licence})"
        table.add_row(
            method.name, f"{method.title}\n{_WHERE[method.place]}{needs}.\n[dim]{source}[/]"
        )
    return table
