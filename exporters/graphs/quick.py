"""Keep the optimiser of the exporter from trying every rule at every node.

onnxscript 0.7 prepares a match before it looks whether a node has the operator that a rule begins
with. For rules of several outputs it sorts all nodes of the graph each time, so the time grows with
the square of a graph: of an export of ten layers it was 12 of 56 seconds, and is 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deos_fx.replaced import replaced

__all__ = ["quick_rules"]


@contextmanager
def quick_rules() -> Iterator[None]:
    """Let rules look at the operator of a node first while inside; they match what they did."""
    from onnxscript.rewriter import RewriteRule

    # Threads that optimise other graphs get the same matches, only sooner.
    with replaced([(RewriteRule, "try_rewrite", _quick)]):
        yield


def _quick(try_rewrite: Callable[..., Any]) -> Callable[..., Any]:
    from onnxscript.rewriter._matcher import SimplePatternMatcher

    @functools.wraps(try_rewrite)
    def quick(rule: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        # The node is the first output of the pattern; None stands for any operator.
        wanted = rule._target_pattern.output_nodes[0].op_identifier()
        differs = wanted is not None and wanted[:2] != (node.domain, node.op_type)
        if differs and type(rule._matcher) is SimplePatternMatcher:
            return None
        return try_rewrite(rule, model, graph, node, **options)

    return quick
