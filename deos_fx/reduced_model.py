"""`ReducedModel` under the name of its former module, which scripts and bug reports import."""

from __future__ import annotations

from deos_fx.runtime.reduced_model import ReducedModel

__all__ = ["ReducedModel"]
