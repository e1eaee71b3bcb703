"""Where a search saves the states of its steps; a disk that fills up does not end the search."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from deos_fx.files import check_folder
from deos_fx.passes.search import processes
from deos_fx.passes.search.state import SearchState

__all__ = ["Checkpoints"]


@dataclass(frozen=True)
class Checkpoints:
    """A folder of states.

    Attributes:
        folder: The folder; each descent has one of its own in it.
        failures: What could not be written so far; shared with the folders in this one.
    """

    folder: Path
    failures: list[OSError] = field(default_factory=list)

    @classmethod
    def at(cls, folder: str | os.PathLike[str]) -> Checkpoints:
        """Return the states of a search.

        Raises:
            OSError: In all processes, if the main one cannot write the folder.
        """
        error = None
        if processes.is_main():
            try:
                check_folder(folder)
            except OSError as caught:
                error = caught
        # The other processes would wait for one that has left.
        (failed,) = processes.of_main([float(error is not None)])
        if failed:
            raise error or OSError(f"the main process cannot write the folder {folder}")
        return cls(Path(folder))

    def within(self, name: str) -> Checkpoints:
        """Return the states in a folder of this one."""
        return Checkpoints(self.folder / name, self.failures)

    def save(self, state: SearchState) -> None:
        """Write a state; if that fails, warn the first time, and go on.

        Warns:
            UserWarning: If it cannot be written.
        """
        try:
            state.save(self.folder)
        except OSError as error:
            if not self.failures:
                warnings.warn(
                    f"The search goes on, but its state cannot be saved: {error}. If it is ended "
                    "now, it will continue from an earlier state.",
                    stacklevel=2,
                )
            self.failures.append(error)
