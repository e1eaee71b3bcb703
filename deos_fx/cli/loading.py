"""Load models: whole, reduced, exported, or without weights."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from deos_fx.cli.going_together import check_going_together
from deos_fx.cli.policies import Choice, examples_of, policy_of
from deos_fx.contents import RECORD, record_of
from deos_fx.errors import DeviceError
from deos_fx.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deos_fx.policy.policy import Policy
    from deos_fx.runtime.reduced_model import ReducedModel
    from deos_fx.runtime.saved import SavedModel

__all__ = [
    "checked_processor",
    "kind_of",
    "load_generating",
    "load_model",
    "load_reduced",
    "load_unreduced",
    "meta_model",
]


def load_model(
    model_dir: str, *, dtype: str | None = None, device: str | None = None
) -> PreTrainedModel:
    """Load a vision-language model.

    Args:
        model_dir: The folder, or a hub id.
        dtype: Precision of the weights; by default the one they were saved in.
        device: A device, or ``auto`` for all that there are.

    Raises:
        ValueError: If there is no such folder, it is incomplete or damaged, or it holds a model
            that reads no images.
    """
    # Called for their checks: the messages come before a long download or load.
    saved = _saved(model_dir)
    config = _config(model_dir)
    return _unreduced(model_dir, saved, config, dtype, device)


def _unreduced(
    model_dir: str, saved: SavedModel | None, config: Any, dtype: str | None, device: str | None
) -> PreTrainedModel:
    """Load a model that has been checked; see `load_model`."""
    from deos_fx.models.families import auto_class
    from deos_fx.reading import blaming

    if saved is not None:
        message = "%s holds a reduced model: the whole one is taken, and its policy is left aside."
        logging.getLogger("deos_fx").warning(message, model_dir)
    options = _options(dtype, device)
    with blaming(model_dir):
        model = auto_class(config).from_pretrained(model_dir, config=config, **options)
    return model.eval()


def _options(dtype: str | None, device: str | None) -> dict[str, Any]:
    """Return what `from_pretrained` is called with.

    Raises:
        ValueError: If the device is not there.
    """
    if device is None:
        return {"dtype": dtype or "auto"}
    if device not in _MAPS:
        _check_device(device)
    return {"dtype": dtype or "auto", "device_map": device}


# Ways in which transformers spreads a model over devices.
_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def _check_device(device: str) -> None:
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"{device!r} is not a device; give cpu, cuda, cuda:1, ... or auto"
        ) from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"there is no device {device}: torch {torch.__version__} finds "
            f"{counted(torch.cuda.device_count(), 'CUDA device')} here; leave it out for the CPU"
        )


def load_reduced(
    model_dir: str, choice: Choice, *, dtype: str | None = None, device: str | None = None
) -> ReducedModel:
    """Load a model with the chosen policy; a folder of a reduced model has a policy of its own.

    Args:
        model_dir: The folder, or a hub id.
        choice: The options about the policy.
        dtype: As in `load_model`.
        device: As in `load_model`.

    Raises:
        ValueError: If the model cannot run the policy; its weights are not loaded then.
    """
    from deos_fx.api import transform
    from deos_fx.runtime.reduced_model import ReducedModel

    # What is damaged may be the config, which is read first.
    saved = _saved(model_dir)
    own = None if saved is None else saved.policy
    model = meta_model(model_dir)
    policy = policy_of(model, examples_of(model, model_dir), own, choice)
    if policy is None:
        # Case: nothing is chosen. The default policy runs on every model.
        policy = transform(model).policy
    # Case: a folder that `save_pretrained` of a reduced model wrote is read with all its checks.
    if saved is not None and policy is own:
        return ReducedModel(saved.model(**_options(dtype, device)), policy)
    whole = _unreduced(model_dir, saved, _config(model_dir), dtype, device)
    return transform(whole, policy=policy)


def load_unreduced(
    model_dir: str, *, dtype: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, dict[str, Policy]]:
    """Load a model as it is, and the policy of its folder by a name, if there is one.

    Args:
        model_dir: The folder, or a hub id.
        dtype: As in `load_model`.
        device: As in `load_model`.
    """
    saved = _saved(model_dir)
    if saved is None:
        return load_model(model_dir, dtype=dtype, device=device), {}
    model = saved.model(**_options(dtype, device))
    return model, {saved.policy.name or "its policy": saved.policy}


def load_generating(
    model_dir: str, choice: Choice, *, dtype: str | None = None, device: str | None = None
) -> tuple[Any, Any]:
    """Load what answers: a model with the chosen policy, a reduced model, or an exported one.

    Args:
        model_dir: The folder, or a hub id.
        choice: The options about the policy.
        dtype: As in `load_model`.
        device: As in `load_model`; of an exported model, where its graphs run.

    Returns:
        The model, and what has the ``device`` and ``dtype`` of its inputs.

    Raises:
        ValueError: If a policy or a precision is chosen for an exported model, whose graphs have
            both already; or as `load_reduced`.
    """
    import torch

    from deos_fx import OnnxModel

    kind = kind_of(model_dir)
    if kind == "onnx":
        if not choice.is_empty:
            raise ValueError(f"{model_dir} is an export, and its policy is part of its graphs")
        if dtype is not None:
            raise ValueError(f"{model_dir} is an export, and its precision is part of its graphs")
        # It takes tensors of the CPU and of any precision.
        inputs = SimpleNamespace(device="cpu", dtype=torch.float32)
        try:
            return OnnxModel.from_pretrained(model_dir, device), inputs
        except DeviceError as error:
            raise ValueError(str(error)) from error
    if not choice.is_empty or kind is not None:
        reduced = load_reduced(model_dir, choice, dtype=dtype, device=device)
        return reduced, reduced.model
    model = load_model(model_dir, dtype=dtype, device=device)
    return model, model


def checked_processor(model_dir: str) -> Any:
    """Load the processor of a model or an export, and check that it goes with the model.

    Args:
        model_dir: The folder, or a hub id.

    Raises:
        ImportError: If it needs a package that is not installed.
        OSError: If there is none.
        ValueError: If it is damaged, or another model's.
    """
    from deos_fx.data.processors import load_processor

    processor = load_processor(model_dir)
    # The graphs of an export compare what they are given with their example.
    if kind_of(model_dir) != "onnx":
        check_going_together(processor, meta_model(model_dir), model_dir)
    return processor


def meta_model(model_dir: str) -> PreTrainedModel:
    """Build the model on the meta device, without its weights."""
    import torch

    from deos_fx.models.facts import configs_of
    from deos_fx.models.families import auto_class
    from deos_fx.reading import blaming

    config = _config(model_dir)
    # The kernel that experts use by default has no form without values but in bfloat16.
    for inner in configs_of(config):
        inner._experts_implementation_internal = "batched_mm"
    with blaming(model_dir), torch.device("meta"):
        return auto_class(config).from_config(config, dtype=config.dtype).eval()


def _config(model_dir: str) -> Any:
    from deos_fx.models.config import read_config
    from deos_fx.models.families import auto_class
    from deos_fx.runtime.mark import unmarked

    # By the type of the config: no weights are read to refuse a model of text alone.
    config = unmarked(read_config(model_dir))
    if auto_class(config) is None:
        raise ValueError(
            f"{model_dir} holds a {config.model_type} model, which reads no images; give a "
            "vision-language model such as a LLaVA"
        )
    return config


def _saved(model_dir: str) -> SavedModel | None:
    """Check the folder of a reduced model; None for a model that is none of this package's folders.

    Raises:
        ValueError: If it is incomplete or damaged, or an export.
    """
    from deos_fx.runtime.saved import SavedModel

    kind = kind_of(model_dir)
    if kind in _EXPORTS:
        raise ValueError(
            f"{model_dir} is an export, which {_EXPORTS[kind]}; for anything else give the folder "
            "of the model that was exported"
        )
    return None if kind is None else SavedModel(model_dir)


# Kinds of exports, and what runs them.
_EXPORTS = {"onnx": "deos-fx generate runs", "genai": "onnxruntime-genai runs"}


def kind_of(model_dir: str) -> str | None:
    """Return what the record of a folder says that it is; None if it has none.

    Raises:
        ValueError: If the record is damaged, or says that the folder is incomplete.
    """
    folder = Path(model_dir)
    return record_of(folder).get("deos_fx") if (folder / RECORD).is_file() else None
