"""The state of a search's gradient steps: saved without pickle and resumed bit-identically."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from deos_fx.checkpoint import check_tensors, load_optimizer, optimizer_tensors
from deos_fx.contents import file_hash, own_hash
from deos_fx.files import write_tensors, write_text
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.passes.search.objective import AugmentedLagrangian
from deos_fx.reading import read_record, read_tensors
from deos_fx.words import counted

if TYPE_CHECKING:
    from deos_fx.passes.search.schema import SearchFile

__all__ = ["RECORD", "RECORD_BYTES", "SearchState"]

# The record of a state, and its largest size: a step takes less than a kilobyte.
RECORD, RECORD_BYTES = "search.json", 2**28
# The files of tensors; there may be others of similar names in the folder.
_STATE = re.compile(r"step-[0-9]{1,9}\.safetensors")
# Learning rates: of scalars; of the weights of scores, which soft gates would otherwise lead astray
# before the rest has learned; of directions of width d, so that a step moves a score by as much at
# every width; and of the directions that a similarity compares, which start at their full length.
_SCALARS, _WEIGHTS, _DIRECTIONS, _METRIC = 0.05, 0.02, 0.1, 0.005


@dataclass
class SearchState:
    """Everything that changes from step to step.

    Attributes:
        reductions: Site, with an underscore for the dot -> relaxed reduction.
        optimizer: AdamW over the parameters that are trained.
        lagrangian: The constraints and their multipliers.
        settings: Settings that must equal those of a checkpoint for it to be continued.
        history: One dict for each step taken.
        best: The parameters with the lowest static loss so far, by name.
        best_loss: That loss.
        best_step: The number of steps after which it was measured.
    """

    reductions: nn.ModuleDict
    optimizer: torch.optim.AdamW
    lagrangian: AugmentedLagrangian
    settings: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = math.inf
    best_step: int = 0

    @classmethod
    def start(
        cls,
        reductions: Mapping[str, RelaxedReduction],
        lagrangian: AugmentedLagrangian,
        settings: dict[str, Any],
    ) -> SearchState:
        """Make the state before the first step.

        Args:
            reductions: Site -> relaxed reduction.
            lagrangian: The constraints.
            settings: Settings that a checkpoint must agree with.

        Returns:
            The state.
        """
        # Module names cannot hold dots.
        modules = nn.ModuleDict({_key(site): module for site, module in reductions.items()})
        groups = [
            {"params": [parameter], "full_rate": _rate(name, parameter)}
            for name, parameter in modules.named_parameters()
            if parameter.requires_grad
        ]
        optimizer = torch.optim.AdamW(groups, lr=_SCALARS, weight_decay=0.0)
        return cls(modules, optimizer, lagrangian, settings)

    @property
    def step(self) -> int:
        """Return the number of steps taken."""
        return len(self.history)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained."""
        return [parameter for parameter in self.reductions.parameters() if parameter.requires_grad]

    @property
    def directions(self) -> list[nn.Parameter]:
        """Return the learned parts among them."""
        named = self.reductions.named_parameters()
        return [parameter for name, parameter in named if ".learned." in name]

    def by_site(self) -> dict[str, RelaxedReduction]:
        """Return site -> relaxed reduction."""
        modules = cast("Mapping[str, RelaxedReduction]", self.reductions)
        return {_site(key): module for key, module in modules.items()}

    def consider(self, loss: float) -> None:
        """Keep a copy of the present parameters if their static loss is the lowest so far."""
        # The first are kept even if their loss is infinite.
        if loss < self.best_loss or not self.best:
            values = self.reductions.state_dict()
            best = {name: value.detach().clone() for name, value in values.items()}
            self.best, self.best_loss, self.best_step = best, loss, self.step

    def take_best(self) -> None:
        """Load the parameters with the lowest static loss."""
        if self.best:
            self.reductions.load_state_dict(self.best)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the state to a folder; each file is written under a temporary name and renamed.

        Args:
            folder: The folder; it is made if it does not exist.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        # Prefixes: ``now/`` and ``best/`` for parameters, ``adam/`` for moments.
        tensors = {f"now/{name}": value for name, value in self.reductions.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        moments = optimizer_tensors(self.optimizer)
        tensors |= {f"adam/{name}": value for name, value in moments.items()}
        # The file of tensors is named by step, so a kill between the two files leaves the earlier
        # pair.
        name = f"step-{self.step}.safetensors"
        write_tensors(path / name, tensors)
        record: dict[str, Any] = {
            "deos_fx": "search",
            "version": 2,
            "tensors": name,
            "sha256": file_hash(path / name),
            # What a search must have in common with this one to continue it.
            "settings": self.settings,
            "multipliers": self.lagrangian.multipliers,
            "best_loss": self.best_loss if self.best_loss < math.inf else None,
            "best_step": self.best_step,
            "history": self.history,
        }
        # Tuples of the settings are lists in a file.
        record["record"] = own_hash(json.loads(json.dumps(record)), "record")
        write_text(path / RECORD, json.dumps(record, indent=1))
        # Only now is no record left that names the earlier file.
        for old in path.iterdir():
            if _STATE.fullmatch(old.name) and old.name != name:
                old.unlink()

    def resume(self, folder: str | os.PathLike[str]) -> None:
        """Continue from a folder, if there is a state in it.

        Args:
            folder: As given to `save`.

        Raises:
            OSError: If the file of its tensors is missing.
            ValueError: If it is not the state of this search, or damaged.
        """
        from deos_fx.passes.search.schema import SearchFile

        path = Path(folder) / RECORD
        if not path.exists():
            return
        cure = "Give another checkpoint folder, or delete this one"
        record = read_record(path, SearchFile, "the state of a search", f"{cure}.", RECORD_BYTES)
        # Through JSON, because that turns tuples into lists.
        if record.settings != json.loads(json.dumps(self.settings)):
            raise ValueError(
                f"{os.fspath(folder)} holds another search (other model, data, budget, steps or "
                f"seed). {cure}."
            )
        file = path.parent / record.tensors
        # Earlier versions wrote no hash.
        if record.sha256 not in (None, file_hash(file)):
            raise ValueError(f"{file} is damaged: it is not the file that was written. {cure}.")
        tensors = read_tensors(file)
        try:
            self._take(record, tensors)
        except ValueError as error:
            raise ValueError(f"{path} does not go with its tensors: {error}. {cure}.") from error

    def _take(self, record: SearchFile, tensors: Mapping[str, Tensor]) -> None:
        """Take over what was saved.

        Raises:
            ValueError: If it does not fit this state, or its parts do not fit each other.
        """
        if record.multipliers.keys() != self.lagrangian.multipliers.keys():
            raise ValueError(f"its multipliers are those of {', '.join(record.multipliers)}")
        if min(record.multipliers.values(), default=0) < self.lagrangian.least:
            raise ValueError(f"a multiplier is negative: {record.multipliers}")
        # Split the names at their prefixes again.
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "adam": {}}
        for name, value in tensors.items():
            head, _, rest = name.partition("/")
            if head not in parts:
                raise ValueError(f"there is a tensor {name!r}")
            parts[head][rest] = value
        # Adam has counted the steps that moved something, for every parameter.
        moved = sum(entry.finite for entry in record.history)
        steps = [x for name, x in parts["adam"].items() if name.endswith("/step")]
        counts = [count for x in steps for count in x.flatten().tolist()]
        if counts != [moved] * (len(self.parameters) if moved else 0):
            raise ValueError(
                f"its history has {counted(moved, 'step')}, and its optimizer {counts}"
            )
        like = self.reductions.state_dict()
        check_tensors("the present state", parts["now"], like)
        check_tensors("the best state", parts["best"], like if parts["best"] else {})
        load_optimizer(self.optimizer, parts["adam"])
        self.reductions.load_state_dict(parts["now"])
        self.best = parts["best"]
        if self.best:
            # JSON has no infinity.
            loss = record.best_loss
            self.best_loss, self.best_step = math.inf if loss is None else loss, record.best_step
        self.history = [entry.model_dump(exclude_unset=True) for entry in record.history]
        self.lagrangian.multipliers = dict(record.multipliers)


def _rate(name: str, parameter: Tensor) -> float:
    """Return the full learning rate of a parameter."""
    *_, kind, part = ("", *name.split("."))
    if kind != "learned":
        return _WEIGHTS if part == "scores" else _SCALARS
    return _METRIC if part == "metric" else _DIRECTIONS / math.sqrt(parameter.shape[0])


def _key(site: str) -> str:
    """Return the name of the module of a site."""
    return site.replace(".", "_")


def _site(key: str) -> str:
    """Return the site of a module with this name."""
    return key.replace("_", ".")
