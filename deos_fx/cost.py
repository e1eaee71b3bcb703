"""What a prefill costs: visual tokens per layer, floating-point operations, bytes of KV cache.

Everything is computed from the model's modules and the token counts, without running the model.
Operations are counted as `torch.utils.flop_counter` counts them: two for each multiply-add of a
linear layer, a convolution or an attention product, nothing for the rest. Masked attention counts
in full, whatever a kernel skips.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel

from deos_fx.inputs import prompt_layout
from deos_fx.operator import required_features
from deos_fx.operator_cost import Amount, SiteSizes, operator_flops, relaxed_flops
from deos_fx.passes.features import OBSERVED
from deos_fx.passes.find_blocks import find_blocks
from deos_fx.passes.layout import PromptLayout, first_layer, grid_after, grid_of_prompt
from deos_fx.policy import Policy, Reduction
from deos_fx.reduction import split_site
from deos_fx.seam import Observation
from deos_fx.signature import check_verified, grid_of, has_class_token, signature_of

__all__ = ["Amount", "Cost", "CostModel", "CostReport"]


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
        width: Size of a hidden state.
    """

    linear: int
    heads: int
    key_heads: int
    dim: int
    width: int

    def flops(self, tokens: Amount) -> Amount:
        """Of the whole block: linear layers, query-key and attention-value products."""
        return tokens * self.linear + 4 * self.heads * self.dim * tokens * tokens

    def row_flops(self, queries: Amount, tokens: Amount) -> Amount:
        """Of the attention logits of a few queries that a score observes."""
        return 2 * self.heads * self.dim * queries * tokens

    @property
    def projections(self) -> int:
        """Of the queries, keys and values of one token."""
        return 2 * self.width * (self.heads + 2 * self.key_heads) * self.dim


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
        ValueError: If it has no vision tower, or is not a LLaVA with images of one size.
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
        check_verified(model, "Counting costs (and searching by them)")
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
        self._class_tokens = int(has_class_token(model))
        self._used = self._vision[: _used_blocks(model, len(self._vision))]
        self._per_patch, self._per_feature = _encoding_flops(model)
        self._grid = grid_of(model)
        self._counted: dict[tuple[str, int, int, bool], int] = {}

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

    def flops(
        self,
        counts: Sequence[Amount] | Tensor,
        overhead: Amount = 0,
        patches: Sequence[Amount] | None = None,
    ) -> Amount:
        """Of one prefill of the whole batch, from pixels to logits.

        Args:
            counts: As in `visual_tokens`.
            overhead: FLOPs of the reductions themselves, see `overhead`.
            patches: Patches of one image that each used block of the vision tower processes, and
                then the projector, see `patches`; by default all of them.
        """
        lengths = [self.text_tokens + count for count in counts]
        layers = sum(
            block.flops(length) for block, length in zip(self._decoder, lengths, strict=True)
        )
        head = self._head * (self.logits_to_keep or lengths[-1])
        encoding = self._encoding(self.patches(Policy()) if patches is None else patches)
        return self.batch * (self.images * encoding + layers + head) + overhead

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
            reduction: What is done, as far as a search can vary it; its ``keep`` is not read.
            before: Visual tokens that come in, of one image before the decoder and of one prompt
                in it.
            after: Those that are kept, counted alike.
        """
        site = self._site(reduction)
        observed = site.observed_flops(_observed(reduction), before, before, self.text_tokens)
        operator = relaxed_flops(reduction, before, after, site.sizes)
        return site.rows * (observed + operator)

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
            flops=int(self.flops(counts, self.overhead(policy), self.patches(policy))),
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
            first = first_layer(reduction.site)
            per_layer[first:] = [kept] * (len(per_layer) - first)
        return [self.images * count for count in per_layer]

    @property
    def tower_blocks(self) -> int:
        """Blocks of the vision tower that the language model depends on."""
        return len(self._used)

    def patches(self, policy: Policy) -> list[int]:
        """Patches of one image in each used block of the vision tower, and then in the projector.

        Args:
            policy: A policy for this model.
        """
        tokens = self.signature.visual_tokens
        per_block = [tokens] * (self.tower_blocks + 1)
        for reduction, kept in zip(policy.reductions, policy.counts(tokens), strict=True):
            stage, block = split_site(reduction.site)
            if stage == "vision":
                per_block[block + 1 :] = [kept] * (self.tower_blocks - block)
        return per_block

    def overhead(self, policy: Policy) -> int:
        """FLOPs of all the reductions of a policy, for the whole batch.

        Args:
            policy: A policy for this model.
        """
        total = 0
        present = self.signature.visual_tokens
        inside = self.patches(policy)
        at_decoder = self.counts(policy)[0]
        grid: Tensor | None = PromptLayout(0, 1, self._grid).grid_tensor(1)
        at_once = 1
        known: set[_Seen] = set()
        for reduction, kept in zip(policy.reductions, policy.counts(present), strict=True):
            stage, layer = split_site(reduction.site)
            if stage == "decoder" and at_once < self.images:
                at_once = self.images
                grid = None if grid is None else grid_of_prompt(grid, self.images)
            site = self._site(reduction)
            before, after = at_once * present, at_once * kept
            seen = _observed(reduction)
            attended = before
            if stage == "projector":
                # A cut right behind the last block looks into the same block.
                attended = inside[-2]
                seen = seen - known
            known = seen if stage == "vision" and layer == self.tower_blocks - 1 else set()
            total += site.rows * int(
                site.observed_flops(seen, attended, before, self.text_tokens)
                + self._operator_flops(reduction, before, after, site.sizes, grid)
            )
            grid = _grid_after(reduction, after, grid)
            present = kept
        if any(of == "raters" for step in policy.reductions for _, _, of in _observed(step)):
            total += self.batch * 2 * self._width * at_decoder * self.text_tokens
        return total

    # *** parts ***

    def _encoding(self, patches: Sequence[Amount]) -> Amount:
        """FLOPs of one image: patch embedding, vision blocks, projector."""
        *in_blocks, in_projector = patches
        blocks = zip(self._used, in_blocks, strict=True)
        tower = sum(block.flops(self._class_tokens + count) for block, count in blocks)
        embedding = self.signature.visual_tokens * self._per_patch
        return embedding + tower + in_projector * self._per_feature

    def _site(self, reduction: Reduction) -> _Site:
        stage, layer = split_site(reduction.site)
        blocks = self._decoder if stage == "decoder" else self._vision
        block = self.tower_blocks - 1 if stage == "projector" else layer
        return _Site(
            stage=stage,
            block=blocks[block],
            following=blocks[block + 1] if block + 1 < len(blocks) else None,
            others=self.text_tokens if stage == "decoder" else self._class_tokens,
            rows=self.batch * (1 if stage == "decoder" else self.images),
            sizes=SiteSizes(
                width=blocks[block].width if stage == "vision" else self._width,
                key=blocks[block].dim,
                joint_key=blocks[block].key_heads * blocks[block].dim,
                text=self.text_tokens,
            ),
        )

    def _operator_flops(
        self, reduction: Reduction, before: int, after: int, sizes: SiteSizes, grid: Tensor | None
    ) -> int:
        """Counted once for each pair of numbers: a search asks again and again."""
        key = (repr(replace(reduction, keep=1.0)), before, after, grid is None)
        if key not in self._counted:
            try:
                flops = operator_flops(reduction, before, after, sizes, grid)
            except ValueError:
                # A search also asks for counts between those that the grid can be split into.
                flops = int(relaxed_flops(reduction, before, after, sizes))
            self._counted[key] = flops
        return self._counted[key]


def _grid_after(reduction: Reduction, count: int, grid: Tensor | None) -> Tensor | None:
    try:
        return None if grid is None else grid_after(reduction, count, grid)
    except ValueError:
        return None


_Seen: TypeAlias = tuple[str, Observation, str]
"""Where, what and of whose queries: see `deos_fx.passes.features`."""


def _observed(reduction: Reduction) -> set[_Seen]:
    """What the reduction observes, each once."""
    needs = (need.partition("@") for need in required_features(reduction))
    return {(where, *OBSERVED[name]) for name, _, where in needs if name in OBSERVED}


@dataclass(frozen=True)
class _Site:
    """What is there at a site.

    Attributes:
        stage: ``vision``, ``projector`` or ``decoder``.
        block: The block before it.
        following: The block behind it.
        others: Tokens of a row that are not visual.
        rows: Rows of the batch: prompts, or images.
        sizes: Of features.
    """

    stage: str
    block: _Block
    following: _Block | None
    others: int
    rows: int
    sizes: SiteSizes

    def observed_flops(
        self, seen: set[_Seen], attended: Amount, visual: Amount, text: int
    ) -> Amount:
        """Of what is observed, for one row of the batch; formulas in `deos_fx.passes.features`.

        Args:
            seen: What is observed.
            attended: Visual tokens in the block before the site.
            visual: Visual tokens at the site.
            text: Text tokens.
        """
        total: Amount = 0
        for where, observation, of in seen:
            block, tokens = self.block, self.others + attended
            if where == "next":
                assert self.following is not None
                block, tokens = self.following, self.others + visual
            # In the tower all tokens are asked, class tokens too.
            every = visual if self.stage == "decoder" else tokens
            queries = {"class": 1, "last": 1, "text": text, "raters": text, "visual": every}
            if of:
                total += block.row_flops(queries[of], tokens)
            if observation.gravity:
                total += 4 * block.dim * queries[of] * tokens
        if self.following is not None and any(where == "next" for where, _, _ in seen):
            total += self.following.projections * (self.others + visual)
        return total


def _encoding_flops(model: PreTrainedModel) -> tuple[int, int]:
    """FLOPs of one patch in front of the tower's blocks, and of one feature behind them."""
    tower, decoder = model.get_encoder(modality="image"), model.get_decoder()
    parts = {id(module) for part in (tower, decoder) for module in part.modules()}
    parts.add(id(model.get_output_embeddings()))
    between = [module for module in model.modules() if id(module) not in parts]
    return _patch_flops(tower), _linear_flops(_leaves(between))


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
        width=config.hidden_size,
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
