"""Bookkeeping of prompts: which positions are visual, which stay, and how values follow them.

Layers of one model may be on several devices: results are where the values (hidden states,
attention, masks) are, and indices follow them. The small tensor functions appear by name in lowered
graphs. Shapes: B rows, N prompt positions,
V visual tokens of a row, K of them kept, M = N - V + K. Only K and V are constants; B and N stay
dynamic in an exported graph. Indices are ascending, so the order of the prompt is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from deos_fx.operator.gather import listed
from deos_fx.operator.scores import LOG_FLOOR

__all__ = [
    "are_visual",
    "beside",
    "class_token",
    "compact_positions",
    "first_of_prompt",
    "gate_bias",
    "grid_positions",
    "is_separator",
    "kept_in_prompt",
    "kept_of_kept",
    "kept_of_prompt",
    "known_of_kept",
    "last_of_prompt",
    "last_token",
    "mass_bias",
    "masses_of_prompt",
    "of_images",
    "of_prompts",
    "ones_at",
    "ones_like_tokens",
    "patch_bias",
    "patch_gate_bias",
    "put",
    "relaxed_grid_positions",
    "relaxed_positions",
    "shift_of",
    "take",
    "take_each",
    "take_in_each",
    "take_mask",
    "text_tokens",
    "trailing",
    "visual_after",
    "visual_positions",
    "with_patches",
]


def are_visual(input_ids: Tensor, image_token: int | tuple[int, ...]) -> Tensor:
    """Flags of the placeholders, of one kind or of several, in input_ids [B, N]."""
    if isinstance(image_token, int):
        return torch.eq(input_ids, image_token)
    return torch.isin(input_ids, torch.tensor(image_token, device=input_ids.device))


def beside(value: Tensor, tokens: Tensor) -> Tensor:
    """The value on the device that the tokens are on."""
    return value.to(tokens.device)


def visual_positions(
    input_ids: Tensor,
    image_token: int | tuple[int, ...],
    count: int,
    separators: Tensor | None = None,
) -> Tensor:
    """Positions of the image placeholders.

    Args:
        input_ids: [B, N].
        image_token: Id of the placeholder, or of each kind of placeholder.
        count: V, the number of placeholders of every row that are no separators.
        separators: None, or flags [B, N] of those that are.

    Returns:
        [B, V] int64, ascending.
    """
    visual = are_visual(input_ids, image_token)
    if separators is not None:
        visual = visual & ~separators
    return listed(visual.float(), count)


def is_separator(features: Tensor, newline: Tensor) -> Tensor:
    """Flags [...] of features [..., d] that are the learned end of an image row, newline [d]."""
    return (features == newline.to(features)).all(dim=-1)


def text_tokens(visual: Tensor, hidden: Tensor) -> Tensor:
    """Positions [B, N - V] of everything in hidden [B, N, d] but the visual tokens [B, V]."""
    flags = torch.ones(hidden.shape[:2], device=hidden.device)
    flags = flags.scatter(1, visual.to(hidden.device), 0.0)
    return listed(flags, hidden.shape[1] - visual.shape[1])


def class_token(hidden: Tensor) -> Tensor:
    """Position [I, 1] of the CLS token of a vision tower's hidden states [I, V + 1, d]."""
    return torch.zeros((hidden.shape[0], 1), dtype=torch.int64, device=hidden.device)


def last_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Position of the last token that is not padding.

    Args:
        hidden: [B, N] or [B, N, d]; only its shape is read.
        attention_mask: None or [B, N] with 1 for real tokens; padding may be on either side.

    Returns:
        [B, 1] int64.
    """
    batch, length = hidden.shape[:2]
    steps = torch.arange(length, device=hidden.device)
    if attention_mask is None:
        return steps[-1:].expand(batch, 1)
    return (attention_mask.to(steps.device) * steps).argmax(dim=1, keepdim=True)


def take(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Rows of `x` at `index`, per batch row.

    Args:
        x: [B or 1, N, ...] or, with dim = -1, [B or 1, ..., N]; a leading 1 is expanded.
        index: [B, M].
        dim: The axis that runs over tokens.

    Returns:
        `x` with N replaced by M.
    """
    x, index = x.movedim(dim, 1), index.to(x.device)
    batch, length = index.shape[0], x.shape[1]
    x = x.expand(batch, *x.shape[1:])
    # One Gather on flattened rows: an index per element (torch.gather) would move more bytes
    # than the tokens themselves.
    offset = torch.arange(batch, device=index.device)[:, None] * length
    rows = x.reshape(batch * length, *x.shape[2:]).index_select(0, (index + offset).flatten())
    return rows.reshape(batch, index.shape[1], *x.shape[2:]).movedim(1, dim)


def take_in_each(x: Tensor, index: Tensor) -> Tensor:
    """`take` of values [k, B or 1, N, ...] with k coordinates for each token: [k, B, M, ...]."""
    return torch.stack([take(coordinate, index) for coordinate in x.unbind(0)])


def take_each(
    parts: tuple[Tensor, ...], index: Tensor, dims: tuple[int | None, ...]
) -> tuple[Tensor, ...]:
    """`take` on every part of a tuple (cos, sin); parts whose axis is None stay as they are."""
    return tuple(
        part if dim is None else take(part, index, dim)
        for part, dim in zip(parts, dims, strict=True)
    )


def take_mask(mask: Tensor | BlockMask | None, index: Tensor) -> Tensor | BlockMask | None:
    """An attention mask restricted to kept tokens, on both axes.

    Args:
        mask: None, [B, N], or [B or 1, H, N, N] as transformers' mask functions return it, or what
            they return for flex_attention.
        index: [B, M].

    Returns:
        None, [B, M] or [B, H, M, M]: windows and bidirectional blocks keep original distances.
    """
    if isinstance(mask, BlockMask):
        visible, (batch, length) = mask.mask_mod, index.shape

        def kept(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible(row, head, index[row, query], index[row, key])

        return create_block_mask(kept, batch, None, length, length, device=index.device)
    if mask is None or mask.ndim == 2:
        return None if mask is None else take(mask, index)
    return take(take(mask, index, dim=2), index, dim=3)


def with_patches(hidden: Tensor, patches: Tensor, class_tokens: int) -> Tensor:
    """A tower's hidden states [I, c + V, d] with other patches: [I, c + K, d].

    Args:
        hidden: Hidden states; the c class tokens in front stay.
        patches: [I, K, d].
        class_tokens: c.
    """
    return torch.cat([hidden[:, :class_tokens], patches.to(hidden)], dim=1)


def patch_bias(mass: Tensor, class_tokens: int, beta: float) -> Tensor:
    """`mass_bias` in a vision tower: [I, c + K] from masses [I, K], 0 for the c class tokens."""
    return torch.nn.functional.pad(beta * mass.float().log(), (class_tokens, 0))


def kept_in_prompt(visual: Tensor, kept: Tensor, hidden: Tensor) -> Tensor:
    """Positions of all text and the kept visual tokens.

    Args:
        visual: [B, V] positions of the visual tokens.
        kept: [B, K] indices into `visual`.
        hidden: [B, N, d]; only its shape is read.

    Returns:
        [B, M] ascending.
    """
    visual, kept = visual.to(hidden.device), kept.to(hidden.device)
    stays = torch.zeros_like(visual, dtype=torch.float32).scatter(1, kept, 1.0)
    flags = torch.ones(hidden.shape[:2], device=hidden.device).scatter(1, visual, stays)
    return listed(flags, hidden.shape[1] - visual.shape[1] + kept.shape[1])


def kept_of_prompt(kept: Tensor, images: int, per_image: int) -> Tensor:
    """Indices kept in each image [B * images, K] as indices into a prompt's tokens.

    Args:
        kept: Indices into the tokens of one image.
        images: Images per prompt.
        per_image: Tokens of one image before the reduction.

    Returns:
        [B, images * K] ascending.
    """
    offset = torch.arange(images, device=kept.device)[:, None] * per_image
    return (kept.unflatten(0, (-1, images)) + offset).flatten(1)


def kept_of_kept(before: Tensor, kept: Tensor) -> Tensor:
    """What two reductions in a row keep, of the tokens that came to the first.

    Args:
        before: [I, K1] indices that the first kept; -1 stands for a copy of the CLS token.
        kept: [I, K2] indices into these, or -1.

    Returns:
        [I, K2].
    """
    kept = kept.to(before.device)
    return torch.where(kept < 0, kept, take(before, kept.clamp(min=0)))


def known_of_kept(x: Tensor, kept: Tensor) -> Tensor:
    """Values [B or 1, V, ...] of kept tokens [B, K]; a copy of the CLS token has the first's."""
    return take(x, kept.clamp(min=0))


def first_of_prompt(kept: Tensor, images: int, per_image: int) -> Tensor:
    """The placeholders of tokens that are not in the order of the image: each image's first K.

    Args:
        kept: [B * images, K]; only its shape is read.
        images: Images per prompt.
        per_image: Placeholders of one image.

    Returns:
        [B, images * K] ascending indices into a prompt's placeholders.
    """
    first = torch.arange(kept.shape[1], device=kept.device)
    return kept_of_prompt(first.expand(kept.shape[0], -1), images, per_image)


def last_of_prompt(kept: Tensor, images: int, per_image: int) -> Tensor:
    """`first_of_prompt` where prompts end in a placeholder, which stays: each image's last K."""
    return first_of_prompt(kept, images, per_image) + (per_image - kept.shape[1])


def of_images(x: Tensor, images: int) -> Tensor:
    """Visual tokens of prompts [B, images * V, d] as those of each image [B * images, V, d]."""
    return x.unflatten(1, (images, -1)).flatten(0, 1)


def of_prompts(x: Tensor, images: int) -> Tensor:
    """Tokens of each image [B * images, K, d] as those of prompts [B, images * K, d]."""
    return x.unflatten(0, (-1, images)).flatten(1, 2)


def masses_of_prompt(mass: Tensor, images: int) -> Tensor:
    """Masses of each image's tokens [B * images, K] as masses of a prompt's [B, images * K]."""
    return mass.unflatten(0, (-1, images)).flatten(1)


def mass_bias(mass: Tensor, visual: Tensor, hidden: Tensor, beta: float) -> Tensor:
    """What later attention adds to each key's logits: beta log m (proportional attention of ToMe).

    Args:
        mass: [B, K] masses of the visual tokens.
        visual: [B, K] their positions.
        hidden: [B, M, d]; only its shape is read.
        beta: 0 ignores masses, 1 counts a token as often as the tokens it stands for.

    Returns:
        [B, M] in float32, 0 at text tokens.
    """
    bias, mass = torch.zeros(hidden.shape[:2], device=hidden.device), mass.to(hidden.device)
    return bias.scatter(1, visual.to(hidden.device), beta * mass.float().log())


def visual_after(visual: Tensor, kept: Tensor) -> Tensor:
    """Positions [B, K] of the kept visual tokens in the shortened prompt."""
    kept = kept.to(visual.device)
    dropped_before = kept - torch.arange(kept.shape[1], device=kept.device)
    return take(visual, kept) - dropped_before


def put(hidden: Tensor, visual: Tensor, tokens: Tensor) -> Tensor:
    """Replace the rows of `hidden` [B, M, d] at `visual` [B, K] by `tokens` [B, K, d]."""
    index = visual.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.scatter(1, index, tokens.to(hidden))


def compact_positions(position_ids: Tensor, origin: Tensor) -> Tensor:
    """Position ids without gaps: each kept token moves down by the number dropped before it.

    Args:
        position_ids: [B or 1, N] of the unreduced prompt.
        origin: [B, M] original prompt positions of the kept tokens.

    Returns:
        [B, M].
    """
    origin = origin.to(position_ids.device)
    dropped_before = origin - torch.arange(origin.shape[1], device=origin.device)
    return take(position_ids, origin) - dropped_before


def trailing(origin: Tensor, visual: Tensor, position_ids: Tensor, images: int) -> Tensor:
    """Dropped visual tokens with no kept token of their image behind them.

    Args:
        origin: [B, M] original prompt positions of the tokens that are left.
        visual: [B, V] original prompt positions of all visual tokens, image by image.
        position_ids: [B or 1, N]; only its shape is read.
        images: Images per prompt.

    Returns:
        [B, N] int64, 1 at these tokens of the original prompt.
    """
    visual = visual.to(origin.device)
    batch, length = origin.shape[0], position_ids.shape[1]
    left = torch.zeros((batch, length), device=origin.device).scatter(1, origin, 1.0)
    return _trailing(take(left, visual), visual, length, images)


def _trailing(left: Tensor, visual: Tensor, length: int, images: int) -> Tensor:
    """`trailing` from flags [B, V] of what is left: last_j = max over its kept tokens of place."""
    per_image = left.unflatten(1, (images, -1))
    place = torch.arange(1, per_image.shape[2] + 1, device=left.device)
    last = (per_image * place).amax(dim=2, keepdim=True)
    behind = (place > last).to(torch.int64).flatten(1)
    nothing = torch.zeros((left.shape[0], length), dtype=torch.int64, device=left.device)
    return nothing.scatter(1, visual, behind)


def grid_positions(position_ids: Tensor, trailing: Tensor, origin: Tensor) -> Tensor:
    """Position ids that keep a token's place in its image.

    Everything behind an image moves up to follow the last token that is kept of it (the rule of
    OpenVINO GenAI for positions in two dimensions, in one).

    Args:
        position_ids: [B or 1, N] of the unreduced prompt.
        trailing: [B, N], see `trailing`.
        origin: [B, M] original prompt positions of the kept tokens.

    Returns:
        [B, M].
    """
    return take(position_ids - trailing.to(position_ids.device).cumsum(dim=1), origin)


def shift_of(trailing: Tensor) -> Tensor:
    """How far [B, 1] the tokens behind the prompt move up, from `trailing` [B, N]."""
    return trailing.sum(dim=1, keepdim=True)


def relaxed_grid_positions(
    position_ids: Tensor, alive: Tensor, visual: Tensor, images: int
) -> Tensor:
    """`grid_positions` where no token leaves.

    Args:
        position_ids: [B or 1, N] of the unreduced prompt.
        alive: Gates [B, V]; below one half counts as dropped. No gradient flows.
        visual: [B, V].
        images: Images per prompt.

    Returns:
        [B, N].
    """
    left = (alive.detach() >= 0.5).float()
    return position_ids - _trailing(left, visual, position_ids.shape[1], images).cumsum(dim=1)


def relaxed_positions(
    position_ids: Tensor, alive: Tensor, visual: Tensor, hidden: Tensor
) -> Tensor:
    """`compact_positions` where no token leaves: each token moves down by the closed gates before.

    Args:
        position_ids: [B or 1, N] of the unreduced prompt.
        alive: Gates [B, V]; below one half counts as dropped. No gradient flows.
        visual: [B, V].
        hidden: [B, N, d]; only its shape is read.

    Returns:
        [B, N].
    """
    closed = (alive.detach() < 0.5).to(torch.int64)
    dropped = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    dropped = dropped.scatter(1, visual, closed)
    return position_ids - (dropped.cumsum(dim=1) - dropped)


def gate_bias(alive: Tensor, mass: Tensor, beta: Tensor, visual: Tensor, hidden: Tensor) -> Tensor:
    """What relaxed reductions add to the logits of each key: log(gate) + beta log(mass).

    Args:
        alive: Gates [B, V].
        mass: [B, V].
        beta: 0-dim.
        visual: [B, V].
        hidden: [B, N, d]; only its shape is read.

    Returns:
        [B, N] in float32, 0 at text tokens.
    """
    bias = alive.float().clamp_min(LOG_FLOOR).log() + beta * mass.float().log()
    zeros = torch.zeros(hidden.shape[:2], device=hidden.device)
    return zeros.scatter(1, visual, bias)


def patch_gate_bias(alive: Tensor, mass: Tensor, beta: Tensor, class_tokens: int) -> Tensor:
    """`gate_bias` in a vision tower: [I, c + V] from gates and masses [I, V], 0 for class tokens.

    Args:
        alive: Gates.
        mass: Masses.
        beta: 0-dim.
        class_tokens: c.
    """
    bias = alive.float().clamp_min(LOG_FLOOR).log() + beta * mass.float().log()
    return torch.nn.functional.pad(bias, (class_tokens, 0))


def ones_at(visual: Tensor) -> Tensor:
    """Open gates [B, V] for visual positions [B, V]."""
    return torch.ones_like(visual, dtype=torch.float32)


def ones_like_tokens(visual: Tensor) -> Tensor:
    """Open gates [I, V] for visual tokens [I, V, d]."""
    return torch.ones(visual.shape[:2], device=visual.device)
