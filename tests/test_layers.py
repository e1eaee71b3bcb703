"""The house has floors: CONTRIBUTING lists the rooms from the ground up, and no import climbs.

Imports in functions and for types count. import-linter would follow the links `deos_fx/passes` and
`deos_fx/exporters` only in an installed package; reading the files needs none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"deos_fx": "deos_fx", "passes": "deos_fx.passes", "exporters": "deos_fx.exporters"}


def module_of(path: Path) -> str:
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *parts]).removesuffix(".__init__")


def source_files() -> dict[str, Path]:
    """Module name -> file. The two links are not followed."""
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    real = (path for path in found if path.resolve() == path)
    return {module_of(path): path for path in real}


FILES = source_files()
# Files of the root that stand above all rooms but the command line.
TOP = ("__init__.py", "api.py", "reduced_model.py")


def imports_of(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, wherever and for whatever."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in FILES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def rooms() -> list[str]:
    """The folders in the table of CONTRIBUTING, from the ground up."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| room |")[1]
    return re.findall(r"^\| `([^`]+)/` \|", table.split("\n\n")[0], flags=re.M)


def room_of(path: Path) -> str:
    """The room a file is in: its package, or of the rooms that hold others, the outermost."""
    parts = path.relative_to(ROOT).parts
    if parts[0] != "deos_fx":
        return parts[0]
    if len(parts) > 2:
        return "/".join(parts[:2])
    if path.name == "__main__.py":
        return "deos_fx/cli"
    return "deos_fx (top)" if path.name in TOP else "deos_fx"


def test_every_file_is_in_a_room() -> None:
    found = {room_of(path) for path in FILES.values()} - {"deos_fx (top)"}
    assert found == set(rooms())


def test_nothing_imports_from_a_room_above() -> None:
    floors = {room: floor for floor, room in enumerate(rooms())}
    floors["deos_fx/cli"] += 1
    floors["deos_fx (top)"] = floors["deos_fx/cli"] - 1
    climbing = [
        f"{module} imports {name}"
        for module, path in FILES.items()
        for name in imports_of(path)
        if name in FILES and floors[room_of(FILES[name])] > floors[room_of(path)]
    ]
    assert climbing == []


def test_no_imports_go_in_circles() -> None:
    graph = nx.DiGraph(
        (module, name)
        for module, path in FILES.items()
        for name in imports_of(path)
        if name in FILES and name != module
    )
    # The face of the package has every public name, for type checkers.
    graph.remove_node("deos_fx")
    circles = [sorted(circle) for circle in nx.strongly_connected_components(graph)]
    assert [circle for circle in circles if len(circle) > 1] == []


TESTS = ROOT / "tests"


def test_tests_mirror_the_rooms() -> None:
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    # Random cases go through all rooms.
    assert folders == {room.split("/")[-1] for room in rooms()} - {"deos_fx"} | {".", "fuzz"}


def test_every_pass_is_tested_among_the_passes() -> None:
    tests = (TESTS / "passes").glob("test_*.py")
    tested = {name for path in tests for name in imports_of(path)}
    subrooms = ("analyse", "capture", "lower", "observe", "rewrite", "search")
    passes = {
        name for name in FILES if name.startswith(tuple(f"deos_fx.passes.{r}." for r in subrooms))
    }
    assert passes - tested == set()
