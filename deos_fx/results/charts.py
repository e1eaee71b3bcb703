"""Draw the charts of the report, as SVG that takes its colours and fonts from the page around it.

matplotlib draws them with placeholder colours, which become CSS variables: one drawing fits a light
and a dark page, stays sharp at any size, and its text can be selected.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deos_fx.policy.policy import Policy
from deos_fx.policy.site import first_layer, split_site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from deos_fx.results.methods import Method

__all__ = [
    "LINE",
    "PAINTS",
    "accuracy_chart",
    "annotate",
    "history_chart",
    "label_beside",
    "new_figure",
    "paint",
    "policy_chart",
    "spread",
    "to_svg",
]

PAINTS = (
    "ink",
    "soft",
    "line",
    "accent",
    "paper",
    "prune",
    "merge",
    "pool",
    "reweight",
    "mixed",
)
"""CSS variables that the page defines; each stands for a placeholder colour while drawing."""


def paint(name: str) -> str:
    """Return the placeholder colour of a CSS variable."""
    # Near black, which no chart uses otherwise; the last byte is the number of the variable.
    return f"#0a0b{PAINTS.index(name):02x}"


_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.edgecolor": paint("line"),
    "axes.labelcolor": paint("soft"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": paint("line"),
    "grid.linewidth": 0.6,
    "xtick.color": paint("line"),
    "ytick.color": paint("line"),
    "xtick.labelcolor": paint("soft"),
    "ytick.labelcolor": paint("soft"),
}


LINE = 0.25
"""Inches that a line of text takes."""

# *** the charts ***


def accuracy_chart(
    methods: Sequence[Method], limit: float, visual_tokens: float, questions: int
) -> str:
    """Draw accuracy against the visual tokens that a decoder layer processes.

    Args:
        methods: The methods; those without a measurement are left out.
        limit: Visual tokens that the budget allows, mean over the layers.
        visual_tokens: Visual tokens of the unreduced model.
        questions: Number of questions behind each accuracy, for the intervals.

    Returns:
        An SVG element.
    """
    shown = sorted((m for m in methods if m.accuracy), key=lambda m: -m.accuracy["overall"])
    # Inches: every label needs a line of its own.
    height = max(4.3, 0.8 + LINE * len(shown))
    figure, axes = new_figure(8.6, height)
    axes.axvspan(0, limit, color=paint("accent"), alpha=0.09, lw=0)
    axes.axvline(limit, color=paint("accent"), lw=1.2, ls=(0, (4, 3)))
    # The axis starts a little below the worst method: differences at the top are what matters.
    low = shown[-1].accuracy["overall"]
    axes.set(xlim=(0, visual_tokens * 1.06), ylim=(max(0.0, low - 0.08) * 100, 102))
    # Methods with few tokens lie close together: their labels are spread and tied by lines.
    cluster = [method for method in shown if method.cost.visual_tokens < 0.6 * visual_tokens]
    heights = spread(
        [100 * m.accuracy["overall"] for m in cluster], *axes.get_ylim(), LINE / (height - 0.7)
    )
    for method in shown:
        _draw_point(axes, method)
    for method, height in zip(cluster, heights, strict=True):
        point = (method.cost.visual_tokens, 100 * method.accuracy["overall"])
        place = (limit + 0.13 * visual_tokens, height)
        label_beside(axes, _named(method, questions), point, place, bold=method.is_searched)
    for method in shown:
        if method not in cluster:
            point = (method.cost.visual_tokens, 100 * method.accuracy["overall"])
            annotate(axes, _named(method, questions), point, (-10, 0), ha="right", va="center")
    bottom = axes.get_ylim()[0]
    annotate(axes, f"budget {limit:.4g}", (limit, bottom), (5, 6), color=paint("accent"))
    axes.set_xlabel("visual tokens a decoder layer processes (mean over layers)")
    axes.set_ylabel("right answers, %")
    return to_svg(figure, "accuracy", "Accuracy of every method against its visual tokens")


def policy_chart(policy: Policy, counts: Sequence[int], whole: float) -> str:
    """Draw a policy along the decoder: the tokens of each layer and the places of the reductions.

    Args:
        policy: The policy.
        counts: Visual tokens of a prompt that each decoder layer processes.
        whole: Visual tokens that each layer would process without reduction.

    Returns:
        An SVG element.
    """
    layers = len(counts)
    figure, axes = new_figure(8.6, 3.5)
    axes.bar(range(layers), [whole] * layers, 0.7, fill=False, ec=paint("line"), lw=0.8, ls=":")
    axes.bar(range(layers), counts, 0.7, color=paint("accent"), alpha=0.55)
    for layer, count in enumerate(counts):
        annotate(axes, f"{count}", (layer, count), (0, 3), ha="center")
    # A reduction before the decoder is read off its first layer.
    before = whole
    for reduction in policy.reductions:
        after = counts[first_layer(reduction.site)]
        _draw_site(axes, reduction.site, reduction.regime, (before, after), whole, layers)
        before = after
    axes.set(xlim=(-1, layers - 0.4), ylim=(0, whole * 1.36), xticks=range(layers))
    axes.set_yticks([0, whole / 4, whole / 2, whole])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("visual tokens")
    return to_svg(figure, "policy", "Visual tokens along the decoder layers under the policy")


def history_chart(history: Sequence[Mapping[str, Any]], limit: float | None) -> str:
    """Draw a search over its steps: the task loss above, the visual tokens below.

    Args:
        history: One entry for each step, with ``step``, ``task`` and ``visual_tokens``.
        limit: The limit on visual tokens, if there is one.

    Returns:
        An SVG element.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (task, used) = _figures(8.6, 4.6, 2)
    steps = [entry["step"] for entry in history]
    losses = [entry["task"] for entry in history]
    task.plot(steps, losses, color=paint("soft"), lw=0.8, alpha=0.6)
    task.plot(steps, _smooth(losses), color=paint("accent"), lw=2)
    task.set_ylabel("task loss")
    used.plot(steps, [entry["visual_tokens"] for entry in history], color=paint("accent"), lw=2)
    if limit is not None:
        used.axhline(limit, color=paint("prune"), lw=1.2, ls=(0, (4, 3)))
        label = f"limit {limit:.4g}"
        annotate(used, label, (steps[-1], limit), (0, 5), ha="right", color=paint("prune"))
    used.set_ylim(bottom=0)
    used.xaxis.set_major_locator(MaxNLocator(integer=True))
    used.set_ylabel("visual tokens, mean")
    used.set_xlabel("step of the search")
    return to_svg(figure, "history", "Task loss and visual tokens over the steps of the search")


# *** parts of them ***


def _draw_point(axes: Axes, method: Method) -> None:
    x, y = method.cost.visual_tokens, 100 * method.accuracy["overall"]
    size, marker = (190, "*") if method.is_searched else (52, "o")
    style: dict[str, Any] = {"color": paint(method.paint), "ec": paint("paper"), "lw": 0.8}
    axes.scatter(x, y, s=size, marker=marker, zorder=3, **style)


def label_beside(
    axes: Axes,
    text: str,
    point: tuple[float, float],
    place: tuple[float, float],
    *,
    bold: bool = False,
) -> None:
    """Write the label of a point at a free place and tie it to the point by a line."""
    axes.annotate(
        text,
        point,
        place,
        va="center",
        color=paint("ink"),
        weight="bold" if bold else "normal",
        arrowprops={
            "arrowstyle": "-",
            "color": paint("soft"),
            "lw": 0.6,
            "relpos": (0, 0.5),
            "shrinkB": 6,
        },
    )


def _named(method: Method, questions: int) -> str:
    """Return the label of a method: its name, its accuracy and the 95 % interval of that."""
    accuracy = method.accuracy["overall"]
    low, high = (100 * end for end in _wilson(accuracy, questions))
    return f"{method.name}  {100 * accuracy:.1f} %  ({low:.0f} to {high:.0f})"


def _draw_site(
    axes: Axes, site: str, regime: str, counts: tuple[float, float], whole: float, layers: int
) -> None:
    # Between two bars; left of the first one for everything before the decoder.
    stage, layer = split_site(site)
    x = layer + 0.5 if stage == "decoder" else -0.5
    color = paint(regime)
    axes.plot([x, x], [0, whole * 1.08], color=color, lw=1.6)
    axes.scatter([x], [whole * 1.08], marker="v", s=46, color=color, zorder=3)
    before, after = counts
    annotate(
        axes,
        f"{regime}\n{before:.4g}→{after:.4g}",
        (x, whole * 1.08),
        (0, 7),
        ha="center",
        color=color,
        # Many layers leave no room for words side by side.
        size=10 if layers <= 14 else 7,
        rotation=0 if layers <= 14 else 90,
    )


def annotate(
    axes: Axes, text: str, point: tuple[float, float], offset: tuple[int, int], **style: Any
) -> None:
    """Write a text at an offset in points from a point."""
    style = {"color": paint("ink")} | style
    axes.annotate(text, point, offset, textcoords="offset points", **style)


def _wilson(fraction: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a fraction of `count` independent answers (Wilson, 1927)."""
    z = 1.96
    center = (fraction + z * z / (2 * count)) / (1 + z * z / count)
    spread = fraction * (1 - fraction) / count + z * z / (4 * count * count)
    half = z * spread**0.5 / (1 + z * z / count)
    return max(0.0, center - half), min(1.0, center + half)


def spread(values: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Return heights near descending `values`, at least the share `gap` of the range apart."""
    step = gap * (high - low)
    heights: list[float] = []
    # 1. From the top, push each one down to keep the distance.
    for value in values:
        heights.append(min(value, heights[-1] - step) if heights else min(value, high - step))
    # 2. From the bottom, lift those that fell below the range, and what is in their way.
    lowest = low + step
    for i in reversed(range(len(heights))):
        heights[i] = max(heights[i], lowest)
        lowest = heights[i] + step
    return heights


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Return exponential running means, without the bias of the start."""
    # Dividing by the sum of the weights so far removes the pull of the zero it starts from.
    total, weight, smoothed = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed


# *** from matplotlib to the page ***


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure in the style of the page; sizes are in inches."""
    figure, axes = _figures(width, height, 1)
    return figure, axes[0]


def _figures(width: float, height: float, rows: int) -> tuple[Figure, list[Axes]]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        for each in axes:
            each.tick_params(length=0)
    return figure, list(axes)


def to_svg(figure: Figure, name: str, title: str) -> str:
    """Return the SVG element of a figure.

    Args:
        figure: The figure.
        name: A word that is unique on the page, for identifiers.
        title: A description for those who cannot see it.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    # Keep the element alone: without the XML header, a page can hold it.
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for name_of_paint in PAINTS:
        text = text.replace(paint(name_of_paint), f"var(--{name_of_paint})")
    # In the shorthand `font: <weight> <size> <families>`, the families become the page's.
    text = re.sub(r"(font: [^;\"']*?[\d.]+px) [^;\"]*", r"\1 var(--font)", text)
    # Newer versions of matplotlib write them on their own.
    text = re.sub(r"(font-family:) [^;\"]*", r"\1 var(--font)", text)
    # Identifiers must be unique on a page that holds several drawings.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    described = f'<svg role="img" aria-label="{title}" style="min-width: {_least_width(text)}px" '
    return text.replace("<svg ", described, 1)


def _least_width(svg: str) -> int:
    """Return the width in pixels at which the smallest text of a drawing has 10."""
    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', svg)[1])  # type: ignore[index]
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: [^;\"']*?([\d.]+)px", svg)]
    return math.ceil(width * 10 / min(sizes, default=10.0))


# Entries that matplotlib writes by default, versions and dates: without them, equal data give equal
# files.
_METADATA: Any = ("Creator", "Date", "Format", "Type")
