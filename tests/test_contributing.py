"""The worked examples of CONTRIBUTING are run as they stand there."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from tiny import inputs, tiny_llava

from deos_fx import transform
from deos_fx.operator import scores, select
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def _example(heading: str) -> tuple[str, str]:
    """The function of a section and the row of its table."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    function, row, *_ = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return function, row


def _entered(monkeypatch: pytest.MonkeyPatch, heading: str, module: Any, table: str) -> str:
    """Run a section's code in a module and enter its row; the name that it gets there."""
    function, row = _example(heading)
    space = dict(vars(module))
    exec(function, space)
    (entry,) = eval("{" + row + "}", space).items()
    monkeypatch.setitem(getattr(module, table), *entry)
    return str(entry[0])


def _kept(reduction: Reduction) -> Any:
    model = tiny_llava()
    batch = inputs(model, batch=2)
    reduced = transform(model, policy=Policy((reduction,)))
    return reduced(**batch).logits, reduced.explain(**batch)[0]


def test_add_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    name = _entered(monkeypatch, "Add a score", scores, "SCORES")
    _, site = _kept(Reduction("projector", 9, scores={name: 1.0}))
    assert site.kept.shape == (2, 9)
    peaks = site.scores
    kept = torch.isin(site.positions_in[0], site.kept[0])
    assert peaks[0][kept].min() >= peaks[0][~kept].max()


def test_add_a_selector(monkeypatch: pytest.MonkeyPatch) -> None:
    name = _entered(monkeypatch, "Add a selector", select, "SELECTORS")
    logits, site = _kept(Reduction("decoder.1", 8, selector=name, gain=1.0))
    assert logits.isfinite().all()
    ranked = site.scores[1].argsort()
    expected = sorted([*ranked[:4].tolist(), *ranked[-4:].tolist()])
    first = int(site.positions_in[1, 0])
    assert [int(position) - first for position in site.kept[1]] == expected


def test_a_new_model_family() -> None:
    section = TEXT.split("## A new model family\n")[1].split("\n## ")[0]
    (builder,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    builder = textwrap.dedent(builder)
    assert len(builder.splitlines()) <= 15
    ((name, family),) = eval("{" + builder + "}", dict(vars(families))).items()
    assert family.config().to_dict() == families.FAMILIES[name].config().to_dict()
