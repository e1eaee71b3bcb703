"""Measure the cost of the parts of a model, on a twin of it that has shapes and no data.

The weights of the twin are on torch's meta device, where an operation takes no time and no memory.
Its blocks are the model's own code, so the counts are right for any family: experts, shared or
sliding caches, heads of different sizes.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from deos_fx.cost.growth import Growth, whole_part
from deos_fx.cost.twin import count_flops, twin_of, whole_numbers
from deos_fx.models.encoding import encoded_by
from deos_fx.models.facts import ModelFacts
from deos_fx.models.families import PER_LAYER, TEXT_IDS
from deos_fx.models.upstream import CACHE
from deos_fx.tokens.cache import tensors_of

__all__ = [
    "DecoderCost",
    "EncoderCost",
    "LayerCost",
    "counting",
    "decoder_inputs",
    "measure_decoder",
    "measure_encoder",
    "once",
]

T = TypeVar("T")

_KNOWN: weakref.WeakKeyDictionary[ModelFacts, dict[Hashable, Any]] = weakref.WeakKeyDictionary()

# Lengths at which the decoder is measured; layers with a state also need longer ones.
_SHORT, _LONG = 2, 4


@dataclass(frozen=True)
class LayerCost:
    """The cost of a decoder layer for one prompt.

    Attributes:
        growth: Its FLOPs by the number of tokens.
        cached: Bytes of its cache for each token held.
        state: Bytes of its cache that do not depend on the length.
        window: Largest number of tokens that its cache holds; None for all.
        key_heads: Heads of the keys in its cache.
        dim: Size of such a head.
    """

    growth: Growth
    cached: int
    state: int
    window: int | None
    key_heads: int
    dim: int


@dataclass(frozen=True)
class DecoderCost:
    """The cost of a decoder for one prompt.

    Attributes:
        layers: Its layers.
        width: Numbers of a token's hidden states, of all streams together.
        before: FLOPs for each token before the first layer.
        after: FLOPs for each token after the last one, without the head.
        head: FLOPs for each token whose logits the head computes.
    """

    layers: tuple[LayerCost, ...]
    width: int
    before: int
    after: int
    head: int


@dataclass(frozen=True)
class EncoderCost:
    """The cost of the image encoder in one call, in FLOPs.

    Attributes:
        total: FLOPs of the whole call.
        blocks: FLOPs of each vision block; 0 if it does not run.
        products: FLOPs of attention products in each block: the part of `blocks` that grows with
            pairs of tokens.
        tokens: Tokens of an image in each vision block; 0 where its hidden states are no sequence.
        patches: Tokens in the last vision block that runs, of all images together.
        width: Size of a hidden state there.
        used: Number of vision blocks up to the deepest that the features depend on.
        front: FLOPs before the first block, as far as the features depend on them, and all FLOPs
            outside of the measured modules.
        after: FLOPs after the last block, as far as the features depend on them.
    """

    total: int
    blocks: tuple[int, ...]
    products: tuple[int, ...]
    tokens: tuple[int, ...]
    patches: int
    width: int
    used: int
    front: int
    after: int


def measure_decoder(facts: ModelFacts) -> DecoderCost:
    """Measure the decoder, once for each model. The model does not run, and no weight is touched.

    Args:
        facts: The facts of the model.
    """
    return once(facts, "decoder", lambda: _decoder(facts))


def measure_encoder(
    facts: ModelFacts,
    inputs: Mapping[str, Tensor] | None = None,
    encode: str = "get_image_features",
) -> EncoderCost:
    """Measure the encoding of images. The model does not run, and no weight is touched.

    Args:
        facts: The facts of the model.
        inputs: Arguments of the method that encodes; None for one image of the config's size,
            which is measured once for each model.
        encode: The method of the model's core that encodes.

    Raises:
        ValueError: If the encoder reads values that it computes, not only sizes.
    """
    if inputs is not None:
        return _encoder(facts, inputs, encode)
    given = facts.image()
    return once(facts, "encoder", lambda: _encoder(facts, given, encode))


def once(facts: ModelFacts, what: str, measure: Callable[[], T]) -> T:
    """Return what was measured of a model before, or measure it now.

    Args:
        facts: The facts of the model.
        what: Name of what is measured.
        measure: Measures it.
    """
    known = _KNOWN.setdefault(facts, {})
    # The key changes if the model is converted or quantised.
    weights = sum(weight.numel() for weight in facts.model.parameters())
    key = (what, facts.model.dtype, weights)
    if key not in known:
        known[key] = measure()
    return cast(T, known[key])


# *** the decoder ***


def _decoder(facts: ModelFacts) -> DecoderCost:
    twin = twin_of(facts.model)
    paths = facts.blocks.decoder
    run = functools.cache(partial(_run_decoder, twin, paths))
    short, long = run(_SHORT), run(_LONG)
    kinds = [
        (short.flops[i], long.flops[i], short.held[i], long.held[i]) for i in range(len(paths))
    ]
    # Layers of one kind cost the same. For other lengths, one of each kind has to run, and what
    # hands on something else than hidden states before the last of these.
    first = {kind: kinds.index(kind) for kind in kinds}
    last = max(first.values())
    for i, kind in enumerate(kinds):
        others = short.outputs[i]
        handing = i < last and any(other is not None for other in others or ())
        if first[kind] != i and not handing:
            nothing = None if others is None else (None,) * len(others)
            twin.get_submodule(paths[i]).forward = partial(_pass_on, nothing)
    known = {}
    for kind, layer in first.items():
        *_, at_short, at_long = kind
        # Bytes of n tokens: c n + s. The sizes below are those of the cache, the same in both runs.
        cached = (at_long.bytes - at_short.bytes) // (_LONG - _SHORT)
        state = at_short.bytes - _SHORT * cached
        flops = partial(_flops_of, run, layer)
        if at_short.indexed:
            growth = Growth.of_index(flops)
        elif state:
            growth = Growth.of_state(flops)
        else:
            growth = Growth.of_attention(flops, _SHORT, _LONG)
        known[kind] = LayerCost(
            growth=growth,
            cached=cached,
            state=state,
            window=at_short.window,
            key_heads=at_short.key_heads,
            dim=at_short.dim,
        )
    layers = tuple(known[kind] for kind in kinds)
    outside = (whole_part(flops, _SHORT) for flops in (short.before, short.after, short.head))
    return DecoderCost(layers, short.width, *outside)


def _pass_on(others: tuple[None, ...] | None, hidden: Tensor, *_: Any, **__: Any) -> Any:
    return hidden if others is None else (hidden, *others)


def _flops_of(run: Callable[[int], _Run], layer: int, length: int) -> int:
    return run(length).flops[layer]


@dataclass(frozen=True)
class _Held:
    """The contents of a layer's cache after a run: bytes, and sizes of its keys."""

    bytes: int
    indexed: bool
    window: int | None
    key_heads: int
    dim: int


@dataclass(frozen=True)
class _Run:
    flops: list[int]
    before: int
    after: int
    head: int
    held: list[_Held]
    width: int
    # Of each layer, what comes after hidden states in its output; None if that is no tuple.
    outputs: list[Any]


def decoder_inputs(twin: Any, length: int) -> dict[str, Any]:
    """Make the arguments of a twin's decoder for one prompt of so many tokens, with a cache."""
    config = twin.config.get_text_config()
    # Embeddings go in, so that token ids with a meaning (images) cannot matter.
    hidden = torch.empty(1, length, config.hidden_size, dtype=twin.dtype, device="meta")
    given: dict[str, Any] = {"inputs_embeds": hidden, CACHE: DynamicCache(config=config)}
    name, size = PER_LAYER[0], getattr(config, PER_LAYER[1], None)
    if size:
        # Case: a decoder that would look up further inputs by token ids, which is no product.
        given[name] = hidden.new_empty(1, length, config.num_hidden_layers, size)
    if TEXT_IDS in inspect.signature(twin.get_decoder().forward).parameters:
        # Case: the same, and a decoder that asks for the ids themselves.
        given[TEXT_IDS] = torch.zeros(1, length, dtype=torch.int64, device="meta")
    return {**given, "use_cache": True}


def _run_decoder(twin: Any, paths: tuple[str, ...], length: int) -> _Run:
    given = decoder_inputs(twin, length)
    # The decoder of some models has the head inside, and runs it as well.
    head = twin.get_output_embeddings() or twin.get_decoder().get_output_embeddings()
    layers, outputs = [twin.get_submodule(path) for path in paths], list[Any]()
    so_far: list[int] = []
    with counting() as counter, torch.no_grad():
        for layer in layers:
            layer.register_forward_hook(lambda *call: outputs.append(call[2]))
            layer.register_forward_hook(lambda *_: so_far.append(counter.get_total_flops()))
        watched = _watch(counter, [*layers, head])
        twin.get_decoder()(**given)
    with counting() as of_head, torch.no_grad():
        head(given["inputs_embeds"])
    held = [_held(layer) for layer in given[CACHE].layers]
    # The last layers may share the keys of earlier ones and hold none.
    nothing = _Held(0, False, None, held[-1].key_heads, held[-1].dim)
    held += [nothing] * (len(paths) - len(held))
    *in_layers, in_head = watched
    last = outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]
    return _Run(
        in_layers,
        so_far[-1] - sum(in_layers),
        counter.get_total_flops() - so_far[-1] - in_head,
        of_head.get_total_flops(),
        held,
        last.numel() // length,
        [output[1:] if isinstance(output, tuple) else None for output in outputs],
    )


def _held(layer: Any) -> _Held:
    # Keys and values, and states. Counters are integers and left out.
    states = [x for x in tensors_of(layer) if x.is_floating_point()]
    keys = getattr(layer, "keys", None)
    heads, dim = (0, 0) if keys is None else (keys.shape[1], keys.shape[3])
    # A window counts the new token too, which the cache need not hold for the next step.
    window = layer.sliding_window - 1 if getattr(layer, "is_sliding", False) else None
    indexed = hasattr(layer, "indexer_keys")
    return _Held(sum(x.nbytes for x in states), indexed, window, heads, dim)


# *** the image encoder ***


def _encoder(facts: ModelFacts, inputs: Mapping[str, Tensor], encode: str) -> EncoderCost:
    # 1. Divide the model into units: its blocks, and the largest modules around them.
    twin = twin_of(facts.model)
    blocks = [twin.get_submodule(path) for path in facts.blocks.vision]
    units = _units(twin.base_model, blocks)
    order: list[nn.Module] = []
    tokens = dict.fromkeys(blocks, 0)
    hidden_of: list[torch.Size] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        order.append(module)
        if module in tokens:
            # Hidden states come first, perhaps by name.
            hidden = next(iter((*args, *kwargs.values())))
            hidden_of.append(hidden.shape)
            if hidden.ndim == 3:
                tokens[module] = hidden.shape[1]

    # 2. Watch what runs in which order, with how many tokens, and what it makes. A unit need not
    # have parameters with gradients, so its outputs are traced as well.
    made: dict[nn.Module, list[Any]] = {unit: [*unit.parameters()] for unit in units}
    for unit in units:
        unit.register_forward_pre_hook(note, with_kwargs=True)
        unit.register_forward_hook(
            lambda unit, _, output: made[unit].extend(pytree.tree_leaves(output))
        )
    # 3. Encode. Code that leaves out padding images reads the pixels, so these keep their data.
    given = {
        name: x.cpu() if isinstance(x, Tensor) and not x.is_meta else x
        for name, x in inputs.items()
    }
    with counting() as counter, torch.enable_grad():
        counts = _watch(counter, units)
        products = _watch(counter, blocks, _PRODUCTS)
        try:
            encoded = encoded_by(twin.base_model, encode, given)
        except NotImplementedError as error:
            raise ValueError(
                f"What an image costs is not known for {facts.name}, whose image encoder "
                "looks at numbers of its own and not only at sizes. Give a policy or limit "
                "visual_tokens, which need no costs."
            ) from error
    # 4. Leave out what the features do not depend on, such as blocks after the chosen layer.
    flops = dict(zip(units, counts, strict=True))
    features = pytree.tree_leaves([encoded])
    used = _used(features, made)
    # 5. Divide the rest into what is before, in and after the blocks.
    ran = [i for i, unit in enumerate(order) if unit in tokens]
    first, after = (ran[0], ran[-1] + 1) if ran else (0, 0)
    glue = counter.get_total_flops() - sum(flops.values())
    costs = {unit: flops[unit] for unit in used}
    *sizes, width = hidden_of[-1] if hidden_of else (0, 0)
    return EncoderCost(
        total=counter.get_total_flops(),
        blocks=tuple(flops.get(block, 0) for block in blocks),
        products=tuple(products),
        tokens=tuple(tokens.values()),
        patches=math.prod(sizes),
        width=width,
        used=max((i + 1 for i, block in enumerate(blocks) if block in used), default=0),
        front=glue + sum(costs.get(unit, 0) for unit in {*order[:first]}),
        after=sum(costs.get(unit, 0) for unit in {*order[after:]}),
    )


def _units(module: nn.Module, blocks: Container[nn.Module]) -> list[nn.Module]:
    """Return the blocks, and the largest modules that contain none."""
    # Case: a block, or a module without one inside. Otherwise look inside.
    if module in blocks or not any(inner in blocks for inner in module.modules()):
        return [module]
    return [unit for child in module.children() for unit in _units(child, blocks)]


def _used(features: list[Tensor], made: Mapping[nn.Module, list[Any]]) -> set[nn.Module]:
    """Return the units whose parameters or outputs the features depend on.

    A gradient tells: where there is none, nothing depends on the tensor. Its values do not matter.
    """
    tensors = {
        unit: [x for x in of_unit if isinstance(x, Tensor) and x.requires_grad]
        for unit, of_unit in made.items()
    }
    every = [x for of_unit in tensors.values() for x in of_unit]
    with whole_numbers(), torch.enable_grad():
        total = torch.stack([feature.float().sum() for feature in features]).sum()
        gradients = torch.autograd.grad(total, every, allow_unused=True)
    reached = {x for x, gradient in zip(every, gradients, strict=True) if gradient is not None}
    return {unit for unit in made if not reached.isdisjoint(tensors[unit])}


# *** both ***


# The operations of attention products in their eager form, which a twin has.
_PRODUCTS = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


def _watch(
    counter: FlopCounterMode, modules: Sequence[nn.Module], of: Sequence[Any] | None = None
) -> list[int]:
    """Return the FLOPs of each module, filled in as it runs: all, or those of operations `of`."""
    flops = [0] * len(modules)

    # The counter's total is taken off before a module runs, and added after it.
    def add(i: int, sign: int, *_: Any) -> None:
        counts = counter.get_flop_counts().get("Global", {})
        flops[i] += sign * sum(counts.values() if of is None else (counts.get(x, 0) for x in of))

    for i, module in enumerate(modules):
        module.register_forward_pre_hook(partial(add, i, -1))
        module.register_forward_hook(partial(add, i, 1))
    return flops


# The setting of torch that `counting` patches is global to the process.
_COUNTING = threading.RLock()


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Run code of a twin, and count its FLOPs."""
    # On meta, assume that a mask selects every element: the largest possible result.
    whole = cast(Any, fx_config).patch(meta_nonzero_assume_all_nonzero=True)
    with _COUNTING, whole, whole_numbers(), count_flops() as counter:
        yield counter
