"""Keep the optimiser of the exporter from rounding the constants of a model.

onnxscript 0.7 drops what it takes for nothing: an addition of 0, a product with 1. Its rules
compare with tolerances (`onnxscript.rewriter._pattern_ir.Constant`: 1e-8, and 1e-5 of the value),
so the 1e-8 of a norm counts as 0, and a token whose features are all 0 becomes NaN (MuseGlimmer, in
padding).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deos_fx.replaced import replaced

__all__ = ["exact_constants"]


@contextmanager
def exact_constants() -> Iterator[None]:
    """Let these rules apply to exactly 0 and 1 while inside."""
    from onnxscript.rewriter._pattern_ir import Constant
    from onnxscript.rewriter.rules.common import _no_op

    constants = [
        given
        for rule in _no_op.rules.rules
        for node in rule._target_pattern._nodes
        for given in node.inputs
        if isinstance(given, Constant)
    ]
    tolerances = ("_rel_tol", "_abs_tol")
    # All threads may have exact rules meanwhile: they change no graph for the worse.
    with replaced((each, name, lambda _: 0.0) for each in constants for name in tolerances):
        yield
