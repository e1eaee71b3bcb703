"""Run transformers' own `generate` on a callable in place of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from deos_fx.inputs.batch import media_of_rows
from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.inputs.items import has_images
from deos_fx.inputs.turns import new_tokens
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.models.views import shallow_copy
from deos_fx.tokens.cache import ReducedCache

__all__ = ["generation_host"]


def generation_host(
    call: Callable[..., ModelOutput],
    model: PreTrainedModel,
    new_cache: Callable[[], ReducedCache],
    device: torch.device | None = None,
) -> Any:
    """Make a view of a model whose forward is another callable, to use transformers' `generate`.

    The view shares all weights and configs with the model. Its class is a subclass of the model's,
    with a few private methods overridden; `deos_fx.models.upstream` lists them.

    Args:
        call: Takes the arguments of the model's forward.
        model: The model; its weights are not used and may be on the meta device.
        new_cache: Makes the cache of a new conversation.
        device: The device for inputs of `call`, if that is not the model's.

    Returns:
        The host; the model is left as it is.
    """

    facts = facts_of(model)
    original: Any = type(facts.text_model)

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> ModelOutput:
        # A prefill: hand what `generate` computed about positions to the cache, which keeps it for
        # later turns.
        cache = kwargs.get(CACHE)
        if _brings_images(self, kwargs):
            # A later turn: the cache has to learn how positions go on, as in `positions`.
            kwargs.pop("position_ids", None)
        elif isinstance(cache, ReducedCache) and not cache.get_seq_length():
            deltas = getattr(self.base_model, "rope_deltas", None)
            if deltas is not None:
                # Beams and several answers repeat the row of their prompt.
                answers = len(kwargs["input_ids"]) // len(deltas)
                cache.rope_deltas = deltas.repeat_interleave(answers, dim=0)
        return call(*args, **kwargs)

    # By its names, generate decides what to pass.
    forward.__signature__ = facts.arguments  # type: ignore[attr-defined]

    def keep_pixels(self: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        # transformers would encode the images before the prefill; here the graph does that.
        return model_kwargs

    def expand(
        self: Any, expand_size: int = 1, *args: Any, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        # For beams, transformers repeats every row of a tensor; flat lists of images need all
        # images of a prompt together.
        media: dict[str, Any] = {}
        if expand_size > 1 and has_images(kwargs):
            given = Call.of(facts, {**kwargs, "input_ids": input_ids})
            rows = [row for row in range(len(given.prompts)) for _ in range(expand_size)]
            media = media_of_rows(given, rows)
        others = {name: value for name, value in kwargs.items() if name not in media}
        ids, others = original._expand_inputs_for_generation(
            self, expand_size, *args, input_ids=input_ids, **others
        )
        return ids, others | media

    def prepare_cache(
        self: Any, config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        given = model_kwargs.get(CACHE)
        _check_cache(config, given)
        if facts.in_front and given is not None and given.get_seq_length():
            raise ValueError(
                f"generate takes what {CACHE} holds for the first tokens of input_ids, and "
                f"{facts.name} holds images there, which it puts in front of the text itself. Call "
                f"the model with the new tokens and {CACHE}, or generate without it."
            )
        if given is not None:
            # transformers' own flag: what `generate` rolls back at the end must be rolled back here
            # too.
            given._is_user_defined = True
        elif config.use_cache is not False:
            # Case: a new conversation.
            model_kwargs[CACHE] = new_cache()

    def positions(self: Any, inputs: Any, model_kwargs: dict[str, Any]) -> Any:
        # Some models remember how positions continue, perhaps from another text; the cache knows
        # its own.
        cache = model_kwargs.get(CACHE)
        if isinstance(cache, ReducedCache) and cache.get_seq_length():
            if _brings_images(self, model_kwargs):
                # Case: new images, whose positions depend on their sizes.
                ids = {"input_ids": inputs, **model_kwargs}
                turn = new_tokens(ids, cache.get_seq_length())
                given = turn | {CACHE: cache, "attention_mask": model_kwargs["attention_mask"]}
                return completed(Call.of(facts, given)).inputs["position_ids"]
            if hasattr(self.base_model, "rope_deltas"):
                self.base_model.rope_deltas = cache.rope_deltas
        return original._prepare_position_ids_for_generation(self, inputs, model_kwargs)

    def candidates(self: Any, **kwargs: Any) -> Any:
        _check_candidates(kwargs["generation_config"], kwargs["model_kwargs"])
        # Assisted decoding: a generator proposes tokens, and the model checks several at once.
        generator = original._get_candidate_generator(self, **kwargs)
        propose = generator.get_candidates

        def after_prompt(*args: Any, **options: Any) -> Any:
            # transformers passes the prompt and the first candidates in one call. A reduction would
            # take the last candidate for the last token of the prompt, so candidates are left out.
            # The generator still runs, since a draft model sets up its own cache in this call. From
            # the next call on, its method is back.
            generator.get_candidates = propose
            propose(*args, **options)
            return args[0], None

        generator.get_candidates = after_prompt
        return generator

    replaced: dict[str, Any] = {
        "forward": forward,
        "_prepare_multimodal_encoder_kwargs_for_generation": keep_pixels,
        "_expand_inputs_for_generation": expand,
        "_prepare_cache_for_generation": prepare_cache,
        "_prepare_position_ids_for_generation": positions,
        "_get_candidate_generator": candidates,
        "generate_batch": _refuse_continuous_batching,
    }
    if device is not None:
        replaced["device"] = device
    host: Any = shallow_copy(facts.text_model)
    # Hooks (accelerate's, for several devices) set a forward on the instance, which would win over
    # the class's.
    vars(host).pop("forward", None)
    if host.base_model is not host and hasattr(host.base_model, "rope_deltas"):
        # The core remembers positions, and other threads may generate with the same model: copy it.
        core = shallow_copy(host.base_model)
        core.rope_deltas = None
        host._modules[host.base_model_prefix] = core
    # A subclass, so that everything that is not overridden stays the model's own.
    host.__class__ = type(f"Reduced{type(model).__name__}", (original,), replaced)
    return host


def _brings_images(host: Any, inputs: Mapping[str, Any]) -> bool:
    """Return whether a later turn has images, and the model's positions depend on their sizes."""
    cache = inputs.get(CACHE)
    later = isinstance(cache, ReducedCache) and cache.get_seq_length()
    return bool(later and has_images(inputs) and hasattr(host.base_model, "rope_deltas"))


def _check_cache(config: GenerationConfig, given: Any) -> None:
    """Refuse caches whose layers all have one length, and a given cache that would not be used."""
    implementation = config.cache_implementation
    if implementation not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation={implementation!r}: the layers of a reduced model hold "
            "different numbers of tokens, which only its own dynamic cache can. Leave "
            "cache_implementation out (or set it to None in generation_config)."
        )
    if given is not None and config.use_cache is False:
        raise ValueError(
            f"{CACHE} came with use_cache=False, which runs the whole text anew for every "
            "token. Leave one of the two out."
        )


def _check_candidates(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Refuse assisted decoding with layers of the model, hidden states or a filled cache."""
    names = ("assistant_early_exit", "use_mtp", "speculation_type")
    inside = [name for name in names if getattr(config, name, None)]
    if inside:
        raise ValueError(
            f"{inside[0]} drafts tokens with layers of the model itself, which a reduced model "
            "runs as a graph. Use assistant_model or prompt_lookup_num_tokens."
        )
    if config.output_hidden_states:
        raise ValueError(
            "output_hidden_states with assisted decoding needs hidden states of every prompt "
            "position, and a reduced model drops some. Leave one of the two out."
        )
    if model_kwargs[CACHE].get_seq_length():
        raise ValueError(
            f"Assisted decoding reads the whole text again and cannot continue {CACHE}. "
            f"Leave out assistant_model and prompt_lookup_num_tokens, or {CACHE}."
        )


def _refuse_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "cache_implementation='paged' packs prompts of text into one row; a reduced model needs "
        "each prompt with its images in a row of its own. Leave cache_implementation out."
    )
