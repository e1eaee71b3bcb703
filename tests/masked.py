"""An oracle: the original model, whose layers do not see the keys that a reduction has dropped."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from closeness import ROUNDINGS, assert_close, difference
from torch import Tensor

from deos_fx.models.facts import facts_of
from deos_fx.models.families import MARKS
from deos_fx.models.upstream import CACHE

STEPS = 3


def assert_pruning_is_masking(
    model: Any,
    reduced: Any,
    batch: dict[str, Tensor],
    roundings: float = ROUNDINGS,
    tower: Callable[[Tensor], Any] = contextlib.nullcontext,
) -> None:
    """Fail unless a model that prunes equals the original one that does not see what was pruned.

    Logits are compared in the prefill and token by token. Any model will do, also one that
    transformers does not have.

    Args:
        model: The original model.
        reduced: The same model with a policy that only prunes, at least one token of every prompt.
        batch: Prompts with images or videos, with or without padding.
        roundings: See `closeness.assert_close`.
        tower: Makes a context in which the tower of the original does not see what was pruned
            there, from flags [B, N] of the tokens that reach the first layer of the decoder.
    """
    facts = facts_of(model)
    placeholders = [token for token in (facts.image_token, facts.video_token) if token is not None]
    output, unreduced = reduced(**batch), model(**batch).logits
    whole_ids, attended = sequence_of(batch, unreduced, facts.image_token)
    last, alive = output[CACHE].spaces[-1], alive_of(output[CACHE], whole_ids)
    visual = torch.isin(whole_ids, torch.tensor(placeholders))
    if MARKS in batch:
        visual = batch[MARKS] == 1
    for kept in alive.values():
        assert kept[~visual].all() and (~kept).any(dim=1).all()
    with masked_from(model, alive), tower(alive[min(alive)]):
        whole = model(**batch).logits
        tokens, logits = generate(model, batch)
    left, real = alive[last.first_layer] & attended, attended.gather(1, last.origin)
    assert_close(output.logits[real], whole[left], roundings)
    # The mask matters, so the comparison says something.
    assert difference(unreduced[left], whole[left]) > 1e-3
    our_tokens, our_logits = generate(reduced, batch)
    assert torch.equal(our_tokens, tokens)
    assert_close(our_logits, logits, roundings)


def sequence_of(
    batch: dict[str, Tensor], logits: Tensor, image_token: int
) -> tuple[Tensor, Tensor]:
    """Ids [B, N] of the sequence that logits [B, N, vocabulary] are of, and what of it is real.

    It is longer than the text if the model puts images in front of that.
    """
    ids = batch["input_ids"]
    # Without a mask nothing is padding.
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    front = torch.full((len(ids), logits.shape[1] - ids.shape[1]), image_token)
    return torch.cat([front, ids], dim=1), torch.cat([torch.ones_like(front).bool(), mask], dim=1)


def layers_of(model: Any) -> list[Any]:
    """The decoder layers of a model."""
    return [model.get_submodule(path) for path in facts_of(model).blocks.decoder]


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens and logits [B, STEPS, vocabulary] of greedy decoding."""
    batch = {name: value.clone() for name, value in batch.items()}
    output = model.generate(
        **batch,
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return output.sequences[:, -STEPS:], torch.stack(output.logits, dim=1)


def alive_of(cache: Any, prompt: Tensor) -> dict[int, Tensor]:
    """First layer -> flags [B, N] of the prompt's tokens that it and those after it hold."""
    nothing = torch.zeros(prompt.shape, dtype=torch.bool)
    return {space.first_layer: nothing.scatter(1, space.origin, True) for space in cache.spaces}


@contextlib.contextmanager
def masked_from(model: Any, alive: dict[int, Tensor]) -> Iterator[Any]:
    """The model with keys masked from some layers on, in calls with and without a cache.

    Args:
        model: The original model.
        alive: See `alive_of`; everything after the prompt is seen.
    """
    handles = []
    for i, layer in enumerate(layers_of(model)):
        first = max((start for start in alive if start <= i), default=None)
        if first is not None:
            hook = _hide(alive[first], i)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _hide(alive: Tensor, layer: int) -> Any:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        # Gemma 3n has streams of hidden states in front.
        axes = args[0].shape[1:] if hasattr(module, "altup") else args[0].shape
        rows, new = axes[:2]
        if "attention_mask" not in kwargs:
            # Case: a layer that is given its mask by place.
            names = inspect.signature(module.forward).parameters
            args, kwargs = args[:1], kwargs | dict(zip(list(names)[1:], args[1:], strict=False))
        cache = kwargs.get(CACHE)
        seen = new + (0 if cache is None else cache.get_seq_length(layer))
        index = getattr(cache.layers[layer], "indexer_keys", None) if cache else None
        if seen == new and index is not None:
            # Case: a layer with an index of keys that another one holds.
            seen += index.shape[1]
        mask = kwargs["attention_mask"]
        if mask is None:
            # Additive, which every implementation of attention takes.
            later = torch.ones(1, 1, new, seen, dtype=torch.bool).triu(seen - new + 1)
            mask = args[0].new_zeros(later.shape).masked_fill(later, torch.finfo(args[0].dtype).min)
        # A window holds the last keys only.
        held = torch.arange(seen)[-mask.shape[-1] :]
        # Beams and several answers are further rows of one prompt.
        prompt = alive.repeat_interleave(rows // len(alive), dim=0)
        keys = torch.cat([prompt, torch.ones(rows, seen - prompt.shape[1]).bool()], dim=1)
        itself = torch.arange(seen - new, seen)[:, None] == held
        hidden = ~(keys[:, None, None, held] | itself)
        if mask.dtype == torch.bool:
            mask = mask & ~hidden
        else:
            mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    return hook
