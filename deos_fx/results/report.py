"""Reports: what a search found, and what the demo measured, each as one self-contained page."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from PIL import Image

from deos_fx.cost.model import Cost
from deos_fx.files import write_text
from deos_fx.policy.policy import Policy
from deos_fx.results import charts
from deos_fx.results.page import Section, build_page, details, table, tiles
from deos_fx.results.pictures import TokenStep, draw_image, draw_step

if TYPE_CHECKING:
    from deos_fx.results.search_result import Candidate, SearchResult

__all__ = ["DemoResult", "Method", "OnnxCheck", "Picture", "demo_report", "search_report"]

SEARCHED = "searched"
UNREDUCED = "no reduction"
SHOWN_STEPS = 4
SHOWN_CANDIDATES = 10


@dataclass(frozen=True)
class Method:
    """One way to run the model, with what it costs and how often it is right.

    Attributes:
        name: A preset's name, ``searched`` or ``no reduction``.
        policy: What it does.
        cost: Cost of one prompt.
        accuracy: Fraction of right answers by kind of question, and ``overall``; empty if there
            is no measurement.
        reason: Why there is none.
        answers: Its answers, in the order of the questions.
    """

    name: str
    policy: Policy
    cost: Cost
    accuracy: Mapping[str, float]
    reason: str = ""
    answers: Sequence[str] = ()

    @property
    def is_searched(self) -> bool:
        """Whether it is what the search returned."""
        return self.name == SEARCHED

    @property
    def paint(self) -> str:
        """The colour it is drawn in: that of its first reduction's regime."""
        if self.is_searched:
            return "accent"
        return self.policy.reductions[0].regime if self.policy.reductions else "ink"


@dataclass(frozen=True)
class Picture:
    """One question about one image, and what the searched policy did to the image's tokens.

    Attributes:
        image: The image.
        kind: Kind of the question.
        question: The question.
        expected: The right answer.
        answers: Answer by name of a method.
        steps: The reductions, in order.
    """

    image: Image.Image
    kind: str
    question: str
    expected: str
    answers: Mapping[str, str]
    steps: Sequence[TokenStep]


@dataclass(frozen=True)
class OnnxCheck:
    """How ONNX Runtime's answers compare with PyTorch's, where it ran, and the files it ran."""

    compared: int
    equal: int
    device: str
    files: Mapping[str, int]


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found out.

    Attributes:
        limit: Visual tokens that the budget allows, mean over the decoder layers.
        search: The search.
        methods: The comparison: without reduction, searched, and every preset.
        questions: How many questions the accuracies are over.
        grid: Rows and columns of the visual tokens of an image.
        pictures: Examples.
        onnx: The check of the exported model.
        seconds: Wall time by stage.
        settings: Versions and numbers that explain the run.
    """

    limit: float
    search: SearchResult
    methods: Sequence[Method]
    questions: int
    grid: tuple[int, int]
    pictures: Sequence[Picture]
    onnx: OnnxCheck
    seconds: Mapping[str, float]
    settings: Mapping[str, str] = field(default_factory=dict)

    def method(self, name: str) -> Method:
        """The method of that name."""
        return next(method for method in self.methods if method.name == name)

    def ranked(self) -> list[Method]:
        """Without reduction, then by accuracy, then what could not be measured."""
        place = {UNREDUCED: -2.0}
        return sorted(
            self.methods, key=lambda m: place.get(m.name, -m.accuracy.get("overall", -1.0))
        )

    def best_preset(self) -> Method | None:
        """The most accurate preset, if any was measured."""
        presets = [m for m in self.ranked() if m.accuracy and m.name not in (SEARCHED, UNREDUCED)]
        return presets[0] if presets else None


# *** the two reports ***


def demo_report(result: DemoResult, path: str | os.PathLike[str]) -> None:
    """Writes the demo's report.

    Args:
        result: What the demo found out.
        path: The HTML file to write.

    Raises:
        OSError: If it cannot be written.
    """
    searched, whole = result.method(SEARCHED), result.method(UNREDUCED)
    sections = [
        _comparison(result),
        _kinds(result),
        _policy_section(searched.policy, searched.cost, whole.cost),
        _spending(result),
        _pictures(result),
        _search_section(result.search),
        _onnx_section(result),
        _times(result),
    ]
    share = result.limit / whole.cost.visual_tokens
    title = f"deos_fx demo: {100 * share:.4g} % of the visual tokens"
    text = build_page(title, _lead(result), _figures(result), sections, _command())
    write_text(path, text)


def search_report(result: SearchResult, path: str | os.PathLike[str]) -> None:
    """Writes the report of a search alone.

    Args:
        result: What the search returned.
        path: The HTML file to write.

    Raises:
        OSError: If it cannot be written.
    """
    sections = [
        _policy_section(result.policy, result.best.cost, result.unreduced),
        _search_section(result),
    ]
    lead = "Found by gradient for a fixed model, rounded to whole tokens, and within every limit."
    figures = tiles(_savings(result.best.cost, result.unreduced))
    text = build_page("A searched token-reduction policy", lead, figures, sections, _command())
    write_text(path, text)


def _command() -> str:
    """The command line, as one would type it."""
    program = os.path.basename(sys.argv[0]) or "python"
    if program == "__main__.py":
        program = "python -m deos_fx"
    return f"{program} {shlex.join(sys.argv[1:])}"


# *** the demo's parts ***


def _lead(result: DemoResult) -> str:
    searched, whole = result.method(SEARCHED), result.method(UNREDUCED)
    best = result.best_preset()
    text = (
        f"With {searched.cost.visual_tokens:.3g} of {whole.cost.visual_tokens:.4g} visual tokens "
        f"in the mean of its decoder layers, the reference model answers "
        f"{_percent(searched.accuracy['overall'])} of {result.questions} held-out questions right"
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
            *_savings(searched.cost, whole.cost),
            (equal, "answers equal", "ONNX Runtime against PyTorch"),
        ]
    )


def _comparison(result: DemoResult) -> Section:
    whole = result.method(UNREDUCED).cost.visual_tokens
    chart = charts.accuracy_chart(result.methods, result.limit, whole, result.questions)
    return Section(
        "Accuracy at the same cost",
        "Every method may use the shaded part: presets are fitted to the budget with as many "
        f"tokens as it allows. In brackets, the 95 % interval that {result.questions} questions "
        "give; digits and photographs of the test scenes were seen neither in training nor in the "
        "search.",
        chart,
        _legend(result.methods),
    )


def _kinds(result: DemoResult) -> Section:
    kinds = [kind for kind in result.method(UNREDUCED).accuracy if kind != "overall"]
    head = ["method", "overall", *(kind.replace("_", " ") for kind in kinds)]
    head += ["visual tokens", "GFLOPs", "KV KiB"]
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
    if not method.accuracy:
        reason = f'<td class="words" colspan="{len(kinds) + 4}">{escape(method.reason)}</td>'
        return [*cells, reason]
    for kind in ("overall", *kinds):
        share = method.accuracy[kind]
        cells.append(f'<td class="shade" style="--share:{share:.3f}">{100 * share:.1f}</td>')
    return [*cells, *_cost_cells(method.cost)]


def _cost_cells(cost: Cost) -> list[str]:
    numbers = (
        f"{cost.visual_tokens:.4g}",
        f"{cost.flops / 1e9:.3g}",
        f"{cost.kv_bytes / 1024:.0f}",
    )
    return [f"<td>{number}</td>" for number in numbers]


def _marked(method: Method) -> str:
    name = escape(method.name)
    return f"<b>{name}</b>" if method.is_searched else name


def _spending(result: DemoResult) -> Section:
    layers = len(result.method(UNREDUCED).cost.visual_tokens_per_layer)
    whole = max(result.method(UNREDUCED).cost.visual_tokens_per_layer)
    rows = []
    for method in result.ranked():
        if method.accuracy:
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
        "dropped token to the kept one (the dot) that takes in its content, brighter with more "
        "of it.",
        f'<div class="{layout}">{"".join(drawn)}</div>',
    )


def _picture(picture: Picture, index: int, grid: tuple[int, int]) -> str:
    name = f"picture-{index}"
    figures = [
        f"<figure>{draw_image(picture.image, name)}<figcaption>what the model is given"
        "</figcaption></figure>"
    ]
    for step in _telling(picture.steps):
        drawing = draw_step(step, picture.image, name, grid)
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
    """The steps that drop most tokens, in order: a policy may have one at every layer."""
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
    regimes = {m.paint for m in methods if m.accuracy} - {"accent", "ink"}
    parts = "".join(
        f'<span><span class="dot" style="background:var(--{regime})"></span>{regime}</span>'
        for regime in sorted(regimes)
    )
    return f'<div class="answers">{parts}</div>'


# *** parts of both ***


def _policy_section(policy: Policy, cost: Cost, whole: Cost) -> Section:
    lines = "\n".join(str(reduction) for reduction in policy.reductions)
    return Section(
        "The policy along the layers",
        "Bars are the visual tokens a decoder layer processes, dotted what it would process "
        "without reduction. A triangle is a reduction: left of layer 0 it acts on the image "
        "features (projector), elsewhere between two decoder layers.",
        charts.policy_chart(policy, cost.visual_tokens_per_layer, whole.visual_tokens),
        f"<pre>{escape(lines)}</pre>",
        details("policy.json", policy.to_json()),
    )


def _search_section(result: SearchResult) -> Section:
    limit = result.limits.get("visual_tokens")
    return Section(
        "The search",
        "Above, the task loss of each step (thin) and its running mean; below, the visual tokens "
        "of the relaxed model, which a growing multiplier holds under the limit. The steps start "
        "near the best preset. Policies along the way are rounded to whole tokens; these, the "
        "presets and small changes of the best are measured in the static form, the form that "
        "runs, and the best is returned. Its loss is "
        f"{result.best.loss:.4g} static and {result.relaxed_loss:.4g} relaxed, a gap of "
        f"{result.gap:+.2g}; without reduction it is {result.unreduced_loss:.4g}.",
        charts.history_chart(result.history, limit),
        table(
            ["candidate", "task loss", "visual tokens", "GFLOPs", "KV KiB", "reductions"],
            [_candidate_row(candidate) for candidate in _telling_candidates(result.candidates)],
            f"The best from each source, of {len(result.candidates)} candidates; the first was "
            "returned. A refined one is a small change of the best so far.",
            "listing",
        ),
    )


def _telling_candidates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best candidate from each source, best first."""
    by_source: dict[str, Candidate] = {}
    for candidate in candidates:
        by_source.setdefault(candidate.source, candidate)
    return list(by_source.values())[:SHOWN_CANDIDATES]


def _candidate_row(candidate: Candidate) -> list[str]:
    reductions = "; ".join(
        f"{reduction.site} {reduction.regime} to {reduction.keep:.4g}"
        for reduction in candidate.policy.reductions
    )
    words = f'<td class="words">{escape(reductions)}</td>'
    loss = f"<td>{candidate.loss:.4f}</td>"
    return [f"<td>{escape(candidate.source)}</td>", loss, *_cost_cells(candidate.cost), words]


def _savings(cost: Cost, whole: Cost) -> list[tuple[str, str, str]]:
    """Figures of what is left of each cost."""
    amounts = [
        ("visual tokens", "{:.4g}", cost.visual_tokens, whole.visual_tokens),
        ("prefill FLOPs", "{:.3g} G", cost.flops / 1e9, whole.flops / 1e9),
        ("KV cache", "{:.4g} KiB", cost.kv_bytes / 1024, whole.kv_bytes / 1024),
    ]
    return [
        (_percent(after / before), f"of {name}", f"{unit.format(after)} of {unit.format(before)}")
        for name, unit, after, before in amounts
    ]


def _overall(method: Method) -> str:
    return _percent(method.accuracy["overall"])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
