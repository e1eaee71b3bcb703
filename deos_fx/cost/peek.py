"""Measure what it costs to peek into a decoder layer: everything in it before its attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from deos_fx.attention.observation import Observation
from deos_fx.attention.seam import PeekedBlock
from deos_fx.cost.growth import Growth
from deos_fx.cost.measure import counting, decoder_inputs, measure_decoder, once
from deos_fx.cost.twin import twin_of
from deos_fx.models.blocks import indexes_keys
from deos_fx.models.facts import ModelFacts
from deos_fx.models.upstream import CACHE

__all__ = ["measure_peek"]


class _Reached(Exception):  # noqa: N818 - not an error: the layers from here on need not run
    """Raised in place of the layer, which is given these arguments."""


def measure_peek(facts: ModelFacts, layer: int) -> Growth:
    """Measure a peek into a layer, once for each kind of layers. No weight is touched.

    Layers of one kind have the same parts and weights of the same shapes, and cost the same.

    Args:
        facts: The facts of the model.
        layer: Index of a decoder layer that attends.
    """
    kinds = once(facts, "kinds of layers", lambda: _kinds(facts))
    # The first one, before which the fewest layers have to run.
    first = kinds.index(kinds[layer])
    return once(facts, f"peek into decoder.{first}", lambda: _measure(facts, first))


def _kinds(facts: ModelFacts) -> list[Any]:
    """Return what is alike in all decoder layers of one kind, for each layer."""
    found = []
    for path, cost in zip(facts.blocks.decoder, measure_decoder(facts).layers, strict=True):
        layer = facts.model.get_submodule(path)
        parts = tuple((name, type(part)) for name, part in layer.named_modules())
        weights = tuple((name, weight.shape) for name, weight in layer.named_parameters())
        found.append((cost, parts, weights))
    return found


def _measure(facts: ModelFacts, layer: int) -> Growth:
    path, twin = facts.blocks.decoder[layer], twin_of(facts.model)
    flops = partial(_flops, twin, twin.get_submodule(path))
    if indexes_keys(facts.model.get_submodule(path)):
        return Growth.of_index(flops)
    return Growth.of_attention(flops, 2, 4)


def _flops(twin: Any, layer: torch.nn.Module, length: int) -> int:
    """Count the FLOPs of a peek on so many tokens."""

    def stop(_: Any, args: Any, kwargs: Any) -> None:
        raise _Reached(args, kwargs)

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with counting(), torch.no_grad():
            twin.get_decoder()(**decoder_inputs(twin, length))
    except _Reached as reached:
        args, kwargs = reached.args
    finally:
        handle.remove()
    kwargs.pop(CACHE, None)
    with counting() as counter, torch.no_grad():
        PeekedBlock(layer, (Observation("keys"),))(*args, **kwargs)
    return counter.get_total_flops()
