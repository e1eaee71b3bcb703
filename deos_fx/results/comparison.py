"""The result of a comparison, and the files that it is written to."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from deos_fx.files import fresh_folder, write_text
from deos_fx.results.compared import Compared, Row, Run, kept_at, options_in_words
from deos_fx.results.comparison_page import comparison_charts, comparison_page
from deos_fx.results.page import standalone

__all__ = ["Comparison"]


@dataclass(frozen=True)
class Comparison(Compared):
    """Methods compared on the same questions: accuracies with intervals, costs, and files of them.

    ``accuracy(row)`` and ``against(row, other)`` give a mean with its 95 % interval, and ``save``
    writes everything.
    """

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``comparison.csv``, ``comparison.json``, plots and the page ``comparison.html``.

        Args:
            folder: The folder to write; other files in it stay.

        Raises:
            OSError: If it cannot be written.
        """
        with fresh_folder(folder) as place:
            write_text(place / "comparison.csv", self.to_csv())
            write_text(place / "comparison.json", json.dumps(self.to_dict(), indent=2) + "\n")
            for name, drawing in comparison_charts(self).items():
                write_text(place / f"{name}.svg", standalone(drawing))
            write_text(place / "comparison.html", comparison_page(self))

    def to_csv(self) -> str:
        """Return a line for each method; shares are from 0 to 1."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        lines = [self._figures(row) for row in [*self.measured, *self.left_out]]
        writer.writerow(lines[0])
        for line in lines:
            # A method that was not run has a name and a reason.
            writer.writerow([line.get(name, "") for name in lines[0]])
        return file.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it: also each answer and its score."""
        return {
            "deos_fx": "comparison",
            "questions": self.questions,
            "limit_visual_tokens": self.limit,
            "settings": dict(self.settings),
            "kinds": list(self.kinds),
            "methods": [
                self._figures(row)
                | {"runs": [_run(run, self.tokens_per_image) for run in row.runs]}
                for row in [*self.measured, *self.left_out]
            ],
        }

    def _figures(self, row: Row) -> dict[str, Any]:
        if not row.runs:
            return {"method": row.name, "group": row.group, "runs": 0, "reason": row.reason}
        found: dict[str, Any] = {"method": row.name, "group": row.group, "runs": len(row.runs)}
        if self.answered:
            differences = {"accuracy": self.accuracy(row)}
            differences["minus_unreduced"] = self.against(row, self.unreduced)
            if self.best is not None:
                differences["minus_best"] = self.against(row, self.best)
            for name, value in differences.items():
                found |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
            found |= {f"accuracy_{kind}": self.accuracy(row, kind).mean for kind in self.kind_names}
        found |= {
            "agreement": self.agreement(row),
            "visual_tokens": row.visual_tokens,
            "flops": row.flops,
            "kv_bytes": row.kv_bytes,
            "milliseconds": row.milliseconds,
            "peak_bytes": row.peak_bytes,
            "tokens_kept": "; ".join(
                kept_at(run.policy, self.tokens_per_image) for run in row.runs
            ),
            "options": "; ".join(options_in_words(run.values) for run in row.runs),
            "evaluations": max(run.evaluations for run in row.runs),
            "reason": "",
        }
        return found


def _run(run: Run, visual_tokens: int) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "options": dict(run.values),
        "evaluations": run.evaluations,
        "tokens_kept": kept_at(run.policy, visual_tokens),
        "policy": None if run.policy is None else json.loads(run.policy.to_json()),
        "cost": asdict(run.cost),
        "milliseconds": run.milliseconds,
        "peak_bytes": run.peak_bytes,
        "answers": list(run.answers),
        "scores": list(run.scores),
    }
