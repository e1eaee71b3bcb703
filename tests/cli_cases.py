"""Commands as a user gives them."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging
from typer.testing import CliRunner

from deos_fx.cli.app import app

# In a process of its own, a command says so by a variable before transformers is imported.
logging.disable_progress_bar()


def run(*arguments: Any, code: int = 0) -> str:
    """What a command prints, after checking its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def fails(*arguments: Any) -> str:
    """The message of a command that fails: one line, and how to see more."""
    message, hint = run(*arguments, code=1).strip().splitlines()
    assert message.startswith("Error: ")
    assert "--debug" in hint
    return message
