"""What a prefill costs: visual tokens per layer, floating-point operations, bytes of KV cache.

Everything is computed from the model's modules and the token counts, without running the model.
Operations are counted as `torch.utils.flop_counter` counts them: two for each multiply-add of a
linear layer, a convolution or an attention product, nothing for the rest. Masked attention counts
in full, whatever a kernel skips.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel

from deos_fx.inputs import prompt_layout
from deos_fx.operator.scores import SCORES
from deos_fx.passes.find_blocks import find_blocks
from deos_fx.policy import Policy, Reduction
from deos_fx.reduction import split_site
from deos_fx.signature import has_class_token, signature_of

__all__ = ["Amount", "Cost", "CostModel", "CostReport"]

Amount: TypeAlias = float | Tensor
"""A number, or a 0-dim tensor through which a gradient flows."""


@dataclass(frozen=True)
class Cost:
    """Cost of one prefill.

    Attributes:
        visual_tokens_per_layer: Visual tokens of a prompt that each decoder layer processes.
        visual_tokens: Their mean over the decoder layers.
        flops: Floating-point operations of the whole batch.
        kv_bytes: Bytes of the key-value cache of the whole batch.
    """

    visual_tokens_per_layer: tuple[int, ...]
    visual_tokens: float
    flops: int
    kv_bytes: int

    @property
    def amounts(self) -> dict[str, float]:
        """What a `Budget` limits, by the names of its fields."""
        return {
            "visual_tokens": self.visual_tokens,
            "flops": self.flops,
            "kv_cache": self.kv_bytes,
        }


@dataclass(frozen=True)
class CostReport:
    """Cost without and with the reductions; printed as a table.

    Attributes:
        before: Cost of the same graph with no reduction.
        after: Cost of the reduced model.
    """

    before: Cost
    after: Cost

    def __str__(self) -> str:
        before, after = self.before, self.after
        rows = [
            ("visual tokens (mean)", before.visual_tokens, after.visual_tokens, "{:,.1f}"),
            ("prefill GFLOPs", before.flops / 1e9, after.flops / 1e9, "{:,.3f}"),
            ("KV cache (KiB)", before.kv_bytes / 1024, after.kv_bytes / 1024, "{:,.1f}"),
        ]
        lines = [f"{'':22}{'before':>12}{'after':>12}{'ratio':>8}"]
        for name, old, new, style in rows:
            numbers = f"{style.format(old):>12}{style.format(new):>12}"
            lines.append(f"{name:22}{numbers}{new / old:8.1%}")
        per_layer = " ".join(map(str, after.visual_tokens_per_layer))
        return "\n".join([*lines, f"visual tokens per decoder layer: {per_layer}"])


@dataclass(frozen=True)
class _Block:
    """What a transformer block costs: `linear` FLOPs per token, and its attention products.

    Attributes:
        linear: FLOPs of the linear layers for one token.
        heads: Query heads.
        key_heads: Key and value heads.
        dim: Size of a head.
    """

    linear: int
    heads: int
    key_heads: int
    dim: int

    def flops(self, tokens: Amount) -> Amount:
        """Of the whole block: linear layers, query-key and attention-value products."""
        return tokens * self.linear + 4 * self.heads * self.dim * tokens * tokens

    def row_flops(self, queries: Amount, tokens: Amount) -> Amount:
        """Of the attention logits of a few queries that a score observes."""
        return 2 * self.heads * self.dim * queries * tokens


class CostModel:
    """Predicts the cost of prompts of one shape, for any policy.

    A vision block whose output the language model does not use costs nothing: capture leaves it
    out, whatever the policy.

    Args:
        model: A transformers vision-language model.
        images: Images per prompt.
        text_tokens: Tokens of a prompt that are not visual, padding included.
        batch: Prompts.
        logits_to_keep: Positions of each prompt whose logits are computed; 0 for all of them.

    Raises:
        TypeError: If `model` is not a transformers model.
        ValueError: If it has no vision tower.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        images: int,
        text_tokens: int,
        batch: int = 1,
        *,
        logits_to_keep: int = 0,
    ) -> None:
        self.signature = signature_of(model)
        self.images = images
        self.text_tokens = text_tokens
        self.batch = batch
        self.logits_to_keep = logits_to_keep
        blocks = find_blocks(model)
        self._vision = [_block(model.get_submodule(path)) for path in blocks.vision]
        self._decoder = [_block(model.get_submodule(path)) for path in blocks.decoder]
        self._width = model.config.get_text_config().hidden_size
        self._head = _linear_flops([model.get_output_embeddings()])
        self._bytes = model.dtype.itemsize
        self._tower_tokens = self.signature.visual_tokens + has_class_token(model)
        self._encoding = self._encoding_flops(model)

    @classmethod
    def of_inputs(cls, model: PreTrainedModel, inputs: Mapping[str, Any]) -> CostModel:
        """The cost model for the prompts of a call.

        Args:
            model: A transformers vision-language model.
            inputs: Arguments of its forward.

        Raises:
            ValueError: If the inputs have no image, or prompts with different numbers of images.
        """
        layout = prompt_layout(model, inputs)
        batch, length = inputs["input_ids"].shape
        kept = inputs.get("logits_to_keep", 0)
        return cls(
            model,
            layout.images,
            length - layout.images * layout.tokens_per_image,
            batch,
            logits_to_keep=len(kept) if isinstance(kept, Tensor) else kept,
        )

    # *** from the visual tokens of each decoder layer; differentiable ***

    def visual_tokens(self, counts: Sequence[Amount] | Tensor) -> Amount:
        """Mean over the decoder layers.

        Args:
            counts: Visual tokens of one prompt, all its images together, that each decoder layer
                processes.
        """
        return sum(counts) / len(self._decoder)

    def flops(self, counts: Sequence[Amount] | Tensor, overhead: Amount = 0) -> Amount:
        """Of one prefill of the whole batch, from pixels to logits.

        Args:
            counts: As in `visual_tokens`.
            overhead: FLOPs of the reductions themselves, see `overhead`.
        """
        lengths = [self.text_tokens + count for count in counts]
        layers = sum(
            block.flops(length) for block, length in zip(self._decoder, lengths, strict=True)
        )
        head = self._head * (self.logits_to_keep or lengths[-1])
        return self.batch * (self.images * self._encoding + layers + head) + overhead

    def kv_bytes(self, counts: Sequence[Amount] | Tensor) -> Amount:
        """Of the keys and values that one prefill of the whole batch leaves.

        Args:
            counts: As in `visual_tokens`.
        """
        per_token = [2 * block.key_heads * block.dim * self._bytes for block in self._decoder]
        layers = zip(per_token, counts, strict=True)
        return self.batch * sum(size * (self.text_tokens + count) for size, count in layers)

    def reduction_flops(self, reduction: Reduction, before: Amount, after: Amount) -> Amount:
        """FLOPs of one reduction's own scores, similarities and merging, for the whole batch.

        Args:
            reduction: What is done; its ``keep`` is not read.
            before: Visual tokens that come in, of one image at the projector and of one prompt
                in the decoder.
            after: Those that are kept, counted alike.
        """
        stage, layer = split_site(reduction.site)
        rows = self.batch if stage == "decoder" else self.batch * self.images
        attention = self._attention_flops(reduction, layer, before)
        return rows * (attention + self._operator_flops(reduction, before, after))

    # *** of a policy; exact ***

    def of_policy(self, policy: Policy) -> Cost:
        """Cost with a policy, the reductions' own matmuls included.

        Args:
            policy: ``Policy()`` gives the cost of the unreduced model.

        Raises:
            ValueError: If the policy does not fit the model.
        """
        counts = self.counts(policy)
        return Cost(
            visual_tokens_per_layer=tuple(counts),
            visual_tokens=sum(counts) / len(counts),
            flops=int(self.flops(counts, self.overhead(policy))),
            kv_bytes=int(self.kv_bytes(counts)),
        )

    def counts(self, policy: Policy) -> list[int]:
        """Visual tokens of one prompt that each decoder layer processes.

        Args:
            policy: A policy for this model.

        Raises:
            ValueError: If it does not fit the model.
        """
        policy.check(self.signature)
        tokens = self.signature.visual_tokens
        per_layer = [tokens] * len(self._decoder)
        for reduction, kept in zip(policy.reductions, policy.counts(tokens), strict=True):
            first = _first_layer(reduction)
            per_layer[first:] = [kept] * (len(per_layer) - first)
        return [self.images * count for count in per_layer]

    def overhead(self, policy: Policy) -> int:
        """FLOPs of all the reductions of a policy, for the whole batch.

        Args:
            policy: A policy for this model.
        """
        total = 0
        present = self.signature.visual_tokens
        for reduction, kept in zip(policy.reductions, policy.counts(present), strict=True):
            at_once = self.images if _first_layer(reduction) else 1
            flops = self.reduction_flops(reduction, at_once * present, at_once * kept)
            total += int(flops)
            present = kept
        return total

    # *** parts ***

    def _encoding_flops(self, model: PreTrainedModel) -> int:
        """FLOPs of one image: patch embedding, vision blocks, projector."""
        patches = self.signature.visual_tokens
        used = self._vision[: _used_blocks(model, len(self._vision))]
        tower, decoder = model.get_encoder(modality="image"), model.get_decoder()
        parts = {id(module) for part in (tower, decoder) for module in part.modules()}
        parts.add(id(model.get_output_embeddings()))
        between = [module for module in model.modules() if id(module) not in parts]
        per_patch = _patch_flops(tower) + _linear_flops(_leaves(between))
        blocks = sum(block.flops(self._tower_tokens) for block in used)
        return patches * per_patch + int(blocks)

    def _attention_flops(self, reduction: Reduction, layer: int, tokens: Amount) -> Amount:
        """Of the attention rows that the scores observe, for one row of the batch."""
        needs = _needs_of_scores(reduction)
        if "attention_cls" in needs:
            return self._vision[0].row_flops(1, self._tower_tokens)
        queries = ("attention_last" in needs) + ("attention_text" in needs) * self.text_tokens
        return self._decoder[layer].row_flops(queries, self.text_tokens + tokens)

    def _operator_flops(self, reduction: Reduction, before: Amount, after: Amount) -> Amount:
        """Of what compares and merges visual tokens, for one row of the batch."""
        widths = {"feature": self._width, "key": self._decoder[0].dim, "grid": 0}
        compared = sum(widths[kind] for kind in reduction.similarity)
        total: Amount = 0
        if "novelty" in reduction.scores and reduction.uses_scores:
            total += 2 * self._width * before * before
        if reduction.selector == "greedy":
            total += 2 * compared * before * before
        if reduction.gain and reduction.temperature != math.inf:
            total += 2 * compared * after * before
        if reduction.gain or reduction.residual:
            total += 2 * self._width * after * before
        return total


def _first_layer(reduction: Reduction) -> int:
    """First decoder layer that sees the reduced tokens."""
    stage, layer = split_site(reduction.site)
    return layer + 1 if stage == "decoder" else 0


def _needs_of_scores(reduction: Reduction) -> set[str]:
    if not reduction.uses_scores:
        return set()
    return {need for name in reduction.scores for need in SCORES[name].needs}


def _block(block: nn.Module) -> _Block:
    """Measure a block by its linear modules and the config of its attention."""
    attention = next(
        module for module in block.modules() if hasattr(module, "config") and module is not block
    )
    config: Any = attention.config
    heads = config.num_attention_heads
    return _Block(
        linear=_linear_flops(block.modules()),
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _linear_flops(modules: Iterable[nn.Module]) -> int:
    """FLOPs per token of all linear layers, quantised ones too: known by their two sizes."""
    sizes = [
        (getattr(module, "in_features", None), getattr(module, "out_features", None))
        for module in _leaves(modules)
    ]
    return sum(2 * a * b for a, b in sizes if isinstance(a, int) and isinstance(b, int))


def _leaves(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules without children: an adapter and the linear layer it wraps count once each."""
    return [module for module in modules if not any(module.children())]


def _patch_flops(tower: nn.Module) -> int:
    """FLOPs of the tower's convolutions for one patch."""
    return sum(
        2 * module.weight.numel() for module in tower.modules() if isinstance(module, nn.Conv2d)
    )


def _used_blocks(model: PreTrainedModel, blocks: int) -> int:
    """How many vision blocks the language model depends on.

    ``vision_feature_layer`` of the LLaVA family indexes hidden states, of which there is one more
    than blocks.
    """
    layer = getattr(model.config, "vision_feature_layer", -1)
    layers = layer if isinstance(layer, list | tuple) else [layer]
    return max(index if index >= 0 else blocks + 1 + index for index in layers)
