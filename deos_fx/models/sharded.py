"""Models whose weights FSDP shards over processes: each gathers a module's weights while it runs.

`torch.distributed.fsdp.fully_shard` changes the class of a module in place, makes DTensors of its
parameters, and adds hooks that gather them before a call and let them go after it. Names of classes
are compared, because importing FSDP takes long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deos_fx.models.views import shallow_copy

__all__ = [
    "check_sharding",
    "class_of",
    "gather_own",
    "gathered",
    "has_shards",
    "is_sharded",
    "shards",
    "without_shards",
]

_FSDP = "torch.distributed.fsdp"


def is_sharded(module: nn.Module) -> bool:
    """Return whether `fully_shard` was called on a module itself."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def has_shards(module: nn.Module) -> bool:
    """Return whether `fully_shard` was called on a module or on a part of it."""
    return any(map(is_sharded, module.modules()))


def check_sharding(model: object) -> None:
    """Refuse a model that is wrapped by the first FSDP: its parameters are slices of a flat one.

    Raises:
        ValueError: If it is.
    """
    if not isinstance(model, nn.Module):
        return
    kinds = {type(part) for part in model.modules()}
    if any(kind.__name__ == "FullyShardedDataParallel" for kind in kinds):
        raise ValueError(
            f"model is a {type(model).__name__} with parts in FullyShardedDataParallel, and a "
            "search runs its layers one by one, which only fully_shard allows: call "
            "torch.distributed.fsdp.fully_shard on each layer and then on the model."
        )


def class_of(module: nn.Module) -> type:
    """Return the class that a module had before FSDP changed it."""
    kinds = type(module).__mro__
    return next(kind for kind in kinds if not kind.__module__.startswith(_FSDP))


def shards(hook: object) -> bool:
    """Return whether a hook of a module is one of FSDP's."""
    return type(getattr(hook, "__self__", None)).__module__.startswith(_FSDP)


def gather_own(model: nn.Module) -> None:
    """Gather the weights that no part with shards of its own has, such as norms between layers.

    Graphs run the parts of a model and never the model itself, whose hook would do it. All
    processes have to make this call. It does nothing where they are gathered, or nothing is
    sharded.
    """
    if is_sharded(model):
        sharded: Any = model
        sharded.unshard()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather the weights of a module whose forward is called without its hooks."""
    if not is_sharded(module):
        yield
        return
    sharded: Any = module
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()


def without_shards(module: nn.Module) -> nn.Module:
    """Return a view of a module as it was before FSDP changed it, with empty weights.

    Args:
        module: The module, which is left as it is; buffers are shared with it.

    Returns:
        The module itself if no part of it is sharded; otherwise the view, whose parameters are on
        the meta device and have their whole shapes.
    """
    return _without_shards(module) if has_shards(module) else module


def _without_shards(module: nn.Module) -> nn.Module:
    view = shallow_copy(module)
    view.__class__ = class_of(module)
    for name, value in list(vars(view).items()):
        if "hooks" in name and hasattr(value, "items"):
            vars(view)[name] = type(value)((k, v) for k, v in value.items() if not shards(v))
        elif name.startswith("__composable_api"):
            # Case: what FSDP knows of the module.
            del vars(view)[name]
    view._parameters = {
        name: None if weight is None else _empty(weight)
        for name, weight in module._parameters.items()
    }
    view._modules = {
        name: None if part is None else _without_shards(part)
        for name, part in module._modules.items()
    }
    return view


def _empty(weight: nn.Parameter) -> nn.Parameter:
    # A shard tells the shape of the whole.
    empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=weight.requires_grad)
