"""Which tokens stay: K indices per row, ascending, so that the order of the tokens is kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deos_fx.operator.scores import full_precision, grid_coverage

__all__ = [
    "for_each_row",
    "greedy",
    "greedy_penalty",
    "grid_anchors",
    "grid_layout",
    "grid_preference",
    "take",
    "top_k",
]


def take(values: Tensor, kept: Tensor) -> Tensor:
    """Gathers the kept entries of every row.

    Rows are flattened into one index, because a gather along an expanded index would read eight
    bytes of index per element.

    Args:
        values: [B, V] or [B, V, d].
        kept: Indices [B, K], or [1, K] when every row keeps the same.

    Returns:
        [B, K] or [B, K, d].
    """
    rows, tokens = values.shape[:2]
    start = torch.arange(rows, device=kept.device).unsqueeze(-1) * tokens
    index = kept + start
    return values.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, (rows, -1))


def for_each_row(kept: Tensor, tokens: Tensor) -> Tensor:
    """Repeats a constant choice [1, K] for every row of the tokens [B, V, d]: [B, K]."""
    return kept.expand(tokens.shape[0], -1)


def top_k(score: Tensor, count: int) -> Tensor:
    """Indices [B, K] of the ``count`` largest scores of [B, V], ascending."""
    best = full_precision(score).topk(count, dim=-1).indices
    return best.sort(dim=-1).values


def greedy(score: Tensor, similarity: Tensor, count: int, diversity: float) -> Tensor:
    """Picks tokens one by one, each unlike those picked before.

    Step t takes argmax_j s_j - delta * max_{i in S} a_ij over the tokens not yet in S. With
    delta = 0 it is ``top_k``; with the score left out it is the max-min rule of DivPrune.

    Args:
        score: Standardized scores [B, V].
        similarity: a, [B or 1, V, V], at least -1.
        count: Number of tokens to keep, at least 1.
        diversity: delta >= 0.

    Returns:
        Indices [B, K], ascending.
    """
    picks, _ = _pick(score, similarity, count, diversity)
    return picks.sort(dim=-1).values


def greedy_penalty(score: Tensor, similarity: Tensor, count: int, diversity: Tensor) -> Tensor:
    """What the greedy rule holds against each token, [B, V]: max_{i in S} a_ij when it was picked.

    Tokens that are not picked within ``count`` steps get the value after the last step. Since the
    penalty only grows, ``score - diversity * penalty`` falls in the order of the picks, and its
    largest K are the K tokens ``greedy`` takes. No gradient flows through the penalty.
    """
    with torch.no_grad():
        return _pick(score, similarity, count, diversity)[1]


def _pick(
    score: Tensor, similarity: Tensor, count: int, diversity: float | Tensor
) -> tuple[Tensor, Tensor]:
    score = full_precision(score)
    similarity = similarity.expand(score.shape[0], -1, -1)
    # Nothing is less similar than -1, so the first pick has the largest gain of all.
    closest = torch.full_like(score, -1.0)
    free = torch.ones_like(score)
    picks = []
    for _ in range(count):
        gain = torch.where(free > 0, score - diversity * closest, torch.finfo(score.dtype).min)
        pick = gain.argmax(dim=-1, keepdim=True)
        picks.append(pick)
        free = free - F.one_hot(pick.squeeze(-1), score.shape[-1]).to(free.dtype)
        nearer = torch.maximum(closest, take(similarity, pick).squeeze(1).to(closest.dtype))
        closest = torch.where(free > 0, nearer, closest)
    return torch.cat(picks, dim=-1), closest


def grid_anchors(grid: Tensor, count: int) -> Tensor:
    """Indices [1, K] of tokens evenly spread over the grid: the centres of pooling windows.

    Window i of n along a side of N covers [i N/n, (i+1) N/n) and its centre is rounded down; with
    that, assigning every token to its nearest anchor, ties to the first, gives exactly the windows
    of ``avg_pool2d`` when the windows divide the grid.

    Args:
        grid: Image, row and column of every token, a constant [V, 3] (or [1, V, 3]): the complete
            grids of one or more images of one size, image by image, row by row.
        count: Anchors over all images together.

    Raises:
        ValueError: If the grid is incomplete or no layout of windows has ``count`` cells.
    """
    images, height, width = _sides(grid)
    if images * height * width != grid.shape[-2]:
        raise ValueError(
            f"grid anchors need complete grids, but {grid.shape[-2]} tokens are not {images} x "
            f"{height} x {width}; use the selector 'grid' only where no other selector has removed "
            "tokens before"
        )
    if count % images:
        raise ValueError(f"{count} anchors do not split evenly over {images} images")
    down, across = grid_layout(height, width, count // images)
    rows, columns = _centres(height, down), _centres(width, across)
    anchors = [(k * height + r) * width + c for k in range(images) for r in rows for c in columns]
    return torch.tensor([anchors], device=grid.device)


def grid_preference(grid: Tensor, count: int) -> Tensor:
    """A constant score [1, V] whose best tokens are grid anchors, for a search over the count.

    1 on the anchors of the largest layout with at most ``count`` windows, so it selects exactly
    what ``grid_anchors`` does where the count has a layout; elsewhere ``grid_coverage``, which is
    at most 0. On an incomplete grid it is ``grid_coverage`` alone.

    Args:
        grid: Image, row and column of every token, a constant [V, 3].
        count: Number of tokens to prefer.
    """
    images, height, width = _sides(grid)
    if not 0 < grid.shape[-2] == images * height * width:
        return grid_coverage(grid)
    per_image = max(count // images, 1)
    while not _layouts(height, width, per_image, float("inf")):
        per_image -= 1
    anchors = grid_anchors(grid, per_image * images)
    chosen = F.one_hot(anchors, grid.shape[-2]).sum(dim=1)
    return torch.where(chosen > 0, 1.0, grid_coverage(grid))


def _sides(grid: Tensor) -> tuple[int, int, int]:
    image, row, column = (axis.unique() for axis in grid.reshape(-1, 3).unbind(-1))
    return len(image), len(row), len(column)


def _centres(side: int, windows: int) -> list[int]:
    return [((2 * i + 1) * side - windows) // (2 * windows) for i in range(windows)]


def grid_layout(
    height: int, width: int, count: int, *, aspect: float = float("inf")
) -> tuple[int, int]:
    """Splits a grid into ``count`` windows: how many down and how many across.

    Windows that divide the grid and are at most twice as long as wide come first (they are the
    windows of ``avg_pool2d``), then the squarest.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        count: Number of windows.
        aspect: The longest window allowed, long side over short side.

    Raises:
        ValueError: If no layout has ``count`` windows; the message names the nearest counts.
    """
    layouts = _layouts(height, width, count, aspect)
    if layouts:
        return min(layouts)[2:]
    near = sorted(range(1, height * width + 1), key=lambda n: abs(n - count))
    good = [n for n in near if _layouts(height, width, n, aspect)][:3]
    raise ValueError(
        f"{count} windows do not fit a grid of {height} x {width} tokens; keep one of {good}"
    )


def _layouts(
    height: int, width: int, count: int, aspect: float
) -> list[tuple[bool, float, int, int]]:
    found = []
    for down in range(1, min(height, count) + 1):
        across, rest = divmod(count, down)
        if rest or across > width:
            continue
        window = (height / down) / (width / across)
        shape = max(window, 1 / window)
        uneven = bool(height % down or width % across) or shape > 2
        if shape <= aspect:
            found.append((uneven, shape, down, across))
    return found
