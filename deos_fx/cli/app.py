"""The command ``deos-fx``.

Every command imports what it needs when it runs, so that ``--help`` does not wait for torch.
"""

from __future__ import annotations

import _thread
import importlib
import inspect as inspection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deos_fx.cli.commands.check import check
from deos_fx.cli.commands.compare import compare
from deos_fx.cli.commands.data import data
from deos_fx.cli.commands.demo import demo
from deos_fx.cli.commands.eval import evaluate
from deos_fx.cli.commands.example import example
from deos_fx.cli.commands.export import export
from deos_fx.cli.commands.generate import generate
from deos_fx.cli.commands.inspect import inspect
from deos_fx.cli.commands.presets import show_presets
from deos_fx.cli.commands.profile import profile
from deos_fx.cli.commands.search import search
from deos_fx.cli.commands.show import show
from deos_fx.cli.commands.transform import transform
from deos_fx.cli.console import QUIET, Console
from deos_fx.version import __version__

__all__ = ["app"]


class _Commands(TyperGroup):
    """The commands; a user's mistake prints one line instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        # These types carry a message for the user; any other error is a bug, with its traceback.
        with _interrupts() as noted:
            try:
                return super().invoke(ctx)
            except BrokenPipeError:
                # Whoever reads the output has enough (| head); typer then ends without a word.
                raise
            except (ValueError, TypeError, OSError, ImportError) as error:
                if ctx.params["debug"]:
                    raise
                if not (noted and isinstance(error, ImportError)):
                    _fail(ImportError(reason) if (reason := _unfit(error)) else error)
            except KeyboardInterrupt:
                pass
            # typer has no public name for the error of an option that there is not.
            except Exception as error:
                if not ctx.params["debug"] and (reason := _unfit(error)):
                    _fail(ImportError(reason))
                option: Any = getattr(error, "option_name", None)
                if any(option in own.opts for own in self.params):
                    unknown: Any = error
                    command = ctx.invoked_subcommand
                    unknown.message = f"{option} comes first: deos-fx {option} {command} ..."
                    unknown.possibilities = None
                raise
        Console(stderr=True).print("Interrupted; no results were written.")
        raise typer.Exit(130) from None


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Note Ctrl-C: packages make another error of it if it comes while they are imported.

    Yields:
        A list that has an entry for each.
    """
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        while frame is not None:
            if frame.f_code.co_name == "__del__":
                # Python drops what is raised there, so it is raised a moment later.
                threading.Timer(0.05, _thread.interrupt_main).start()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    # Shells let jobs in the background ignore it, and only the main thread may say what it does.
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_usual or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _unfit(error: BaseException) -> str:
    """Return that a torchvision of another torch is the cause of an error; empty if it is not."""
    # transformers imports it wherever it is installed, and says only what it could not import.
    while inner := error.__cause__ or error.__context__:
        error = inner
    if "torchvision" not in str(error):
        return ""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return ""
    except Exception:
        pass
    else:
        return ""
    found = [f"{name} {version(name)}" for name in ("torchvision", "torch")]
    return (
        f"{' does not fit '.join(found)} ({error}); install both from one place (pip install "
        "--upgrade torch torchvision), or uninstall torchvision, which images of most models do "
        "not need"
    )


def _fail(error: Exception) -> None:
    # Soft wrapping leaves lines whole, so that paths and commands can be copied.
    console = Console(stderr=True, soft_wrap=True)
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.filename and not error.filename2:
        # Python writes "[Errno 2] No such file or directory: 'a.jsonl'".
        text = f"{error.filename}: {error.strerror}"
    console.print("[bold red]Error:[/]", end=" ")
    console.print(text, markup=False, highlight=False)
    console.print("[dim]deos-fx --debug <command> shows where it comes from.[/]")
    raise typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _in_paragraphs(text: str) -> str:
    """Join the lines of each paragraph, so that a terminal of any width breaks them itself."""
    parts = inspection.cleandoc(text).split("\n\n")
    return "\n\n".join(part if "\n " in part else part.replace("\n", " ") for part in parts)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deos-fx {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors, and what was asked for, alone.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """A compiler for the visual tokens of Hugging Face vision-language models.

    Start with [bold]deos-fx demo[/].
    """
    import logging

    QUIET.set(quiet)
    # By default, termination from outside skips all cleaning up. As SystemExit it passes through
    # the contexts that remove temporary folders.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # The commands have a progress display of their own. transformers reads these variables when it
    # is imported, for which a command's help need not wait.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # What these warn of is between packages: nobody who runs a command can mend it.
    for name in ("torch.onnx", "onnx_ir", "torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


# In the order of the help.
_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "example": example,
    "presets": show_presets,
    "inspect": inspect,
    "data": data,
    "search": search,
    "transform": transform,
    "eval": evaluate,
    "show": show,
    "generate": generate,
    "export": export,
    "compare": compare,
    "profile": profile,
    "check": check,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, help=_in_paragraphs(_command.__doc__ or ""))(_command)
