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

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from deos_fx.data import Record
    from deos_fx.policy.policy import ModelSignature, Policy
    from deos_fx.runtime.reduced_model import ReducedModel

__all__ = [
    "DEFAULT_LIMIT",
    "DataFile",
    "Evaluations",
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

DEFAULT_LIMIT = 0.125
"""The limit on visual tokens if a command is given none."""


def _limit(text: str) -> int | float:
    """Parse a limit: ``12.5%`` or ``0.125`` is a fraction, ``18`` an absolute number."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        # Digits alone make an absolute number: "1" is one token, and "1.0" is all of them.
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}; give for example 0.125, 12.5% or 18") from None


Model = Annotated[
    str, typer.Argument(metavar="MODEL_DIR", help="Folder that save_pretrained wrote, or a hub id.")
]


Output = Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder to write.")]


OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")
]


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
        parser=_limit,
        metavar="LIMIT",
        help="Visual tokens that may stay, mean over the decoder layers: 0.125, 12.5% or 18.",
    ),
]


TokenLimits = Annotated[
    list[Any] | None,
    typer.Option(
        "--budget",
        parser=_limit,
        metavar="LIMIT",
        help="Visual tokens that may stay, mean over the decoder layers: 0.125, 12.5% or 18. Given "
        "several times: a policy for each, in one go.",
    ),
]


OtherLimit = Annotated[
    Any, typer.Option(parser=_limit, metavar="LIMIT", help="Fraction, or absolute number.")
]


def load_model(model_dir: str) -> PreTrainedModel:
    """Load a vision-language model.

    Raises:
        ValueError: If there is no such folder, or it holds a model that reads no images.
    """
    from transformers import AutoModelForImageTextToText

    # Called for its checks: their messages come before a long download or load.
    _config(model_dir)
    return AutoModelForImageTextToText.from_pretrained(model_dir, dtype="auto").eval()


def meta_model(model_dir: str) -> PreTrainedModel:
    """Build the model on the meta device, without its weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    config = _config(model_dir)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=config.dtype).eval()


def _config(model_dir: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from deos_fx.data.processors import check_place

    check_place(model_dir)
    # By the type of the config: no weights are read to refuse a model of text alone.
    config = AutoConfig.from_pretrained(model_dir)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"{model_dir} holds a {config.model_type} model, which reads no images; give a "
            "vision-language model such as a LLaVA"
        )
    return config


def load_reduced(
    model_dir: str, path: Path | None, preset: str | None, budget: int | float | None
) -> ReducedModel:
    """Load a model with the chosen policy; a folder of a reduced model has a policy of its own."""
    from deos_fx import Budget, ReducedModel, transform

    # Case: a folder that `save_pretrained` of a reduced model wrote, and no other options.
    if path is preset is budget is None and _is_reduced(model_dir):
        return ReducedModel.from_pretrained(model_dir)
    model = load_model(model_dir)
    # Case: a budget alone, to which the default policy is fitted.
    if path is None and preset is None and budget is not None:
        return transform(model, budget=Budget(visual_tokens=budget))
    return transform(model, policy=policy_of(model, path, preset, budget))


def load_unreduced(model_dir: str) -> tuple[PreTrainedModel, dict[str, Policy]]:
    """Load a model as it is, and the policy of its folder by a name, if there is one."""
    from deos_fx import ReducedModel

    if not _is_reduced(model_dir):
        return load_model(model_dir), {}
    reduced = ReducedModel.from_pretrained(model_dir)
    return reduced.model, {reduced.policy.name or "its policy": reduced.policy}


def _is_reduced(model_dir: str) -> bool:
    return os.path.isfile(os.path.join(model_dir, "deos_fx.json"))


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
    if chosen or _is_reduced(model_dir):
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
    model: PreTrainedModel, path: Path | None, preset: str | None, budget: int | float | None
) -> Policy | None:
    """Return the chosen policy, if there is one; a preset is fitted to the budget.

    Raises:
        ValueError: If the options do not go together, or the preset cannot meet the budget.
    """
    from deos_fx import presets
    from deos_fx.models.facts import facts_of
    from deos_fx.policy.policy import Policy

    # Case: a policy file.
    if path is not None:
        if preset is not None or budget is not None:
            raise ValueError("--policy says where to keep how much; give it without the others")
        return Policy.load(path)
    # Case: neither a file nor a method.
    if preset is None:
        if budget is not None:
            raise ValueError("--budget needs a method to fit to it; give --preset as well")
        return None
    # Case: a preset.
    signature = facts_of(model).signature
    if not signature.visual_tokens:
        raise ValueError(
            f"--preset is fitted to a number of visual tokens, and how many an image of a "
            f"{signature.model_type} model has depends on its size; give --policy, with fractions "
            "to keep, or search for one"
        )
    tokens = _tokens(DEFAULT_LIMIT if budget is None else budget, signature)
    return presets.fit(preset, tokens, model)


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


def _tokens(limit: int | float, signature: ModelSignature) -> float:
    """Return a limit on visual tokens as an absolute number, with the checks of a budget."""
    from deos_fx.cost.amounts import Cost
    from deos_fx.policy.budget import Budget

    whole = signature.visual_tokens
    # Only the visual tokens are read; FLOPs and bytes are fillers.
    unreduced = Cost((whole,) * signature.decoder_layers, float(whole), 1, 1)
    return Budget(visual_tokens=limit).limits(unreduced)["visual_tokens"]


def copy_processor(model_dir: str, folder: Path) -> None:
    """Save the model's processor into a folder, if there is one that can be loaded."""
    try:
        processor = processor_of(model_dir)
    except ImportError as error:
        # The model is written all the same, since it does not need its processor.
        logging.getLogger("deos_fx").warning("The processor is not copied: %s", error)
        return
    if processor is not None:
        processor.save_pretrained(folder)


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
