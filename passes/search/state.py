"""The state of a search's gradient steps: saved without pickle and resumed bit-identically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deos_fx.checkpoint import load_optimizer, optimizer_tensors
from deos_fx.files import write_file, write_text
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.passes.search.objective import AugmentedLagrangian

__all__ = ["SearchState"]

_LEARNING_RATE = 0.1
# Adam's epsilon. It is large, so that a parameter with a negligible gradient stays where it is. The
# default would move it as fast as any other, and dormant sites would drift into the policy.
_EPSILON = 0.1


@dataclass
class SearchState:
    """Everything that changes from step to step.

    Attributes:
        reductions: Site, with an underscore for the dot -> relaxed reduction.
        optimizer: Adam over all their parameters.
        lagrangian: The constraints and their multipliers.
        settings: Settings that must equal those of a checkpoint for it to be continued.
        history: One dict for each step taken.
        snapshots: Step -> parameters after it, to be rounded later.
    """

    reductions: nn.ModuleDict
    optimizer: torch.optim.Adam
    lagrangian: AugmentedLagrangian
    settings: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    snapshots: dict[int, dict[str, Tensor]] = field(default_factory=dict)

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
        optimizer = torch.optim.Adam(modules.parameters(), lr=_LEARNING_RATE, eps=_EPSILON)
        return cls(modules, optimizer, lagrangian, settings)

    @property
    def step(self) -> int:
        """Return the number of steps taken."""
        return len(self.history)

    def by_site(self) -> dict[str, RelaxedReduction]:
        """Return site -> relaxed reduction."""
        modules = cast("Mapping[str, RelaxedReduction]", self.reductions)
        return {_site(key): module for key, module in modules.items()}

    def take_snapshot(self) -> None:
        """Store a copy of the present parameters under the present step."""
        self.snapshots[self.step] = {
            name: value.detach().clone() for name, value in self.reductions.state_dict().items()
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the state to a folder; each file is written under a temporary name and renamed.

        Args:
            folder: The folder; it is made if it does not exist.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        # Prefixes: ``now/`` for the present parameters, the step for a snapshot, ``adam/`` for
        # moments.
        tensors = {f"now/{name}": value for name, value in self.reductions.state_dict().items()}
        for step, parameters in self.snapshots.items():
            tensors |= {f"{step}/{name}": value for name, value in parameters.items()}
        moments = optimizer_tensors(self.optimizer)
        tensors |= {f"adam/{name}": value for name, value in moments.items()}
        # The file of tensors is named by step, so a kill between the two files leaves the earlier
        # pair.
        name = f"step-{self.step}.safetensors"
        write_file(path / name, lambda part: save_file(tensors, part))
        record = {
            "deos_fx": "search",
            "version": 1,
            "tensors": name,
            # What a search must have in common with this one to continue it.
            "settings": self.settings,
            "multipliers": self.lagrangian.multipliers,
            "history": self.history,
        }
        write_text(path / "search.json", json.dumps(record, indent=1))
        # Only now is no record left that names the earlier files.
        for old in path.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink()

    def resume(self, folder: str | os.PathLike[str]) -> None:
        """Continue from a folder, if there is a state in it.

        Args:
            folder: As given to `save`.

        Raises:
            ValueError: If it is not the state of this search.
        """
        path = Path(folder) / "search.json"
        if not path.exists():
            return
        record = _read(path)
        # Through JSON, because that turns tuples into lists.
        if record["settings"] != json.loads(json.dumps(self.settings)):
            raise ValueError(
                f"{os.fspath(folder)} holds another search (other model, data, budget, steps or "
                "seed). Give another checkpoint folder, or delete this one."
            )
        tensors = load_file(path.parent / record["tensors"])
        # Split the names at their prefixes again.
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            head, _, rest = name.partition("/")
            parts.setdefault(head, {})[rest] = value
        self.reductions.load_state_dict(parts.pop("now"))
        # Before the first step, Adam has no moments.
        load_optimizer(self.optimizer, parts.pop("adam", {}))
        self.snapshots = {int(step): parameters for step, parameters in parts.items()}
        self.history = record["history"]
        self.lagrangian.multipliers = record["multipliers"]


def _key(site: str) -> str:
    """Return the name of the module of a site."""
    return site.replace(".", "_")


def _site(key: str) -> str:
    """Return the site of a module with this name."""
    return key.replace("_", ".")


def _read(path: Path) -> dict[str, Any]:
    """Read and check the record of a state.

    Raises:
        ValueError: If it is damaged, something else or of another version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not the state of a search: {error}") from error
    if not isinstance(record, dict) or record.get("deos_fx") != "search":
        raise ValueError(f"{path} is not the state of a search; give another checkpoint folder.")
    if record.get("version") != 1:
        raise ValueError(f"{path} has version {record.get('version')!r}; this release reads 1.")
    return record
