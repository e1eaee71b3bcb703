"""Run the command ``deos-fx`` as ``python -m deos_fx``."""

from deos_fx.cli.app import app

app(prog_name="python -m deos_fx")
