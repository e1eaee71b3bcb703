"""Load processors; images need nothing of the side that reads videos, and so no torchvision."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import transformers.models.smolvlm.processing_smolvlm as smolvlm
from transformers import AutoProcessor, ProcessorMixin
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

from deos_fx.reading import blaming
from deos_fx.replaced import Replacement, replaced

__all__ = ["VIDEO_EXTRA", "load_processor", "reading_from"]

# ``owner/name``; a path with one slash has the same form and counts as a folder if it is one.
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")

VIDEO_EXTRA = "pip install 'deos-fx[video]'"

# Whether this thread loads a processor without its video side.
_LOADING: ContextVar[bool] = ContextVar("loading", default=False)


def load_processor(folder: str | os.PathLike[str]) -> Any:
    """Load a processor of a vision-language model.

    Where torchvision is not installed, a processor of images and videos is loaded all the same. It
    refuses videos, and saves their settings as it has found them.

    Args:
        folder: A folder that it was saved in, or a hub id.

    Raises:
        ImportError: If a package is missing that images need, too; where it is torchvision, the
            message names the extra that installs it.
        OSError: If there is no processor.
        ValueError: If there is no such folder, it is damaged, or it has no processor that reads
            images.
    """
    try:
        with reading_from(folder):
            processor = _loaded(folder)
    except (ImportError, ValueError) as error:
        # The messages of transformers have several lines, and some are ValueErrors.
        reason = " ".join(str(error).split())
        if is_torchvision_available() or "torchvision" not in reason.lower():
            raise
        raise ImportError(
            f"images of {folder} need torchvision ({VIDEO_EXTRA}): {reason}"
        ) from error
    except OSError as error:
        if not os.path.isdir(folder) or any(
            os.path.exists(os.path.join(folder, name))
            for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)
        ):
            raise
        # transformers would say that the folder should be none, as it may also be a hub id.
        raise OSError(
            f"{folder} has no processor of images; save the model's own there "
            "(processor.save_pretrained)"
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ValueError(
            f"{folder} holds a {type(processor).__name__} and no processor of images and text; "
            "save the model's own there (processor.save_pretrained)"
        )
    return processor


@contextmanager
def reading_from(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Read a part of a model by transformers, and say of errors where it was looked for.

    Args:
        folder: The folder, or a hub id.

    Raises:
        OSError: If there is none, or none of that name on the hub.
        ValueError: If the folder does not exist and its name is not a hub id, or it is damaged.
    """
    # transformers would look for anything else on the hub and fail with a message about tokens.
    if os.path.isdir(folder):
        with blaming(folder):
            yield
        return
    # Nor is it asked, and asked again for half a minute, for what stands in a folder that exists.
    if not _HUB_ID.fullmatch(str(folder)) or os.path.isdir(os.path.dirname(folder)):
        raise ValueError(f"there is no folder {folder}")
    try:
        with blaming(folder):
            yield
    except OSError as error:
        # Case: perhaps a misspelt path, of which transformers knows nothing.
        raise OSError(
            f"there is no folder {folder}, and the hub has not given a model of that name: {error}"
        ) from error


def _loaded(folder: str | os.PathLike[str]) -> Any:
    replacements: list[Replacement] = []
    if not is_torchvision_available():
        replacements = [
            (AutoVideoProcessor, "from_pretrained", _in_this_thread),
            # What it compares the class with needs torchvision, too.
            (ProcessorMixin, "check_argument_for_proper_class", _unless_ours),
        ]
    # SmolVLM writes times of videos in words.
    if smolvlm.num2words is None:
        replacements.append((smolvlm, "num2words", lambda original: _refuse))
    token = _LOADING.set(True)
    try:
        with replaced(replacements):
            return AutoProcessor.from_pretrained(folder)
    finally:
        _LOADING.reset(token)


def _in_this_thread(original: Any) -> Any:
    def from_pretrained(folder: str | os.PathLike[str], *inputs: Any, **options: Any) -> Any:
        if not _LOADING.get():
            return original(folder, *inputs, **options)
        settings, _ = BaseVideoProcessor.get_video_processor_dict(folder)
        return _UnreadVideos(settings)

    return staticmethod(from_pretrained)


def _unless_ours(original: Any) -> Any:
    def check(self: ProcessorMixin, name: str, argument: Any) -> Any:
        is_ours = isinstance(argument, _UnreadVideos)
        return type(argument) if is_ours else original(self, name, argument)

    return check


class _UnreadVideos(BaseVideoProcessor):
    """Stands where the processor of videos would be.

    Args:
        settings: Those of the processor of videos.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        vars(self).update(settings)

    def __getattr__(self, name: str) -> None:
        # Processors and chat templates ask for settings that the files leave at their defaults.
        if name.startswith("_") or name == "settings":
            raise AttributeError(name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        _refuse()

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they were found."""
        return dict(self.settings)


def _refuse(*args: Any) -> Any:
    raise ImportError(f"reading videos needs packages that are not installed; {VIDEO_EXTRA}")
