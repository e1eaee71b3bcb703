"""Record the result of a search and write its page, whose sections the demo's page shares."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from deos_fx.cost.amounts import Cost
from deos_fx.files import write_text
from deos_fx.policy.policy import Policy
from deos_fx.results import charts
from deos_fx.results.compared import Compared
from deos_fx.results.evidence import Evidence
from deos_fx.results.page import Section, build_page, details, table, tiles
from deos_fx.words import counted

__all__ = [
    "SHOWN_CANDIDATES",
    "Candidate",
    "Look",
    "SearchResult",
    "command",
    "cost_cells",
    "measured_section",
    "percentage",
    "policy_section",
    "savings",
    "search_report",
    "search_section",
]


# *** the result ***


@dataclass(frozen=True)
class Candidate:
    """A policy that meets every limit, scored in its static form.

    Attributes:
        policy: The policy.
        source: Its origin: ``gradient at <sites>``, ``preset <name>``, ``preset <name>, tuned``,
            ``tried at <site>``, ``refined <origin>``, ``carried from a looser budget`` or
            ``no reduction``.
        loss: Task loss of its static graph on the scoring batches.
        cost: Its exact cost.
    """

    policy: Policy
    source: str
    loss: float
    cost: Cost


@dataclass(frozen=True)
class Look:
    """What a learned score looks at, measured on held-back data.

    Attributes:
        site: The site.
        part: Name of the learned part.
        share: Its share of the spread of everything that is added up to the score.
        like: Name of a score -> correlation with it, the strongest first.
    """

    site: str
    part: str
    share: float
    like: dict[str, float]

    def __str__(self) -> str:
        like = ", ".join(f"{value:+.2f} {name}" for name, value in self.like.items())
        return f"{self.site}: {self.part} makes {percentage(self.share)} of the score, like {like}"


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        policy: The candidate with the lowest static loss; it meets every limit.
        history: One dict for each step: task loss, relaxed costs, multipliers, gate temperature.
        candidates: Every policy that was scored in static form, best first.
        limits: Absolute limits by name.
        unreduced: Cost of the model without reductions.
        unreduced_loss: Task loss of that model on the scoring batches; 0 without labels, where the
            model is compared with itself.
        relaxed_loss: Task loss of the returned policy in its relaxed form, at the last gate
            temperature; NaN where it has none: groups of patches in the tower, some presets.
        interrupted: Whether the steps were cut short (Ctrl-C).
        looks: What the learned scores of the policy look at.
        evaluations: Forward passes of a batch that the search took; a backward pass counts two.
        evidence: The data behind the result, and its lead over the best preset.
        scales: Scale of images -> the lowest loss that was reached at it; empty where images were
            not scaled.
        preset_evaluations: Losses that were spent on tuning presets, beside these evaluations.
        measured: Answers, costs and times on questions of the data: of the model without reduction,
            of the policy, and of the best preset; None where they were not measured.
    """

    policy: Policy
    history: list[dict[str, Any]] = field(repr=False)
    candidates: list[Candidate] = field(repr=False)
    limits: dict[str, float]
    unreduced: Cost
    unreduced_loss: float
    relaxed_loss: float
    interrupted: bool = False
    looks: list[Look] = field(default_factory=list)
    evaluations: int = 0
    evidence: Evidence | None = None
    scales: Mapping[float, float] = field(default_factory=dict)
    preset_evaluations: int = 0
    measured: Compared | None = None

    @property
    def best(self) -> Candidate:
        """Return the candidate whose policy is the result."""
        return self.candidates[0]

    @property
    def best_preset(self) -> Candidate | None:
        """Return the best preset that was tried beside the result, if one has met the limits."""
        if self.evidence is None or not self.evidence.preset:
            return None
        return next(each for each in self.candidates if each.source == self.evidence.preset)

    @property
    def gap(self) -> float:
        """Return the static minus the relaxed task loss of the returned policy."""
        return self.best.loss - self.relaxed_loss

    @property
    def doubts(self) -> list[str]:
        """Return what the data is too little for, in words; empty where it is enough."""
        return [] if self.evidence is None else self.evidence.doubts

    @property
    def basis(self) -> str:
        """Say where the policy comes from, on which data, and what it is compared with."""
        lines = [f"It comes from: {self.best.source}."]
        if self.interrupted:
            lines.insert(0, "The search was interrupted, and this is the best that it had found.")
        losses = [f"policy {self.best.loss:.4g}"]
        if self.evidence is not None:
            lines.append(str(self.evidence))
            if self.evidence.preset:
                losses.append(f"{self.evidence.preset} {self.evidence.preset_loss:.4g}")
        losses.append(f"no reduction {self.unreduced_loss:.4g}")
        lines.append(f"Loss on the scored prompts: {', '.join(losses)}.")
        if self.scales:
            reached = ", ".join(f"{scale:g} {loss:.4g}" for scale, loss in self.scales.items())
            lines.append(
                f"Images enter at {self.policy.image_scale:g} of their size; the lowest loss at "
                f"each scale: {reached}."
            )
        presets = "Presets have their published settings."
        if self.preset_evaluations:
            presets = (
                "Presets and settings of their options were tried in "
                f"{counted(self.preset_evaluations, 'evaluation')} on the scored prompts."
            )
        lines.append(presets)
        return " ".join(lines)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained HTML page about the search.

        Args:
            path: The file to write.

        Raises:
            OSError: If the file cannot be written.
        """
        search_report(self, path)


# *** the page ***


def search_report(result: SearchResult, path: str | os.PathLike[str]) -> None:
    """Write the report of a search on its own.

    Args:
        result: The result of the search.
        path: The HTML file to write.

    Raises:
        OSError: If the file cannot be written.
    """
    sections = [
        *([measured_section(result.measured)] if result.measured is not None else []),
        policy_section(result.policy, result.best.cost, result.unreduced, result.looks),
        search_section(result),
    ]
    lead = f"Searched for a fixed model, and within every limit. {result.basis}"
    lead = " ".join([lead, *result.doubts])
    figures = tiles(savings(result.best.cost, result.unreduced))
    text = build_page("A searched token-reduction policy", lead, figures, sections, command())
    write_text(path, text)


# *** its sections ***


SHOWN_CANDIDATES = 10


def command() -> str:
    """Return the command line as one would type it."""
    program = os.path.basename(sys.argv[0]) or "python"
    if program == "__main__.py":
        program = "python -m deos_fx"
    return f"{program} {shlex.join(sys.argv[1:])}"


def cost_cells(cost: Cost) -> list[str]:
    """Return the cells of a cost."""
    return [f"<td>{text}</td>" for text in cost.cells.values()]


def measured_section(measured: Compared) -> Section:
    """Show what was answered on questions of the data, and what that took."""
    right = ["right, %"] if measured.answered else []
    rows = []
    for row in measured.measured:
        figures = [f"{100 * measured.agreement(row):.1f}", f"{row.milliseconds:.3g}"]
        if measured.answered:
            found = measured.accuracy(row)
            interval = f"({100 * found.low:.1f} to {100 * found.high:.1f})"
            figures.insert(0, f"{100 * found.mean:.1f} {interval}")
        cells = [f"<td>{text}</td>" for text in figures]
        rows.append([f"<td>{escape(row.name)}</td>", *cells, *cost_cells(row.runs[0].cost)])
    costs = measured.unreduced.runs[0].cost.cells
    return Section(
        "Answers and times",
        f"Of {counted(measured.questions, 'question')} of the data, those that policies were "
        "scored on. Right is an answer that is exactly the given one, in brackets with the 95 % "
        "interval of a bootstrap, or the exact one where all are right or none is; the same are "
        "answers of the unreduced model. Times and costs are those of the first question's "
        "prefill on this machine.",
        table(["method", *right, "same, %", "ms", *costs], rows),
    )


def policy_section(policy: Policy, cost: Cost, whole: Cost, looks: Sequence[Look] = ()) -> Section:
    """Draw a policy along the layers, and say what its learned scores look at."""
    lines = "\n".join(policy.lines)
    return Section(
        "The policy along the layers",
        "Bars are the visual tokens a decoder layer processes, dotted what it would process "
        "without reduction. A triangle is a reduction: left of layer 0 it acts on the image "
        "features (projector), elsewhere between two decoder layers.",
        charts.policy_chart(policy, cost.visual_tokens_per_layer, whole.visual_tokens),
        f"<pre>{escape(lines)}</pre>",
        *([_looks_table(looks)] if looks else []),
        details("policy.json", policy.to_json()),
    )


def _looks_table(looks: Sequence[Look]) -> str:
    """Show the share of every learned score, and the named scores that it resembles."""
    rows = []
    for look in looks:
        like = ", ".join(f"{value:+.2f} {name}" for name, value in look.like.items())
        cells = (look.site, look.part, percentage(look.share), like)
        rows.append([f"<td>{escape(cell)}</td>" for cell in cells])
    return table(
        ["site", "learned score", "share of the score", "correlations"],
        rows,
        "What the learned scores look at: their share of the spread of the whole score, and the "
        "scores by name that they resemble most, on held-back data.",
    )


def search_section(result: SearchResult) -> Section:
    """Show the course of a search and its best candidates."""
    limit = result.limits.get("visual_tokens")
    passes = counted(f"{result.evaluations:,}", "forward pass", "forward passes")
    return Section(
        "The search",
        "Above, the task loss of each step at the best place (thin) and its running mean; below, "
        "the visual tokens of the relaxed model, which a growing multiplier pushes to the limit. "
        "What the steps reach, presets and small changes of the best are measured in the static "
        "form, the form that runs, and the best is returned: it comes from "
        f"“{result.best.source}”. All that took {passes} of a batch, "
        f"of which a backward pass counts two. {_losses(result)}",
        # Where no reduction is right, no step was taken.
        *([charts.history_chart(result.history, limit)] if result.history else []),
        table(
            ["candidate", "task loss", *result.unreduced.cells, "reductions"],
            [_candidate_row(candidate) for candidate in _telling_candidates(result.candidates)],
            f"The best from each source, of {counted(len(result.candidates), 'candidate')}; the "
            "first was returned. A refined one is a small change of the best so far.",
            "listing",
        ),
    )


def _losses(result: SearchResult) -> str:
    relaxed = ""
    if not math.isnan(result.relaxed_loss):
        relaxed = f" static and {result.relaxed_loss:.4g} relaxed, a gap of {result.gap:+.2g}"
    return (
        f"The loss of the policy is {result.best.loss:.4g}{relaxed}; without reduction it is "
        f"{result.unreduced_loss:.4g}."
    )


def _telling_candidates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the best candidate from each source, best first."""
    # Candidates come best first, so the first of a source is its best.
    by_source: dict[str, Candidate] = {}
    for candidate in candidates:
        by_source.setdefault(candidate.source, candidate)
    return list(by_source.values())[:SHOWN_CANDIDATES]


def _candidate_row(candidate: Candidate) -> list[str]:
    scale, reductions = candidate.policy.image_scale, candidate.policy.reductions
    parts = [f"images at {scale:.3g}"] * (scale != 1)
    parts += [f"{one.site} {one.regime} to {one.keep:.4g}" for one in reductions]
    words = f'<td class="words">{escape("; ".join(parts))}</td>'
    loss = f"<td>{candidate.loss:.4f}</td>"
    return [f"<td>{escape(candidate.source)}</td>", loss, *cost_cells(candidate.cost), words]


def savings(cost: Cost, whole: Cost) -> list[tuple[str, str, str]]:
    """Return figures of the share of each cost that is left."""
    amounts = [
        ("visual tokens", "{:.4g}", cost.visual_tokens, whole.visual_tokens),
        ("prefill FLOPs", "{:.3g} G", cost.flops / 1e9, whole.flops / 1e9),
        ("KV cache", "{:.4g} KiB", cost.kv_bytes / 1024, whole.kv_bytes / 1024),
    ]
    return [
        (percentage(after / before), f"of {name}", f"{unit.format(after)} of {unit.format(before)}")
        for name, unit, after, before in amounts
    ]


def percentage(share: float) -> str:
    """Write a share in per cent."""
    return f"{100 * share:.1f} %"
