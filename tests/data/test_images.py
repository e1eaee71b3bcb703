"""Images are upright, as deep as they are, of bounded size, or one error says why not."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from deos_fx.data import MAX_PIXELS, Record, batches, open_image
from deos_fx.data.images import FORMATS
from deos_fx.reference.model import build_processor

ORIENTATION = 0x0112


def pixels(processor, image):
    (batch,) = batches(processor, [Record(image, "what is at")], 1)
    return batch["pixel_values"]


# *** what an image looks like ***


@pytest.fixture
def shades():
    """Noise, of the size that the processor wants: 8 bits, four channels."""
    return np.random.default_rng(0).integers(0, 256, (144, 144, 4), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_images_are_upright(tmp_path, shades, orientation, kind):
    exif, path = Image.Exif(), tmp_path / f"a.{kind}"
    exif[ORIENTATION] = orientation
    Image.fromarray(shades[:100, :, :3]).save(path, exif=exif)
    processor = build_processor()
    expected = processor.image_processor(load_image(str(path)), return_tensors="pt")
    assert pixels(processor, path).equal(expected["pixel_values"])


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, "png") for mode in ("1", "L", "LA", "P", "RGBA")]
    + [("CMYK", "jpg"), ("PA", "tif"), ("CMYK", "tif"), ("YCbCr", "tif"), ("RGBA", "webp")],
)
def test_images_of_every_mode_are_those_of_transformers(tmp_path, shades, mode, kind):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(shades).convert("RGB").convert(mode).save(path)
    processor = build_processor()
    expected = processor.image_processor(load_image(str(path)), return_tensors="pt")
    assert pixels(processor, path).equal(expected["pixel_values"])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_16_bits_are_scaled(tmp_path, shades, orientation, kind):
    # load_image cuts them off at 255. The high bytes are the image of 8 bits.
    exif, path = Image.Exif(), tmp_path / f"a.{kind}"
    exif[ORIENTATION] = orientation
    deep = 256 * shades[..., 0].astype(np.uint16) + shades[..., 1]
    Image.fromarray(deep).save(path, exif=exif)
    with Image.open(path) as image:
        assert image.mode == "I;16"
    expected = np.rot90(shades[..., 0], -1) if orientation == 6 else shades[..., 0]
    found = pixels(build_processor(), path)[0].add(1).mul(127.5).round()
    assert (found.numpy() == expected).all()


def test_images_without_a_known_range_are_refused(tmp_path, shades):
    path = tmp_path / "a.tif"
    Image.fromarray(shades[..., 0].astype(np.float32)).save(path)
    with pytest.raises(ValueError, match=r"a\.tif is not an image .* mode F, whose range"):
        pixels(build_processor(), path)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("white", [0, 1])
def test_16_bits_of_a_tiff_in_any_order_and_with_white_as_zero(tmp_path, shades, order, white):
    deep = (256 * shades[..., 0].astype(np.uint16) + shades[..., 1]).astype(order)
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(deep, 16, photometric=white, big=order == ">u2"))
    if order == ">u2" and not white:
        # Pillow does not know this one.
        with pytest.raises(ValueError, match="is not an image"):
            open_image(path)
        return
    expected = shades[..., 0] if white else 255 - shades[..., 0]
    assert (np.asarray(open_image(path))[..., 1] == expected).all()


def test_12_bits_of_a_tiff(tmp_path):
    values = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    packed = "".join(f"{value:012b}" for value in values.flatten())
    data = int(packed, 2).to_bytes(len(packed) // 8, "big")
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(values, 12, data=data))
    assert (np.asarray(open_image(path))[..., 0] == values >> 4).all()


def tiff(values, bits, photometric=1, big=False, data=None):
    """A TIFF of one strip, byte by byte as its specification says."""
    end = ">" if big else "<"
    data = values.tobytes() if data is None else data
    height, width = values.shape
    tags = [
        *((256, width), (257, height), (258, bits), (259, 1), (262, photometric)),
        *((273, 8), (277, 1), (278, height), (279, len(data))),
    ]
    entries = b"".join(
        struct.pack(f"{end}HHI", tag, 4 if tag in (273, 279) else 3, 1)
        + (
            struct.pack(f"{end}I", value)
            if tag in (273, 279)
            else struct.pack(f"{end}HH", value, 0)
        )
        for tag, value in tags
    )
    head = (b"MM" if big else b"II") + struct.pack(f"{end}HI", 42, 8 + len(data))
    return head + data + struct.pack(f"{end}H", len(tags)) + entries + bytes(4)


def test_loaded_images_are_as_deep_as_files(shades):
    deep = Image.fromarray(256 * shades[..., 0].astype(np.uint16) + shades[..., 1])
    assert (np.asarray(open_image(deep))[..., 2] == shades[..., 0]).all()


def test_contents_of_a_file_are_as_good_as_its_path(tmp_path, shades):
    path = tmp_path / "a.png"
    Image.fromarray(shades).save(path)
    assert open_image(path.read_bytes()).tobytes() == open_image(path).tobytes()


# *** what is refused ***


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PPM", "TGA", "PCX", "ICO", "JPEG2000"])
def test_other_formats_are_not_opened(kind, tmp_path, shades):
    path = tmp_path / "a.png"
    with open(path, "wb") as file:
        Image.fromarray(shades[:64, :64, :3]).save(file, kind)
    with pytest.raises(ValueError, match=r"a\.png is not an image .* it is none of PNG, JPEG"):
        open_image(path, "data.jsonl, line 3")


def png_head(width, height):
    """The beginning of a PNG of one bit a pixel, without pixels."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


# Pillow warns of the second and refuses the third by itself.
@pytest.mark.parametrize("side", [8_001, 10_000, 14_000, 60_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(side, tmp_path):
    assert side**2 > MAX_PIXELS
    path = tmp_path / "a.png"
    path.write_bytes(png_head(side, side))
    with pytest.raises(ValueError, match=r"^data\.jsonl, line 3: .*a\.png is not .*pixels"):
        open_image(path, "data.jsonl, line 3")
    path.write_bytes(png_head(8_000, 8_000))
    with pytest.raises(ValueError, match="truncated"):
        open_image(path)


@pytest.mark.parametrize("kind", FORMATS)
# Pillow warns of metadata that it cannot read, and goes on.
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_damaged_files_end_in_one_error(kind, tmp_path, shades):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(shades[:40, :40, :3]).save(file, kind, exif=exif)
    whole, path = file.getvalue(), tmp_path / "a"
    places = {*range(0, min(len(whole), 160), 7), *range(160, len(whole), len(whole) // 15)}
    damaged = [whole[:place] for place in places]
    for place in places:
        for byte in (0, 0xFF, whole[place] ^ 0x55):
            damaged.append(whole[:place] + bytes([byte]) + whole[place + 1 :])
    read = 0
    for contents in damaged:
        path.write_bytes(contents)
        try:
            assert open_image(path, "d.csv, line 7").mode == "RGB"
            read += 1
        except ValueError as error:
            assert str(error).startswith(f"d.csv, line 7: {path} is not an image")  # noqa: PT017
    assert 0 < read < len(damaged)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path):
        with pytest.raises(ValueError, match=f"{path} is not an image .* device or a pipe"):
            open_image(path)
