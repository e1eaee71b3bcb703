"""Reduced models in folders: the model's own files, the policy, and a note that says so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedModel

import deos_fx
from deos_fx.files import fresh_folder
from deos_fx.policy import Policy

__all__ = ["load", "save"]

VERSION = 1

_NOTE = "deos_fx.json"
_POLICY = "policy.json"


def save(model: PreTrainedModel, policy: Policy, dir: str | os.PathLike[str]) -> None:
    """Write a model and its policy, whole or not at all.

    Args:
        model: The unreduced model.
        policy: What is reduced.
        dir: A folder; other files in it stay.

    Raises:
        OSError: If it cannot be written.
    """
    packages = (deos_fx, torch, transformers)
    note = {
        "deos_fx": "reduced_model",
        "version": VERSION,
        "packages": {package.__name__: package.__version__ for package in packages},
    }
    with fresh_folder(dir) as folder:
        model.save_pretrained(folder)
        policy.save(folder / _POLICY)
        (folder / _NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        written = {entry.name for entry in folder.iterdir()}
    # Weights of an earlier model in this folder would be preferred to those in several files.
    for weights in Path(dir).glob("*.safetensors*"):
        if weights.name not in written:
            weights.unlink()


def load(dir: str | os.PathLike[str], **options: Any) -> tuple[PreTrainedModel, Policy]:
    """Read what `save` wrote.

    Args:
        dir: The folder.
        **options: For transformers' `from_pretrained`, such as ``dtype`` and ``device_map``.

    Returns:
        The model and its policy.

    Raises:
        ValueError: If there is no reduced model in the folder, or it cannot be read.
    """
    folder = Path(dir)
    _check_note(folder)
    policy = Policy.load(folder / _POLICY)
    return AutoModelForImageTextToText.from_pretrained(folder, **options), policy


def _check_note(folder: Path) -> None:
    if not (folder / _NOTE).is_file():
        missing = f"it has no {_NOTE}" if folder.is_dir() else "there is no such folder"
        raise ValueError(
            f"{folder} is not a saved reduced model: {missing}. Give a folder that "
            "ReducedModel.save_pretrained has written; for any other model load it with "
            "transformers and call deos_fx.transform."
        )
    try:
        note = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
        kind, version = note["deos_fx"], note["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _NOTE} is damaged ({error}); save the model again.") from error
    if kind != "reduced_model" or version != VERSION:
        raise ValueError(
            f"{folder} holds a {kind} of version {version}; this release reads reduced_model of "
            f"version {VERSION}."
        )
