"""Videos as processors make them: for every family, the placeholders of one and its inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from families import BREAK, END, IMAGE, START, VIDEO
from torch import Tensor

Video = tuple[list[int], dict[str, Tensor]]
"""Placeholders of one video, and its inputs with a leading axis of videos, frames or patches."""

_seeds = itertools.count(1001)
_FRAME = 6  # visual tokens: 2 x 3 of 4 patches each


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(next(_seeds)))


def _whole(tokens: int) -> list[int]:
    return [START, *[VIDEO] * tokens, END]


def _by_frames(frames: int, token: int = VIDEO) -> list[int]:
    """Every frame between marks of its own, and after it the time in text."""
    return [x for i in range(frames) for x in (START, *[token] * _FRAME, END, 10 + i)]


def _patches(
    block: Callable[[int], list[int]], *patch: int, depth: int = 1, **more: int
) -> Callable[[int], Video]:
    """As Qwen-VL takes videos; so many of their frames make one of visual tokens."""

    def video(frames: int) -> Video:
        table = torch.tensor([[frames * depth, 4, 6]])
        pixels = _noise(frames * depth * 24, *patch)
        others = {name: torch.tensor([value]) for name, value in more.items()}
        return block(frames), {"pixel_values_videos": pixels, "video_grid_thw": table, **others}

    return video


def _frames(side: int, tokens: int, ends: int = 0) -> Callable[[int], Video]:
    """As LLaVA takes videos."""
    return lambda frames: (
        [VIDEO] * (frames * tokens + ends),
        {"pixel_values_videos": _noise(1, frames, 3, side, side)},
    )


def _one(frames: int) -> list[int]:
    return _whole(frames * _FRAME)


def _glm(frames: int) -> list[int]:
    return [BREAK, *_by_frames(frames, IMAGE), BREAK + 1]


def _pooled(frames: int) -> Video:
    """As Kimi takes videos: one set of visual tokens for all frames."""
    return _whole(_FRAME), _patches(_one, 3, 4, 4)(frames)[1]


def _with_flags(frames: int) -> Video:
    """As VideoLLaMA 3 takes videos: what is like the frame before is left out of the prompt."""
    kept = torch.ones(frames, _FRAME, dtype=torch.bool)
    kept[1:, ::2] = False
    inputs = _patches(_one, 48, video_merge_sizes=2)(frames)[1]
    return _whole(int(kept.sum())), inputs | {"video_compression_mask": kept.flatten()}


def _gemma4(height: int, width: int, pixels: int, tokens: int) -> Callable[[int], Video]:
    grid = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    places = torch.stack(grid, dim=-1).reshape(1, -1, 2)
    return lambda frames: (
        [x for i in range(frames) for x in (10 + i, START, *[VIDEO] * tokens, END)],
        {
            "pixel_values_videos": _noise(frames, height * width, pixels),
            "video_position_ids": places.repeat(frames, 1, 1),
            "num_frames_per_video": torch.tensor([frames]),
        },
    )


def _molmo2(frames: int) -> Video:
    # 8 x 8 patches of a frame, of which 8 x 1 neighbours make a token.
    inputs = {
        "pixel_values_videos": _noise(frames, 64, 48),
        "video_token_pooling": torch.arange(frames * 64).reshape(-1, 8),
        "video_grids": torch.tensor([[frames, 8, 1]]),
    }
    return [x for i in range(frames) for x in (10 + i, START, *[IMAGE] * 8, END)], inputs


def _timed_by(name: str) -> Callable[[int], Video]:
    """As Qwen2.5 takes videos: with the seconds between two frames."""

    def video(frames: int) -> Video:
        block, inputs = _qwen(frames)
        return block, inputs | {name: torch.tensor([0.5 * frames])}

    return video


_qwen = _patches(_one, 96)
_timed = _patches(_by_frames, 96)
_in_images = _patches(_glm, 96)
VIDEOS: dict[str, Callable[[int], Video]] = {
    "llava_next_video": _frames(16, 4),
    "llava_onevision": _frames(16, 4, ends=1),
    "video_llava": _frames(32, 65),
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _timed_by("second_per_grid_ts"),
    "qwen2_5_omni_thinker": _timed_by("video_second_per_grid"),
    "qwen3_omni_moe_thinker": _timed_by("video_second_per_grid"),
    "exaone4_5": _qwen,
    "hyperclovax_v2": _qwen,
    "lfm3_vl": _timed,
    "minimax_m3_vl": _timed,
    "muse_glimmer": _timed,
    "qwen3_vl": _timed,
    "qwen3_vl_moe": _timed,
    "qwen3_5": _timed,
    "cosmos3_omni": _timed,
    "cohere_compass": _timed,
    "cosmos3_edge": _patches(_by_frames, 48),
    "ernie4_5_vl_moe": _patches(_one, 48, depth=2),
    "video_llama_3": _with_flags,
    "kimi_k25": _pooled,
    "glm4v": _in_images,
    "glm4v_moe": _in_images,
    "glm46v": _in_images,
    "glmga": _in_images,
    "glm_ocr": _in_images,
    "gemma4": _gemma4(4, 6, 48, _FRAME),
    "gemma4_unified": _gemma4(2, 3, 192, _FRAME),
    "molmo2": _molmo2,
}
"""Name of a family -> a video of so many frames, as its processor makes it."""
