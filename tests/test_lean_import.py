"""Importing the package is cheap: optional heavy libraries load where they are used, no GPU."""

import subprocess
import sys

import pytest

HEAVY = (
    "onnx",
    "onnxruntime",
    "onnxscript",
    "matplotlib",
    "optuna",
    "pydantic",
    "sklearn",
    "typer",
)

PROBE = """
import sys
import torch

def refuse(*args, **kwargs):
    raise AssertionError("import deos_fx touches CUDA")

torch.cuda._lazy_init = torch.cuda.current_device = torch.cuda.device_count = refuse
import {module}

assert not torch.cuda.is_initialized()
loaded = [name for name in {heavy!r} if name in sys.modules]
assert not loaded, f"import {module} loads {{loaded}}"
"""


def run_in_new_interpreter(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["deos_fx", "deos_fx.passes", "deos_fx.exporters"])
def test_import_is_lean(module):
    result = run_in_new_interpreter(PROBE.format(module=module, heavy=HEAVY))
    assert result.returncode == 0, result.stderr


def test_import_prints_nothing():
    result = run_in_new_interpreter("import deos_fx")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# Commands that a user waits for with nothing to compute: torch alone takes seconds to import.
QUICK = """
import sys
from typer.testing import CliRunner
from deos_fx.cli.app import app

for arguments in {commands!r}:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and result.output, (arguments, result.output)
    loaded = {{"numpy", "torch", "transformers"}} & set(sys.modules)
    assert not loaded, f"{{arguments}} loads {{loaded}}"
"""


def test_help_and_lists_do_not_wait_for_torch():
    from deos_fx.cli.app import app

    names = [command.name for command in app.registered_commands]
    commands = [["--version"], ["--help"], ["presets"], ["presets", "--json"]]
    commands += [[name, "--help"] for name in names]
    assert len(names) > 10
    result = run_in_new_interpreter(QUICK.format(commands=commands))
    assert result.returncode == 0, result.stderr
