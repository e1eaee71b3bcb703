"""Write the page of a comparison, and draw its charts."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from deos_fx.results.charts import LINE, label_beside, new_figure, paint, spread, to_svg
from deos_fx.results.compared import Compared, Difference, Row, kept_at, options_in_words
from deos_fx.results.page import Section, build_page, details, table, tiles
from deos_fx.results.search_result import command, percentage
from deos_fx.words import counted

__all__ = ["comparison_charts", "comparison_page"]

# Group of a method -> its colour.
_PAINTS = {"unreduced": "ink", "policy": "accent", "preset": "pool", "input": "mixed"}


# *** the charts ***


def comparison_charts(result: Compared) -> dict[str, str]:
    """Draw the charts: an SVG element by name."""
    return {"accuracy": _accuracy_chart(result), "cost": _cost_chart(result)}


def _accuracy_chart(result: Compared) -> str:
    """Draw right answers, a line for each method, with the interval of each."""
    rows = result.measured
    figure, axes = new_figure(8.6, 0.9 + LINE * len(rows))
    places = range(len(rows))
    whole = 100 * result.accuracy(result.unreduced).mean
    axes.axvline(whole, color=paint("ink"), lw=1, ls=(0, (4, 3)))
    for place, row in zip(places, rows, strict=True):
        found = result.accuracy(row)
        color = paint(_PAINTS[row.group])
        axes.plot([100 * found.low, 100 * found.high], [place, place], color=color, lw=2)
        axes.scatter([100 * found.mean], [place], color=color, s=34, zorder=3)
        # Runs with other seeds.
        if len(row.runs) > 1:
            each = 100 * row.scores.mean(axis=1)
            axes.scatter(each, [place] * len(each), color=color, s=70, marker="|", lw=1)
    axes.set_yticks(places, [row.name for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    low, high = _shares_around(axes.get_xlim())
    axes.set_xlim(low, high)
    # No mark of a share that there is not.
    axes.set_xticks([at for at in axes.get_xticks() if max(0, low) <= at <= min(100, high)])
    axes.set_xlabel("right answers, %")
    return to_svg(figure, "accuracy", "Right answers of every method with 95 % intervals")


def _cost_chart(result: Compared) -> str:
    """Draw right answers against the measured time of a prefill."""
    rows = sorted(result.measured, key=lambda row: (-result.accuracy(row).mean, row.milliseconds))
    # Inches: every name needs a line of its own.
    height = max(4.3, 0.8 + LINE * len(rows))
    figure, axes = new_figure(8.6, height)
    for row in rows:
        at = (row.milliseconds, 100 * result.accuracy(row).mean)
        style: dict[str, Any] = {
            "color": paint(_PAINTS[row.group]),
            "ec": paint("paper"),
            "lw": 0.8,
        }
        size, marker = (190, "*") if row.group == "policy" else (52, "o")
        axes.scatter(*at, s=size, marker=marker, zorder=3, **style)
    axes.set_xlabel("milliseconds of a prefill")
    low, high = _shares_around(axes.get_ylim())
    axes.set_ylim(low, high)
    axes.set_yticks([at for at in axes.get_yticks() if max(0, low) <= at <= min(100, high)])
    axes.set_ylabel("right answers, %")
    # Many methods are as right and as fast as others: their names are spread, right of the slowest.
    slowest = max(row.milliseconds for row in rows)
    axes.set_xlim(0, 1.45 * slowest)
    shares = [100 * result.accuracy(row).mean for row in rows]
    places = spread(shares, low, high, LINE / (height - 0.7))
    for row, share, at_height in zip(rows, shares, places, strict=True):
        point, place = (row.milliseconds, share), (1.1 * slowest, at_height)
        label_beside(axes, row.name, point, place, bold=row.group == "policy")
    return to_svg(figure, "cost", "Right answers of every method against the time of a prefill")


def _shares_around(limits: tuple[float, float]) -> tuple[float, float]:
    """Return limits of an axis within 0 to 100 %, some points apart even where all are alike."""
    low, high = limits
    missing = max(0.0, 10 - (high - low)) / 2
    # A mark at 0 or 100 % stays whole.
    return max(-2.0, low - missing), min(102.0, high + missing)


# *** the page ***


def comparison_page(result: Compared) -> str:
    """Return the page, one self-contained HTML document."""
    sections = [
        _accuracies(result),
        _costs(result),
        _kinds(result),
        _places(result),
        _settings(result),
    ]
    title = f"Compared at {counted(f'{result.limit:.4g}', 'visual token')}"
    return build_page(title, _lead(result), _tiles(result), sections, command())


def _lead(result: Compared) -> str:
    whole, best = result.unreduced, result.best
    text = (
        f"The unreduced model answers {_share(result, whole)} of "
        f"{counted(result.questions, 'question')} right"
    )
    if best is None:
        return f"{text}; no method that reduces it could be run."
    text += f"; the best method, {best.name}, {_share(result, best)}"
    others = [row for row in result.measured[1:] if row.group != "input" and row is not best]
    if others:
        ahead = result.against(best, others[0])
        text += f", {_points(ahead)} points above the next" if ahead.mean else ", as does the next"
        text += f", {others[0].name}"
    return (
        f"{text}. In brackets, 95 % intervals of a paired bootstrap over the questions, or the "
        "exact ones where all questions are answered alike."
    )


def _tiles(result: Compared) -> str:
    whole, best = result.unreduced, result.best
    items = [(_share(result, whole), "right, unreduced", _tokens(whole))]
    if best is not None:
        faster = f"{whole.milliseconds:.3g} ms unreduced"
        items += [
            (_share(result, best), f"right, {best.name}", _tokens(best)),
            (percentage(best.flops / whole.flops), "of prefill FLOPs", f"with {best.name}"),
            (f"{best.milliseconds:.3g} ms", "a prefill", faster),
        ]
    return tiles(items)


def _tokens(row: Row) -> str:
    return counted(f"{row.visual_tokens:.4g}", "token")


def _accuracies(result: Compared) -> Section:
    best = result.best
    head = ["method", "right, %", "minus unreduced"]
    head += [f"minus {best.name}"] if best is not None else []
    head += ["same, %"]
    rows = []
    for row in result.measured:
        cells = [_name(row), f"<td>{_percent(result.accuracy(row))}</td>"]
        references = [result.unreduced] if best is None else [result.unreduced, best]
        for other in references:
            text = "" if row is other else _points(result.against(row, other))
            cells.append(f"<td>{text}</td>")
        rows.append([*cells, f"<td>{100 * result.agreement(row):.1f}</td>"])
    rows += [
        [_name(row), f'<td class="words" colspan="{len(head) - 1}">{escape(row.reason)}</td>']
        for row in result.left_out
    ]
    over = [r.name for r in result.measured[1:] if r.visual_tokens > result.limit + 1e-9]
    note = f"Above the budget: {', '.join(over)}." if over else ""
    return Section(
        "Accuracy",
        "Right answers, and how much better or worse a method is than another on the same "
        "questions, in points; in brackets the 95 % interval of a paired bootstrap, or the exact "
        "one where all questions are answered alike. The same are answers of the unreduced "
        "model, right or wrong. An interval without 0 is a difference that the questions show. "
        "The best method was picked on these questions, which flatters it a little. The model as "
        "it is has the colour of text, policies are blue, presets green, and less of the image "
        "is ochre. Short strokes are runs with other seeds.",
        comparison_charts(result)["accuracy"],
        table(head, rows, note),
    )


def _costs(result: Compared) -> Section:
    head = ["method", "visual tokens, mean", "GFLOPs", "KV KiB", "ms of a prefill", "peak MiB"]
    rows = []
    for row in result.measured:
        figures = (
            f"{row.visual_tokens:.4g}",
            f"{row.flops / 1e9:.3g}",
            f"{row.kv_bytes / 1024:.0f}",
            f"{row.milliseconds:.2f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.3g}",
        )
        kept = _each(kept_at(run.policy, result.tokens_per_image) for run in row.runs)
        cells = [f"<td>{text}</td>" for text in figures]
        rows.append([_name(row), *cells, f'<td class="words">{escape(kept)}</td>'])
    return Section(
        "Cost",
        "Of one prefill of the first test prompt. Tokens are those that a decoder layer processes, "
        "the mean over layers; times were measured by turns on this machine, and memory at its "
        "peak, beside the model. Where runs differ, "
        "figures are means. Tokens kept are of an image, after each site.",
        comparison_charts(result)["cost"],
        table([*head, "tokens kept"], rows, kind="listing"),
    )


def _kinds(result: Compared) -> Section:
    kinds = result.kind_names
    # Case: the questions have no kinds.
    if not kinds:
        return Section("By kind of question", "The test data names no kinds of questions.")
    asked = [f"{kind.replace('_', ' ')} ({result.kinds.count(kind)})" for kind in kinds]
    rows = []
    for row in result.measured:
        shares = [result.accuracy(row, kind).mean for kind in kinds]
        rows.append(
            [
                _name(row),
                *(
                    f'<td class="shade" style="--share:{share:.3f}">{100 * share:.1f}</td>'
                    for share in shares
                ),
            ]
        )
    return Section(
        "By kind of question",
        "Right answers in percent; in the head, the number of questions.",
        table(["method", *asked], rows),
    )


def _places(result: Compared) -> Section:
    layers = len(result.unreduced.runs[0].cost.visual_tokens_per_layer)
    whole = max(result.unreduced.runs[0].cost.visual_tokens_per_layer)
    rows = []
    for row in result.measured:
        # The root tells small counts apart, which methods differ in most.
        counts = row.runs[0].cost.visual_tokens_per_layer
        cells = "".join(
            f'<td class="shade" style="--share:{(count / whole) ** 0.5:.3f}">{count}</td>'
            for count in counts
        )
        rows.append([_name(row), cells])
    return Section(
        "Where the methods spend their tokens",
        "Visual tokens that each decoder layer processes, in the first run of each method.",
        table(["method", *(f"layer {i}" for i in range(layers))], rows),
    )


def _settings(result: Compared) -> Section:
    rows = []
    for row in result.measured:
        options = _each(options_in_words(run.values) for run in row.runs)
        if options:
            tried = max(run.evaluations for run in row.runs)
            words = f'<td class="words">{escape(options)}</td>'
            rows.append([_name(row), f"<td>{len(row.runs)}</td>", f"<td>{tried}</td>", words])
    text = "\n".join(f"{name}: {value}" for name, value in result.settings.items())
    return Section(
        "Settings",
        "The options that each preset ran with, and how many settings were tried to find them.",
        table(["preset", "runs", "tried", "options"], rows, kind="listing") if rows else "",
        details("Versions and settings", text),
    )


# *** words ***


def _name(row: Row) -> str:
    dot = f'<span class="dot" style="background:var(--{_PAINTS[row.group]})"></span>'
    name = escape(row.name)
    return f"<td>{dot}{f'<b>{name}</b>' if row.group == 'policy' else name}</td>"


def _each(texts: Iterable[str]) -> str:
    """Join the texts of runs, equal ones once."""
    return "; ".join(dict.fromkeys(texts))


def _share(result: Compared, row: Row) -> str:
    return percentage(result.accuracy(row).mean)


def _percent(found: Difference) -> str:
    low, high = 100 * found.low, 100 * found.high
    return f"{100 * found.mean:.1f} ({low:.1f} to {high:.1f})"


def _points(found: Difference) -> str:
    low, high = 100 * found.low, 100 * found.high
    return f"{100 * found.mean:+.1f} ({low:+.1f} to {high:+.1f})"
