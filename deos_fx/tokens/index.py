"""Compute indices into prompts: which tokens stay, and how values are re-indexed.

These small tensor functions appear by name in lowered graphs.

- Shapes: B rows, N prompt positions, I images, V visual tokens of a row, K of them kept, and
  M = N - V + K tokens left. Only K and V are constants; B and N stay dynamic in an exported graph.
- Indices are ascending, so the order of the prompt is kept.
- The layers of a model may be on several devices: results are on the device of the values (hidden
  states, attention, masks), and indices are moved there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from deos_fx.operator.gather import listed

__all__ = [
    "beside",
    "first_of_prompt",
    "kept_in_prompt",
    "kept_of_kept",
    "kept_of_prompt",
    "known_of_kept",
    "last_of_prompt",
    "masses_of_prompt",
    "of_images",
    "of_prompts",
    "put",
    "streams_in_row",
    "take",
    "take_each",
    "take_in_each",
    "take_mask",
    "visual_after",
    "with_patches",
]


def beside(value: Tensor, tokens: Tensor) -> Tensor:
    """Move a value to the device that the tokens are on."""
    return value.to(tokens.device)


def take(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Take the tokens of `x` at `index`, for each row of the batch.

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
    # One Gather on flattened rows: torch.gather has an index per element, which would move more
    # bytes than the tokens themselves.
    offset = torch.arange(batch, device=index.device)[:, None] * length
    rows = x.reshape(batch * length, *x.shape[2:]).index_select(0, (index + offset).flatten())
    return rows.reshape(batch, index.shape[1], *x.shape[2:]).movedim(1, dim)


def take_in_each(x: Tensor, index: Tensor) -> Tensor:
    """Apply `take` to values [k, B or 1, N, ...] of k coordinates per token: [k, B, M, ...]."""
    return torch.stack([take(coordinate, index) for coordinate in x.unbind(0)])


def take_each(
    parts: tuple[Tensor, ...], index: Tensor, dims: tuple[int | None, ...]
) -> tuple[Tensor, ...]:
    """Apply `take` to every part of a tuple (cos, sin); parts whose axis is None stay as is."""
    return tuple(
        part if dim is None else take(part, index, dim)
        for part, dim in zip(parts, dims, strict=True)
    )


def take_mask(mask: Tensor | BlockMask | None, index: Tensor) -> Tensor | BlockMask | None:
    """Restrict an attention mask to kept tokens, on both axes.

    Args:
        mask: None, [B, N], [B or 1, H, N, N] as transformers' mask functions return it, or the
            BlockMask that they return for flex_attention.
        index: [B, M].

    Returns:
        None, [B, M], [B, H, M, M] or a BlockMask; windows and bidirectional blocks keep the
        original distances.
    """
    if isinstance(mask, BlockMask):
        visible, (batch, length) = mask.mask_mod, index.shape

        # A BlockMask is a function of places, so the function is asked for the original ones.
        def kept(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible(row, head, index[row, query], index[row, key])

        return create_block_mask(kept, batch, None, length, length, device=index.device)
    # Case: flags of real tokens, or no mask.
    if mask is None or mask.ndim == 2:
        return None if mask is None else take(mask, index)
    # Case: queries and keys.
    return take(take(mask, index, dim=2), index, dim=3)


def with_patches(hidden: Tensor, patches: Tensor, class_tokens: int) -> Tensor:
    """Replace the patches in a tower's hidden states [I, c + V, d]: [I, c + K, d].

    Args:
        hidden: Hidden states; the c class tokens in front stay.
        patches: [I, K, d].
        class_tokens: c.
    """
    return torch.cat([hidden[:, :class_tokens], patches.to(hidden)], dim=1)


def kept_in_prompt(visual: Tensor, kept: Tensor, hidden: Tensor) -> Tensor:
    """Return the positions of all text and of the kept visual tokens.

    Args:
        visual: [B, V] positions of the visual tokens.
        kept: [B, K] indices into `visual`.
        hidden: [B, N, d]; only its shape is read.

    Returns:
        [B, M] ascending.
    """
    # 1 for text, and for visual tokens that are kept; `listed` turns the flags into M positions.
    visual, kept = visual.to(hidden.device), kept.to(hidden.device)
    stays = torch.zeros_like(visual, dtype=torch.float32).scatter(1, kept, 1.0)
    flags = torch.ones(hidden.shape[:2], device=hidden.device).scatter(1, visual, stays)
    return listed(flags, hidden.shape[1] - visual.shape[1] + kept.shape[1])


def kept_of_prompt(kept: Tensor, images: int, per_image: int) -> Tensor:
    """Turn indices kept in each image [B * images, K] into indices into a prompt's visual tokens.

    Args:
        kept: Indices into the tokens of one image.
        images: Images per prompt.
        per_image: Tokens of one image before the reduction.

    Returns:
        [B, images * K] ascending.
    """
    # Images of a prompt are consecutive rows; token j of image i is number i * per_image + j.
    offset = torch.arange(images, device=kept.device)[:, None] * per_image
    return (kept.unflatten(0, (-1, images)) + offset).flatten(1)


def kept_of_kept(before: Tensor, kept: Tensor) -> Tensor:
    """Return the indices that two successive reductions keep of the tokens that reach the first.

    Args:
        before: [I, K1] indices that the first kept; -1 stands for a copy of the CLS token.
        kept: [I, K2] indices into these, or -1.

    Returns:
        [I, K2].
    """
    kept = kept.to(before.device)
    # -1 would index from the end: take any token in its place, and then put -1 back.
    return torch.where(kept < 0, kept, take(before, kept.clamp(min=0)))


def known_of_kept(x: Tensor, kept: Tensor) -> Tensor:
    """Take values [B or 1, V, ...] of kept tokens [B, K]; a copy of CLS gets the first token's."""
    return take(x, kept.clamp(min=0))


def first_of_prompt(kept: Tensor, images: int, per_image: int) -> Tensor:
    """Return the placeholders that tokens out of the image's order take: each image's first K.

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
    """Return each image's last K placeholders, as `first_of_prompt` does for the first.

    They are taken if prompts end in a placeholder, so that this one stays the last.
    """
    return first_of_prompt(kept, images, per_image) + (per_image - kept.shape[1])


def of_images(x: Tensor, images: int) -> Tensor:
    """Split visual tokens of prompts [B, images * V, d] by image: [B * images, V, d]."""
    return x.unflatten(1, (images, -1)).flatten(0, 1)


def of_prompts(x: Tensor, images: int) -> Tensor:
    """Join tokens of images [B * images, K, d] by prompt: [B, images * K, d]."""
    return x.unflatten(0, (-1, images)).flatten(1, 2)


def masses_of_prompt(mass: Tensor, images: int) -> Tensor:
    """Join masses of images' tokens [B * images, K] by prompt: [B, images * K]."""
    return mass.unflatten(0, (-1, images)).flatten(1)


def visual_after(visual: Tensor, kept: Tensor) -> Tensor:
    """Return the positions [B, K] of the kept visual tokens in the shortened prompt."""
    # The j-th kept token had index kept[j], so kept[j] - j tokens before it were dropped.
    kept = kept.to(visual.device)
    dropped_before = kept - torch.arange(kept.shape[1], device=kept.device)
    return take(visual, kept) - dropped_before


def put(hidden: Tensor, visual: Tensor, tokens: Tensor) -> Tensor:
    """Replace the rows of `hidden` [B, M, d] at `visual` [B, K] by `tokens` [B, K, d].

    Hidden states of several streams [B, M, s, d] take tokens [B, K, s d].
    """
    index = visual.to(hidden.device)[..., None]
    if hidden.ndim > 3:
        tokens, index = tokens.unflatten(2, hidden.shape[2:]), index[..., None]
    # scatter takes an index for every element; the expanded one occupies no memory.
    return hidden.scatter(1, index.expand(-1, -1, *hidden.shape[2:]), tokens.to(hidden))


def streams_in_row(x: Tensor) -> Tensor:
    """Put the streams of hidden states [B, N, s, d] side by side: [B, N, s d]."""
    return x.flatten(2)
