"""Load the processor of a model's folder where there is one, and what follows from it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deos_fx.cli.going_together import check_going_together
from deos_fx.contents import add_to_record

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from deos_fx.data import Record
    from deos_fx.runtime.reduced_model import ReducedModel

__all__ = [
    "copy_processor",
    "example_of",
    "example_processor",
    "export_example",
    "going_with",
    "processor_of",
    "scaled_example",
]


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


def going_with(model: Any, processor: Any) -> Any:
    """Return the processor that goes with a model: of a reduced or exported one, it scales images.

    Raises:
        ValueError: If the policy scales images, and the model takes one size only.
    """
    from transformers import PreTrainedModel

    return processor if isinstance(model, PreTrainedModel) else model.processor(processor)


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


def example_of(
    model: PreTrainedModel, model_dir: str, record: Record | None = None
) -> dict[str, Tensor] | None:
    """Make a prompt with an image; None if how an image becomes inputs is not known.

    Args:
        model: The model on the meta device.
        model_dir: Its folder, or a hub id.
        record: What the prompt is to be made of; by default a grey image.

    Raises:
        ImportError: If a record is given, and the processor needs a package that is not installed.
        OSError: If a record is given, and there is no processor.
        ValueError: If it takes the processor, and this does not go with the model.
    """
    from deos_fx.inputs.example import example_inputs, processed_example
    from deos_fx.models.facts import facts_of

    if record is not None:
        from deos_fx.data.processors import load_processor

        own = load_processor(model_dir)
        check_going_together(own, model, model_dir)
        return processed_example(own, record)
    processor = example_processor(model_dir)
    if processor is not None and facts_of(model).sizes_vary:
        check_going_together(processor, model, model_dir)
    try:
        return example_inputs(model, processor)
    except ValueError:
        return None


def export_example(reduced: ReducedModel, model_dir: str) -> dict[str, Tensor] | None:
    """Make the prompt that an export needs if nobody gives one.

    Args:
        reduced: The reduced model.
        model_dir: Its folder, or a hub id.

    Returns:
        What the processor makes of a question, where all images have one size and only it knows the
        kinds of tokens. None where an export makes a prompt itself, or asks for one.

    Raises:
        ValueError: If the processor is not the model's.
    """
    from deos_fx.exporters.graphs.example import kinds_of_tokens
    from deos_fx.inputs.example import processed_example
    from deos_fx.models.facts import facts_of

    facts = facts_of(reduced.model)
    if facts.sizes_vary or not kinds_of_tokens(facts):
        return None
    processor = example_processor(model_dir)
    if processor is None:
        return None
    check_going_together(processor, reduced.model, model_dir)
    return processed_example(reduced.processor(processor))


def scaled_example(
    model: PreTrainedModel, model_dir: str, scale: float, record: Record | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make a prompt with an image of full size, and one in which the image enters at a scale.

    Args:
        model: The model on the meta device.
        model_dir: Its folder, or a hub id.
        scale: The scale, less than 1.
        record: As in `example_of`.

    Raises:
        ValueError: If there is no processor or not the model's, or images of one size only enter.
    """
    from deos_fx.data import scaled_processor
    from deos_fx.inputs.example import processed_example

    processor = processor_of(model_dir)
    if processor is None:
        raise ValueError(
            f"a processor lets images enter at {scale:.3g} of their size, and {model_dir} has "
            "none; save the model's own there (processor.save_pretrained)"
        )
    check_going_together(processor, model, model_dir)
    scaled = scaled_processor(processor, scale)
    return processed_example(processor, record), processed_example(scaled, record)
