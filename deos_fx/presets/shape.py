"""Describe a model by the sizes that presets are fitted to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from deos_fx.models.families import COORDINATES, INDEXES
from deos_fx.operator import grid_layout
from deos_fx.policy.counts import ASPECT
from deos_fx.policy.tier import MOST_TOKENS, check_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deos_fx.cost.measure import LayerCost
    from deos_fx.models.facts import ModelFacts

__all__ = ["ImageSize", "Shape"]

ImageSize: TypeAlias = int | tuple[int, int]
"""Visual tokens of an image, or their rows and columns."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model that presets are fitted to.

    Attributes:
        decoder_layers: Layers of the decoder.
        visual_tokens: Visual tokens of an image.
        grid: Rows and columns of these tokens; one row if they form no square.
        placed: Whether rows and columns are known.
        without_attention: Decoder layers that do not attend (convolutions, and layers that keep a
            state), or whose attention cannot be observed.
        shared_from: The first decoder layer whose keys later layers attend to as well; it and those
            after it have no sites. None where every layer has keys of its own.
        indexing: Whether layers choose the keys that a token sees by an index of them.
        following: Decoder layers that see the keys that the layer before has chosen, so that there
            is no site between the two.
        vision_blocks: Blocks of the vision tower.
        used_blocks: Blocks of the tower up to the last that the language model depends on; 0 if
            the tower has no sites.
        tower_sites: Blocks of the tower, from the first on, that have a site: fewer than the used
            ones where the features are made of several blocks.
        in_groups: Whether a token at these sites is a group of patches in an encoder that is one
            node of the graph: tokens stay in order, and only the block of a site can be observed.
        unseen: Whether not even that can be, since its attention is not that of transformers.
        class_token: Whether a CLS token attends to exactly the patches that become visual tokens.
        coordinates: Whether a position has several coordinates, so that it cannot be renumbered.
        counting: Whether layers count positions themselves, by the tokens that they get.
    """

    decoder_layers: int
    visual_tokens: int
    grid: tuple[int, int]
    placed: bool = True
    without_attention: frozenset[int] = frozenset()
    shared_from: int | None = None
    indexing: bool = False
    following: frozenset[int] = frozenset()
    vision_blocks: int = 0
    used_blocks: int = 0
    tower_sites: int = 0
    in_groups: bool = False
    unseen: bool = False
    class_token: bool = False
    coordinates: bool = False
    counting: bool = False

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        visual_tokens: ImageSize | None = None,
        example_inputs: Mapping[str, Any] | None = None,
    ) -> Shape:
        """Infer the sizes of a model; nothing is captured, and it runs on shapes alone.

        Args:
            model: A transformers vision-language model, which may lie on the meta device.
            visual_tokens: Visual tokens of an image, or their rows and columns, where its size
                decides how many there are. A single row says that their places are not known.
            example_inputs: As in `fit`.

        Raises:
            TypeError: If it is not such a model.
            ValueError: If it reads no images, or the number of tokens is neither given nor fixed.
        """
        # Loaded here: a list of the presets needs no code of models.
        from deos_fx.cost.measure import measure_decoder
        from deos_fx.models.facts import facts_of

        facts = facts_of(model)
        if isinstance(visual_tokens, tuple):
            for side in visual_tokens:
                check_count("visual_tokens", side, 1, MOST_TOKENS)
        elif visual_tokens is not None:
            check_count("visual_tokens", visual_tokens, 1, MOST_TOKENS)
        grid = _grid(visual_tokens or facts.grid)
        count = math.prod(grid)
        if not count:
            raise ValueError(
                f"How many visual tokens an image of a {facts.signature.model_type} model has "
                "depends on its size: give visual_tokens, the number of your images."
            )
        used = sites = in_front = 0
        if not facts.sizes_vary:
            in_front = int(facts.has_class_token)
            used, sites = _tower(facts, count + in_front)
            if in_front and not used:
                # Case: the CLS token is one of the visual tokens.
                in_front = 0
                used, sites = _tower(facts, count)
        patchwise = used > 0
        if not patchwise:
            used = sites = _tower_of_groups(facts, example_inputs)
        layers = measure_decoder(facts).layers
        return cls(
            decoder_layers=facts.signature.decoder_layers,
            visual_tokens=count,
            grid=grid,
            placed=1 not in grid or count == 1,
            without_attention=_without_attention(facts, layers),
            shared_from=_shared_from(layers),
            indexing=facts.indexes_keys,
            following=_following(model),
            vision_blocks=facts.signature.vision_layers,
            used_blocks=used,
            tower_sites=sites,
            in_groups=bool(used) and not patchwise,
            unseen=bool(used) and not (patchwise or _is_seen(facts)),
            class_token=bool(patchwise and in_front),
            coordinates=hasattr(model.base_model, COORDINATES),
            counting=facts.counts_positions,
        )

    @property
    def decoder_sites(self) -> int:
        """Return the number of decoder layers, from the first on, that have a site."""
        # Nothing would be saved after the last layer.
        return self.decoder_layers - 1 if self.shared_from is None else self.shared_from

    def layers_before(self, share: float) -> int:
        """Return the decoder layers before a site at this share of the depth, at least 1."""
        return max(1, round(share * self.decoder_layers))

    def attending(self, before: int, *, following: bool = False) -> int:
        """Return the number of layers before the nearest site whose layer attends.

        Args:
            before: The number of layers that is wanted; of two as near, the lower is taken.
            following: Whether the layer after the site is to attend, and not the one before it.

        Raises:
            ValueError: If there is no such site.
        """
        fine = [
            count
            for count in range(1, self.decoder_sites + 1)
            if (count if following else count - 1) not in self.without_attention
            and count not in self.following
        ]
        if not fine:
            raise ValueError("no layer of the decoder with a site attends to the visual tokens")
        return min(fine, key=lambda count: (abs(count - before), count))

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


def _grid(size: ImageSize) -> tuple[int, int]:
    """Return rows and columns: of a number of tokens, those of a square, or else one row."""
    if not isinstance(size, int):
        return size
    side = math.isqrt(size)
    return (side, side) if side * side == size else (1, size)


def _shared_from(layers: Sequence[LayerCost]) -> int | None:
    """Return the first layer whose keys are read by layers that have none of their own.

    These read the keys of the last layer of their kind before them, sliding or not.
    """
    first = next((i for i, layer in enumerate(layers) if _borrows_keys(layer)), None)
    if first is None:
        return None
    # Of each kind the last: later entries replace earlier ones.
    return min({layer.window: i for i, layer in enumerate(layers[:first]) if layer.cached}.values())


def _attends(layer: LayerCost) -> bool:
    """Return whether the cost of a layer grows with pairs of tokens."""
    return layer.growth.quadratic > 0


def _without_attention(facts: ModelFacts, layers: Sequence[LayerCost]) -> frozenset[int]:
    """Return the decoder layers that do not attend, or whose attention cannot be observed."""
    from deos_fx.attention.mask import attention_modules

    parts = map(facts.model.get_submodule, facts.blocks.decoder)
    seen = (bool(attention_modules(part)) for part in parts)
    both = enumerate(zip(layers, seen, strict=True))
    return frozenset(i for i, (layer, seen) in both if not (_attends(layer) and seen))


def _borrows_keys(layer: LayerCost) -> bool:
    """Return whether a layer attends, and holds no keys of its own."""
    return _attends(layer) and not (layer.cached and layer.key_heads)


def _following(model: PreTrainedModel) -> frozenset[int]:
    """Return the layers that see the keys that an earlier one has chosen."""
    kinds = getattr(model.config.get_text_config(), INDEXES, None) or ()
    return frozenset(i for i, kind in enumerate(kinds) if kind == "shared")


def _tower(facts: ModelFacts, tokens: int) -> tuple[int, int]:
    """Count the vision blocks up to the last that is used, and those of them that have a site.

    Args:
        facts: The facts of a model whose images have one size.
        tokens: Patches of an image, and a CLS token if the tower has one.
    """
    from deos_fx.cost.measure import measure_encoder
    from deos_fx.cost.tower import blocks_read

    try:
        encoder = measure_encoder(facts)
    except ValueError:
        # Case: an encoder that reads values. Nothing is known of its blocks.
        return 0, 0
    # A tower may have more tokens than come out of it: then its tokens are patches alone.
    if not encoder.used or encoder.tokens[encoder.used - 1] != tokens:
        return 0, 0
    read = blocks_read(facts)
    # Features that are also read from an earlier block go around all blocks after that.
    return (max(read) + 1, min(read) + 1) if read else (0, 0)


def _tower_of_groups(facts: ModelFacts, given: Mapping[str, Any] | None) -> int:
    """Count the vision blocks up to the last that is used where groups of patches make a token.

    Args:
        facts: The facts of the model.
        given: Inputs of a call with images; None for an example that follows from the config.
    """
    from deos_fx.cost.measure import once
    from deos_fx.cost.tower import blocks_of_groups
    from deos_fx.errors import NoGroups
    from deos_fx.inputs.call import Call
    from deos_fx.inputs.example import example_inputs

    def count() -> int:
        try:
            inputs = example_inputs(facts.model) if given is None else Call.of(facts, given).inputs
            found, _ = blocks_of_groups(facts, inputs)
        except (NoGroups, ValueError):
            # Case: there are no such groups, or it takes a processor to make an image.
            return 0
        # The presets begin with the first block.
        return 0 if found.start else found.stop

    # Only what follows from the config is the same at every call.
    return once(facts, "blocks of groups of an example", count) if given is None else count()


def _is_seen(facts: ModelFacts) -> bool:
    """Return whether the attention of the tower's blocks can be observed."""
    from deos_fx.attention.mask import attention_modules

    return bool(attention_modules(facts.model.get_submodule(facts.blocks.vision[0])))
