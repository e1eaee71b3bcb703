"""The grid of an image: where its pooling windows are and how they weigh its tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deos_fx.operator.scores import grid_coverage

__all__ = [
    "columns",
    "grid_anchors",
    "grid_layout",
    "grid_preference",
    "interpolation",
    "window_members",
]


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
    images, height, width = _complete(grid)
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


def window_members(grid: Tensor, windows: int) -> Tensor:
    """Tokens of each window when every image is cut into equal windows: indices [W, m].

    Args:
        grid: Image, row and column of every token, a constant [V, 3]: complete grids.
        windows: Windows of one image.

    Raises:
        ValueError: If the grid is incomplete or does not split into that many equal windows.
    """
    images, height, width = _complete(grid)
    down, across = grid_layout(height, width, windows)
    if height % down or width % across:
        raise ValueError(
            f"{windows} windows do not split a grid of {height} x {width} tokens evenly; choose a "
            "number whose windows divide it"
        )
    index = torch.arange(images * height * width, device=grid.device)
    cells = index.view(images, down, height // down, across, width // across)
    return cells.transpose(2, 3).reshape(images * windows, -1)


def columns(grid: Tensor) -> int:
    """Tokens in one row of an image, of complete grids [V, 3]."""
    return _complete(grid)[2]


def interpolation(grid: Tensor, count: int) -> Tensor:
    """Bilinear interpolation onto a coarser grid, as what each token adds to the window centres.

    Output i of n along a side of N is sampled at (i + 0.5) N / n - 0.5 (``interpolate`` without
    aligned corners). With the weights W of all tokens in all outputs, and the token at the lower
    corner of each sample as the one that is kept, P_ij = W_ij / W_ii: a mean with these weights is
    the interpolated value.

    Args:
        grid: Image, row and column of every token, a constant [V, 3]: complete grids.
        count: Outputs over all images together.

    Returns:
        P [1, K, V], 0 where a token meets itself.
    """
    images, height, width = _complete(grid)
    down, across = grid_layout(height, width, count // images)
    rows, columns = _samples(height, down), _samples(width, across)
    weights = torch.einsum("iy,jx->ijyx", rows, columns).reshape(down * across, height * width)
    weights = torch.block_diag(*[weights] * images).to(grid.device)
    kept = grid_anchors(grid, count)
    own = weights.gather(1, kept.mT)
    return (weights / own).scatter(1, kept.mT, 0.0).unsqueeze(0)


def _samples(side: int, windows: int) -> Tensor:
    """Weights [windows, side] of the linear interpolation along one side."""
    place = (torch.arange(windows, dtype=torch.float64) + 0.5) * side / windows - 0.5
    distance = (place.unsqueeze(-1) - torch.arange(side)).abs()
    return (1 - distance).clamp_min(0).float()


def _complete(grid: Tensor) -> tuple[int, int, int]:
    """Images, rows and columns of complete grids."""
    images, height, width = _sides(grid)
    if images * height * width != grid.shape[-2]:
        raise ValueError(
            f"windows need complete grids, but {grid.shape[-2]} tokens are not {images} x "
            f"{height} x {width}; use them only where no other selector has removed tokens before"
        )
    return images, height, width
