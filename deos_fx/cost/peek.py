"""Measure what it costs to peek into a decoder layer: everything in it before its attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from deos_fx.attention.observation import Observation
from deos_fx.attention.seam import PeekedBlock
from deos_fx.cost.growth import Growth
from deos_fx.cost.measure import counting, decoder_inputs, once
from deos_fx.cost.twin import twin_of
from deos_fx.models.blocks import indexes_keys
from deos_fx.models.facts import ModelFacts
from deos_fx.models.upstream import CACHE

__all__ = ["measure_peek"]


class _Reached(Exception):  # noqa: N818 - not an error: the layers from here on need not run
    """Raised in place of the layer, which is given these arguments."""


def measure_peek(facts: ModelFacts, layer: int) -> Growth:
    """Measure a peek into a layer, once for each model. No weight is touched.

    Args:
        facts: The facts of the model.
        layer: Index of a decoder layer that attends.
    """
    return once(facts, f"peek into decoder.{layer}", lambda: _measure(facts, layer))


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
    del kwargs[CACHE]
    with counting() as counter, torch.no_grad():
        PeekedBlock(layer, (Observation("keys"),))(*args, **kwargs)
    return counter.get_total_flops()
