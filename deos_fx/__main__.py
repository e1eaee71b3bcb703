"""``python -m deos_fx`` is the command ``deos-fx``."""

from deos_fx.cli.app import app

app(prog_name="python -m deos_fx")
