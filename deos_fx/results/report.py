"""Write the report of the demo, one self-contained page, from its measurements."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from deos_fx.files import write_text
from deos_fx.results import charts
from deos_fx.results.methods import SEARCHED, UNREDUCED, Method, OnnxCheck, Picture
from deos_fx.results.page import Section, build_page, details, table, tiles
from deos_fx.results.search_result import (
    command,
    cost_cells,
    percentage,
    policy_section,
    savings,
    search_section,
)
from deos_fx.results.token_drawing import TokenStep, draw_image, draw_step

if TYPE_CHECKING:
    from deos_fx.results.search_result import SearchResult

__all__ = ["DemoResult", "demo_report"]

SHOWN_STEPS = 4


@dataclass(frozen=True)
class DemoResult:
    """All measurements of the demo.

    Attributes:
        limit: Visual tokens that the budget allows, mean over the decoder layers.
        search: The result of the search.
        methods: The methods compared: no reduction, searched, and every preset.
        tuning: Forward passes of a batch that tuning the presets took; 0 if they have their
            published settings.
        questions: Number of questions behind each accuracy.
        grid: Rows and columns of the visual tokens of an image.
        pictures: Examples.
        onnx: The check of the exported model.
        seconds: Wall time of each stage.
        settings: Versions and settings of the run.
    """

    limit: float
    search: SearchResult
    methods: Sequence[Method]
    tuning: int
    questions: int
    grid: tuple[int, int]
    pictures: Sequence[Picture]
    onnx: OnnxCheck
    seconds: Mapping[str, float]
    settings: Mapping[str, str] = field(default_factory=dict)

    def method(self, name: str) -> Method:
        """Return the method of a name."""
        return next(method for method in self.methods if method.name == name)

    def ranked(self) -> list[Method]:
        """Sort the methods: no reduction, then by accuracy, then those without a measurement."""
        # Ascending: -2 is before every negated accuracy, and 1 after all of them.
        place = {UNREDUCED: -2.0}
        return sorted(
            self.methods, key=lambda m: place.get(m.name, -m.accuracy.get("overall", -1.0))
        )

    @property
    def presets_in_words(self) -> str:
        """Return how the presets were set."""
        if not self.tuning:
            return "published settings (pip install 'deos-fx[compare]' to have them tuned)"
        return (
            f"each with the best of its own options on the data of the search, found in "
            f"{self.tuning:,} evaluations by all of them"
        )

    def best_preset(self) -> Method | None:
        """Return the most accurate preset, if any was measured."""
        presets = [m for m in self.ranked() if m.accuracy and m.name not in (SEARCHED, UNREDUCED)]
        return presets[0] if presets else None


# *** the report ***


def demo_report(result: DemoResult, path: str | os.PathLike[str]) -> None:
    """Write the demo's report.

    Args:
        result: The measurements.
        path: The HTML file to write.

    Raises:
        OSError: If the file cannot be written.
    """
    searched, whole = result.method(SEARCHED), result.method(UNREDUCED)
    sections = [
        _comparison(result),
        _kinds(result),
        policy_section(searched.policy, searched.cost, whole.cost, result.search.looks),
        _spending(result),
        _pictures(result),
        search_section(result.search),
        _onnx_section(result),
        _times(result),
    ]
    share = result.limit / whole.cost.visual_tokens
    title = f"deos_fx demo: {100 * share:.4g} % of the visual tokens"
    text = build_page(title, _lead(result), _figures(result), sections, command())
    write_text(path, text)


# *** the demo's parts ***


def _lead(result: DemoResult) -> str:
    searched, whole = result.method(SEARCHED), result.method(UNREDUCED)
    best = result.best_preset()
    text = (
        f"With {searched.cost.visual_tokens:.3g} of {whole.cost.visual_tokens:.4g} visual tokens "
        f"in the mean of its decoder layers, the reference model answers "
        f"{percentage(searched.accuracy['overall'])} of {result.questions} held-out questions right"
    )
    if best is not None:
        text += f"; the best hand-designed method, {best.name}, {_overall(best)} at the same budget"
    return f"{text}; without reduction it is {_overall(whole)}."


def _figures(result: DemoResult) -> str:
    searched, whole = result.method(SEARCHED), result.method(UNREDUCED)
    equal = f"{result.onnx.equal} / {result.onnx.compared}"
    return tiles(
        [
            (_overall(searched), "right, searched", f"{_overall(whole)} without reduction"),
            *savings(searched.cost, whole.cost),
            (equal, "answers equal", "ONNX Runtime against PyTorch"),
        ]
    )


def _comparison(result: DemoResult) -> Section:
    whole = result.method(UNREDUCED).cost.visual_tokens
    chart = charts.accuracy_chart(result.methods, result.limit, whole, result.questions)
    return Section(
        "Accuracy at the same cost",
        "Every method may use the shaded part: presets are fitted to the budget with as many "
        f"tokens as it allows, {result.presets_in_words}; the search took "
        f"{result.search.evaluations:,}. In "
        f"brackets, the 95 % interval that {result.questions} questions "
        "give; digits and photographs of the test scenes were seen neither in training nor in the "
        "search.",
        chart,
        _legend(result.methods),
    )


def _kinds(result: DemoResult) -> Section:
    kinds = [kind for kind in result.method(UNREDUCED).accuracy if kind != "overall"]
    costs = result.method(UNREDUCED).cost.cells
    head = ["method", "overall", *(kind.replace("_", " ") for kind in kinds), *costs]
    rows = [_method_row(method, kinds) for method in result.ranked()]
    return Section(
        "By kind of question",
        "Right answers in percent. Methods fail differently: some keep what the text asks about, "
        "some the overall impression. Costs are of one prompt's prefill.",
        table(head, rows),
    )


def _method_row(method: Method, kinds: Sequence[str]) -> list[str]:
    dot = f'<span class="dot" style="background:var(--{method.paint})"></span>'
    cells = [f"<td>{dot}{_marked(method)}</td>"]
    # Case: not measured. The reason takes the place of all figures.
    if not method.accuracy:
        columns = len(kinds) + 1 + len(method.cost.cells)
        return [*cells, f'<td class="words" colspan="{columns}">{escape(method.reason)}</td>']
    for kind in ("overall", *kinds):
        share = method.accuracy[kind]
        cells.append(f'<td class="shade" style="--share:{share:.3f}">{100 * share:.1f}</td>')
    return [*cells, *cost_cells(method.cost)]


def _marked(method: Method) -> str:
    name = escape(method.name)
    return f"<b>{name}</b>" if method.is_searched else name


def _spending(result: DemoResult) -> Section:
    layers = len(result.method(UNREDUCED).cost.visual_tokens_per_layer)
    whole = max(result.method(UNREDUCED).cost.visual_tokens_per_layer)
    rows = []
    for method in result.ranked():
        if method.accuracy:
            # The root tells small counts apart, which methods differ in most.
            cells = "".join(
                f'<td class="shade" style="--share:{(count / whole) ** 0.5:.3f}">{count}</td>'
                for count in method.cost.visual_tokens_per_layer
            )
            rows.append([f"<td>{_marked(method)}</td>", cells])
    return Section(
        "Where the methods spend their tokens",
        "Visual tokens that each decoder layer processes. The mean of a row is what the budget "
        "limits, so an early cut may keep more in all layers and a late one has to cut deeper.",
        table(["method", *(f"layer {i}" for i in range(layers))], rows),
    )


def _pictures(result: DemoResult) -> Section:
    drawn = (_picture(picture, i, result.grid) for i, picture in enumerate(result.pictures))
    single = all(len(picture.steps) <= 1 for picture in result.pictures)
    layout = "pairs" if single else "rows"
    return Section(
        "Kept and merged tokens",
        "The first test question of every kind. A square is a visual token. Outlined ones are "
        "still there after the reduction, dark ones are gone, and a yellow line leads from a "
        "dropped token (the dot) to the kept one that takes in its content, brighter with more "
        "of it.",
        f'<div class="{layout}">{"".join(drawn)}</div>',
    )


def _picture(picture: Picture, index: int, grid: tuple[int, int]) -> str:
    name = f"picture-{index}"
    figures = [
        f"<figure>{draw_image(picture.image, name, grid)}<figcaption>what the model is given"
        "</figcaption></figure>"
    ]
    for step in _telling(picture.steps):
        drawing = draw_step(step, name, grid)
        caption = f"{step.site}: {step.regime} {len(step.before)} → {len(step.kept)}"
        figures.append(f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>")
    answers = "".join(
        f'<span class="{"right" if answer == picture.expected else "wrong"}">'
        f"{escape(method)}: <b>{escape(answer) or '(nothing)'}</b></span>"
        for method, answer in picture.answers.items()
    )
    return (
        f'<div class="example"><h3>{escape(picture.question)}?</h3>'
        f"<p>kind “{escape(picture.kind.replace('_', ' '))}”, "
        f"right answer: {escape(picture.expected)}</p>"
        f'<div class="strip">{"".join(figures)}</div><div class="answers">{answers}</div></div>'
    )


def _telling(steps: Sequence[TokenStep]) -> list[TokenStep]:
    """Select the steps that drop most tokens, in order; a policy may have one at every layer."""
    dropped = sorted(steps, key=lambda step: len(step.kept) - len(step.before))[:SHOWN_STEPS]
    return [step for step in steps if step in dropped]


def _onnx_section(result: DemoResult) -> Section:
    check = result.onnx
    rows = [
        [f"<td>{escape(name)}</td>", f"<td>{math.ceil(size / 1024):,}</td>"]
        for name, size in check.files.items()
    ]
    return Section(
        "In ONNX Runtime",
        "The searched model was exported, prefill and decode apart, and generated answers to "
        f"{check.compared} test questions on the {check.device.upper()}; {check.equal} of them are "
        "equal to PyTorch's, token by token.",
        table(["file", "KiB"], rows, kind="narrow"),
    )


def _times(result: DemoResult) -> Section:
    rows = [
        [f"<td>{escape(stage)}</td>", f"<td>{seconds:.1f}</td>"]
        for stage, seconds in {**result.seconds, "total": sum(result.seconds.values())}.items()
    ]
    settings = "\n".join(f"{name}: {value}" for name, value in result.settings.items())
    return Section(
        "How long it took",
        "Wall-clock seconds of each stage on this machine.",
        table(["stage", "seconds"], rows, kind="narrow"),
        details("Versions and settings", settings),
    )


def _legend(methods: Sequence[Method]) -> str:
    # The searched method and the unreduced model have colours that stand for no regime.
    regimes = {m.paint for m in methods if m.accuracy} - {"accent", "ink"}
    parts = "".join(
        f'<span><span class="dot" style="background:var(--{regime})"></span>{regime}</span>'
        for regime in sorted(regimes)
    )
    return f'<div class="answers">{parts}</div>'


def _overall(method: Method) -> str:
    return percentage(method.accuracy["overall"])
