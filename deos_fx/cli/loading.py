"""Define the options that commands share, and load models, policies and processors.

Annotations of options are evaluated at import, so types of torch and transformers stay behind
``TYPE_CHECKING``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deos_fx.cli.limits import read_limit
from deos_fx.cli.policies import check_runs, chosen_policy, own_policy
from deos_fx.contents import RECORD, add_to_record

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from deos_fx.data import Record
    from deos_fx.policy.policy import Policy
    from deos_fx.runtime.reduced_model import ReducedModel

__all__ = [
    "AsJson",
    "DataFile",
    "Device",
    "Dtype",
    "Evaluations",
    "Force",
    "Images",
    "Model",
    "OtherLimit",
    "Output",
    "OutputOption",
    "PolicyFile",
    "PolicyFiles",
    "Preset",
    "Presets",
    "Prompt",
    "TestFile",
    "TokenLimit",
    "TokenLimits",
    "TuneFile",
    "Urls",
    "copy_processor",
    "example_of",
    "example_processor",
    "load_model",
    "load_reduced",
    "load_unreduced",
    "meta_model",
    "load_generating",
    "named_policies",
    "policy_of",
    "processor_of",
    "question_of",
]


Model = Annotated[
    str, typer.Argument(metavar="MODEL_DIR", help="Folder that save_pretrained wrote, or a hub id.")
]


Output = Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder to write.")]


OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")
]


Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there already.")]


Dtype = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16; by default as saved."),
]


Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ... or auto for all there are."),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


PolicyFile = Annotated[
    Path | None, typer.Option("--policy", metavar="FILE", help="A policy file, policy.json.")
]


Preset = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A published method, fitted to the budget."),
]


PolicyFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="A policy file, or the folder of a search; may be given several times.",
    ),
]


Presets = Annotated[
    list[str] | None,
    typer.Option(
        "--preset", metavar="NAME", help="A preset; may be given several times. Default: all."
    ),
]


DataFile = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="Questions: JSONL, CSV or a folder of datasets; deos-fx data shows how it is read.",
    ),
]


TestFile = Annotated[
    Path, typer.Option(metavar="FILE", help="Questions with answers, as deos-fx data shows them.")
]


TuneFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Data to tune presets on; give what was searched with."),
]


Evaluations = Annotated[
    int,
    typer.Option(
        min=1, help="Settings tried to tune a preset; deos-fx search says how many are fair."
    ),
]


Images = Annotated[
    list[str],
    typer.Option("--image", metavar="FILE", help="An image; may be given several times."),
]


Prompt = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="The question. <image> in it says where an image goes; else it comes first.",
    ),
]


Urls = Annotated[
    bool, typer.Option("--urls", help="Download images where the data has https or http URLs.")
]


TokenLimit = Annotated[
    Any,
    typer.Option(
        "--budget",
        parser=read_limit,
        metavar="LIMIT",
        help="Visual tokens that may stay, mean over the decoder layers: 0.125, 12.5% or 18.",
    ),
]


TokenLimits = Annotated[
    list[Any] | None,
    typer.Option(
        "--budget",
        parser=read_limit,
        metavar="LIMIT",
        help="Visual tokens that may stay, mean over the decoder layers: 0.125, 12.5% or 18. Given "
        "several times: a policy for each, in one go.",
    ),
]


OtherLimit = Annotated[
    Any, typer.Option(parser=read_limit, metavar="LIMIT", help="Fraction, or absolute number.")
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
    from transformers import AutoModelForImageTextToText

    from deos_fx.reading import blaming

    # Called for their checks: the messages come before a long download or load.
    _check_saved(model_dir)
    _config(model_dir)
    if own_policy(model_dir) is not None:
        message = "%s holds a reduced model: the whole one is taken, and its policy is left aside."
        logging.getLogger("deos_fx").warning(message, model_dir)
    where = {} if device is None else {"device_map": device}
    how = {"dtype": dtype or "auto", **where}
    with blaming(model_dir):
        return AutoModelForImageTextToText.from_pretrained(model_dir, **how).eval()


def meta_model(model_dir: str) -> PreTrainedModel:
    """Build the model on the meta device, without its weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    from deos_fx.models.facts import configs_of

    config = _config(model_dir)
    # The kernel that experts use by default has no form without values but in bfloat16.
    for inner in configs_of(config):
        inner._experts_implementation_internal = "batched_mm"
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=config.dtype).eval()


def _config(model_dir: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from deos_fx.data.processors import check_place
    from deos_fx.reading import blaming

    check_place(model_dir)
    # By the type of the config: no weights are read to refuse a model of text alone.
    with blaming(model_dir):
        config = AutoConfig.from_pretrained(model_dir)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"{model_dir} holds a {config.model_type} model, which reads no images; give a "
            "vision-language model such as a LLaVA"
        )
    return config


def load_reduced(
    model_dir: str, path: Path | None, preset: str | None, budget: int | float | None, **how: Any
) -> ReducedModel:
    """Load a model with the chosen policy; a folder of a reduced model has a policy of its own.

    Args:
        model_dir: The folder, or a hub id.
        path: A policy file.
        preset: Name of a preset.
        budget: Limit on visual tokens.
        **how: Options of `load_model`.

    Raises:
        ValueError: If the model cannot run the policy; its weights are not loaded then.
    """
    from deos_fx.api import transform
    from deos_fx.runtime.reduced_model import ReducedModel

    # What is damaged may be the config, which is read first.
    _check_saved(model_dir)
    own = path is preset is budget is None and own_policy(model_dir) is not None
    model = meta_model(model_dir)
    policy = policy_of(model, model_dir, path, preset, budget)
    if policy is None:
        # Case: nothing is chosen. The default policy runs on every model.
        policy = transform(model).policy
    # Case: a folder that `save_pretrained` of a reduced model wrote is read with all its checks.
    if own:
        return ReducedModel.from_pretrained(model_dir, **how)
    return transform(load_model(model_dir, **how), policy=policy)


def load_unreduced(model_dir: str) -> tuple[PreTrainedModel, dict[str, Policy]]:
    """Load a model as it is, and the policy of its folder by a name, if there is one."""
    from deos_fx.runtime.reduced_model import ReducedModel

    if own_policy(model_dir) is None:
        return load_model(model_dir), {}
    reduced = ReducedModel.from_pretrained(model_dir)
    return reduced.model, {reduced.policy.name or "its policy": reduced.policy}


def _check_saved(model_dir: str) -> None:
    """Compare a folder that has a record with it."""
    from deos_fx.runtime.saved import check_folder

    if (Path(model_dir) / RECORD).is_file():
        check_folder(Path(model_dir))


def load_generating(
    model_dir: str, path: Path | None, preset: str | None, budget: int | float | None
) -> tuple[Callable[..., Tensor], Any]:
    """Load what answers: a model with the chosen policy, a reduced model, or an exported one.

    Returns:
        Its `generate`, and what has the ``device`` and ``dtype`` of its inputs.

    Raises:
        ValueError: If a policy is chosen for an exported model, which has one already.
    """
    import torch

    from deos_fx import OnnxModel

    chosen = not path is preset is budget is None
    if os.path.isfile(os.path.join(model_dir, "prefill.onnx")):
        if chosen:
            raise ValueError(f"{model_dir} is an export, and its policy is part of its graphs")
        # It takes tensors of the CPU and of any precision.
        inputs = SimpleNamespace(device="cpu", dtype=torch.float32)
        return OnnxModel.from_pretrained(model_dir).generate, inputs
    if chosen or own_policy(model_dir) is not None:
        reduced = load_reduced(model_dir, path, preset, budget)
        return reduced.generate, reduced.model
    model: Any = load_model(model_dir)
    return model.generate, model


def question_of(images: Sequence[str], prompt: str, urls: bool) -> Record:
    """Make a record of the options ``--image`` and ``--prompt``."""
    from deos_fx.data.rows import record_of

    row = {"images": list(images), "prompt": prompt}
    return record_of(row, Path(), "--image", urls)


def policy_of(
    model: PreTrainedModel,
    model_dir: str,
    path: Path | None,
    preset: str | None,
    budget: int | float | None,
) -> Policy | None:
    """Return the chosen policy, or that of a folder of a reduced model; None if there is neither.

    Args:
        model: The model on the meta device.
        model_dir: Its folder, or a hub id.
        path: A policy file.
        preset: Name of a preset.
        budget: Limit on visual tokens.

    Raises:
        ValueError: If the options do not go together, or the model cannot run the policy.
    """
    inputs = example_of(model, model_dir)
    chosen = chosen_policy(model, inputs, path, preset, budget)
    own = own_policy(model_dir)
    if chosen is None and own is not None:
        check_runs(model, inputs, own)
    return own if chosen is None else chosen


def example_of(model: PreTrainedModel, model_dir: str) -> dict[str, Tensor] | None:
    """Make a prompt with an image; None if how an image becomes inputs is not known."""
    from deos_fx.inputs.example import example_inputs

    try:
        return example_inputs(model, example_processor(model_dir))
    except ValueError:
        return None


def named_policies(paths: Sequence[Path]) -> dict[str, Path]:
    """Name policy files: by their names, or where these are alike, by their folders.

    Args:
        paths: Files, or folders that a search wrote, for all policies in them.

    Raises:
        ValueError: If two files are the same, or a folder has no policy.
    """
    paths = [file for path in paths for file in _policies_in(path)]
    for names in ([path.stem for path in paths], [str(path) for path in paths]):
        if len({*names}) == len(names):
            return dict(zip(names, paths, strict=True))
    raise ValueError("a policy file is given twice; give each once")


def _policies_in(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("policy*.json"))
    if not found:
        raise ValueError(f"there is no policy.json in {path}")
    return found


def copy_processor(model_dir: str, folder: Path) -> None:
    """Save the model's processor, if it can be loaded, in a reduced model's folder or an export."""
    try:
        processor = processor_of(model_dir)
    except ImportError as error:
        # The model is written all the same, since it does not need its processor.
        logging.getLogger("deos_fx").warning("The processor is not copied: %s", error)
        return
    if processor is not None:
        processor.save_pretrained(folder)
        add_to_record(folder)


def processor_of(model_dir: str) -> Any:
    """Load the model's processor; None if there is none.

    Raises:
        ImportError: If it needs a package that is not installed.
    """
    from deos_fx.data.processors import load_processor

    # transformers has no way to ask. A folder with config.json alone is fine for `inspect`.
    try:
        return load_processor(model_dir)
    except (OSError, ValueError):
        return None


def example_processor(model_dir: str) -> Any:
    """Load the model's processor for an example of a call; None if that is not possible."""
    try:
        return processor_of(model_dir)
    # Case: a processor that cannot be loaded. An example can be made without it, and what is wrong
    # with it shows in the commands that need it.
    except Exception:
        return None
