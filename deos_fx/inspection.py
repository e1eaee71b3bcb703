"""What ``deos-fx inspect`` tells about a model, and inputs to capture it with."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.cost import CostModel
from deos_fx.inputs import complete_inputs
from deos_fx.passes.pipeline import capture_call
from deos_fx.policy import Policy
from deos_fx.signature import check_verified, grid_of, signature_of

__all__ = ["example_inputs", "print_cost", "print_model"]

TEXT_TOKENS = 16


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A prompt with one grey image and a few words, to capture or export a model with.

    Args:
        model: A vision-language model with image placeholders in its prompt.

    Returns:
        ``input_ids``, ``attention_mask`` ``[1, V + 16]`` and ``pixel_values`` ``[1, 3, S, S]``.
    """
    config = model.config
    visual_tokens = signature_of(model).visual_tokens
    word = next(token for token in range(2) if token != config.image_token_id)
    ids = torch.full((1, visual_tokens + TEXT_TOKENS), word)
    ids[:, 1 : visual_tokens + 1] = config.image_token_id
    side = config.vision_config.image_size
    pixels = torch.zeros(1, config.vision_config.num_channels, side, side, dtype=model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def print_model(model: PreTrainedModel, console: Console) -> None:
    """Prints a model's blocks and sites.

    Args:
        model: A vision-language model.
        console: Where.

    Raises:
        ValueError: If it is no such model, or cannot be captured.
    """
    signature = signature_of(model)
    check_verified(model, "Inspecting a model")
    inputs = complete_inputs(model, example_inputs(model) | {"use_cache": False})
    captured = capture_call(model, inputs)
    rows, columns = grid_of(model)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    console.print(f"{type(model).__name__}, {millions:,.1f} million parameters", highlight=False)
    console.print(f"{signature.visual_tokens} visual tokens an image ({rows} x {columns})")
    for name, paths in (("vision", captured.blocks.vision), ("decoder", captured.blocks.decoder)):
        console.print(f"{len(paths)} {name} blocks: {paths[0]} ...", highlight=False)
    assert captured.sites is not None
    table = Table("site", "usable", "scores that can be computed there", title="Sites")
    for site in captured.sites.sites:
        usable = "no" if site.reason else "yes"
        table.add_row(site.name, usable, site.reason or ", ".join(site.scores))
    console.print(table)


def print_cost(model: PreTrainedModel, policy: Policy, console: Console) -> None:
    """Prints what a policy costs, layer by layer and in all, for one image and 16 text tokens.

    Args:
        model: A vision-language model.
        policy: A policy for it.
        console: Where.

    Raises:
        ValueError: If the policy does not fit the model.
    """
    costs = CostModel.of_images(model, images=1, text_tokens=TEXT_TOKENS)
    before, after = costs.of_policy(Policy()), costs.of_policy(policy)
    console.print(policy, highlight=False, markup=False)
    layers = Table(title=f"Visual tokens, one image and {TEXT_TOKENS} text tokens")
    for name in ("layer", "before", "after"):
        layers.add_column(name, justify="right")
    old, new = costs.patches(Policy()), costs.patches(policy)
    rows = [(f"vision {i}", *pair) for i, pair in enumerate(zip(old, new, strict=True))][:-1]
    rows = rows if new != old else []
    pairs = zip(before.visual_tokens_per_layer, after.visual_tokens_per_layer, strict=True)
    rows += [(f"decoder {layer}", *pair) for layer, pair in enumerate(pairs)]
    for name, *numbers in rows:
        layers.add_row(name, *map(str, numbers))
    console.print(layers)
    totals = Table("", *(("before", "after", "ratio")), title="Cost of the prefill")
    amounts = {
        "visual tokens, mean": (before.visual_tokens, after.visual_tokens),
        "GFLOPs": (before.flops / 1e9, after.flops / 1e9),
        "KV cache, KiB": (before.kv_bytes / 1024, after.kv_bytes / 1024),
    }
    for name, (whole, left) in amounts.items():
        totals.add_row(name, f"{whole:,.4g}", f"{left:,.4g}", f"{left / whole:.1%}")
    console.print(totals)
