"""Mark the config of a saved reduced model, so that other loaders do not take it for a whole one.

The entry ``quantization_config`` says how a checkpoint is compressed. Loaders look there first:
transformers warns of a method that it does not know and loads the whole model, and engines that
know the entry, such as vLLM, refuse the folder. Both print the name of the method, so it says what
to do.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedConfig

from deos_fx.files import write_text
from deos_fx.reading import read_json

__all__ = ["mark", "unmarked"]

METHOD = (
    "deos_fx (a policy for visual tokens, which deos_fx.ReducedModel.from_pretrained applies; "
    "loaded otherwise, the model is not reduced)"
)
"""The name of the method, in words for those who read it in a warning."""

_ENTRY = "quantization_config"


def mark(file: Path) -> None:
    """Write the mark into a ``config.json``, unless the entry says how weights are quantised."""
    config = read_json(file)
    if config.get(_ENTRY) is None:
        write_text(file, json.dumps({**config, _ENTRY: {"quant_method": METHOD}}, indent=2) + "\n")


def unmarked(config: PreTrainedConfig) -> PreTrainedConfig:
    """Take the mark off a config that was loaded, and return it."""
    found = getattr(config, _ENTRY, None)
    if isinstance(found, dict) and found.get("quant_method") == METHOD:
        del config.quantization_config
    return config
