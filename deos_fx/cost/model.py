"""Predict the cost of a prefill: visual tokens per layer, FLOPs, bytes of KV cache.

The parts of the model are measured once, on a twin that has shapes and no data. From these and the
counts of tokens, costs are computed; the model does not run.

Operations are counted as `torch.utils.flop_counter` counts them: two for each multiply-add of a
linear layer, a convolution or an attention product, nothing for the rest. Masked attention counts
in full, whatever a kernel skips.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.cost.amounts import Amount, Cost
from deos_fx.cost.overhead import (
    Seen,
    Site,
    SiteSizes,
    Together,
    known_grid_after,
    observations,
    operator_flops,
    relaxed_flops,
)
from deos_fx.cost.parts import Parts, at_most
from deos_fx.inputs.call import Call
from deos_fx.models.facts import ModelFacts, facts_of
from deos_fx.policy.counts import along, as_shares, tokens_per_layer
from deos_fx.policy.latency import LatencyTable
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import split_site
from deos_fx.tokens.layout import PromptLayout

__all__ = ["CostModel"]


class CostModel:
    """Predicts the cost of prompts of one shape, for any policy.

    Blocks of the image encoder whose results the language model does not use cost nothing, if
    capture leaves them out.

    Args:
        facts: The facts of a model.
        layout: The prompts' images.
        text_tokens: Tokens of a prompt that are not visual, padding included.
        batch: Prompts.
        logits_to_keep: Positions of each prompt whose logits are computed; 0 for all of them.
        call: A call with the images of all prompts. May be left out only where all images have one
            size.
    """

    def __init__(
        self,
        facts: ModelFacts,
        layout: PromptLayout,
        text_tokens: int,
        batch: int = 1,
        *,
        logits_to_keep: int = 0,
        call: Call | None = None,
    ) -> None:
        self.signature = facts.signature
        self.layout = layout
        self.text_tokens = text_tokens
        self.batch = batch
        self.logits_to_keep = logits_to_keep
        self.latency: LatencyTable | None = None
        self._parts = Parts(facts, call)
        # The prompts whose images the call has.
        self._encoded_prompts = batch
        self._counted: dict[tuple[str, int, int, bool], int] = {}

    @classmethod
    def of_images(
        cls, model: PreTrainedModel, images: int, text_tokens: int, batch: int = 1, **options: Any
    ) -> CostModel:
        """Make the cost model of prompts with `images` images, where all images have one size.

        Args:
            model: A transformers vision-language model.
            images: Images per prompt.
            text_tokens: As for the class.
            batch: As for the class.
            **options: As for the class.

        Raises:
            TypeError: If `model` is not a transformers model.
            ValueError: If it reads no images, or the number of visual tokens depends on the image's
                size.
        """
        facts = facts_of(model)
        if facts.sizes_vary:
            raise ValueError(
                f"The visual tokens of an image of a {facts.signature.model_type} model depend on "
                "its size: give inputs of a call."
            )
        layout = PromptLayout(facts.image_token, images, facts.grid)
        return cls(facts, layout, text_tokens, batch, **options)

    @classmethod
    def of_call(cls, call: Call) -> CostModel:
        """Make the cost model of the prompts of a call.

        Args:
            call: The call.

        Raises:
            ValueError: If the call has no image, or the prompts differ in their images.
        """
        layout = call.layout
        batch, length = call.inputs["input_ids"].shape
        kept = call.inputs.get("logits_to_keep", 0)
        return cls(
            call.facts,
            layout,
            length - sum(layout.sizes),
            batch,
            logits_to_keep=len(kept) if isinstance(kept, Tensor) else kept,
            call=call,
        )

    def of_one_prompt(self) -> CostModel:
        """Return the same cost model for a batch of one."""
        alone = copy.copy(self)
        alone.batch = 1
        return alone

    def with_latency(self, table: LatencyTable) -> CostModel:
        """Return the same cost model with measured times, by which `latency_ms` predicts.

        Args:
            table: The times.

        Raises:
            ValueError: If they are those of another model.
        """
        if table.model != self.signature:
            raise ValueError(
                f"the latency table is that of {table.model}, and this model is {self.signature}; "
                "measure this model with deos_fx.profile"
            )
        timed = copy.copy(self)
        timed.latency = table
        return timed

    @property
    def images(self) -> int:
        """Return the number of images per prompt."""
        return self.layout.images

    @property
    def tokens_per_image(self) -> int:
        """Return the visual tokens of an image before any reduction.

        Raises:
            ValueError: If images have different numbers of tokens.
        """
        return self.layout.tokens_per_image

    @property
    def tokens_of_first_image(self) -> int:
        """Return the visual tokens of the first image before any reduction."""
        return self.layout.sizes[0]

    @property
    def sizes_vary(self) -> bool:
        """Return whether other images, or videos, may have other numbers of visual tokens."""
        fixed = self.signature.visual_tokens
        return fixed == 0 or set(self.layout.sizes) != {fixed}

    def for_any_size(self, policy: Policy) -> Policy:
        """Return the policy, with shares in place of counts if other images may have other sizes.

        Counts are fitted to the first image; shares serve images of any size.
        """
        return as_shares(policy, self.tokens_of_first_image) if self.sizes_vary else policy

    # *** costs from the visual tokens of each decoder layer; differentiable ***

    def mean_tokens(self, counts: Sequence[Amount] | Tensor) -> Amount:
        """Compute the mean of the visual tokens over the decoder layers.

        Args:
            counts: Visual tokens of one prompt, all its images together, that each decoder layer
                processes.
        """
        return sum(counts) / self.signature.decoder_layers

    def flops(
        self,
        counts: Sequence[Amount] | Tensor,
        overhead: Amount = 0,
        patches: Sequence[Amount] | None = None,
    ) -> Amount:
        """Compute the FLOPs of one prefill of the whole batch, from pixels to logits.

        Args:
            counts: As in `mean_tokens`.
            overhead: FLOPs of the reductions themselves, see `overhead`.
            patches: Patches of one image that each used block of the vision tower processes, then
                those of the projector, see `patches`; by default all of them.
        """
        lengths = [self.text_tokens + count for count in counts]
        layers = sum(
            block.growth.flops(length)
            for block, length in zip(self._parts.decoder, lengths, strict=True)
        )
        # What is before the layers runs over the prompt as it enters the decoder, and what is after
        # them over what is left at the end, as the head does.
        measured = self._parts.measured
        around = measured.before * lengths[0] + measured.after * lengths[-1]
        head = self._parts.measured.head * (self.logits_to_keep or lengths[-1])
        encoding = self._encoding(self.patches(Policy()) if patches is None else patches)
        return encoding + self.batch * (layers + around + head) + overhead

    def kv_bytes(self, counts: Sequence[Amount] | Tensor) -> Amount:
        """Compute the bytes of the keys and values that one prefill of the whole batch leaves.

        Args:
            counts: As in `mean_tokens`.
        """
        total: Amount = 0
        for layer, count in zip(self._parts.measured.layers, counts, strict=True):
            # A sliding layer holds no more than its window.
            held = at_most(self.text_tokens + count, layer.window)
            total = total + layer.cached * held + layer.state
        return self.batch * total

    def latency_ms(
        self,
        counts: Sequence[Amount] | Tensor,
        overhead: Amount = 0,
        patches: Sequence[Amount] | None = None,
    ) -> Amount:
        """Predict the milliseconds of the prefill of one prompt, from a table of measured times.

        A decoder layer takes the time at its own length. Encoding takes time in proportion to its
        FLOPs, and so do the reductions, at the rate of the decoder.

        Args:
            counts: As in `mean_tokens`.
            overhead: As in `flops`.
            patches: As in `flops`.
        """
        assert self.latency is not None, "with_latency comes first"
        table, longest = self.latency, self.latency.lengths[-1]
        decoder = table.decoder([self.text_tokens + count for count in counts])
        encoding = self._encoding(self.patches(Policy()) if patches is None else patches)
        encoder = table.encoder * encoding / max(table.encoder_flops, 1) / self.batch
        full = sum(row[-1] for row in table.layers)
        rate = full / float(sum(block.growth.flops(longest) for block in self._parts.decoder))
        return decoder + encoder + rate * overhead / self.batch

    def encoding_flops(self) -> int:
        """Count the FLOPs of encoding all images of the batch."""
        return round(float(self._encoding(self.patches(Policy()))))

    def shares(self, length: int) -> list[float]:
        """Return the share of each decoder layer in the FLOPs of all of them, at some length."""
        flops = [float(block.growth.flops(length)) for block in self._parts.decoder]
        return [own / sum(flops) for own in flops]

    def reduction_flops(self, reduction: Reduction, before: Amount, after: Amount) -> Amount:
        """Compute the FLOPs of a reduction's own scores, similarities and merging, for the batch.

        Args:
            reduction: The reduction, as far as a search can vary it; its ``keep`` is not read.
            before: Visual tokens that come in, of one image before the decoder and of one prompt
                in it.
            after: Visual tokens that are kept, counted in the same way.
        """
        site = self._site(reduction)
        observed = site.observed_flops(observations(reduction), before, before, self.text_tokens)
        operator = relaxed_flops(reduction, before, after, site.sizes)
        rows = self.batch * (1 if site.stage == "decoder" else self.images)
        return rows * (observed + operator)

    # *** costs of a policy; exact ***

    def predict(self, policy: Policy) -> Cost:
        """Compute the cost with a policy, the reductions' own matmuls included.

        Args:
            policy: ``Policy()`` gives the cost of the unreduced model.

        Raises:
            ValueError: If the policy does not fit the model.
        """
        amounts = self.amounts(policy, ("visual_tokens", "flops", "kv_cache"))
        return Cost(
            visual_tokens_per_layer=tuple(self.counts(policy)),
            visual_tokens=amounts["visual_tokens"],
            flops=round(amounts["flops"]),
            kv_bytes=round(amounts["kv_cache"]),
        )

    def amounts(
        self, policy: Policy, names: Iterable[str], *, counted: bool = True
    ) -> dict[str, float]:
        """Compute some amounts of `predict`, under the names of a budget's limits.

        Args:
            policy: A policy for this model.
            names: The amounts; names of other limits are left out.
            counted: Whether the FLOPs of the reductions are counted, which takes far longer than
                everything else, or computed by the formula of a search (see `relaxed_flops`).

        Raises:
            ValueError: If the policy does not fit the model.
        """
        counts = self.counts(policy)

        def whole(cost: Callable[..., Amount]) -> Amount:
            return cost(counts, self.overhead(policy, counted), self.patches(policy))

        made: dict[str, Callable[[], Amount]] = {
            "visual_tokens": lambda: sum(counts) / len(counts),
            "flops": lambda: whole(self.flops),
            "kv_cache": lambda: self.kv_bytes(counts),
            "latency_ms": lambda: whole(self.latency_ms),
        }
        return {name: float(made[name]()) for name in names if name in made}

    def without_images(self) -> Cost:
        """Compute the cost of the same prompts as text alone."""
        none = [0] * self.signature.decoder_layers
        flops = round(float(self.flops(none))) - self.encoding_flops()
        return Cost(tuple(none), 0.0, flops, round(float(self.kv_bytes(none))))

    def counts(self, policy: Policy) -> list[int]:
        """Count the visual tokens of one prompt that each decoder layer processes.

        Args:
            policy: A policy for this model.

        Raises:
            ValueError: If it does not fit the model.
        """
        policy.check(self.signature)
        return tokens_per_layer(policy, self.layout.sizes, self.signature.decoder_layers)

    @property
    def tower_blocks(self) -> int:
        """Count the vision blocks up to the last that is used; 0 if they cannot be told apart."""
        return self._parts.tower_blocks

    def patches(self, policy: Policy) -> list[float]:
        """Count the visual tokens of an image in each used vision block, and then in the projector.

        In the tower, a token may be a group of patches. Images of several sizes count by their
        mean.
        """
        sizes = self.layout.sizes
        kept = (
            (split_site(step.site)[1] + 1, _mean([*map(step.count, sizes)]))
            for step in policy.reductions
            if split_site(step.site)[0] == "vision"
        )
        return along(_mean(sizes), kept, self.tower_blocks + 1)

    def overhead(self, policy: Policy, counted: bool = True) -> int:
        """Compute the FLOPs of all the reductions of a policy, for the whole batch."""
        total = 0
        # Groups of tokens that are reduced together: at first, images of one size are one kind of
        # group, with a row for each image.
        inside = self.patches(policy)
        sizes = self.layout.sizes
        together = [
            Together(len(alike), (sizes[alike[0]],), sizes[alike[0]], self._cells(alike[0]))
            for alike in self.layout.alike()
        ]
        in_decoder = False
        known: set[Seen] = set()
        for reduction in policy.reductions:
            stage, layer = split_site(reduction.site)
            # From the first decoder site on, a reduction sees all images of a prompt at once.
            if stage == "decoder" and not in_decoder:
                in_decoder, together = True, [self._of_prompt(together)]
            site, seen = self._site(reduction), observations(reduction)
            if stage == "projector":
                # A reduction right after the last block has observed that block already.
                seen = seen - known
            known = seen if stage == "vision" and layer == self.tower_blocks - 1 else set()
            for group in together:
                before, after = group.present, sum(map(reduction.count, group.images))
                # At the projector, attention is that of the last block, over the patches in it.
                attended = inside[self.tower_blocks - 1] if stage == "projector" else before
                total += group.rows * int(
                    site.observed_flops(seen, attended, before, self.text_tokens)
                    + self._operator_flops(
                        reduction, before, after, site.sizes, group.grid, counted
                    )
                )
                group.grid = known_grid_after(reduction, after, group.grid)
                group.present = after
        total *= self.batch
        # Raters are chosen once, by a product of the visual tokens with the text.
        if any(of == "raters" for step in policy.reductions for _, _, of in observations(step)):
            width = self._parts.measured.width
            total += self.batch * 2 * width * self.counts(policy)[0] * self.text_tokens
        return total

    def _cells(self, image: int) -> Tensor:
        """Return image, row and column of every token of one image, [V, 3]."""
        return PromptLayout(0, 1, self.layout.each_grid[image]).grid_tensor(1)

    def _of_prompt(self, images: Sequence[Together]) -> Together:
        """Return the tokens of a prompt, from those of its images of each size."""
        present = sum(group.rows * group.present for group in images)
        grid = None
        if all(group.grid is not None for group in images):
            # The order of the images does not change a cost.
            parts = [group.grid for group in images for _ in range(group.rows)]
            grid = torch.cat(
                [part + torch.tensor([i, 0, 0]) for i, part in enumerate(parts) if part is not None]
            )
        return Together(1, self.layout.sizes, present, grid)

    def _encoding(self, patches: Sequence[Amount]) -> Amount:
        """Compute the FLOPs of encoding all images: patch embedding, vision blocks, projector."""
        # Case: the encoder was measured as a whole, for a batch of `_encoded_prompts`.
        if self._parts.opaque:
            whole = sum(self.layout.sizes) / self.images
            shares = [count / whole for count in patches[:-1]]
            return self._parts.encoding_as_one(shares) * self.batch / self._encoded_prompts
        # Case: block by block. Class tokens are not reduced, so only the visual ones are exchanged.
        *in_blocks, in_projector = patches
        whole, per_token = self.tokens_per_image, self._parts.patches_per_token
        tower: Amount = 0
        for i, count in enumerate(in_blocks):
            left = self._parts.tokens_in_block(i) - per_token * (whole - count)
            tower = tower + self._parts.vision[i].growth.flops(left)
        encoder = self._parts.encoder
        if self._parts.in_groups:
            # What makes tokens of groups of patches runs over all of them.
            in_projector = whole
        projector = encoder.after * in_projector / whole
        return self.batch * self.images * (encoder.front + tower + projector)

    def _site(self, reduction: Reduction) -> Site:
        # The projector comes after the last used block of the tower, whose attention it observes.
        stage, layer = split_site(reduction.site)
        if stage == "vision" and self._parts.in_groups:
            return self._site_of_groups(layer)
        blocks = self._parts.decoder if stage == "decoder" else self._parts.vision
        index = self.tower_blocks - 1 if stage == "projector" else layer
        block = blocks[index] if blocks else None
        width = self._parts.width
        if stage != "projector" and block:
            width = block.width if stage == "vision" else self._parts.measured.width
        return Site(
            stage=stage,
            block=block,
            following=blocks[index + 1] if index + 1 < len(blocks) else None,
            others=self.text_tokens if stage == "decoder" else self._parts.class_tokens,
            sizes=SiteSizes(
                width=width,
                key=block.dim if block else 0,
                joint_key=block.key_heads * block.dim if block else 0,
                text=self.text_tokens,
                normed=self._parts.width,
            ),
        )

    def _site_of_groups(self, layer: int) -> Site:
        """Return the surroundings of a site at which groups of patches are tokens."""
        block, per_token = self._parts.block_of_groups(layer), self._parts.patches_per_token
        return Site(
            stage="vision",
            block=block,
            following=None,
            others=0 if self._parts.opaque else self._parts.class_tokens,
            sizes=SiteSizes(
                width=per_token * block.width,
                key=per_token * block.dim,
                joint_key=per_token * block.key_heads * block.dim,
                text=self.text_tokens,
            ),
            per_token=per_token,
        )

    def _operator_flops(
        self,
        reduction: Reduction,
        before: int,
        after: int,
        sizes: SiteSizes,
        grid: Tensor | None,
        counted: bool,
    ) -> int:
        """Count a reduction's own FLOPs, once for each pair of counts: a search asks repeatedly."""
        if not counted:
            return int(relaxed_flops(reduction, before, after, sizes))
        # The count in the policy is not read, so policies that differ in it share an entry.
        key = (repr(replace(reduction, keep=1.0)), before, after, grid is None)
        if (known := self._counted.get(key)) is not None:
            return known
        try:
            flops = operator_flops(reduction, before, after, sizes, grid)
        except ValueError:
            # A search also asks for counts that the grid cannot be divided into.
            flops = int(relaxed_flops(reduction, before, after, sizes))
        return self._counted.setdefault(key, flops)


def _mean(counts: Sequence[int]) -> float:
    """Return the mean of counts, a whole number if they are all the same."""
    return counts[0] if len(set(counts)) == 1 else sum(counts) / len(counts)
