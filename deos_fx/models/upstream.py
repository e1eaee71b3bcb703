"""Check, at import, the private names of torch and transformers that deos_fx relies on.

An import of a name that is gone fails by itself. The names listed here would go unnoticed: a method
overridden by name would simply never be called, and a table looked up by name would be another.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

from transformers.masking_utils import create_causal_mask

__all__ = ["CACHE", "FORMER_CACHE", "RELIED_ON", "Relied", "check_upstream"]

FORMER_CACHE = "past_key_values"
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else FORMER_CACHE
"""The installed transformers' name of the cache among the arguments and the outputs of a model.

transformers 5.24 renamed it, everywhere at once.
"""


class Relied(NamedTuple):
    """One name of another package that deos_fx relies on.

    Attributes:
        owner: The module, or the class in it after a colon, that has the name.
        name: The name; ``argument=`` for a parameter of the owner, which is then a function.
        reason: What goes wrong without it.
    """

    owner: str
    name: str
    reason: str


_GENERATE = "transformers.generation.utils:GenerationMixin"
_MODULE = "torch.nn:Module"

RELIED_ON: tuple[Relied, ...] = (
    # Overridden in the view of the model that generates (runtime/generation.py).
    Relied(
        _GENERATE,
        "_prepare_multimodal_encoder_kwargs_for_generation",
        "generate would encode images before the prefill, outside of the graph",
    ),
    Relied(_GENERATE, "_expand_inputs_for_generation", "beams would tear images of a prompt apart"),
    Relied(_GENERATE, "_prepare_cache_for_generation", "generate would make a cache of its own"),
    Relied(
        _GENERATE,
        "_prepare_position_ids_for_generation",
        "later turns would take their positions from another prompt",
    ),
    Relied(_GENERATE, "_get_candidate_generator", "a reduction would drop candidate tokens"),
    # Looked up: tables of attention, the parameters by which functions of masks are recognised.
    Relied("transformers:AttentionInterface", "_global_mapping", "shapes would need kernels"),
    Relied("transformers:AttentionMaskInterface", "_global_mapping", "shapes would need kernels"),
    Relied(
        "transformers:PreTrainedConfig",
        "_attn_implementation",
        "a view of a block would observe nothing",
    ),
    Relied(
        "transformers.masking_utils:create_causal_mask",
        "config=",
        "functions that make masks are recognised by this parameter",
    ),
    Relied(
        "transformers.masking_utils:create_causal_mask",
        f"{CACHE}=",
        "masks of a cache with a length per layer are asked for by this parameter",
    ),
    Relied(
        "transformers.utils.output_capturing:maybe_install_capturing_hooks",
        "model=",
        "hooks would be installed in the model through a view of it, once more",
    ),
    # Replaced: how modules are called.
    Relied(_MODULE, "_call_impl", "views of modules are called through it"),
    Relied(_MODULE, "_wrapped_call_impl", "calls of modules are recorded by replacing it"),
    Relied("torch.fx.graph_module", "_loader", "the source of every graph would stay in memory"),
)
"""What is relied on without an import that would fail."""


def check_upstream(relied_on: Iterable[Relied] = RELIED_ON) -> None:
    """Check that all names are there.

    Args:
        relied_on: The names.

    Raises:
        ImportError: If one is missing. The message has the version of the package that lacks it,
            and what would go wrong.
    """
    for owner, name, reason in relied_on:
        module, _, attribute = owner.partition(":")
        if not _has(module, attribute, name):
            package = importlib.import_module(module.partition(".")[0])
            raise ImportError(
                f"{package.__name__} {package.__version__} has no {name} in {owner}, and without "
                f"it {reason}. Install a version that pyproject.toml of deos_fx names."
            )


def _has(module: str, attribute: str, name: str) -> bool:
    try:
        owner: Any = importlib.import_module(module)
    except ImportError:
        # Case: the whole module is gone, or has moved.
        return False
    if attribute:
        owner = getattr(owner, attribute, None)
    if not name.endswith("="):
        return hasattr(owner, name)
    # Case: a parameter of a function.
    return callable(owner) and name[:-1] in inspect.signature(owner).parameters
