"""The two root folders are part of the package, and pyproject.toml lists what is in the tree."""

import importlib
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def packages_in(folder: Path, name: str) -> set[str]:
    """The package in a folder and the packages below it; links are not followed."""
    found = {name} if any(folder.glob("*.py")) else set()
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink() and child.name != "__pycache__":
            found |= packages_in(child, f"{name}.{child.name}")
    return found


def test_package_list_equals_the_tree():
    tree = (
        packages_in(ROOT / "deos_fx", "deos_fx")
        | packages_in(ROOT / "passes", "deos_fx.passes")
        | packages_in(ROOT / "exporters", "deos_fx.exporters")
    )
    assert sorted(SETUPTOOLS["packages"]) == sorted(tree)


def test_every_package_has_an_init_file():
    folders = SETUPTOOLS["package-dir"]
    for package in SETUPTOOLS["packages"]:
        root = max((name for name in folders if package.startswith(name)), key=len)
        below = package.removeprefix(root).strip(".").replace(".", "/")
        assert (ROOT / folders[root] / below / "__init__.py").is_file(), package


@pytest.mark.parametrize("name", ["passes", "exporters"])
def test_root_folder_imports_as_subpackage(name):
    module = importlib.import_module(f"deos_fx.{name}")
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py"


@pytest.mark.parametrize("name", ["passes", "exporters"])
def test_link_is_committed_as_a_relative_link(name):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--stage", "--", f"deos_fx/{name}"]
    line = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    mode, blob = line.split()[:2]
    assert stat.S_ISLNK(int(mode, 8))
    command = ["git", "cat-file", "blob", blob]
    target = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert target == f"../{name}"


def test_package_data_exists():
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        for pattern in patterns:
            assert any(folder.glob(pattern)), f"no file of {package} matches {pattern}"


@pytest.mark.parametrize(
    ("platform", "machine"),
    [
        ("linux", "x86_64"),
        ("linux", "aarch64"),
        ("linux", "riscv64"),
        ("win32", "AMD64"),
        ("win32", "ARM64"),
        ("darwin", "arm64"),
        ("darwin", "x86_64"),
    ],
)
def test_exactly_one_onnxruntime_on_every_platform(platform, machine):
    has_gpu_wheel = (platform, machine) in {
        ("linux", "x86_64"),
        ("linux", "aarch64"),
        ("win32", "AMD64"),
    }
    environment = {"sys_platform": platform, "platform_machine": machine}
    requirements = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    chosen = [
        requirement.name
        for requirement in requirements
        if requirement.name.startswith("onnxruntime")
        and Marker(str(requirement.marker)).evaluate(environment)
    ]
    assert chosen == ["onnxruntime-gpu" if has_gpu_wheel else "onnxruntime"]


def test_every_dependency_is_bounded_on_both_sides():
    project = PROJECT["project"]
    for text in sum(project["optional-dependencies"].values(), project["dependencies"]):
        operators = {specifier.operator for specifier in Requirement(text).specifier}
        assert operators == {">=", "<"}, text


def test_readme_has_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    setup = "python3 -m venv .venv && .venv/bin/pip install -e"
    # With Optuna, which tunes the presets that the demo compares with.
    assert lines.count(f"{setup} '.[compare]' && .venv/bin/deos-fx demo") == 1
    # .ci/run takes the test command from README by what it runs.
    assert lines.count(f"{setup} '.[test]' && .venv/bin/pytest -n auto") == 1
    assert sum("bin/pytest -n" in line for line in lines) == 1
