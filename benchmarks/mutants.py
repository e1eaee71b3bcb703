"""Measure how many faults the tests find: change the code at random, and run the tests beside it.

    pip install mutmut
    python benchmarks/mutants.py deos_fx/operator --tests tests/operator --output operator.json

The changes are those of mutmut: numbers and operators are changed, arguments dropped, values
replaced by None, conditions turned round. Left alone are annotations, decorators, imports and
assertions, and the texts of errors and warnings, which `tests/misuse.py` compares.

pytest collects the tests once, and runs them once to see which of them touch which functions. For
each mutant a child process puts the changed code in the place of the module's, wherever it is
referred to, and runs the tests that touch it until one fails: those of the file's own name first.
No file of the code is written.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import IO, Any

import libcst as cst
import pytest
import torch
from common import conditions
from hypothesis import HealthCheck, Phase, settings
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

from deos_fx.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"passes": "deos_fx.passes", "exporters": "deos_fx.exporters"}
"""Folders that are packages of another name."""


# *** mutants ***


@dataclass(frozen=True)
class Mutant:
    """A changed file.

    Attributes:
        path: The file, from the root.
        line: Where it was changed.
        index: Its number among the mutants of the file.
        in_function: Whether it is in one; tables and fields are in none.
        before: What was there.
        after: What is there now.
    """

    path: str
    line: int
    index: int
    in_function: bool
    before: str
    after: str

    @property
    def source(self) -> str:
        """The text of the changed file."""
        return Changes(self.path).source(self.index)

    def is_of(self, tests: Path) -> bool:
        """Return whether tests have the name of the file."""
        return tests.stem.startswith(f"test_{Path(self.path).stem}")

    def __str__(self) -> str:
        before, after = (" ".join(text.split())[:90] for text in (self.before, self.after))
        return f"{self.path}:{self.line} #{self.index}: {before} -> {after}"


class Changes(cst.CSTVisitor):
    """Every change of a file."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, path: str) -> None:
        self.path = path
        self._found: list[tuple[cst.CSTNode, cst.CSTNode, int, bool]] = []
        self._functions = 0
        wrapper = MetadataWrapper(cst.parse_module((ROOT / path).read_text("utf-8")))
        self._module = wrapper.module
        wrapper.visit(self)

    def on_visit(self, node: cst.CSTNode) -> bool:
        if _is_left_alone(node):
            return False
        self._functions += isinstance(node, cst.FunctionDef)
        line = self.get_metadata(PositionProvider, node).start.line
        for kind, changes in mutation_operators:
            if isinstance(node, kind):
                # Of a string, one change: another case would be found by the same tests.
                changed = list(changes(node))[: 1 if kind is cst.BaseString else None]
                inside = self._functions > 0
                self._found += [
                    (node, new, line, inside) for new in changed if _strict(new) == _strict(node)
                ]
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        self._functions -= isinstance(original_node, cst.FunctionDef)

    def source(self, index: int) -> str:
        """Return the text of the file with one change."""
        old, new, *_ = self._found[index]
        return self._module.deep_replace(old, new).code

    def mutants(self) -> list[Mutant]:
        """Return the mutants of the file."""
        text = self._module.code_for_node
        return [
            Mutant(self.path, line, i, inside, text(old), text(new))
            for i, (old, new, line, inside) in enumerate(self._found)
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
        case cst.Call(func=cst.Name("TypeVar")) | cst.Subscript(value=cst.Name("Literal")):
            return True
        case cst.Call(func=cst.Attribute(attr=cst.Name("warn" | "warning"))):
            return True
    return _is_strict(node)


def _is_strict(node: cst.CSTNode) -> bool:
    """Return whether an argument only asserts something about lengths."""
    match node:
        case cst.Arg(keyword=cst.Name("strict")):
            return True
    return False


def _strict(node: cst.CSTNode) -> list[cst.Arg]:
    """Return the arguments of a call that only assert something about lengths."""
    return list(filter(_is_strict, node.args)) if isinstance(node, cst.Call) else []


# *** running ***


def put_in(path: str, source: str | ast.Module, **names: object) -> None:
    """Put other code in the place of a module's, wherever it is referred to; with more names."""
    first, *rest = Path(path).with_suffix("").parts
    name = ".".join([PACKAGES.get(first, first), *rest]).removesuffix(".__init__")
    module = importlib.import_module(name)
    changed = ModuleType(module.__name__)
    vars(module).update(names)
    changed.__dict__.update(__file__=module.__file__, __package__=module.__package__, **names)
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


@dataclass(frozen=True)
class Touched:
    """What a test runs of the files that are changed.

    Attributes:
        places: Path, first and last line of every function.
        seconds: CPU time of the test.
        setup: CPU time of the fixtures of its file, which the first test of a file waits for.
    """

    places: set[tuple[str, int, int]]
    seconds: float
    setup: float

    def runs(self, mutant: Mutant) -> bool:
        """Return whether the test runs the changed function; for a table, anything of its file."""
        of_file = [(first, last) for path, first, last in self.places if path == mutant.path]
        inside = any(first <= mutant.line <= last for first, last in of_file)
        return inside or (bool(of_file) and not mutant.in_function)

    @property
    def order(self) -> tuple[float, float]:
        """Return what to sort by: the cheapest first, and files with slow fixtures in one go."""
        return (self.setup if self.setup > 1 else 0.0, self.seconds)

    @property
    def limit(self) -> float:
        """Return the CPU time after which the test may never end."""
        return 10 + 10 * (self.setup + self.seconds)


class Watcher:
    """A plugin of pytest that sees what each test touches; what fixtures do counts for the file."""

    def __init__(self) -> None:
        self._seen: dict[str, set[tuple[str, int, int]]] = defaultdict(set)
        self._name = ""
        self._seconds: dict[str, float] = {}
        # Of the slowest fixtures of each file.
        self._setup: dict[Path, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        """See what the fixtures of a test run."""
        start, self._name = time.process_time(), item.path.as_posix()
        result = yield
        self._setup[item.path] = max(self._setup[item.path], time.process_time() - start)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """See what a test runs."""
        start, self._name = time.process_time(), item.nodeid
        result = yield
        self._seconds[item.nodeid] = time.process_time() - start
        return result

    def put_in(self, path: str) -> None:
        """Let every function of a module tell when it is called."""
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                first = min(each.lineno for each in (node, *node.decorator_list))
                tell = ast.parse(f"__touch__({(path, first, node.end_lineno)})").body
                node.body = [*tell, *node.body]
        put_in(path, tree, __touch__=lambda place: self._seen[self._name].add(place))

    def write(self, items: Sequence[pytest.Item], file: IO[str]) -> None:
        """Write what each test touches, by its name, as JSON."""
        found = {
            item.nodeid: (
                [*(self._seen[item.nodeid] | self._seen[item.path.as_posix()])],
                self._seconds[item.nodeid],
                self._setup[item.path],
            )
            for item in items
            if item.nodeid in self._seconds
        }
        json.dump(found, file)
        file.flush()


class Runner:
    """A plugin of pytest that runs the collected tests for every mutant."""

    def __init__(
        self, mutants: Sequence[Mutant], save: Callable[[int, Sequence[str]], None]
    ) -> None:
        self.mutants = mutants
        self.save = save

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests as they are, then for each mutant those that touch it."""
        tests = self._first_run(session)
        survivors: list[str] = []
        for done, mutant in enumerate(self.mutants, 1):
            items = [
                item
                for item in session.items
                if item.nodeid in tests
                # A test may read a table, and run nothing of its file.
                and (tests[item.nodeid].runs(mutant) or mutant.is_of(item.path))
            ]
            items.sort(key=lambda x: (not mutant.is_of(x.path), tests[x.nodeid].order))
            limits = [tests[item.nodeid].limit for item in items]
            if _passes(items, partial(put_in, mutant.path, mutant.source), limits):
                survivors.append(f"{mutant} ({len(items)} tests)")
                print("survives:", survivors[-1], flush=True)
            print(f"{done - len(survivors)} of {done} killed", flush=True)
            self.save(done, survivors)
        return True

    def _first_run(self, session: pytest.Session) -> dict[str, Touched]:
        """Return what each test touches, by its name."""
        # Every file in the place of itself: what fails then is no matter of a mutant.
        paths = {mutant.path for mutant in self.mutants}
        watcher = Watcher()
        session.config.pluginmanager.register(watcher)
        with tempfile.TemporaryFile("w+") as file:
            finish = partial(watcher.write, session.items, file)
            limits = [0.0] * len(session.items)
            passed = _passes(session.items, lambda: [*map(watcher.put_in, paths)], limits, finish)
            session.config.pluginmanager.unregister(watcher)
            file.seek(0)
            found = {
                name: Touched({(path, a, b) for path, a, b in places}, *seconds)
                for name, (places, *seconds) in json.load(file).items()
            }
            if session.testsfailed or not passed:
                last = list(found)[-1:] or "the first test"
                raise pytest.UsageError(f"{last} fails without a mutant, or a test after it")
            return found


def _passes(
    items: Sequence[pytest.Item],
    prepare: Callable[[], object],
    limits: Sequence[float],
    finish: Callable[[], None] = lambda: None,
) -> bool:
    """Return whether tests pass in a process of their own.

    Args:
        items: The tests.
        prepare: Changes the code in that process.
        limits: CPU time of each test after which it counts as failed, since it may never end; 0
            for none.
        finish: What to do in that process at the end.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    code = 1
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        prepare()
        code = any(map(_fails, items, [*items[1:], None], limits))
        finish()
    finally:
        os._exit(code)


def _fails(item: pytest.Item, following: pytest.Item | None, limit: float) -> bool:
    from _pytest.runner import runtestprotocol

    # The signal ends the process.
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    # Case: it waits for ever.
    signal.alarm(round(20 * limit))
    return any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


# *** the command ***


def main() -> None:
    """Run mutants, and print those that survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="files and folders, from the root")
    parser.add_argument("--tests", nargs="+", required=True, help="their tests, as for pytest")
    parser.add_argument("--sample", type=int, help="how many mutants, drawn at random; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="where the results go, as JSON")
    given = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    # Neither random order nor several workers.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # No test fails because the machine is busy, and none looks for a simpler example.
    settings.register_profile(
        "mutants",
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    settings.load_profile("mutants")
    mutants = [mutant for path in _files(given.paths) for mutant in Changes(path).mutants()]
    # A larger sample of the same seed begins with a smaller one.
    random.Random(given.seed).shuffle(mutants)
    print(f"{len(mutants)} mutants", flush=True)

    said = conditions("mutants", {"mutants": len(mutants)}, torch.device("cpu"))

    def save(done: int, survivors: Sequence[str]) -> None:
        killed = done - len(survivors)
        found = {"tried": done, "killed": killed, "interval_95": _interval(killed, done)}
        results = said | found | {"survivors": survivors}
        write_text(given.output, json.dumps(results, indent=1) + "\n")

    options = ["-q", "-s", "-p", "no:cacheprovider"]
    runner = Runner(mutants[: given.sample], save)
    sys.exit(pytest.main([*options, *given.tests], [runner]))


def _files(paths: Sequence[str]) -> list[str]:
    found = [
        file
        for path in paths
        for file in ([Path(path)] if path.endswith(".py") else sorted(Path(path).rglob("*.py")))
    ]
    return [file.as_posix() for file in found]


def _interval(killed: int, done: int) -> list[float]:
    """Return Wilson's interval of 95 % of the share of mutants that are killed."""
    z, share = 1.96, killed / done
    middle = share + z * z / (2 * done)
    half = z * math.sqrt(share * (1 - share) / done + z * z / (4 * done * done))
    return [round((middle + sign * half) / (1 + z * z / done), 3) for sign in (-1, 1)]


if __name__ == "__main__":
    main()
