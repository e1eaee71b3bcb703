"""Plots of the comparison and the ablations, as SVG files of their own."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Series", "bars_chart", "comparison_chart", "lines_chart"]

Series = Mapping[str, Sequence[tuple[float, Sequence[float]]]]
"""Name of a line -> its points: x, and the values of all seeds there."""

_INK, _SOFT, _LINE = "#22262b", "#646b73", "#d9dde2"
# Distinct in hue and in lightness, so that they stay apart in grey (after Okabe and Ito).
_COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#8c564b",
    "#bcbd22",
)
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deos_fx",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}


def comparison_chart(runs: Sequence[Mapping[str, Any]]) -> str:
    """Draw right answers over the budget, a line for each search, with the range of its seeds."""
    methods = dict.fromkeys(run["method"] for run in runs)
    budgets = sorted({run["budget"] for run in runs})
    series: dict[str, list[tuple[float, list[float]]]] = {}
    for method in methods:
        for budget in budgets:
            right = [
                100 * run["right"]["overall"]
                for run in runs
                if (run["method"], run["budget"]) == (method, budget)
            ]
            if right:
                series.setdefault(method, []).append((100 * budget, right))
    return lines_chart(series, "visual tokens that stay, %", "right answers, %", logarithmic=True)


def lines_chart(series: Series, x_label: str, y_label: str, *, logarithmic: bool = False) -> str:
    """Draw the mean of the seeds as a line and their range as a band.

    Args:
        series: The lines.
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.
        logarithmic: Whether the horizontal axis is; its marks are then the values drawn.

    Returns:
        An SVG document.
    """
    figure, axes = _figure()
    for i, (name, points) in enumerate(series.items()):
        # Where colours come again, lines are dashed.
        color, dashes = _COLORS[i % len(_COLORS)], "-" if i < len(_COLORS) else "--"
        x = [at for at, _ in points]
        means = [sum(values) / len(values) for _, values in points]
        axes.plot(x, means, color=color, ls=dashes, lw=2, marker="o", ms=5, label=name)
        lows, highs = ([end(values) for _, values in points] for end in (min, max))
        axes.fill_between(x, lows, highs, color=color, alpha=0.13, lw=0)
    if logarithmic:
        axes.set_xscale("log")
        marks = sorted({at for points in series.values() for at, _ in points})
        axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
        axes.minorticks_off()
    axes.set(xlabel=x_label, ylabel=y_label)
    return _finished(figure, axes)


def bars_chart(groups: Mapping[str, Mapping[str, Sequence[float]]], y_label: str) -> str:
    """Draw groups of bars: the mean of the seeds, and a stroke over their range.

    Args:
        groups: Group -> name of a bar -> the values of all seeds.
        y_label: Label of the vertical axis.

    Returns:
        An SVG document.
    """
    figure, axes = _figure()
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / len(names)
    for i, (name, color) in enumerate(zip(names, _endless_colors(), strict=False)):
        label: str | None = name
        for place, bars in enumerate(groups.values()):
            values = bars.get(name, ())
            if not values:
                continue
            at = place + (i - (len(names) - 1) / 2) * width
            mean = sum(values) / len(values)
            axes.bar(at, mean, 0.9 * width, color=color, label=label)
            axes.plot([at, at], [min(values), max(values)], color=_INK, lw=1.2)
            axes.annotate(
                f"{mean:.1f}",
                (at, max(*values, mean)),
                (0, 3),
                textcoords="offset points",
                ha="center",
                size=8,
                color=_INK,
            )
            # One entry of the legend for all bars of a name.
            label = None
    axes.set_xticks(range(len(groups)), list(groups))
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(y_label)
    return _finished(figure, axes)


def _endless_colors() -> Sequence[str]:
    return _COLORS * 4


def _figure() -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.tick_params(length=0)
    return figure, axes


def _finished(figure: Figure, axes: Axes) -> str:
    """Add the legend, and return the drawing."""
    import matplotlib

    file = io.StringIO()
    # Without versions and dates, equal data give equal files.
    metadata: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(_STYLE):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(file, format="svg", facecolor="white", metadata=metadata)
    return file.getvalue()
