"""Find the visual tokens in a prompt, and compute position ids after a reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from deos_fx.operator.gather import listed
from deos_fx.tokens.index import take

__all__ = [
    "are_open",
    "are_visual",
    "class_token",
    "compact_positions",
    "grid_positions",
    "is_separator",
    "last_token",
    "relaxed_positions",
    "shift_of",
    "text_tokens",
    "trailing",
    "visual_positions",
]


def are_visual(input_ids: Tensor, image_token: int | tuple[int, ...]) -> Tensor:
    """Flag the placeholders, of one kind or of several, in input_ids [B, N]."""
    # Case: one kind, which exports to a single operator.
    if isinstance(image_token, int):
        return torch.eq(input_ids, image_token)
    return torch.isin(input_ids, torch.tensor(image_token, device=input_ids.device))


def visual_positions(
    input_ids: Tensor,
    image_token: int | tuple[int, ...],
    count: int,
    separators: Tensor | None = None,
) -> Tensor:
    """Return the positions of the image placeholders.

    Args:
        input_ids: [B, N].
        image_token: Id of the placeholder, or of each kind of placeholder.
        count: V, the number of placeholders in every row that are not separators.
        separators: None, or flags [B, N] of the placeholders that are separators.

    Returns:
        [B, V] int64, ascending.
    """
    visual = are_visual(input_ids, image_token)
    if separators is not None:
        visual = visual & ~separators
    return listed(visual.float(), count)


def is_separator(features: Tensor, newline: Tensor) -> Tensor:
    """Return flags [...] of features [..., d] that equal the learned row end, newline [d]."""
    return (features == newline.to(features)).all(dim=-1)


def text_tokens(visual: Tensor, hidden: Tensor) -> Tensor:
    """Return positions [B, N - V] of everything in [B, N, d] but the visual tokens [B, V]."""
    # 1 everywhere but at the visual tokens; `listed` turns flags into positions.
    flags = torch.ones(hidden.shape[:2], device=hidden.device)
    flags = flags.scatter(1, visual.to(hidden.device), 0.0)
    return listed(flags, hidden.shape[1] - visual.shape[1])


def class_token(hidden: Tensor) -> Tensor:
    """Return the position [I, 1] of the CLS token in a tower's hidden states [I, V + 1, d]."""
    return torch.zeros((hidden.shape[0], 1), dtype=torch.int64, device=hidden.device)


def last_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the position of each row's last token that is not padding.

    Args:
        hidden: [B, N] or [B, N, d]; only its shape is read.
        attention_mask: None or [B, N] with 1 for real tokens; padding may be on either side.

    Returns:
        [B, 1] int64.
    """
    batch, length = hidden.shape[:2]
    steps = torch.arange(length, device=hidden.device)
    # Case: no padding.
    if attention_mask is None:
        return steps[-1:].expand(batch, 1)
    # The largest place of a real token, whichever side the padding is on.
    return (attention_mask.to(steps.device) * steps).argmax(dim=1, keepdim=True)


def compact_positions(position_ids: Tensor, origin: Tensor) -> Tensor:
    """Return position ids without gaps, lowered by the number of tokens dropped before each.

    Args:
        position_ids: [B or 1, N] of the unreduced prompt.
        origin: [B, M] original prompt positions of the kept tokens.

    Returns:
        [B, M].
    """
    # The j-th token left was at origin[j], so origin[j] - j tokens before it were dropped.
    origin = origin.to(position_ids.device)
    dropped_before = origin - torch.arange(origin.shape[1], device=origin.device)
    return take(position_ids, origin) - dropped_before


def trailing(
    origin: Tensor,
    visual: Tensor,
    position_ids: Tensor,
    images: int,
    is_open: Tensor | None = None,
) -> Tensor:
    """Flag the dropped visual tokens that no kept token of their image follows.

    Args:
        origin: [B, M] original prompt positions of the tokens that are left.
        visual: [B, V] original prompt positions of all visual tokens, image by image.
        position_ids: [B or 1, N]; only its shape is read.
        images: Images per prompt.
        is_open: In the relaxed form: flags [B, M] of the tokens that do not count as dropped.

    Returns:
        [B, N] int64 over the original prompt, 1 at these tokens.
    """
    visual = visual.to(origin.device)
    batch, length = origin.shape[0], position_ids.shape[1]
    ones: Tensor | float = 1.0 if is_open is None else is_open.float()
    flags = torch.zeros((batch, length), device=origin.device).scatter(1, origin, ones)
    left = take(flags, visual)
    # Places count from 1, so that 0 says that no token of the image is left.
    per_image = left.unflatten(1, (images, -1))
    place = torch.arange(1, per_image.shape[2] + 1, device=left.device)
    last = (per_image * place).amax(dim=2, keepdim=True)
    trails = (place > last).to(torch.int64).flatten(1)
    nothing = torch.zeros((left.shape[0], length), dtype=torch.int64, device=left.device)
    return nothing.scatter(1, visual, trails)


def grid_positions(position_ids: Tensor, trailing: Tensor, origin: Tensor) -> Tensor:
    """Return position ids in which tokens keep their place in their image.

    Everything after an image moves up, to follow the last token that is kept of it. This is the
    rule of OpenVINO GenAI for two-dimensional positions, applied to one dimension.

    Args:
        position_ids: [B or 1, N] of the unreduced prompt.
        trailing: [B, N], see `trailing`.
        origin: [B, M] original prompt positions of the kept tokens.

    Returns:
        [B, M].
    """
    return take(position_ids - trailing.to(position_ids.device).cumsum(dim=1), origin)


def shift_of(trailing: Tensor) -> Tensor:
    """Return how far [B, 1] tokens after the prompt move up, from `trailing` [B, N]."""
    return trailing.sum(dim=1, keepdim=True)


def are_open(alive: Tensor, visual: Tensor, hidden: Tensor) -> Tensor:
    """Return flags [B, M] of text, and of visual tokens whose gates are at least half open.

    Args:
        alive: Gates [B, K] of the visual tokens. No gradient flows: positions are whole numbers.
        visual: [B, K] their positions.
        hidden: [B, M, d]; only its shape is read.
    """
    flags = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    return flags.scatter(1, visual, (alive.detach() >= 0.5).to(torch.int64))


def relaxed_positions(position_ids: Tensor, origin: Tensor, is_open: Tensor) -> Tensor:
    """Return `compact_positions` in the relaxed form: tokens that are not open count as dropped.

    Args:
        position_ids: [B or 1, N] of the unreduced prompt.
        origin: [B, M] original prompt positions of the tokens in the sequence.
        is_open: Flags [B, M].

    Returns:
        [B, M].
    """
    # Open tokens before each: an exclusive sum, since its own gate does not move a token.
    before = is_open.cumsum(dim=1) - is_open
    return take(position_ids, origin) - (origin - before)
