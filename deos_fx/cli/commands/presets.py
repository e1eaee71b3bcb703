"""The command ``deos-fx presets``: the published methods, and the policy of one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from deos_fx.cli.console import Console
from deos_fx.cli.options import AsJson

__all__ = ["show_presets"]


def show_presets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Write this preset's policy as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the published methods, or write the policy of one.

    Policies are written with the defaults of the official code; in Python,
    deos_fx.presets has them as functions with all their settings.

    [bold]Examples[/]

      deos-fx presets

      deos-fx presets fastv > policy.json
    """
    from deos_fx import presets
    from deos_fx.cli.terminal import presets_table

    # Case: no name, so list all.
    if name is None and as_json:
        keys = ("name", "title", "source", "licence", "needs", "place")
        listed = [{key: getattr(method, key) for key in keys} for method in presets.list()]
        typer.echo(json.dumps(listed, indent=2))
        return
    if name is None:
        Console().print(presets_table(presets.list()))
        return
    known = {method.name: method for method in presets.list()}
    if name not in known:
        raise ValueError(f"no preset {name!r}; choose from {', '.join(known)}")
    # Plain text without a further line end: the output is meant for a file.
    typer.echo(known[name].function().to_json(), nl=False)
