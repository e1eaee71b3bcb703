"""The operator: pruning, merging, pooling and reweighting of visual tokens as one family.

All functions are pure, and take tensors of visual tokens alone. They need no scatter-add and no
shapes that depend on data. The batch may be dynamic, and half precision goes in and comes out. The
formulas are in the modules.
"""

from __future__ import annotations

from types import FunctionType

from deos_fx.operator.assign import (
    SIMILARITIES,
    between_halves,
    centred,
    k_nearest,
    nearest,
    similarity,
    soft,
    standing_in,
    uniform,
)
from deos_fx.operator.gather import chosen, for_each_row, in_order, others, take, with_last
from deos_fx.operator.grid import columns, grid_anchors, grid_layout, interpolation, window_members
from deos_fx.operator.scores import SCORES, Score, combine, standardize
from deos_fx.operator.select import (
    SELECTORS,
    Selector,
    bipartite,
    favour,
    lattice,
    neighbourhood,
    quota,
    second_half,
    strided,
    top_k,
    windows,
)
from deos_fx.operator.sequential import coverage, determinantal, distinct, greedy, max_min, probe
from deos_fx.operator.transfer import (
    importance,
    merge,
    merged_mass,
    own_part,
    rest,
    rest_beside,
    reweight,
    slot_of,
    with_class,
)

__all__ = [
    "SCORES",
    "SELECTORS",
    "SIMILARITIES",
    "Score",
    "Selector",
    "between_halves",
    "bipartite",
    "centred",
    "chosen",
    "columns",
    "combine",
    "coverage",
    "determinantal",
    "distinct",
    "favour",
    "for_each_row",
    "greedy",
    "grid_anchors",
    "grid_layout",
    "importance",
    "in_order",
    "interpolation",
    "k_nearest",
    "lattice",
    "max_min",
    "merge",
    "merged_mass",
    "nearest",
    "neighbourhood",
    "others",
    "own_part",
    "probe",
    "quota",
    "rest",
    "rest_beside",
    "reweight",
    "second_half",
    "similarity",
    "slot_of",
    "soft",
    "standing_in",
    "standardize",
    "strided",
    "take",
    "top_k",
    "uniform",
    "window_members",
    "windows",
    "with_class",
    "with_last",
]

# The printed code of a graph names a function's module; the public one is the easiest to read.
for _function in [value for name, value in globals().items() if name in __all__]:
    if isinstance(_function, FunctionType):
        _function.__module__ = __name__
