"""Published methods as policies, fitted to a model and a budget, with their options tuned.

Every preset is a plain policy of the one operator; lowering and export know nothing of presets.
`list` gives the source of each. Methods that are not presets, and why:

- SparseVLM (version 1.5) merges what it drops into clusters whose ties are broken by random noise.
- ATS and the outlier counts of PruMerge keep a number of tokens that depends on the image.
- TokenPacker, Q-Former and pixel shuffling have trained weights or change the number of channels:
  they are parts of a model, not reductions of its tokens.
- DynamicViT, AdaViT and SPViT need predictors that are trained with the model.
"""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING

from deos_fx.deferred import deferred
from deos_fx.presets.catalogue import CATALOGUE, Method
from deos_fx.presets.decoder import dart, fastv, fitprune, pyramid_drop, sparsevlm_plus
from deos_fx.presets.projector import (
    avg_pool,
    bilinear_pool,
    cdpruner,
    divprune,
    holov,
    merge,
    random,
    redistribute,
    uniform,
    vscan,
)
from deos_fx.presets.tower import (
    evit,
    fastervlm,
    hiprune,
    prumerge,
    prumerge_plus,
    tome,
    visionzip,
    vispruner,
)

if TYPE_CHECKING:
    from deos_fx.presets.fitting import fit, mean_visual_tokens, options
    from deos_fx.presets.rule import Option
    from deos_fx.presets.tuning import Tuned, tune

__all__ = [
    "CATALOGUE",
    "Method",
    "Option",
    "Tuned",
    "avg_pool",
    "bilinear_pool",
    "cdpruner",
    "dart",
    "divprune",
    "evit",
    "fastervlm",
    "fastv",
    "fit",
    "fitprune",
    "hiprune",
    "holov",
    "list",
    "mean_visual_tokens",
    "merge",
    "names",
    "options",
    "prumerge",
    "prumerge_plus",
    "pyramid_drop",
    "random",
    "redistribute",
    "sparsevlm_plus",
    "tome",
    "tune",
    "uniform",
    "visionzip",
    "vispruner",
    "vscan",
]


# Fitting and tuning need torch, for which a list of the presets does not wait.
__getattr__ = deferred(
    __name__,
    {
        "Option": "rule",
        "Tuned": "tuning",
        "fit": "fitting",
        "mean_visual_tokens": "fitting",
        "options": "fitting",
        "tune": "tuning",
    },
)


def list() -> builtins.list[Method]:
    """List all presets with their sources, licences and needs, sorted by name."""
    return [CATALOGUE[name] for name in sorted(CATALOGUE)]


def names() -> builtins.list[str]:
    """List the names of all presets."""
    return sorted(CATALOGUE)
