"""Give the costs of a model's parts: its decoder layers, its vision blocks, what is around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from deos_fx.cost.amounts import Amount
from deos_fx.cost.growth import Growth
from deos_fx.cost.measure import DecoderCost, EncoderCost, measure_decoder, measure_encoder
from deos_fx.cost.peek import measure_peek
from deos_fx.cost.tower import blocks_read
from deos_fx.inputs.call import Call
from deos_fx.models.facts import ModelFacts
from deos_fx.models.families import READ

__all__ = ["BlockCost", "Parts", "at_most", "heads_of"]


@dataclass(frozen=True)
class BlockCost:
    """The cost of a transformer block, and the sizes of its attention.

    Attributes:
        growth: Its FLOPs by the number of tokens: linear layers, convolutions, states, query-key
            and attention-value products.
        heads: Query heads; a part of one where only some pairs of tokens see each other.
        key_heads: Key and value heads.
        dim: Size of a head.
        width: Size of a hidden state.
        peek: Measures a peek into it; None for a block that computes queries, keys and values of
            the hidden states before it attends, and nothing else.
    """

    growth: Growth
    heads: float
    key_heads: int
    dim: int
    width: int
    peek: Callable[[], Growth] | None = None

    def row_flops(self, queries: Amount, tokens: Amount) -> Amount:
        """Compute the FLOPs of the attention logits of a few queries that a score observes."""
        return 2 * self.heads * self.dim * queries * tokens

    def peek_flops(self, tokens: Amount) -> Amount:
        """Compute the FLOPs of everything before the attention."""
        if self.peek is not None:
            return self.peek().flops(tokens)
        # Queries, keys and values; two for each multiply-add.
        return 2 * self.width * (self.heads + 2 * self.key_heads) * self.dim * tokens


def heads_of(block: nn.Module) -> tuple[int, int, int, int]:
    """Read query heads, key heads, size of a head and width from a block's attention config."""
    # The attention module has the config of its own part of the model, with the right counts.
    configs: list[Any] = [module.config for module in block.modules() if hasattr(module, "config")]
    config = next((item for item in configs if hasattr(item, "num_attention_heads")), None)
    if config is None:
        # Case: the attention of this block cannot be observed.
        return 0, 0, 0, 0
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, key_heads, dim, config.hidden_size


def at_most(tokens: Amount, most: int | None) -> Amount:
    """Return a number of tokens, limited to `most`, the tokens of a window; None for no limit."""
    if most is None:
        return tokens
    # Case: a search, whose counts have a gradient.
    return tokens.clamp(max=most) if isinstance(tokens, Tensor) else min(tokens, most)


class Parts:
    """The costs of the parts of a model, each measured when it is first asked for.

    Args:
        facts: The facts of the model.
        call: A call with images; None for images of the config's size.

    Attributes:
        opaque: Whether blocks of the image encoder cannot be told apart.
        width: Size of a hidden state of the decoder.
        class_tokens: Tokens of the vision tower in front of the patches.
    """

    def __init__(self, facts: ModelFacts, call: Call | None) -> None:
        self._facts = facts
        # Facts do not keep the model alive.
        self._model = facts.model
        self._call = call
        self.opaque = facts.encodes_as_one(() if call is None else call.inputs)
        self.width: int = self._model.config.get_text_config().hidden_size
        self.class_tokens = int(facts.has_class_token)

    @cached_property
    def measured(self) -> DecoderCost:
        """Measure the decoder."""
        return measure_decoder(self._facts)

    @cached_property
    def decoder(self) -> list[BlockCost]:
        """Return the decoder layers."""
        blocks = []
        layers = zip(self._facts.blocks.decoder, self.measured.layers, strict=True)
        for i, (path, layer) in enumerate(layers):
            block = self._model.get_submodule(path)
            heads, key_heads, dim = heads_of(block)[0], layer.key_heads, layer.dim
            # Case: the cache holds latent vectors, of which keys of every head are made.
            latent = (getattr(part, "qk_head_dim", None) for part in block.modules())
            if (own := next(filter(None, latent), None)) is not None:
                key_heads, dim = heads, own
            peek = partial(measure_peek, self._facts, i)
            blocks.append(BlockCost(layer.growth, heads, key_heads, dim, self.width, peek))
        return blocks

    @cached_property
    def encoder(self) -> EncoderCost:
        """Measure the encoding of one image of the config's size."""
        if self._call is None or READ.isdisjoint(self._call.inputs):
            return measure_encoder(self._facts)
        # Case: the encoder also reads text. An image of the call's size costs what any other does.
        ((encode, given),) = self._call.first_prompt().encodings
        return measure_encoder(self._facts, given, encode)

    @property
    def tower_blocks(self) -> int:
        """Count the vision blocks up to the last that is used; all if they are measured as one."""
        return self._facts.signature.vision_layers if self.opaque else self.encoder.used

    @cached_property
    def in_groups(self) -> bool:
        """Return whether patches are dropped in groups, while the model's own encoder runs."""
        return self.opaque or not blocks_read(self._facts)

    @cached_property
    def patches_per_token(self) -> int:
        """Return how many patches make a visual token."""
        if not self.opaque:
            return self.encoder.patches // self._facts.signature.visual_tokens
        return self.encodings[0].patches // self._visual_tokens

    @cached_property
    def _visual_tokens(self) -> int:
        """Count the visual tokens of the call."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        """Return the visual tokens of every image of the call; one image without a call."""
        if self._call is None:
            return [self._facts.signature.visual_tokens]
        return [size for one in self._call.prompts if one.layout for size in one.layout.sizes]

    def block_of_groups(self, i: int) -> BlockCost:
        """Return a vision block, whatever the shape of its hidden states.

        Where it attends in windows, or images are cut into tiles, it has heads in proportion to the
        pairs of patches that see each other.
        """
        encoder = self.encodings[0] if self.opaque else self.encoder
        block = self._model.get_submodule(self._facts.blocks.vision[i])
        configs = (getattr(module, "config", None) for module in block.modules())
        names = ("num_attention_heads", "num_heads", "attention_heads")
        found = (getattr(config, name, 0) for config in configs for name in names)
        heads = next(filter(None, found), 0)
        dim = encoder.width // heads if heads else 0
        linear = (encoder.blocks[i] - encoder.products[i]) // max(encoder.patches, 1)
        # Queries times keys are half of the products.
        pairs = sum((self.patches_per_token * size) ** 2 for size in self._sizes)
        seen = encoder.products[i] / max(4 * encoder.width * pairs, 1) if self.opaque else 1
        return BlockCost(Growth(linear, 0), heads * seen, heads, dim, encoder.width)

    @cached_property
    def vision(self) -> list[BlockCost]:
        """Return the vision blocks; none if they cannot be told apart."""
        if self.opaque:
            return []
        blocks = []
        for i, path in enumerate(self._facts.blocks.vision):
            block = self._model.get_submodule(path)
            heads, key_heads, dim, width = heads_of(block)
            # Attention products grow with pairs of tokens, everything else with tokens.
            tokens, products = self.tokens_in_block(i), self.encoder.products[i]
            growth = Growth((self.encoder.blocks[i] - products) / tokens, products / tokens**2)
            blocks.append(BlockCost(growth, heads, key_heads, dim, width))
        return blocks

    def tokens_in_block(self, i: int) -> int:
        """Return the tokens of an image in a vision block, class tokens included."""
        # A block whose hidden states are no sequence counts as if it saw the visual tokens.
        return self.encoder.tokens[i] or self._facts.signature.visual_tokens

    def encoding_as_one(self, shares: Sequence[Amount]) -> Amount:
        """Compute the FLOPs of encoding all images and videos of the call, whose sizes matter.

        Where patches are dropped, those of every image, and of every window, are taken to be
        dropped alike.

        Args:
            shares: Share of the visual tokens that are left in every vision block.
        """
        images = self.encodings[0]
        total: Amount = sum(encoding.total for encoding in self.encodings)
        for share, flops, products in zip(shares, images.blocks, images.products, strict=False):
            # Some patches, such as CLS, are part of no token and stay.
            if isinstance(share, Tensor) or share != 1:
                grouped = self.patches_per_token * self._visual_tokens / images.patches
                left = 1 - grouped * (1 - share)
                total = total - (flops - products) * (1 - left) - products * (1 - left**2)
        return total

    @cached_property
    def encodings(self) -> list[EncoderCost]:
        """Measure the encoding of all images and videos of the call, whose sizes matter.

        Raises:
            ValueError: If there is no call.
        """
        if self._call is None:
            raise ValueError(
                f"What encoding an image of a {self._facts.signature.model_type} model costs "
                "depends on its size: give inputs of a call."
            )
        return [
            measure_encoder(self._facts, given, encode) for encode, given in self._call.encodings
        ]
