"""Rules of the exporter's optimiser do the same when they look at operators first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import onnx_ir
import pytest
from onnxscript.rewriter import RewriteRule, pattern

from deos_fx.exporters.graphs.quick import quick_rules

MODEL = """
<ir_version: 10, opset_import: ["" : 20]>
agraph (float[4] x, float[4] y) => (float[4] a, float[4] b, float[4] c)
{
    s = Neg(x)
    t = Neg(s)
    u = Add(t, y)
    v = Abs(u)
    w = Exp(u)
    a = Neg(v)
    b = Sub(w, v)
    c = Sub(v, w)
}
"""


def _twice(op: Any, x: Any) -> Any:
    return op.Neg(op.Neg(x))


def _pair(op: Any, x: Any) -> Any:
    return op.Abs(x), op.Exp(x)


def _prefixed(op: Any, x: Any, y: Any) -> Any:
    return pattern.OpsetPatternBuilder("").submodule("S")(x, y, _allow_other_attributes=True)


RULES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "one output": (_twice, lambda op, x: op.Identity(x)),
    "two outputs": (_pair, lambda op, x: (op.Sin(x), op.Cos(x))),
    "any operator of a prefix": (_prefixed, lambda op, x, y: op.Mul(x, y)),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_match_what_they_did(name: str) -> None:
    found = []
    for context in (contextlib.nullcontext, quick_rules):
        model = onnx_ir.from_onnx_text(MODEL)
        rules = pattern.RewriteRuleSet([pattern.RewriteRule(*RULES[name])])
        with context():
            count = rules.apply_to_model(model)
        found.append((count, [node.op_type for node in model.graph]))
    assert found[0] == found[1] and found[0][0] > 0


def test_rules_are_put_back() -> None:
    own = RewriteRule.try_rewrite
    with quick_rules():
        assert RewriteRule.try_rewrite is not own
    assert RewriteRule.try_rewrite is own
