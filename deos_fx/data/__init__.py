"""Read questions about images from files, and render them as inputs of a model."""

from deos_fx.data.batches import answer_labels, batches
from deos_fx.data.images import MAX_PIXELS, open_image
from deos_fx.data.reading import read_records
from deos_fx.data.record import Record
from deos_fx.data.scale import scaled_processor

__all__ = [
    "MAX_PIXELS",
    "Record",
    "answer_labels",
    "batches",
    "open_image",
    "read_records",
    "scaled_processor",
]
