"""Save and load reduced models: the model's own files, the policy, and a note that identifies them.

What would come back as another model is refused when it is saved, not when it is missed.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedModel

from deos_fx.files import fresh_folder
from deos_fx.models.views import has_codes
from deos_fx.policy.policy import Policy
from deos_fx.reading import blaming, read_record
from deos_fx.version import __version__

__all__ = ["load", "save"]

VERSION = 1

_NOTE = "deos_fx.json"
_POLICY = "policy.json"


def save(model: PreTrainedModel, policy: Policy, dir: str | os.PathLike[str]) -> None:
    """Write a model and its policy, whole or not at all.

    Args:
        model: The unreduced model.
        policy: The policy.
        dir: A folder; other files in it stay.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If loading would give another model: it has adapters or other parts that its
            config does not describe, or weights of a kind that the config does not name.
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
    with fresh_folder(dir) as folder:
        model.save_pretrained(folder)
        _check_written(model, folder)
        policy.save(folder / _POLICY)
        (folder / _NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        written = {entry.name for entry in folder.iterdir()}
    # transformers would prefer an earlier model's single file to new weights in several files.
    for weights in Path(dir).glob("*.safetensors*"):
        if weights.name not in written:
            weights.unlink()


def load(dir: str | os.PathLike[str], **options: Any) -> tuple[PreTrainedModel, Policy]:
    """Load the model and the policy that `save` wrote.

    Args:
        dir: The folder.
        **options: Options of transformers' `from_pretrained`, such as ``dtype`` and ``device_map``.

    Returns:
        The model and its policy.

    Raises:
        ValueError: If there is no reduced model in the folder, it cannot be read, or its weights
            are not those of the model that its config describes.
    """
    folder = Path(dir)
    _check_note(folder)
    policy = Policy.load(folder / _POLICY)
    with blaming(folder):
        model, found = _read(AutoModelForImageTextToText, folder, **options)
    wrong = _differences(found)
    if wrong:
        raise ValueError(
            f"{folder} does not hold the weights of the model that its config describes: {wrong}. "
            f"Save the model again. {_CURE}"
        )
    return model, policy


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


def _check_note(folder: Path) -> None:
    if not (folder / _NOTE).is_file():
        missing = f"it has no {_NOTE}" if folder.is_dir() else "there is no such folder"
        raise ValueError(
            f"{folder} is not a saved reduced model: {missing}. Give a folder that "
            "ReducedModel.save_pretrained has written; for any other model load it with "
            "transformers and call deos_fx.transform."
        )
    from deos_fx.runtime.schema import NoteFile

    read_record(folder / _NOTE, NoteFile, "the note of a reduced model", "Save the model again.")
