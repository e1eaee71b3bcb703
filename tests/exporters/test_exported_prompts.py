"""Prompts that the graphs of an export are for, and what is said of others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime import OrtValue
from torch import Tensor

from deos_fx.exporters.prompts import ExportedPrompts

IMAGE = 9
MANIFEST = {
    "image_token": IMAGE,
    "image_tokens": 2,
    "images": 1,
    "ends_in_image": False,
    "inputs": ["input_ids", "attention_mask", "pixel_values", "image_sizes", "kinds"],
    "pixels": [1, 3, 4, 4],
    "further_pixels": {},
    "guards": [True, False],
}
SIZES = torch.tensor([[4, 4]])


def prompts(**changes: Any) -> dict[str, Any]:
    """Two prompts that fit, one of them padded."""
    given = {
        "input_ids": torch.tensor([[0, 1, IMAGE, IMAGE, 2], [1, 3, IMAGE, IMAGE, 2]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "pixel_values": torch.zeros(2, 3, 4, 4),
        "image_sizes": SIZES.expand(2, -1),
        "kinds": torch.zeros(2, 5),
        "use_cache": True,
    }
    return {name: x for name, x in (given | changes).items() if x is not None}


def exported(**changes: Any) -> ExportedPrompts:
    read = ["input_ids", "pixel_values", "attention_mask", "kinds", "past_key_values.0.key"]
    return ExportedPrompts(MANIFEST | changes, {"image_sizes": SIZES, "values": SIZES}, read)


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def test_prompts_like_those_of_the_export_pass() -> None:
    exported().check(prompts())
    exported().check(prompts(attention_mask=None))
    # Sizes of another type, and one prompt alone.
    exported().check(prompts(image_sizes=SIZES.expand(2, -1).int()))
    exported().check({name: x[:1] for name, x in prompts(use_cache=None).items()})
    # What the graphs do not read may be left out.
    exported(inputs=[*MANIFEST["inputs"], "more"]).check(prompts())
    exported(ends_in_image=True).check(prompts(input_ids=ids([0, 1, 2, 9, 9], [1, 2, 3, 9, 9])))
    # Exports of earlier versions say nothing of the end.
    exported(ends_in_image=None).check(prompts(input_ids=ids([0, 1, 2, 9, 9], [1, 9, 9, 2, 3])))
    # Padding on the right.
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    given = ids([1, 9, 9, 2, 9], [1, 9, 9, 2, 3])
    with pytest.raises(ValueError, match=r"\[2, 3\] image tokens each"):
        exported().check(prompts(input_ids=given, attention_mask=mask))


def test_patches_may_be_counted_through_the_prompts() -> None:
    # Two patches make a token; of the last one, only one is there.
    numbers = ids([0, 1], [2, -1])
    read = ["input_ids", "pixel_values"]
    manifest = MANIFEST | {"inputs": [*MANIFEST["inputs"], "image_token_pooling"]}
    of_numbers = ExportedPrompts(manifest, {"image_token_pooling": numbers}, read)
    of_numbers.check(prompts(image_token_pooling=ids([0, 1], [2, -1], [3, 4], [5, -1])))
    for others in ([0, 1], [2, 3], [4, 5], [6, 7]), ([0, 1], [2, -1], [3, 4], [-1, 5]):
        with pytest.raises(ValueError, match="image_token_pooling is "):
            of_numbers.check(prompts(image_token_pooling=ids(*others)))


ANOTHER = "Export it again with example_inputs like these (deos-fx export --image FILE)."
HALF = (
    "The prompt has no image, or no place for it, but this model was exported for prompts with 1: "
    "pass pixel_values, and input_ids with image placeholders (token id 9); or neither, for a text "
    "without images."
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pixel_values": None}, HALF),
        ({"input_ids": ids([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])}, HALF),
        (
            {"input_ids": ids([0, 1, 9, 9, 2], [1, 9, 9, 9, 2])},
            "The prompts have [2, 3] image tokens each, but this model was exported for prompts "
            f"with 2 (1 image). {ANOTHER}",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 5, 5)},
            "attention_mask is (2, 1, 5, 5), but exported graphs take flags of real tokens [B, N]. "
            "Give every prompt a row of its own.",
        ),
        (
            {"input_ids": ids([0, 1, 2, 9, 9], [1, 9, 9, 2, 3])},
            "There are prompts that end in an image, but this model was exported for prompts that "
            f"end in text. {ANOTHER}",
        ),
        (
            # Padding on the right comes after the end.
            {
                "input_ids": ids([1, 2, 9, 9, 0], [1, 9, 9, 2, 3]),
                "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
            },
            "There are prompts that end in an image, but this model was exported for prompts that "
            f"end in text. {ANOTHER}",
        ),
        (
            {"more": torch.ones(2), "another": torch.ones(2)},
            "The call has another, more, but this model was exported for attention_mask, "
            f"image_sizes, input_ids, kinds, pixel_values. {ANOTHER}",
        ),
        (
            {"kinds": None, "image_sizes": None},
            "The call lacks image_sizes, kinds, but this model was exported for attention_mask, "
            f"image_sizes, input_ids, kinds, pixel_values. {ANOTHER}",
        ),
        (
            {"pixel_values": torch.zeros(2, 3, 4, 5)},
            "pixel_values of 2 prompts has the shape (2, 3, 4, 5), but this model was exported for "
            "(1, 3, 4, 4) per prompt. Use the processor of the model. "
            f"{ANOTHER}",
        ),
        (
            {"image_sizes": torch.tensor([[4, 4], [4, 3]])},
            "image_sizes is [[4, 4], [4, 3]], but this model was exported for images with [[4, 4]] "
            f"in every prompt. {ANOTHER}",
        ),
        (
            {"image_sizes": torch.zeros(2, 9)},
            "image_sizes is of shape (2, 9), but this model was exported for images with [[4, 4]] "
            f"in every prompt. {ANOTHER}",
        ),
        (
            {"position_ids": torch.tensor([[0, 1, 0, 1, 2]] * 2)},
            "position_ids go back inside a row",
        ),
    ],
)
def test_other_prompts_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        exported().check(prompts(**changes))
    assert str(caught.value).startswith(said)


def test_text_at_the_end_is_refused_where_an_image_ended_the_prompts() -> None:
    with pytest.raises(ValueError, match="end in text, but .* that end in an image"):
        exported(ends_in_image=True).check(prompts())


def test_every_branch_is_that_of_the_export() -> None:
    def outputs(*values: bool) -> dict[str, Any]:
        arrays = enumerate(map(np.array, values))
        return {f"guard_{i}": OrtValue.ortvalue_from_numpy(array) for i, array in arrays}

    exported().check_branches(outputs(True, False))
    for other in ((False, False), (True, True)):
        with pytest.raises(ValueError, match="This model computes another way for these prompts"):
            exported().check_branches(outputs(*other))
