"""Save and load reduced models: the model's own files, the policy, and a note that identifies them.

What would come back as another model is refused when it is saved, not when it is missed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from deos_fx.contents import (
    FILES,
    MODEL_FILES,
    RECORD,
    check_unchanged,
    record_of,
    stamp,
    verify,
    write_record,
)
from deos_fx.files import disk_errors, fresh_folder
from deos_fx.models.config import read_config
from deos_fx.models.families import auto_class
from deos_fx.models.views import has_codes
from deos_fx.policy.policy import Policy
from deos_fx.reading import as_record, blaming
from deos_fx.runtime.mark import mark, unmarked
from deos_fx.version import __version__

__all__ = ["READ", "SavedModel", "folder_for", "save"]

VERSION = 1

_POLICY = "policy.json"
_ADAPTERS = "adapter_config.json"

READ = (*MODEL_FILES, _ADAPTERS)
"""Patterns of the files that are read when a saved model is loaded."""


def save(model: PreTrainedModel, policy: Policy, dir: str | os.PathLike[str]) -> None:
    """Write a model and its policy, whole or not at all.

    Args:
        model: The unreduced model.
        policy: The policy.
        dir: A folder; other files in it stay.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If loading would give another model: it has adapters or other parts that its
            config does not describe, or weights of a kind that the config does not name; or there
            are adapters in the folder.
    """
    # Before anything is written: could config and weights restore this model?
    _check_described(model)
    versions = {package.__name__: package.__version__ for package in (torch, transformers)}
    note = {
        "deos_fx": "reduced_model",
        "version": VERSION,
        "packages": {"deos_fx": __version__} | versions,
    }
    # If a check of what was written fails, nothing of it reaches the target.
    with folder_for(dir) as folder:
        with disk_errors(dir):
            model.save_pretrained(folder)
        _check_written(model, folder)
        mark(folder / "config.json")
        policy.save(folder / _POLICY)
        write_record(folder, note)


@contextmanager
def folder_for(dir: str | os.PathLike[str], also: Iterable[str] = ()) -> Iterator[Path]:
    """Provide a temporary folder to save a model in; see `deos_fx.files.fresh_folder`.

    Args:
        dir: Where it is moved to.
        also: Patterns of files besides those of a model that are written anew, or go.

    Yields:
        The temporary folder.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If it holds adapters.
    """
    if (Path(dir) / _ADAPTERS).exists():
        raise ValueError(
            f"{os.fspath(dir)} has an {_ADAPTERS}: transformers would load these adapters with "
            "whatever model is saved there. Give another folder, or move the adapters away."
        )
    with fresh_folder(dir, (*FILES, *also), whole=True) as folder:
        yield folder


class SavedModel:
    """A model that `save` wrote, in a folder whose files have been checked.

    Args:
        dir: The folder.

    Raises:
        ValueError: If there is no reduced model in the folder, or it is incomplete or damaged.

    Warns:
        UserWarning: If an earlier version has saved it, without the hashes of its files.

    Attributes:
        policy: Its policy.
    """

    def __init__(self, dir: str | os.PathLike[str]) -> None:
        self._folder = Path(dir)
        self._before = stamp(self._folder)
        _check_folder(self._folder)
        self.policy = Policy.load(self._folder / _POLICY)

    def model(self, **options: Any) -> PreTrainedModel:
        """Load the unreduced model.

        Args:
            **options: Options of transformers' `from_pretrained`, such as ``dtype`` and
                ``device_map``.

        Raises:
            ValueError: If its weights are not those of the model that its config describes, or
                somebody has begun to write the folder meanwhile.
        """
        with blaming(self._folder):
            options.setdefault("config", unmarked(read_config(self._folder)))
            model, found = _read(auto_class(options["config"]), self._folder, **options)
        check_unchanged(self._folder, self._before)
        wrong = _differences(found)
        if wrong:
            raise ValueError(
                f"{self._folder} does not hold the weights of the model that its config describes: "
                f"{wrong}. Save the model again. {_CURE}"
            )
        return model


def _read(kind: Any, folder: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model, and transformers' report of missing, unexpected and mismatched weights."""
    # transformers only warns of weights that do not fit, so ask for its report and judge by that.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    # A pickle of weights is none of the files that `save` writes.
    options["use_safetensors"] = True
    model, found = kind.from_pretrained(folder, **options)
    found["mismatched_keys"] = [name for name, *_ in found["mismatched_keys"]]
    return model, found


def _check_described(model: PreTrainedModel) -> None:
    """Refuse a model that could not be restored from its config and weights."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"The model would not be saved: transformers writes the adapters alone. {_CURE}"
        )
    if getattr(model, "hf_quantizer", None) is None:
        # Case: not quantised by transformers. Only weights that were quantised later are refused.
        coded = [path for path, module in model.named_modules() if has_codes(module)]
        if coded:
            raise ValueError(
                f"The weights of {_some(coded)} are quantised, and the config of the model does "
                "not say how. Quantise it while it is loaded (from_pretrained with a "
                "quantization_config), or save the model as it was before."
            )
        return
    # Case: quantised by transformers. Its config says how, but two things may have changed since.
    # 1. The weights themselves.
    packed = [path for path, weight in model.named_parameters() if _is_packed(weight)]
    if packed:
        raise ValueError(
            f"bitsandbytes has rounded the scales of {_some(packed)} for this CPU when the model "
            "was first called, and writes other weights than were loaded. Load the model again and "
            "save it before its first call."
        )
    # 2. The modules. Quantised layers add parameters of their own to those of the plain class, so
    # only missing ones tell that a part was replaced.
    with torch.device("meta"), torch.random.fork_rng():
        plain = type(model)(copy.deepcopy(model.config))
    missing = dict(plain.named_parameters()).keys() - dict(model.named_parameters()).keys()
    if missing:
        raise ValueError(
            f"The model would not be loaded as it is: it has something else in the place of "
            f"{_some(missing)}. {_CURE}"
        )


def _is_packed(weight: Any) -> bool:
    """Return whether bitsandbytes has repacked a 4-bit weight for its CPU kernel; seen in 0.50."""
    state = getattr(weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _check_written(model: PreTrainedModel, folder: Path) -> None:
    """Refuse files that would load as another model; they are read back without their weights."""
    # Case: quantised by transformers. `_check_described` has compared its modules and weights.
    if getattr(model, "hf_quantizer", None) is not None:
        return
    try:
        again, found = _read(type(model), folder, device_map="meta")
    except (OSError, RuntimeError) as error:
        raise ValueError(f"The model would not be loaded again: {error} {_CURE}") from error
    wrong = _differences(found)
    if wrong:
        raise ValueError(f"The model would not be loaded as it is: {wrong}. {_CURE}")
    # The config names one precision, to which other weights are rounded. Widening loses nothing.
    kept = dict(again.named_parameters())
    rounded = [
        name
        for name, weight in model.named_parameters()
        if torch.promote_types(weight.dtype, kept[name].dtype) != kept[name].dtype
    ]
    if rounded:
        raise ValueError(
            f"The model would not be loaded as it is: {_some(rounded)} would be rounded to "
            f"{kept[rounded[0]].dtype}. Give all weights one precision first (model.to)."
        )


_CURE = (
    "Merge adapters into the weights first (load them with peft.PeftModel.from_pretrained and take "
    "what its merge_and_unload() returns); other changed modules need a model class and a config "
    "that have them."
)


def _differences(found: Mapping[str, Any]) -> str:
    """Describe the weights that transformers reports as missing, unexpected or of other sizes."""
    kinds = {"missing_keys": "missing", "unexpected_keys": "unknown", "mismatched_keys": "resized"}
    parts = {word: _some(found[kind]) for kind, word in kinds.items() if found[kind]}
    return "; ".join(f"{word}: {names}" for word, names in parts.items())


def _some(names: Iterable[str]) -> str:
    """Return the first few names as text, and the number of the others."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def _check_folder(folder: Path) -> None:
    """Compare the files in the folder of a saved model with its record.

    Raises:
        ValueError: If there is no reduced model in the folder, or it is incomplete or damaged.
    """
    if not (folder / RECORD).is_file():
        missing = f"it has no {RECORD}" if folder.is_dir() else "there is no such folder"
        raise ValueError(
            f"{folder} is not a saved reduced model: {missing}. Give a folder that "
            "ReducedModel.save_pretrained has written; for any other model load it with "
            "transformers and call deos_fx.transform."
        )
    from deos_fx.runtime.schema import NoteFile

    record = record_of(folder)
    as_record(
        folder / RECORD, record, NoteFile, "the note of a reduced model", "Save the model again."
    )
    verify(folder, record, READ)
