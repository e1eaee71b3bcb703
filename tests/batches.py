"""Batches whose prompts differ in their images, as the processors of each kind give them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from families import BREAK, END, FAMILIES, IMAGE, PAD, START, TWINS, VIDEO, shared
from tiny import shared_llava
from torch import Tensor

from deos_fx.models.families import PATCH_NUMBERS

Image = tuple[list[int], dict[str, Tensor]]
"""Placeholders of one image, and its inputs with a leading axis of images."""

_seeds = itertools.count(11)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(next(_seeds)))


def grid(rows: int, columns: int) -> Image:
    """As Qwen-VL takes images: patches of 4 x 4 pixels in 2 frames, merged by twos."""
    patches = noise(4 * rows * columns, 3 * 2 * 16)
    table = torch.tensor([[1, 2 * rows, 2 * columns]])
    block = [START, *[IMAGE] * (rows * columns), END]
    return block, {"pixel_values": patches, "image_grid_thw": table}


def video(frames: int, rows: int, columns: int) -> Image:
    patches = noise(4 * frames * rows * columns, 3 * 2 * 16)
    table = torch.tensor([[frames, 2 * rows, 2 * columns]])
    block = [START, *[VIDEO] * (frames * rows * columns), END]
    return block, {"pixel_values_videos": patches, "video_grid_thw": table}


def rows(height: int, width: int) -> Image:
    """As Pixtral takes images: padded to the largest, a break behind each row of 4 x 4 patches."""
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, :, :height, :width] = noise(1, 3, height, width)
    block = [*[IMAGE] * (width // 4), BREAK] * (height // 4)
    return block, {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}


def anyres(height: int, width: int) -> Image:
    """As LLaVA-NeXT takes images: the whole and its tiles of 16 x 16, an end behind each row."""
    tiles = torch.zeros(1, 5, 3, 16, 16)
    used = 1 + height * width // 256
    tiles[:, :used] = noise(1, used, 3, 16, 16)
    block = [IMAGE] * (16 + (height // 4) * (width // 4 + 1))
    return block, {"pixel_values": tiles, "image_sizes": torch.tensor([[height, width]])}


def plain(side: int = 32) -> Image:
    return [IMAGE] * 64, {"pixel_values": noise(1, 3, side, side)}


def strip(rows: int, columns: int) -> Image:
    """As MiniCPM-V takes images: patches of 4 x 4 pixels side by side, merged by fours."""
    pixels = noise(1, 3, 4, 4 * 16 * rows * columns)
    table = torch.tensor([[4 * rows, 4 * columns]], dtype=torch.int32)
    block = [START, *[IMAGE] * (rows * columns), END]
    return block, {"pixel_values": pixels, "target_sizes": table}


def batch_of(name: str, prompts: Sequence[Sequence[Image]]) -> dict[str, Tensor]:
    """Prompts with these images, text around them, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    texts = []
    for shown in prompts:
        ids: list[int] = []
        for block, _ in shown:
            ids += torch.randint(1, 100, (3,), generator=generator).tolist() + block
        ids += torch.randint(1, 100, (5,), generator=generator).tolist()
        texts.append(torch.tensor(ids))
    ids = torch.nn.utils.rnn.pad_sequence(
        texts, batch_first=True, padding_value=PAD, padding_side="left"
    )
    media: dict[str, list[Tensor]] = {}
    for shown in prompts:
        for _, inputs in shown:
            for key, value in inputs.items():
                media.setdefault(key, []).append(value)
    family = (FAMILIES | TWINS).get(name)
    extra = family.extra(ids) if family else {}
    joined = {
        # A strip has the patches of all images side by side.
        key: torch.cat(values, dim=-1 if key == "pixel_values" and "target_sizes" in media else 0)
        for key, values in media.items()
    }
    for key in PATCH_NUMBERS & media.keys():
        # As a processor counts them: through the whole batch, each image or video from 0 on.
        counts = [int(values.max()) + 1 for values in media[key]]
        before = itertools.accumulate(counts[:-1], initial=0)
        joined[key] = torch.cat([values + n for values, n in zip(media[key], before, strict=True)])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), **joined, **extra}


def model_of(name: str) -> Any:
    return shared_llava(4) if name == "llava" else shared(name)


def tiles(count: int) -> Image:
    """As Idefics 3 takes the images of one prompt: filled up with zeros."""
    pixels, real = torch.zeros(1, 3, 3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.int64)
    pixels[:, :count] = noise(1, count, 3, 32, 32)
    real[:, :count] = 1
    block = [START, *[IMAGE] * 64, END] * count
    return block, {"pixel_values": pixels, "pixel_attention_mask": real}


def queries() -> Image:
    """As BLIP-2 takes images: as many tokens as there are queries."""
    return [IMAGE] * 32, {"pixel_values": noise(1, 3, 32, 32)}


def halves(count: int) -> Image:
    """As Phi-4 takes images: the whole in a tile of 16 x 16, tiles side by side, ends of rows."""
    real = torch.zeros(1, 3, 8, 8)
    real[:, : 1 + count] = 1
    block = [IMAGE] * (4 * (4 * count + 1) + 1 + 20)
    return block, {
        "image_pixel_values": noise(1, 3, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16 * count]]),
        "image_attention_mask": real,
    }


def crops(count: int) -> Image:
    """As Molmo 2 takes images: two neighbouring patches of a crop make a token."""
    return [IMAGE] * (32 * count), {
        "pixel_values": noise(count, 64, 48),
        "image_token_pooling": torch.arange(64 * count).reshape(-1, 2),
        "image_grids": torch.tensor([[8, 4, 8 * (count - 1), 4]]),
        "image_num_crops": torch.tensor([count]),
    }


def parts(count: int) -> Image:
    """As Step 3.7 takes images: parts of an image in 16 tokens each, and the whole in 64."""
    return [IMAGE] * (16 * count + 64), {
        "pixel_values": noise(1, 3, 64, 64),
        "pixel_values_local": noise(count, 3, 32, 32),
        "num_local_patches": torch.tensor([count]),
    }


BATCHES: dict[str, Callable[[], list[list[Image]]]] = {
    "llava": lambda: [[plain(64)], [plain(64), plain(64)], []],
    "gemma3": lambda: [[plain(), plain()], [plain()]],
    "molmo2": lambda: [[crops(3)], [crops(1), crops(2)], []],
    "step3p7": lambda: [[parts(1)], [parts(3), parts(2)]],
    "internvl": lambda: [[plain()], [plain(), plain()]],
    "qwen2_5_vl": lambda: [[grid(4, 8)], [grid(2, 3), grid(4, 4)], [grid(4, 8)]],
    "minicpmv4_6": lambda: [[strip(4, 8)], [strip(2, 2), strip(4, 4)], []],
    "qwen3_vl": lambda: [[grid(3, 4)], [], [grid(5, 4), grid(2, 2)]],
    "pixtral": lambda: [[rows(16, 32)], [rows(32, 16), rows(16, 16)]],
    "idefics3": lambda: [[tiles(1)], [tiles(3)]],
    "llava_next": lambda: [[anyres(32, 32)], [anyres(16, 32)]],
    "blip-2": lambda: [[queries()], [queries(), queries()], []],
    "phi4_multimodal": lambda: [[halves(1)], [halves(2)]],
    "glm5_next_shared": lambda: [[grid(4, 8)], [grid(2, 3), grid(4, 4)], []],
}
