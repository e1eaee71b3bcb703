"""Load the processor of a model's folder where there is one, and what follows from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deos_fx.contents import add_to_record

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["copy_processor", "example_of", "example_processor", "image_inputs", "processor_of"]


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


def image_inputs(model_dir: str, images: Sequence[str]) -> dict[str, Tensor]:
    """Return a prompt with images as the model's processor makes it.

    Args:
        model_dir: The folder, or a hub id.
        images: Files.

    Raises:
        ImportError: If the processor needs a package that is not installed.
        OSError: If there is no processor.
        ValueError: If an image cannot be read.
    """
    from deos_fx.cli.questions import question_of
    from deos_fx.data import batches
    from deos_fx.data.processors import load_processor

    record = question_of(images, "What is shown here?", urls=False)
    return next(batches(load_processor(model_dir), [record], 1))


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


def example_of(model: PreTrainedModel, model_dir: str) -> dict[str, Tensor] | None:
    """Make a prompt with an image; None if how an image becomes inputs is not known."""
    from deos_fx.inputs.example import example_inputs

    try:
        return example_inputs(model, example_processor(model_dir))
    except ValueError:
        return None
