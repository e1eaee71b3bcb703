"""The operator: pruning, merging, pooling and reweighting of visual tokens as one family.

Pure tensor functions on the visual tokens alone: no scatter, no data-dependent shape, batch
dynamic, half precision in and out. See the formulas in the modules.
"""

from __future__ import annotations

from types import FunctionType

from deos_fx.operator.assign import SIMILARITIES, dropped, nearest, similarity, soft, uniform
from deos_fx.operator.scores import SCORES, Score, combine, standardize
from deos_fx.operator.select import for_each_row, greedy, grid_anchors, grid_layout, take, top_k
from deos_fx.operator.static import StaticOutput, required_features, static_reduce
from deos_fx.operator.transfer import importance, merge, merged_mass, residual, reweight

__all__ = [
    "SCORES",
    "SIMILARITIES",
    "Score",
    "StaticOutput",
    "combine",
    "dropped",
    "for_each_row",
    "greedy",
    "grid_anchors",
    "grid_layout",
    "importance",
    "merge",
    "merged_mass",
    "nearest",
    "required_features",
    "residual",
    "reweight",
    "similarity",
    "soft",
    "standardize",
    "static_reduce",
    "take",
    "top_k",
    "uniform",
]

# The code of a graph spells out where a function lives; the public place reads best there.
for _function in [value for name, value in globals().items() if name in __all__]:
    if isinstance(_function, FunctionType):
        _function.__module__ = __name__
