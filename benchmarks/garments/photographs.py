"""Read the photographs of Fashion-MNIST that scenes are composed of."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from deos_fx.reference.scenes import Split

__all__ = ["GARMENTS", "PHOTO_SIZE", "Wardrobe", "read_wardrobe"]

PHOTO_SIZE = 28

# Six of the ten classes, those that are told apart best, and their labels in the files. Left out
# are shirts, coats and T-shirts, which look like pullovers and dresses, and sneakers.
_LABELS = {"trousers": 1, "pullover": 2, "dress": 3, "sandal": 5, "bag": 8, "boot": 9}
GARMENTS = tuple(_LABELS)

# Of each class, the last tenth of the photographs in train.npz is for validation.
_VALIDATION = 0.1


@dataclass(frozen=True, eq=False)
class Wardrobe:
    """The photographs of every split.

    Attributes:
        photographs: Split -> for each of ``GARMENTS``, uint8 ``[N, 28, 28]``, 0 behind the garment.
    """

    photographs: Mapping[Split, tuple[np.ndarray, ...]]


def read_wardrobe(data: str | Path) -> Wardrobe:
    """Read all photographs.

    Args:
        data: A folder with ``train.npz`` and ``test.npz``, or with a folder ``fashion_mnist`` that
            has them. Each has ``images`` uint8 ``[N, 28, 28]`` and ``labels`` ``[N]``, 0 to 9.

    Returns:
        The wardrobe. Validation photographs are the last tenth of each class in ``train.npz``.

    Raises:
        ValueError: If a file is missing or has other contents, or a class has too few photographs.
    """
    folder = Path(data)
    nested = folder / "fashion_mnist"
    return _read(nested.resolve() if nested.is_dir() else folder.resolve())


@cache
def _read(folder: Path) -> Wardrobe:
    known, test = (_by_class(folder / f"{name}.npz") for name in ("train", "test"))
    ends = [round(len(images) * (1 - _VALIDATION)) for images in known]
    pairs = list(zip(known, ends, strict=True))
    return Wardrobe(
        {
            "train": tuple(images[:end] for images, end in pairs),
            "validation": tuple(images[end:] for images, end in pairs),
            "test": test,
        }
    )


def _by_class(path: Path) -> tuple[np.ndarray, ...]:
    expected = f"images uint8 [N, {PHOTO_SIZE}, {PHOTO_SIZE}] and labels [N]"
    if not path.is_file():
        raise ValueError(
            f"there is no {path}; give --data a folder with Fashion-MNIST as train.npz and "
            f"test.npz, each with {expected}"
        )
    try:
        with np.load(path) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as {expected}: {error}") from error
    shape = (len(labels), PHOTO_SIZE, PHOTO_SIZE)
    if images.dtype != np.uint8 or images.shape != shape:
        raise ValueError(
            f"{path} has images {images.dtype} {list(images.shape)} and {len(labels)} labels; "
            f"give {expected}"
        )
    found = tuple(images[labels == label] for label in _LABELS.values())
    few = [name for name, those in zip(GARMENTS, found, strict=True) if len(those) < 10]
    if few:
        raise ValueError(
            f"{path} has fewer than 10 photographs of {', '.join(few)} (labels "
            f"{', '.join(str(_LABELS[name]) for name in few)}); give all of Fashion-MNIST"
        )
    return found
