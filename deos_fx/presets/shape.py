"""Describe a model by the sizes that presets are fitted to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deos_fx.models.families import COORDINATES
from deos_fx.operator import grid_layout
from deos_fx.policy.counts import ASPECT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deos_fx.models.facts import ModelFacts

__all__ = ["Shape"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model that presets are fitted to.

    Attributes:
        decoder_layers: Layers of the decoder.
        visual_tokens: Visual tokens of an image.
        grid: Rows and columns of these tokens; one row if they form no square.
        vision_blocks: Blocks of the vision tower.
        used_blocks: Blocks of the tower up to the last that the language model depends on; 0 if
            a visual token is not made of one patch each, so that the tower has no sites.
        class_token: Whether a CLS token attends to exactly the patches that become visual tokens.
        coordinates: Whether a position has several coordinates, so that it cannot be renumbered.
        counting: Whether layers count positions themselves, by the tokens that they get.
        without_attention: Decoder layers that do not attend.
    """

    decoder_layers: int
    visual_tokens: int
    grid: tuple[int, int]
    vision_blocks: int = 0
    used_blocks: int = 0
    class_token: bool = False
    coordinates: bool = False
    counting: bool = False
    without_attention: frozenset[int] = frozenset()

    @classmethod
    def of(cls, model: PreTrainedModel, visual_tokens: int | None = None) -> Shape:
        """Infer the sizes of a model; nothing is captured or run.

        Args:
            model: A transformers vision-language model, which may lie on the meta device.
            visual_tokens: Visual tokens of an image, where its size decides how many there are.

        Raises:
            TypeError: If it is not such a model.
            ValueError: If it reads no images, or the number of tokens is neither given nor fixed.
        """
        # Loaded here: a list of the presets needs no code of models.
        from deos_fx.models.facts import facts_of

        facts = facts_of(model)
        count = visual_tokens or math.prod(facts.grid)
        if not count:
            raise ValueError(
                f"How many visual tokens an image of a {facts.signature.model_type} model has "
                "depends on its size: give visual_tokens, the number of your images."
            )
        side = math.isqrt(count)
        used = in_front = 0
        if not facts.sizes_vary:
            in_front = int(facts.has_class_token)
            used = _used_blocks(facts, count + in_front)
        return cls(
            decoder_layers=facts.signature.decoder_layers,
            visual_tokens=count,
            grid=(side, side) if side * side == count else (1, count),
            vision_blocks=facts.signature.vision_layers,
            used_blocks=used,
            class_token=bool(used and in_front),
            coordinates=hasattr(model.base_model, COORDINATES),
            counting=facts.counts_positions,
            without_attention=_without_attention(facts),
        )

    def layers_before(self, share: float) -> int:
        """Return the decoder layers before a site at this share of the depth, at least 1."""
        return max(1, round(share * self.decoder_layers))

    def block_at(self, share: float) -> int:
        """Return the index of the vision block that ends at this share of the used tower."""
        return max(1, round(share * self.used_blocks)) - 1

    def windows(self, most: int, *, even: bool = False) -> int:
        """Return the largest number of nearly square windows that split the grid.

        Args:
            most: At most so many.
            even: Whether all windows must have one size.
        """
        height, width = self.grid
        for count in range(most, 1, -1):
            try:
                down, across = grid_layout(height, width, count, aspect=ASPECT)
            except ValueError:
                continue
            if not even or (height % down == 0 and width % across == 0):
                return count
        # A single window always does.
        return 1


def _without_attention(facts: ModelFacts) -> frozenset[int]:
    """Return the decoder layers whose cost does not grow with pairs of tokens."""
    from deos_fx.cost.measure import measure_decoder
    from deos_fx.tokens.cache import ReducedCache

    if not ReducedCache(facts.model.config.get_text_config()).has_states:
        # Case: all layers attend, which need not be measured.
        return frozenset()
    layers = measure_decoder(facts).layers
    return frozenset(i for i, layer in enumerate(layers) if not layer.growth.quadratic)


def _used_blocks(facts: ModelFacts, tokens: int) -> int:
    """Count the vision blocks up to the last that is used, if it has this number of tokens."""
    from deos_fx.cost.measure import measure_encoder

    try:
        encoder = measure_encoder(facts)
    except ValueError:
        # Case: an encoder that reads values. Nothing is known of its blocks.
        return 0
    # A tower may have more tokens than come out of it: then its tokens are patches alone.
    return encoder.used if encoder.used and encoder.tokens[encoder.used - 1] == tokens else 0
