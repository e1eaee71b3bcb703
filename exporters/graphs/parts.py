"""Build the parts of a model that is reduced before the decoder alone, as engines take them.

All layers then hold the same tokens: the decoder is that of the unreduced model, and a prompt is
one with fewer image placeholders. An engine runs three graphs:

    vision      pixel_values (of one prompt) -> image_features [T, d]
    embedding   input_ids [B, t], image_features [T, d] -> inputs_embeds [B, t, d]
    decoder     inputs_embeds [B, t, d], attention_mask [B, P + t], position_ids [B, t],
                past_key_values.<layer>.key / .value [B, heads, P, D]
                -> logits [B, 1, vocabulary] of the last token,
                   present.<layer>.key / .value [B, heads, P + t, D]

T features are left of the images of a prompt, and the n-th takes the place of the n-th placeholder;
P tokens came before. For new tokens T is 0, and for a prompt P is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from transformers import PreTrainedModel

from deos_fx.exporters.graphs.decode import Decode, decode_exportable, decode_step
from deos_fx.exporters.graphs.example import Example, word_of
from deos_fx.exporters.graphs.exportable import Exportable, inputs_of
from deos_fx.exporters.graphs.image_encoder import record
from deos_fx.exporters.graphs.prefill import let_export
from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.notes import note_of
from deos_fx.passes.pipeline import copy_of, run_graph
from deos_fx.passes.rewrite.replace_placeholder_merge import (
    merge_placeholders,
    replace_placeholder_merge,
)
from deos_fx.passes.rewrite.return_guards import return_guards
from deos_fx.passes.rewrite.select_logits import LOGITS
from deos_fx.passes.rewrite.split_embeddings import (
    EMBEDDINGS,
    decoder_of,
    embeddings_of,
    goes_around,
)
from deos_fx.policy.policy import Policy
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.tokens.layout import PromptLayout

__all__ = ["FEATURES", "Parts", "Vision", "part_graphs"]

FEATURES = "image_features"
"""Name of what the vision graph returns and the embedding graph takes."""

# What an engine gives the decoder beside keys and values.
_GIVEN = {EMBEDDINGS, "attention_mask", "position_ids"}


@dataclass(frozen=True)
class Parts:
    """The graphs of a model that an engine runs one after the other.

    Attributes:
        graphs: ``vision``, ``embedding`` and ``decoder``.
        images: Of each image of a prompt, how many placeholders it has and how many are left.
    """

    graphs: dict[str, Exportable]
    images: list[tuple[int, int]]


def part_graphs(reduced: ReducedModel, example: Example) -> Parts:
    """Lower the parts of a model for an export.

    Args:
        reduced: The reduced model. Its reductions are before the decoder, under the position rule
            ``compact`` and without a bias for masses.
        example: The prompts to trace with.

    Returns:
        The parts.

    Raises:
        ValueError: If the decoder needs to know more of a prompt than an engine tells it.
    """
    name = type(reduced.model).__name__
    if example.inputs["position_ids"].ndim > 2:
        raise ValueError(f"{name} counts images by time, row and column, and engines by tokens")
    # One prompt. Its text does not matter, which is checked below.
    rows = {name: x[:1] for name, x in example.inputs.items() if name not in example.images}
    facts = facts_of(reduced.model)
    call = completed(Call.of(facts, {**rows, **example.images, "use_cache": True}))
    whole = ReducedModel(reduced.model, Policy())
    _check(whole.graphs.prefill(call, example.layout), example, name)
    vision, features, images = _vision(reduced, call, example.layout)
    # With positions that are counted anew, new tokens are those of the unreduced model.
    step, cache, positions = decode_step(whole, example)
    decoder = _LastLogits(decoder_of(step), reduced.model)
    more = {*decoder.used} - _GIVEN
    if more:
        raise ValueError(f"the layers of {name} read {', '.join(sorted(more))} as well")
    exportable = decode_exportable(decoder, facts, cache, (), positions)
    embedding = _Embedding(embeddings_of(step), facts.image_token)
    ids = torch.full((2, 2 * len(features)), facts.image_token, device=features.device)
    given = {"input_ids": ids[:, : len(features) // 2 + 1], FEATURES: features}
    axes = {"input_ids": {0: Dim("batch"), 1: Dim("sequence")}, FEATURES: {0: Dim("features")}}
    graphs = {
        "vision": vision,
        "embedding": Exportable(embedding, given, axes),
        "decoder": exportable,
    }
    return Parts(graphs, images)


# *** vision ***


def _vision(
    reduced: ReducedModel, call: Call, layout: PromptLayout
) -> tuple[Exportable, Tensor, list[tuple[int, int]]]:
    """Record what becomes of the images of a prompt.

    Args:
        reduced: The reduced model.
        call: A call of one prompt.
        layout: Its images.

    Returns:
        The graph, its result, and how many placeholders each image has and how many are left.
    """
    facts = call.facts
    lowered = copy_of(reduced.graphs.prefill(call, layout))
    let_export(lowered, False)
    front = replace_placeholder_merge(embeddings_of(lowered))
    # Engines and processors have no half precision.
    pixels, ids = call.inputs["pixel_values"].float(), call.inputs["input_ids"]
    with torch.no_grad():
        # A reduced encoder follows patches where it first sees images of these sizes.
        spaces = run_graph(front, call.inputs)["spaces"]
    origin = spaces[-1]["origin"] if spaces else torch.arange(ids.shape[1], device=ids.device)[None]
    # How many tokens each image keeps is known, and so are their places among those that are left.
    (places,) = torch.where(ids.gather(1, origin)[0] == facts.image_token)
    images = _images(ids[0] == facts.image_token, origin[0], layout)

    def encode(pixels: Tensor, ids: Tensor = ids) -> list[Tensor]:
        given = {"input_ids": ids, "pixel_values": pixels.to(reduced.model.dtype)}
        hidden = run_graph(front, {**call.inputs, **given})[EMBEDDINGS]
        return [hidden[0].index_select(0, places)]

    with torch.no_grad():
        recorded = record(encode, pixels)
        (features,), reads = recorded(pixels)
        # Other words, small ids, in place of those that were added to the example.
        words = torch.arange(ids.shape[1], device=ids.device) % 32 + 3
        others = torch.where(ids == word_of(facts), words, ids)
        if not torch.equal(*encode(pixels), *encode(pixels, others)):
            raise ValueError(
                "the policy compares visual tokens with the text of the prompt, of which the graph "
                "of the images knows nothing"
            )
    module = Vision(recorded, reads)
    return Exportable(module, {"pixel_values": pixels}, {"pixel_values": {}}), features, images


def _images(placeholders: Tensor, origin: Tensor, layout: PromptLayout) -> list[tuple[int, int]]:
    """Count the placeholders of each image, and those that are left.

    Args:
        placeholders: Flags [N] of a prompt.
        origin: Its places [M] that are left.
        layout: Its images.

    Raises:
        ValueError: If there is text between the tokens of an image, or where an image ends does not
            show.
    """
    counts = list(layout.sizes)
    if layout.separators:
        # Case: ends of rows are placeholders as well. An image is a run of them.
        edges = torch.nn.functional.pad(placeholders.int(), (1, 1)).diff().nonzero()[:, 0]
        counts = edges.diff()[::2].tolist()
    left = torch.zeros_like(placeholders)
    left[origin] = True
    places = placeholders.nonzero()[:, 0].split(counts)
    # The places of an image follow each other.
    together = all(part[-1] - part[0] + 1 == len(part) for part in places)
    if len(counts) != layout.images or not together:
        raise ValueError(
            "its prompts have text between the tokens of an image, or none between images with "
            "ends of rows, and engines are not told which tokens are left"
        )
    return [(len(part), int(left[part].sum())) for part in places]


def _check(prefill: fx.GraphModule, example: Example, name: str) -> None:
    """Refuse prompts of which the decoder has to know more than hidden states and padding."""
    masks = [
        node for node in prefill.graph.nodes if node.op == "call_module" and note_of(node).is_mask
    ]
    if any(not note_of(mask).plain for mask in masks):
        raise ValueError(
            f"layers of {name} see a window, or the tokens of an image see each other, and engines "
            "tell the decoder no more than what is padding"
        )
    if goes_around(prefill, example.images):
        raise ValueError(f"layers of {name} add features of an image to hidden states")
    if return_guards(copy_of(prefill)):
        raise ValueError(f"{name} computes another way for prompts of another kind")


class Vision(nn.Module):
    """What was recorded of the images of one prompt.

    Args:
        recorded: The recording.
        reads: What the model read of the pixels, for which alone the recording holds.
    """

    def __init__(self, recorded: nn.Module, reads: Sequence[Tensor]) -> None:
        super().__init__()
        self.recorded = recorded
        for i, value in enumerate(reads):
            self.register_buffer(f"read_{i}", value)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return the visual tokens [T, d] that are left of the images of a prompt.

        They are NaN where the model would have gone on in another way.
        """
        (features,), reads = self.recorded(pixel_values)
        for i, value in enumerate(reads):
            same = (value == self.get_buffer(f"read_{i}")).all()
            features = torch.where(same, features, torch.nan)
        return {FEATURES: features}


# *** embedding and decoder ***


class _Embedding(nn.Module):
    """Embeds words, and puts visual tokens in the places of image placeholders."""

    def __init__(self, lowered: fx.GraphModule, image_token: int) -> None:
        super().__init__()
        self.lowered = lowered
        self.image_token = image_token
        _, unused = inputs_of(lowered)
        self.none = dict.fromkeys([*unused, CACHE])

    def forward(self, input_ids: Tensor, image_features: Tensor) -> dict[str, Tensor]:
        """Return the hidden states that enter the decoder."""
        hidden = self._embedded(input_ids)
        # A model may answer with a placeholder, which stands for itself then. It also makes sure
        # that there is a row to take where there are no features.
        own = self._embedded(torch.full_like(input_ids[:1, :1], self.image_token))
        rows = torch.cat([image_features, own[0]])
        mask = (input_ids == self.image_token)[..., None]
        return {EMBEDDINGS: merge_placeholders(hidden, mask, rows)}

    def _embedded(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = run_graph(self.lowered, {**self.none, "input_ids": input_ids})[EMBEDDINGS]
        return hidden


class _LastLogits(Decode):
    """A decoder that returns the logits of the last token alone."""

    def __init__(self, lowered: fx.GraphModule, model: PreTrainedModel) -> None:
        super().__init__(lowered, model)
        self.used = [name for name in self.used if name != LOGITS]

    def forward(
        self, past_key_values: dict[str, dict[str, Tensor]], **inputs: Tensor
    ) -> dict[str, Any]:
        """Run the layers on keys and values by layer, and return logits and the new ones."""
        last = torch.tensor([-1], device=inputs[EMBEDDINGS].device)
        return super().forward(past_key_values, **inputs, **{LOGITS: last})
