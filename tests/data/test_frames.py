"""Images as a model is given them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_processors import noise, write_processor

from deos_fx import reference
from deos_fx.data import Record, batches, open_image
from deos_fx.data.frames import frames
from deos_fx.data.processors import load_processor


def test_pixels_that_went_in() -> None:
    _, processor = reference.load()
    image = noise(144, 144)
    (inputs,) = batches(processor, [Record(image, "what is")], 1)
    (found,) = frames(processor, inputs, [image])
    assert (np.asarray(found) == np.asarray(image)).all()


def test_crops(tmp_path: Path) -> None:
    """A wide image is scaled to the height that goes in, and its middle is what the model sees."""
    _, processor = reference.load()
    wide = Image.new("RGB", (432, 144), "red")
    wide.paste(noise(144, 144), (144, 0))
    processor.image_processor.size = {"shortest_edge": 144}
    (inputs,) = batches(processor, [Record(wide, "what is")], 1)
    (found,) = frames(processor, inputs, [wide])
    assert (np.asarray(found) == np.asarray(noise(144, 144))).all()


@pytest.mark.parametrize(("family", "tiles"), [("smolvlm", 5), ("internvl", 5), ("gemma3", 1)])
def test_tiles_are_images_of_their_own(family: str, tiles: int, tmp_path: Path) -> None:
    processor = load_processor(write_processor(family, tmp_path))
    # The quarters have a colour each, and the whole image is the last tile.
    quarters = Image.new("RGB", (2, 2))
    quarters.putdata([(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)])
    image = quarters.resize((56, 56), Image.Resampling.NEAREST)
    (inputs,) = batches(processor, [Record(image, "what?")], 1)
    found = [np.asarray(frame)[14, 14].tolist() for frame in frames(processor, inputs, [image])]
    assert len(found) == tiles
    if tiles == 5:
        assert found[:4] == [[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]]


def test_flattened_patches_are_of_the_whole_image(tmp_path: Path) -> None:
    processor = load_processor(write_processor("qwen2_5_vl", tmp_path))
    image = open_image(noise(60, 90))
    (inputs,) = batches(processor, [Record(image, "what?")], 1)
    assert frames(processor, inputs, [image]) == [image]


def test_tiles_that_are_put_together_again_are_the_image(tmp_path: Path) -> None:
    processor = load_processor(write_processor("llava_onevision", tmp_path))
    image = noise(56, 40)
    (inputs,) = batches(processor, [Record(image, "what?")], 1)
    whole, put_together = frames(processor, inputs, [image])
    assert whole.size == (28, 28) and put_together is image
