"""The results of a search under several budgets, and their page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape

from deos_fx.files import write_text
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.results import charts
from deos_fx.results.page import Section, build_page, details, table, tiles
from deos_fx.results.search_result import (
    Candidate,
    SearchResult,
    command,
    cost_cells,
    measured_section,
    percentage,
)
from deos_fx.words import counted

__all__ = ["SearchFront"]


@dataclass(frozen=True)
class SearchFront:
    """The best policies under several budgets.

    None of them is dominated: where the policy of a tighter budget is as good as that of a looser
    one, it is the result under both.

    Attributes:
        results: The result under each budget, the loosest first.
    """

    results: Mapping[Budget, SearchResult]

    def __getitem__(self, budget: Budget) -> SearchResult:
        return self.results[budget]

    @property
    def policies(self) -> list[Policy]:
        """Return the different policies, the loosest first."""
        found: list[Policy] = []
        for result in self.results.values():
            if result.policy not in found:
                found.append(result.policy)
        return found

    @property
    def interrupted(self) -> bool:
        """Return whether the search was cut short (Ctrl-C)."""
        return any(result.interrupted for result in self.results.values())

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained HTML page about the search.

        Args:
            path: The file to write.

        Raises:
            OSError: If the file cannot be written.
        """
        sources = ", ".join(dict.fromkeys(one.best.source for one in self.results.values()))
        lead = (
            "Searched for a fixed model, each within its budget, and none dominated. They come "
            f"from: {sources}."
        )
        figures = tiles(
            [
                (f"{result.best.loss:.4g}", "task loss", _named(budget))
                for budget, result in self.results.items()
            ]
        )
        measured = next(iter(self.results.values())).measured
        answers = [] if measured is None else [measured_section(measured)]
        sections = [self._front_section(), *answers, *self._policy_sections()]
        title = "Searched token-reduction policies"
        write_text(path, build_page(title, lead, figures, sections, command()))

    def _front_section(self) -> Section:
        """Draw the front, and list what is on it."""
        unreduced = next(iter(self.results.values()))
        rows = [
            [
                f"<td>{escape(_named(budget))}</td>",
                f"<td>{result.best.loss:.4f}</td>",
                *cost_cells(result.best.cost),
                f'<td class="words">{escape(result.best.source)}</td>',
            ]
            for budget, result in self.results.items()
        ]
        different = counted(len(self.policies), "different policy", "different policies")
        return Section(
            "The front",
            "The task loss of the policies against what they cost, both measured in the static "
            "form, the form that runs. Small dots are other policies that were tried; the dashed "
            f"line is the loss without reduction, {unreduced.unreduced_loss:.4g}.",
            _front_chart(list(self.results.values())),
            table(
                ["budget", "task loss", *unreduced.unreduced.cells, "source"],
                rows,
                f"The best under each budget: {different}.",
                "listing",
            ),
        )

    def _policy_sections(self) -> list[Section]:
        """Write out every policy."""
        return [
            Section(
                f"Within {_named(budget)}",
                f"It needs {percentage(result.best.cost.flops / result.unreduced.flops)} of the "
                f"FLOPs of the prefill. {' '.join([result.basis, *result.doubts])}",
                "<pre>" + escape("\n".join(result.policy.lines) or "no reduction") + "</pre>",
                details("policy.json", result.policy.to_json()),
            )
            for budget, result in self.results.items()
        ]


def _named(budget: Budget) -> str:
    """Return the limits of a budget in words."""
    words = []
    for item in fields(budget):
        value = getattr(budget, item.name)
        if value is not None:
            amount = percentage(value) if isinstance(value, float) and value <= 1 else f"{value:g}"
            words.append(f"{amount} {item.name.replace('_', ' ')}")
    return ", ".join(words)


def _front_chart(results: Sequence[SearchResult]) -> str:
    """Draw task losses against visual tokens, or FLOPs if no result limits visual tokens."""
    by_tokens = any("visual_tokens" in result.limits for result in results)

    def amount(candidate: Candidate) -> float:
        return candidate.cost.visual_tokens if by_tokens else candidate.cost.flops / 1e9

    figure, axes = charts.new_figure(8.6, 3.8)
    best = [result.best for result in results]
    others = [each for result in results for each in result.candidates if each not in best]
    ink, soft = charts.paint("accent"), charts.paint("soft")
    axes.scatter(list(map(amount, others)), [each.loss for each in others], s=8, color=soft)
    axes.plot(list(map(amount, best)), [each.loss for each in best], color=ink, marker="o", lw=1.6)
    axes.axhline(results[0].unreduced_loss, color=charts.paint("prune"), lw=1.2, ls=(0, (4, 3)))
    axes.set_xlabel("visual tokens a decoder layer processes (mean)" if by_tokens else "GFLOPs")
    axes.set_ylabel("task loss")
    return charts.to_svg(figure, "front", "Task loss of every policy against its cost")
