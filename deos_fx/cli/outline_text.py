"""The text that ``deos-fx inspect`` prints about a model."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.cli.outline import Outline
from deos_fx.cost.model import CostModel
from deos_fx.inputs.call import Call
from deos_fx.models.facts import facts_of
from deos_fx.policy.policy import Policy

__all__ = ["print_cost", "print_outline"]

_STAGES = ("vision", "projector", "decoder")


def print_outline(found: Outline, console: Console) -> None:
    """Print a model's blocks, token spaces and sites, from pixels to logits.

    Args:
        found: The outline of the model.
        console: The console to print on.
    """
    size = f"{found.parameters / 1e6:,.1f} million parameters"
    console.print(f"[bold]{found.name}[/] ({found.family}), {size}", highlight=False)
    rows, columns = found.grid
    grid = f" ({rows} x {columns})" if rows else "; images of other sizes have others"
    console.print(f"{found.visual} visual tokens an image{grid}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("blocks", no_wrap=True, style="bold")
    table.add_column("module", overflow="fold")
    table.add_column("tokens", justify="right")
    table.add_column("visual", justify="right")
    table.add_column("site")
    reasons = list(dict.fromkeys(row.reason for row in found.rows if row.reason))
    for row, behind in zip(found.rows, (*found.rows[1:], None), strict=True):
        last = behind is None or behind.stage != row.stage
        number = f"no ({reasons.index(row.reason) + 1})" if row.reason else "[green]available[/]"
        numbers = [str(count) if count else "-" for count in (row.tokens, row.visual)]
        module = f"{row.module} x {row.count}" if row.count > 1 else row.module
        cut = row.reduction
        table.add_row(row.name, module, *numbers, number, end_section=last and cut is None)
        if cut is not None:
            left = f"[bold]-> {row.left}[/]"
            table.add_row(f"  [cyan]{cut.regime}[/]", "", "", left, "", end_section=last)
    console.print(table)
    for i, reason in enumerate(reasons):
        console.print(f" ({i + 1}) {reason}", highlight=False)
    console.print(_scores(found))


def _scores(found: Outline) -> Table:
    """Make a table of the scores that can be computed at each stage."""
    known = {
        stage: dict.fromkeys(
            score for row in found.rows if row.stage == stage for score in row.scores
        )
        for stage in _STAGES
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("scores", overflow="fold")
    for stage in _STAGES:
        table.add_column(stage, justify="center")
    groups: dict[tuple[bool, ...], list[str]] = {}
    for score in dict.fromkeys(score for stage in reversed(_STAGES) for score in known[stage]):
        groups.setdefault(tuple(score in known[stage] for stage in _STAGES), []).append(score)
    for places, names in groups.items():
        table.add_row(", ".join(names), *("[green]yes[/]" if place else "-" for place in places))
    return table


def print_cost(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], policy: Policy, console: Console
) -> None:
    """Print the total cost of a policy, next to that of the unreduced model.

    Args:
        model: A vision-language model.
        inputs: A prompt with one image.
        policy: A policy for it.
        console: The console to print on.

    Raises:
        ValueError: If the policy does not fit the model.
    """
    costs = CostModel.of_call(Call.of(facts_of(model), inputs))
    before, after = costs.of_policy(Policy()), costs.of_policy(policy)
    console.print(policy, highlight=False, markup=False, soft_wrap=True)
    totals = Table("", "before", "after", "ratio", title="Cost of the prefill", box=box.SIMPLE_HEAD)
    names = ("visual tokens, mean", "GFLOPs", "KV cache, KiB")
    for name, whole, left in zip(names, before.in_units, after.in_units, strict=True):
        totals.add_row(name, f"{whole:,.4g}", f"{left:,.4g}", f"{left / whole:.1%}")
    console.print(totals)
