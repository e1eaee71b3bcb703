"""Write the outline of a model for programs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from deos_fx.cli.outline import Outline
from deos_fx.cost.amounts import CostReport

__all__ = ["outline_json"]


def outline_json(found: Outline, costs: CostReport | None) -> dict[str, Any]:
    """Return what `print_outline` and `print_cost` show, ready for JSON.

    Args:
        found: The outline of the model.
        costs: The cost of its policy, if it has one.
    """
    rows = []
    for row in found.rows:
        cut = row.reduction
        kept = {} if cut is None else {"reduction": cut.regime, "left": row.left}
        rows.append(
            {
                "blocks": row.name,
                "module": row.module,
                "count": row.count,
                "tokens": row.tokens,
                "visual": row.visual,
                "available": not row.reason,
                "reason": row.reason,
                "scores": list(row.scores),
                **kept,
            }
        )
    sides = {} if costs is None else {"before": costs.before, "after": costs.after}
    return {
        "model": found.name,
        "family": found.family,
        "parameters": found.parameters,
        "visual_tokens": found.visual,
        "grid": list(found.grid) if all(found.grid) else None,
        "rows": rows,
        "policy": None if costs is None else json.loads(found.policy.to_json()),
        "costs": {side: dataclasses.asdict(cost) for side, cost in sides.items()} or None,
    }
