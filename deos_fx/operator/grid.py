"""The grid of an image: places of pooling windows, and weights of its tokens in them."""

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
    """Return indices [1, K] of tokens evenly spread over the grid: the centres of pooling windows.

    Window i of n along a side of N covers [i N/n, (i+1) N/n), and its centre is rounded down.
    Where the windows divide the grid, assigning every token to its nearest anchor, ties to the
    first, then gives exactly the windows of ``avg_pool2d``. A count that no division of the grid
    gives is spread over bands of rows, some of which have one window more than others.

    Args:
        grid: Image, row and column of every token, a constant [V, 3] (or [1, V, 3]): the complete
            grids of one or more images of one size, image by image, row by row.
        count: Number of anchors over all images together.

    Raises:
        ValueError: If the grid is incomplete, or the anchors do not split evenly over images.
    """
    images, height, width = _complete(grid)
    if count % images:
        raise ValueError(f"{count} anchors do not split evenly over {images} images")
    bands = _bands(height, width, count // images)
    rows = _centres(height, len(bands))
    places = [r * width + c for r, n in zip(rows, bands, strict=True) for c in _centres(width, n)]
    anchors = [k * height * width + place for k in range(images) for place in places]
    return torch.tensor([anchors], device=grid.device)


def grid_preference(grid: Tensor, count: int) -> Tensor:
    """Return a constant score [1, V] whose best tokens are grid anchors, to search over the count.

    1. On the anchors, the score is 1. So it selects exactly what ``grid_anchors`` does.
    2. Elsewhere, and on an incomplete grid, it is ``grid_coverage``, which is at most 0.

    Args:
        grid: Image, row and column of every token, a constant [V, 3].
        count: Number of tokens to prefer.
    """
    images, height, width = _sides(grid)
    if not 0 < grid.shape[-2] == images * height * width:
        # Case: the grid is incomplete or empty, so it has no windows.
        return grid_coverage(grid)
    anchors = grid_anchors(grid, max(count // images, 1) * images)
    chosen = F.one_hot(anchors, grid.shape[-2]).sum(dim=1)
    return torch.where(chosen > 0, 1.0, grid_coverage(grid))


def _sides(grid: Tensor) -> tuple[int, int, int]:
    """Count the images, rows and columns that occur in a grid."""
    image, row, column = (axis.unique() for axis in grid.reshape(-1, 3).unbind(-1))
    return len(image), len(row), len(column)


def _centres(side: int, windows: int) -> list[int]:
    """Return the place of each window's centre along one side, rounded down."""
    # floor((i + 1/2) side / windows - 1/2), in whole numbers.
    return [((2 * i + 1) * side - windows) // (2 * windows) for i in range(windows)]


def _bands(height: int, width: int, count: int) -> list[int]:
    """Return how many windows each band of rows has: equally many where a layout allows that."""
    layouts = _layouts(height, width, count, float("inf"))
    if layouts:
        *_, down, across = min(layouts)
        return [across] * down
    # As many bands as make windows the squarest; each has one, and none is narrower than a token.
    squarest = round((count * height / width) ** 0.5)
    down = max(min(squarest, height, count), -(-count // width))
    # Band i ends behind window (i + 1) count / down of all, rounded down.
    ends = [(i + 1) * count // down for i in range(down)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def grid_layout(
    height: int, width: int, count: int, *, aspect: float = float("inf")
) -> tuple[int, int]:
    """Split a grid into ``count`` windows: return how many go down and how many across.

    Windows that divide the grid and are at most twice as long as wide are preferred (they are the
    windows of ``avg_pool2d``), and among those the squarest.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        count: Number of windows.
        aspect: The largest ratio allowed of a window's long side to its short side.

    Raises:
        ValueError: If no layout has ``count`` windows; the message names the nearest counts.
    """
    layouts = _layouts(height, width, count, aspect)
    if layouts:
        return min(layouts)[2:]
    # Counts that have a layout, the nearest first.
    near = sorted(range(1, height * width + 1), key=lambda n: abs(n - count))
    good = [n for n in near if _layouts(height, width, n, aspect)][:3]
    raise ValueError(
        f"{count} windows do not fit a grid of {height} x {width} tokens; keep one of {good}"
    )


def _layouts(
    height: int, width: int, count: int, aspect: float
) -> list[tuple[bool, float, int, int]]:
    """List the layouts of ``count`` windows; the smallest tuple is the best one.

    Returns:
        Whether the windows are uneven or long, the ratio of their sides, and how many go down and
        across.
    """
    found = []
    for down in range(1, min(height, count) + 1):
        across, rest = divmod(count, down)
        # Windows must fill the grid and be at least one token wide.
        if rest or across > width:
            continue
        window = (height / down) / (width / across)
        shape = max(window, 1 / window)
        uneven = bool(height % down or width % across) or shape > 2
        if shape <= aspect:
            found.append((uneven, shape, down, across))
    return found


def window_members(grid: Tensor, windows: int) -> Tensor:
    """Return the tokens of each window, indices [W, m], for images cut into equal windows.

    Args:
        grid: Image, row and column of every token, a constant [V, 3]: complete grids.
        windows: Number of windows in one image.

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
    # [images, down, rows of a window, across, columns of a window]
    cells = index.view(images, down, height // down, across, width // across)
    return cells.transpose(2, 3).reshape(images * windows, -1)


def columns(grid: Tensor) -> int:
    """Return the number of tokens in one row of an image, given complete grids [V, 3]."""
    return _complete(grid)[2]


def interpolation(grid: Tensor, count: int) -> Tensor:
    """Return bilinear interpolation onto a coarser grid as an assignment to the window centres.

    Output i of n along a side of N is sampled at (i + 0.5) N / n - 0.5 (``interpolate`` without
    aligned corners). With the weights W of all tokens in all outputs, and the token at the lower
    corner of each sample as the one that is kept, P_ij = W_ij / W_ii: a mean with these weights is
    the interpolated value.

    Args:
        grid: Image, row and column of every token, a constant [V, 3]: complete grids.
        count: Outputs over all images together.

    Returns:
        P [1, K, V], 0 between a token and itself.
    """
    images, height, width = _complete(grid)
    bands = _bands(height, width, count // images)
    rows = _samples(height, len(bands))
    parts = [
        torch.einsum("y,jx->jyx", row, _samples(width, across)).flatten(1)
        for row, across in zip(rows, bands, strict=True)
    ]
    weights = torch.cat(parts)
    weights = torch.block_diag(*[weights] * images).to(grid.device)
    kept = grid_anchors(grid, count)
    # W_ii: the weight of the kept token in its own output.
    own = weights.gather(1, kept.mT)
    return (weights / own).scatter(1, kept.mT, 0.0).unsqueeze(0)


def _samples(side: int, windows: int) -> Tensor:
    """Return the weights [windows, side] of linear interpolation along one side."""
    place = (torch.arange(windows, dtype=torch.float64) + 0.5) * side / windows - 0.5
    # A token at distance 1 or more from the sample has no weight.
    distance = (place.unsqueeze(-1) - torch.arange(side)).abs()
    return (1 - distance).clamp_min(0).float()


def _complete(grid: Tensor) -> tuple[int, int, int]:
    """Return the numbers of images, rows and columns, and refuse incomplete grids."""
    images, height, width = _sides(grid)
    if images * height * width != grid.shape[-2]:
        raise ValueError(
            f"windows need complete grids, but {grid.shape[-2]} tokens are not {images} x "
            f"{height} x {width}; use them only where no other selector has removed tokens before"
        )
    return images, height, width
