"""What the commands show while they work and when they are done."""

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

if TYPE_CHECKING:
    from deos_fx.cost.amounts import Cost
    from deos_fx.presets import Method
    from deos_fx.results.report import DemoResult

__all__ = ["Advance", "Stages", "presets_table", "results_table", "stages", "times_table"]

Advance: TypeAlias = Callable[[int, int], None]
"""Called with how much of a stage is done and how much there is."""


class Stages:
    """Stages of a longer piece of work, each with a bar and its wall time.

    Where the output is not a terminal there are no bars, but a line at the end of each stage.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[Advance]:
        """Runs one stage.

        Args:
            name: What the stage does.

        Yields:
            A function to call as the stage advances; a stage that does not call it shows a bar
            that only says it is busy.
        """
        with self.phased(name) as advance:
            advance("", 0, None)
            yield lambda done, total: advance("", done, total)

    @contextmanager
    def phased(self, name: str) -> Iterator[Callable[[str, int, int | None], None]]:
        """Runs one stage that has several phases, each with a bar of its own.

        Args:
            name: What the stage does.

        Yields:
            A function to call with a phase, how much of it is done and how much there is.
        """
        bars: dict[str, TaskID] = {}

        def advance(phase: str, done: int, total: int | None) -> None:
            if phase not in bars:
                title = f"{name}: {phase}" if phase else name
                bars[phase] = self.progress.add_task(title, total=total)
            self.progress.update(bars[phase], completed=done, total=total)

        start = time.perf_counter()
        yield advance
        self._finish(name, time.perf_counter() - start, bars.values())

    def _finish(self, name: str, seconds: float, bars: Iterable[TaskID]) -> None:
        self.seconds[name] = seconds
        for bar in bars:
            # A phase may end early: what it has done is all there was.
            done = self.progress.tasks[bar].completed or 1
            self.progress.update(bar, completed=done, total=done)
        if self.progress.disable:
            self.progress.console.print(f"{name}: {seconds:.1f} s", highlight=False)


@contextmanager
def stages(console: Console) -> Iterator[Stages]:
    """Shows stages as they run.

    Args:
        console: Where.

    Yields:
        What to call with the name of each stage.
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


def results_table(result: DemoResult) -> Table:
    """The comparison of the demo: one column a method, so that it fits 80 characters."""
    methods = result.ranked()
    table = Table(
        title=f"Right answers in % of {result.questions} test questions; "
        f"budget {result.limit:.4g} visual tokens, mean over the decoder layers",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("")
    for method in methods:
        style = "bold" if method.is_searched else None
        name = method.name.replace("_", " ")
        width = max(5, *map(len, name.split()))
        table.add_column(name, justify="right", style=style, width=width)
    kinds = [kind for kind in methods[0].accuracy if kind != "overall"]
    for kind in ("overall", *kinds):
        shares = [f"{100 * m.accuracy[kind]:.1f}" if m.accuracy else "-" for m in methods]
        table.add_row(kind.replace("_", " "), *shares, end_section=kind == kinds[-1])
    for name, cell in _COSTS.items():
        table.add_row(name, *(cell(m.cost) if m.accuracy else "-" for m in methods))
    return table


_COSTS: Mapping[str, Callable[[Cost], str]] = {
    "tokens": lambda cost: f"{cost.visual_tokens:.4g}",
    "GFLOPs": lambda cost: f"{cost.flops / 1e9:.3g}",
    "KV KiB": lambda cost: f"{cost.kv_bytes / 1024:.0f}",
}


def times_table(seconds: Mapping[str, float]) -> Table:
    """Wall time of every stage."""
    table = Table(title="Wall-clock seconds")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, value in seconds.items():
        table.add_row(stage, f"{value:.1f}")
    table.add_row("total", f"{sum(seconds.values()):.1f}", style="bold")
    return table


def presets_table(methods: Iterable[Method]) -> Table:
    """Published methods: what they do, where, and where they come from.

    Args:
        methods: In the order of the rows.
    """
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for method in methods:
        sites = [reduction.site for reduction in method.function().reductions]
        where = sites[0] if len(sites) == 1 else f"{sites[0]} to {sites[-1]}, {len(sites)} sites"
        needs = f"; needs {method.needs}" if method.needs else ""
        source = f"{method.source} (licence of its code: {method.licence})"
        table.add_row(method.name, f"{method.title}\nAt {where}{needs}.\n[dim]{source}[/]")
    return table
