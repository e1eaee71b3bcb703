"""Run an unmodified model once and record the run as a torch.fx graph.

The tracer's proxies carry the concrete value of the example run. Control flow and ``isinstance``
checks look at the value, so any model code works; every operation on a proxy is recorded. One
``call_module`` node stands for a transformer block, an embedding, a norm, the projector or the
head; the glue between them is plain fx nodes. Blocks keep their kernels and their weights: nothing
is copied.

Where the example run decides something for good (a branch on a tensor or on a length), a *guard*
node is recorded that is checked at every later run, so a specialisation is never silent.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from deos_fx.errors import CaptureError
from deos_fx.models.blocks import Block, puts_in_front
from deos_fx.models.families import own_name
from deos_fx.models.known_shapes import META
from deos_fx.models.shapes_only import plain_attention, without_missing_weights
from deos_fx.models.views import execution_device, is_offloaded
from deos_fx.passes.capture.in_front import InFront
from deos_fx.passes.capture.replacements import TRACER, replacements_of
from deos_fx.passes.capture.tracer import Tracer
from deos_fx.passes.finish import finish
from deos_fx.passes.notes import GraphNote, annotate_graph
from deos_fx.replaced import replaced

__all__ = ["capture"]


def capture(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    blocks: Mapping[str, Block],
    *,
    part: PreTrainedModel | None = None,
    opaque_encoder: bool = False,
) -> fx.GraphModule:
    """Record one forward pass as a graph of blocks and glue.

    Args:
        model: The unmodified model, in eval mode. Its weights are shared, never copied.
        inputs: Arguments of its forward. Tensors, caches and numbers become graph inputs,
            everything else is part of the structure, and the graph holds for this value only.
        blocks: Module path of every transformer block -> the block.
        part: The model inside it that runs; None for the model itself.
        opaque_encoder: Record the image encoder as one node.

    Returns:
        A `GraphModule` with the same inputs that returns a dict of the model's output fields,
        without the outputs of encoders among them. If its language model has an output of its own
        in that of the model, the dict has the fields of both. The graph module has a `GraphNote`,
        and its blocks are marked in the notes of their nodes.

    Raises:
        CaptureError: If the model's code does something that cannot be recorded.
    """
    tracer = Tracer(model, blocks)
    _check_offloaded(tracer, model)
    # A flag or a string may decide about the path through the code, so it stays a Python value.
    arguments = {
        name: tracer.placeholder(name, value) if _is_data(value) else value
        for name, value in inputs.items()
    }
    with _recording(tracer, model, opaque_encoder):
        # Not model(...): hooks of the instance (accelerate moves inputs) are no part of the graph.
        run = part or model
        forward = type(run).forward
        given = arguments
        if puts_in_front(model):
            tracer.in_front = InFront(tracer, arguments)
            given = tracer.in_front.given(arguments)
        named = {own_name(name, forward): value for name, value in given.items()}
        try:
            result = forward(run, **named)
        except NotImplementedError as error:
            if execution_device(model) != META:
                raise
            # Case: code that asks where values are not zero, which there are not without weights.
            raise CaptureError(
                f"{type(model).__name__} looks at numbers of its own, which there are none of "
                "without weights. Load it with its weights, and use deos_fx in Python."
            ) from error
    # What encoders return on the way (`image_outputs` of transformers 5.24) is left out: its fields
    # would keep layers of the vision tower that nothing else reads, and a list per image.
    parts = (value for value in result.values() if isinstance(value, ModelOutput))
    fields = {
        name: value
        for output in (*(output for output in parts if "logits" in output), result)
        for name, value in output.items()
        if value is not None and not isinstance(value, ModelOutput)
    }
    tracer.create_node("output", "output", (tracer.create_arg(fields),), {})
    tracer.always_make_masks()
    graph_module = fx.GraphModule(tracer.attributes(), tracer.graph, f"{type(model).__name__}Graph")
    # All blocks of the model, also those that are not in the graph: a reduction may peek into them.
    modules = {block: model.get_submodule(path) for path, block in blocks.items()}
    modules |= tracer.views
    in_front = tracer.in_front is not None
    annotate_graph(graph_module, GraphNote(type(result), modules, in_front=in_front))
    return finish(graph_module)


# Held during a capture: a model's code writes to the model while it runs, so captures take turns.
_CAPTURING = threading.RLock()


def _is_data(value: object) -> bool:
    """Return whether an argument becomes an input of the graph: tensors, caches and numbers do."""
    # In Python, bool is a kind of int.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number or isinstance(value, (torch.Tensor, Cache))


@contextlib.contextmanager
def _recording(tracer: Tracer, model: PreTrainedModel, opaque_encoder: bool) -> Iterator[None]:
    """Turn the tracer on; replaced functions are always restored."""
    replacements = replacements_of(model, opaque_encoder)
    # Plain attention, because a kernel that compiles itself at its first call (flex attention)
    # would compile the functions that replace torch's while tracing.
    plain = plain_attention()
    with _CAPTURING, torch.no_grad(), without_missing_weights(model), plain, replaced(replacements):
        token = TRACER.set(tracer)
        try:
            yield
        finally:
            TRACER.reset(token)


def _check_offloaded(tracer: Tracer, model: nn.Module) -> None:
    """Refuse offloaded weights that glue code reads: hooks load them when a module is called."""
    for path, module in model.named_modules():
        if not tracer.is_leaf_module(module, path) and is_offloaded(module):
            names = [name for name, _ in module.named_parameters(recurse=False)]
            raise CaptureError(
                f"{', '.join(names)} of {path or 'the model'} are offloaded, and the model's code "
                "reads them between its layers. Give them a device of their own in device_map."
            )
