"""Read the config of a model, which may be a stranger's: it says how much is built of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from deos_fx.data.processors import reading_from

__all__ = ["MAX_LAYERS", "MAX_SIDE", "read_config"]

MAX_LAYERS = 1000
"""The largest number of layers or blocks that a config may name; published models have up to 126.

Modules are built for each, and lists as long, before anything can be asked of the model.
"""

MAX_SIDE = 8000
"""The longest side of images that a config may name; an image of that size is made as an example.

Its square is the largest image that is opened (`deos_fx.data.images.MAX_PIXELS`).
"""

# Names of entries, in whatever part of a config.
_LIMITS = (
    (re.compile(r"(^|_)(layers?|blocks?|depths?)$"), MAX_LAYERS, "layers"),
    (re.compile(r"^image_size$"), MAX_SIDE, "pixels a side"),
)


def read_config(folder: str | os.PathLike[str]) -> PreTrainedConfig:
    """Read the config of a model, within limits.

    Args:
        folder: Its folder, or a hub id.

    Raises:
        OSError: If there is none.
        ValueError: If it is damaged, or names more than `MAX_LAYERS` layers or `MAX_SIDE` pixels.
    """
    if os.path.isdir(folder) and not os.path.exists(os.path.join(folder, "config.json")):
        raise ValueError(f"{folder} has no config.json; give the folder that a model was saved in")
    with reading_from(folder):
        # As it is written: transformers makes lists with an entry for each layer.
        written, _ = PreTrainedConfig.get_config_dict(folder)
    for name, value, limit, what in _beyond(written):
        raise ValueError(
            f"{os.path.join(folder, 'config.json')}: {name} is {value:,}, and a model has at most "
            f"{limit:,} {what}; correct it, or download the file again"
        )
    with reading_from(folder):
        return AutoConfig.from_pretrained(folder)


def _beyond(entries: Any, place: str = "") -> Iterator[tuple[str, int, int, str]]:
    """Yield the entries that are beyond their limits, each with the limit and what it limits."""
    if not isinstance(entries, Mapping):
        return
    for name, value in entries.items():
        yield from _beyond(value, f"{place}{name}.")
        numbers = value if isinstance(value, list) else [value]
        for pattern, limit, what in _LIMITS:
            if pattern.search(name):
                large = (one for one in numbers if isinstance(one, int) and one > limit)
                yield from ((f"{place}{name}", one, limit, what) for one in large)
