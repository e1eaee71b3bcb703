"""Measure how many faults the tests find: change the code at random, and run the tests beside it.

    pip install mutmut
    .venv/bin/python benchmarks/mutants.py deos_fx/operator --tests tests/operator --sample 100

The changes are those of mutmut: numbers and operators are changed, arguments dropped, values
replaced by None, conditions turned round. Left alone are annotations, decorators, imports and
assertions, and the texts of errors and warnings, which `tests/misuse.py` compares.

pytest collects the tests once. For each mutant a child process puts the changed code in the place
of the module's, wherever it is referred to, and runs the tests until one fails: those of the file's
own name first. No file is written.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import os
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import libcst as cst
import pytest
from hypothesis import HealthCheck, settings
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"passes": "deos_fx.passes", "exporters": "deos_fx.exporters"}
"""Folders that are packages of another name."""
SECONDS = 300
"""CPU time after which a mutant counts as one that does not end."""


# *** mutants ***


@dataclass(frozen=True)
class Mutant:
    """A changed file.

    Attributes:
        path: The file, from the root.
        line: Where it was changed.
        index: Its number among the mutants of the file.
        before: What was there.
        after: What is there now.
    """

    path: str
    line: int
    index: int
    before: str
    after: str

    @property
    def source(self) -> str:
        """The text of the changed file."""
        return Changes(self.path).source(self.index)

    def __str__(self) -> str:
        before, after = (" ".join(text.split())[:90] for text in (self.before, self.after))
        return f"{self.path}:{self.line} #{self.index}: {before} -> {after}"


class Changes(cst.CSTVisitor):
    """Every change of a file."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, path: str) -> None:
        self.path = path
        self._found: list[tuple[cst.CSTNode, cst.CSTNode, int]] = []
        wrapper = MetadataWrapper(cst.parse_module((ROOT / path).read_text("utf-8")))
        self._module = wrapper.module
        wrapper.visit(self)

    def on_visit(self, node: cst.CSTNode) -> bool:
        if _is_left_alone(node):
            return False
        line = self.get_metadata(PositionProvider, node).start.line
        for kind, changes in mutation_operators:
            if isinstance(node, kind):
                # Of a string, one change: another case would be found by the same tests.
                changed = list(changes(node))[: 1 if kind is cst.BaseString else None]
                self._found += [(node, new, line) for new in changed]
        return True

    def source(self, index: int) -> str:
        """Return the text of the file with one change."""
        old, new, _ = self._found[index]
        return self._module.deep_replace(old, new).code

    def mutants(self) -> list[Mutant]:
        """Return the mutants of the file."""
        text = self._module.code_for_node
        return [
            Mutant(self.path, line, i, text(old), text(new))
            for i, (old, new, line) in enumerate(self._found)
        ]


def _is_left_alone(node: cst.CSTNode) -> bool:
    match node:
        case cst.Annotation() | cst.Raise() | cst.Assert() | cst.Decorator():
            return True
        case cst.Import() | cst.ImportFrom():
            return True
        case cst.If(test=cst.Name("TYPE_CHECKING")):
            return True
        case cst.Assign(targets=[cst.AssignTarget(cst.Name("__all__"))]):
            return True
        case cst.Call(func=cst.Name("TypeVar")):
            return True
        case cst.Call(func=cst.Attribute(attr=cst.Name("warn" | "warning"))):
            return True
        case cst.Arg(keyword=cst.Name("strict")):
            # Case: an assertion about lengths.
            return True
    return False


# *** running ***


def put_in(path: str, source: str) -> None:
    """Put other code in the place of a module's, wherever it is referred to."""
    first, *rest = Path(path).with_suffix("").parts
    name = ".".join([PACKAGES.get(first, first), *rest]).removesuffix(".__init__")
    module = importlib.import_module(name)
    changed = ModuleType(module.__name__)
    changed.__dict__.update(__file__=module.__file__, __package__=module.__package__)
    exec(compile(source, str(module.__file__), "exec", dont_inherit=True), changed.__dict__)
    for name, new in vars(changed).items():
        old = vars(module).get(name)
        if name.startswith("__") or new is old:
            continue
        if isinstance(new, type) and isinstance(old, type):
            for part, method in vars(new).items():
                _take_code(vars(old).get(part), method)
        elif not _take_code(old, new):
            # Case: a value, such as a table.
            for other in [*sys.modules.values()]:
                for at, value in [*getattr(other, "__dict__", {}).items()]:
                    if value is old:
                        setattr(other, at, new)


def _take_code(old: Any, new: Any) -> bool:
    """Let a function do what another one does; return whether both are functions."""
    for part in ("fget", "__func__"):
        # Case: a property, or a method of the class.
        old, new = getattr(old, part, old), getattr(new, part, new)
    old, new = (inspect.unwrap(x) if callable(x) else x for x in (old, new))
    if not isinstance(old, FunctionType) or not isinstance(new, FunctionType):
        return False
    if len(old.__code__.co_freevars) == len(new.__code__.co_freevars):
        old.__code__ = new.__code__
        old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
    return True


class Runner:
    """A plugin of pytest that runs the collected tests for every mutant."""

    def __init__(self, mutants: Sequence[Mutant]) -> None:
        self.mutants = mutants

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests as they are, then for each mutant, and print those that survive."""
        # Every file in the place of itself: what fails then is no matter of a mutant.
        files = {mutant.path: (ROOT / mutant.path).read_text("utf-8") for mutant in self.mutants}
        if session.testsfailed or not self._passes(session.items, files):
            raise pytest.UsageError("there are failures without a mutant")
        killed = 0
        for done, mutant in enumerate(self.mutants, 1):
            own = f"test_{Path(mutant.path).stem}"
            items = sorted(session.items, key=lambda item: item.path.stem != own)
            if self._passes(items, {mutant.path: mutant.source}):
                print(f"survives: {mutant}", flush=True)
            else:
                killed += 1
            print(f"{killed} of {done} killed, {_interval(killed, done)}", flush=True)
        return True

    def _passes(self, items: Sequence[pytest.Item], files: Mapping[str, str]) -> bool:
        """Return whether tests pass with other texts of files, in a process of their own."""
        child = os.fork()
        if child:
            return os.waitpid(child, 0)[1] == 0
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            # Case: it waits for ever.
            signal.alarm(20 * SECONDS)
            for path, source in files.items():
                put_in(path, source)
            code = any(map(_fails, items, [*items[1:], None]))
        finally:
            os._exit(code)


def _fails(item: pytest.Item, following: pytest.Item | None) -> bool:
    from _pytest.runner import runtestprotocol

    return any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


# *** the command ***


def main() -> None:
    """Run mutants, and print those that survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="files and folders, from the root")
    parser.add_argument("--tests", nargs="+", required=True, help="their tests, as for pytest")
    parser.add_argument("--sample", type=int, help="how many mutants, drawn at random; default all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Neither random order nor several workers.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # No test fails because the machine is busy.
    settings.register_profile(
        "mutants", deadline=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    settings.load_profile("mutants")
    mutants = [mutant for path in _files(given.paths) for mutant in Changes(path).mutants()]
    # A larger sample of the same seed begins with a smaller one.
    random.Random(given.seed).shuffle(mutants)
    print(f"{len(mutants)} mutants", flush=True)
    options = ["-q", "-s", "-p", "no:cacheprovider"]
    sys.exit(pytest.main([*options, *given.tests], [Runner(mutants[: given.sample])]))


def _files(paths: Sequence[str]) -> list[str]:
    found = [
        file
        for path in paths
        for file in ([Path(path)] if path.endswith(".py") else sorted(Path(path).rglob("*.py")))
    ]
    return [file.as_posix() for file in found]


def _interval(killed: int, done: int) -> str:
    """Return the share of mutants that are killed, with Wilson's interval of 95 %."""
    z, share = 1.96, killed / done
    middle = share + z * z / (2 * done)
    half = z * math.sqrt(share * (1 - share) / done + z * z / (4 * done * done))
    low, high = ((middle + sign * half) / (1 + z * z / done) for sign in (-1, 1))
    return f"{share:.0%} ({low:.0%} to {high:.0%})"


if __name__ == "__main__":
    main()
