"""Sections shared by the page of the demo and the page of a search."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from html import escape
from typing import Any, Protocol

from deos_fx.cost.amounts import Cost
from deos_fx.policy.policy import Policy
from deos_fx.results import charts
from deos_fx.results.candidate import Candidate
from deos_fx.results.page import Section, details, table

__all__ = [
    "SHOWN_CANDIDATES",
    "Found",
    "command",
    "cost_cells",
    "percentage",
    "policy_section",
    "savings",
    "search_section",
]

SHOWN_CANDIDATES = 10


class Found(Protocol):
    """The parts of a `SearchResult` that a page reads."""

    @property
    def policy(self) -> Policy: ...
    @property
    def history(self) -> list[dict[str, Any]]: ...
    @property
    def candidates(self) -> list[Candidate]: ...
    @property
    def limits(self) -> dict[str, float]: ...
    @property
    def unreduced(self) -> Cost: ...
    @property
    def unreduced_loss(self) -> float: ...
    @property
    def relaxed_loss(self) -> float: ...
    @property
    def best(self) -> Candidate: ...
    @property
    def gap(self) -> float: ...


def command() -> str:
    """Return the command line as one would type it."""
    program = os.path.basename(sys.argv[0]) or "python"
    if program == "__main__.py":
        program = "python -m deos_fx"
    return f"{program} {shlex.join(sys.argv[1:])}"


def cost_cells(cost: Cost) -> list[str]:
    """Return the cells of a cost."""
    return [f"<td>{text}</td>" for text in cost.cells.values()]


def policy_section(policy: Policy, cost: Cost, whole: Cost) -> Section:
    """Draw a policy along the layers."""
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


def search_section(result: Found) -> Section:
    """Show the course of a search and its best candidates."""
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
            ["candidate", "task loss", *result.unreduced.cells, "reductions"],
            [_candidate_row(candidate) for candidate in _telling_candidates(result.candidates)],
            f"The best from each source, of {len(result.candidates)} candidates; the first was "
            "returned. A refined one is a small change of the best so far.",
            "listing",
        ),
    )


def _telling_candidates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the best candidate from each source, best first."""
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
