"""Models and data in which the best place, count, regime and direction of a reduction are known.

The models are LLaVAs whose weights are set by hand, so that everything they do is known:

1. The tower and the projector hand on what is in the pixels: an image *is* its visual tokens. The
   norms are linear, because their epsilon is far larger than the squares that they add it to.
2. Attention is a plain mean over all earlier tokens, as queries and keys are 0, unless a layer is
   told to look at the question. A mean weighs a token by its gate, or by its mass where later
   attention knows of masses, so what a reduction does to an answer is known exactly.
3. An MLP is a row of thresholds, each of which writes one direction. All tokens have a direction in
   common, with length 1, so that there is something to compare with.

Directions (of classes, marks and so on) are columns of a random rotation: no axis tells anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.runtime.reduced_model import ReducedModel

PAD, START, READ, IMAGE = 0, 1, 2, 3
# Words from here on: questions, or answers.
WORDS = 4
# An epsilon beside which squares of hidden states are nothing: a norm divides by its root.
_LINEAR = 1e6


@dataclass(frozen=True)
class Threshold:
    """One unit of an MLP: it adds ``relu(x . reads - above) writes``.

    Attributes:
        reads: [d].
        above: The threshold.
        writes: [d].
    """

    reads: Tensor
    above: float
    writes: Tensor


@dataclass(frozen=True)
class Layer:
    """What one decoder layer does; nothing if it is left out.

    Attributes:
        moves: [d, d]: what of the mean over earlier tokens is added to a token.
        looks_at: A direction [d]: the longer a token is along it, the more others look at it.
        thresholds: Units of its MLP.
    """

    moves: Tensor | None = None
    looks_at: Tensor | None = None
    thresholds: Sequence[Threshold] = ()


@dataclass(frozen=True)
class Constructed:
    """A model, its task, and what the search should find.

    Attributes:
        model: The model.
        data: Batches to search with, with labels.
        test: Batches of other prompts.
        budget: The budget.
        sites: Sites to search; all if None.
        directions: What was built in, by name.
    """

    model: LlavaForConditionalGeneration
    data: list[dict[str, Tensor]]
    test: list[dict[str, Tensor]]
    budget: Budget
    sites: tuple[str, ...] | None = None
    directions: dict[str, Tensor] = field(default_factory=dict)

    def accuracy(self, policy: Policy) -> float:
        """Return the share of right answers to the test prompts."""
        reduced = ReducedModel(self.model, policy)
        right = []
        for batch in self.test:
            # The answer is the last token.
            ids, answer = batch["input_ids"].split([batch["input_ids"].shape[1] - 1, 1], dim=1)
            with torch.no_grad():
                logits = reduced(input_ids=ids, pixel_values=batch["pixel_values"]).logits
            right.append(logits[:, -1].argmax(dim=-1) == answer[:, 0])
        return torch.cat(right).float().mean().item()


def rotation(width: int, seed: int) -> Tensor:
    """Return random orthonormal directions, the columns of [d, d]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]


def transparent_llava(
    side: int,
    width: int,
    layers: Sequence[Layer],
    common: Tensor,
    head: Tensor,
    words: Tensor | None = None,
) -> LlavaForConditionalGeneration:
    """Make a LLaVA that does what its layers say.

    Args:
        side: Visual tokens along a side of the image.
        width: Width d of the tokens.
        layers: Its decoder layers.
        common: The direction [d] that all tokens have.
        head: Directions [A, d] of the answers, which are the first A words.
        words: Embeddings [W, d] of the words, without the common direction; zeros if None.

    Returns:
        The model, in eval mode.
    """
    patch = math.ceil(math.sqrt(width / 3))
    units = max([1, *(len(layer.thresholds) for layer in layers)])
    vocabulary = WORDS + max(len(head), 0 if words is None else len(words))
    vision = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=side * patch,
        patch_size=patch,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=units,
        num_hidden_layers=len(layers),
        num_attention_heads=1,
        num_key_value_heads=1,
        rms_norm_eps=_LINEAR,
        hidden_act="relu",
        # The slowest pair of a head does not turn.
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        bos_token_id=START,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        image_seq_length=side * side,
        projector_hidden_act="linear",
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    # 1. Nothing but norms, which only scale.
    for name, parameter in model.named_parameters():
        norm = name.endswith("norm.weight") and "language_model" in name
        parameter.data.fill_(math.sqrt(_LINEAR) if norm else 0.0)
    # 2. A patch is a token.
    tower = model.model.vision_tower.embeddings
    tower.patch_embedding.weight.data.copy_(_pixels(width, patch))
    for linear in (
        model.model.multi_modal_projector.linear_1,
        model.model.multi_modal_projector.linear_2,
    ):
        linear.weight.data.copy_(torch.eye(width))
    # 3. The decoder.
    for module, layer in zip(model.model.language_model.layers, layers, strict=True):
        _set_layer(module, layer, common)
    model.lm_head.weight.data[WORDS : WORDS + len(head)] = head
    embeddings = model.get_input_embeddings().weight.data
    embeddings += common
    if words is not None:
        embeddings[WORDS : WORDS + len(words)] += words
    return model.eval().requires_grad_(False)


def _pixels(width: int, patch: int) -> Tensor:
    """Return the weights of a convolution that takes the first pixels of a patch as they are."""
    return torch.eye(width, 3 * patch * patch).view(width, 3, patch, patch)


def _set_layer(module: Any, layer: Layer, common: Tensor) -> None:
    """Set the weights of a decoder layer."""
    attention, mlp = module.self_attn, module.mlp
    if layer.moves is not None:
        attention.v_proj.weight.data.copy_(layer.moves)
        attention.o_proj.weight.data.copy_(torch.eye(len(common)))
    if layer.looks_at is not None:
        # The last dimension of a head does not turn. The square root is what scores are divided by.
        attention.q_proj.weight.data[-1] = common
        attention.k_proj.weight.data[-1] = math.sqrt(len(common)) * layer.looks_at
    for i, unit in enumerate(layer.thresholds):
        mlp.gate_proj.weight.data[i] = unit.reads - unit.above * common
        mlp.up_proj.weight.data[i] = common
        mlp.down_proj.weight.data[:, i] = unit.writes


def images_of(tokens: Tensor, side: int) -> Tensor:
    """Return the images [B, 3, H, W] whose visual tokens are these [B, V, d]."""
    batch, _, width = tokens.shape
    patch = math.ceil(math.sqrt(width / 3))
    pixels = torch.nn.functional.pad(tokens, (0, 3 * patch * patch - width))
    grid = pixels.view(batch, side, side, 3, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, side * patch, side * patch)


def batches_of(
    tokens: Tensor, answers: Tensor, side: int, before: Tensor | None = None, size: int = 16
) -> list[dict[str, Tensor]]:
    """Make batches of prompts: a start, perhaps a question, the image, a last word, the answer.

    Args:
        tokens: Visual tokens [B, V, d].
        answers: Numbers [B] of the answers.
        side: Visual tokens along a side.
        before: Numbers [B, T] of the words of the question.
        size: Prompts in a batch.
    """
    rows, visual = tokens.shape[:2]
    parts = [torch.full((rows, 1), START)]
    parts += [] if before is None else [WORDS + before]
    parts += [torch.full((rows, visual), IMAGE), torch.full((rows, 1), READ)]
    ids = torch.cat([*parts, WORDS + answers.unsqueeze(1)], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    whole = {"input_ids": ids, "labels": labels, "pixel_values": images_of(tokens, side)}
    splits = {name: value.split(size) for name, value in whole.items()}
    return [dict(zip(splits, part, strict=True)) for part in zip(*splits.values(), strict=True)]


# *** problems ***

# Prompts to search with, and to test with.
_SEARCHED, _TESTED = 384, 256
# Length of noise in every direction of a token, beside directions of length 1.
_NOISE = 0.05


class _Random:
    """Random numbers of one seed, and directions to build with.

    Args:
        width: Width d of the tokens.
        seed: The seed.
    """

    rows = _SEARCHED + _TESTED

    def __init__(self, width: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.axes = torch.linalg.qr(torch.randn(width, width, generator=self.generator))[0]
        self.common = self.axes[0]

    def directions(self, first: int, count: int) -> Tensor:
        """Return orthonormal directions [count, d], from the first on; 0 is the common one."""
        assert first + count <= len(self.axes), "the tokens are too narrow for this problem"
        return self.axes[first : first + count]

    def below(self, top: int, *shape: int) -> Tensor:
        """Return whole numbers from 0 to top - 1."""
        return torch.randint(top, shape, generator=self.generator)

    def some(self, count: int, among: int) -> Tensor:
        """Return flags [rows, among], each row with so many set."""
        order = torch.rand(self.rows, among, generator=self.generator).argsort(dim=1)
        return order < count

    def tokens(self, content: Tensor) -> Tensor:
        """Return content [rows, V, d] as tokens: with the common direction and noise."""
        noise = torch.randn(content.shape, generator=self.generator)
        return self.common + content + _NOISE * noise


def _prompts(side: int, tokens: Tensor, answers: Tensor, **given: Any) -> dict[str, Any]:
    """Return batches to search with, and those to test with."""
    parts = {"tokens": tokens, "answers": answers, **given}
    searched = {name: value[:_SEARCHED] for name, value in parts.items()}
    tested = {name: value[_SEARCHED:] for name, value in parts.items()}
    return {"data": batches_of(side=side, **searched), "test": batches_of(side=side, **tested)}


def pruning(side: int = 8, width: int = 48, layers: int = 2, seed: int = 0) -> Constructed:
    """Make a problem in which a few marked tokens are right, and all others are wrong.

    Merging mixes wrong answers in, and nothing but the mark tells which tokens are right.
    """
    random = _Random(width, seed)
    marks, classes = random.directions(1, 2), random.directions(3, 8)
    marked, visual = 4, side * side
    answers = random.below(len(classes), random.rows)
    right = random.some(marked, visual)
    # The others say any other class.
    off = torch.where(right, 0, 1 + random.below(len(classes) - 1, random.rows, visual))
    said = classes[(answers.unsqueeze(1) + off) % len(classes)]
    stack = [Layer()] * (layers - 1) + [Layer(moves=classes.mT @ classes)]
    return Constructed(
        transparent_llava(side, width, stack, random.common, 8 * classes),
        sites=("projector",),
        budget=Budget(visual_tokens=marked),
        directions={"mark": marks[0] - marks[1]},
        **_prompts(side, random.tokens(said + marks[(~right).long()]), answers),
    )


def merging(side: int = 8, width: int = 48, layers: int = 3, seed: int = 0) -> Constructed:
    """Make a problem that asks which type of token is most frequent.

    Dropping loses the counts. A threshold after the reduction lets only tokens of one type through,
    so tokens must be merged with their like, and their masses be known.
    """
    random = _Random(width, seed)
    types, counted = random.directions(1, 4), random.directions(5, 4)
    visual = side * side
    answers = random.below(len(types), random.rows)
    # The type that leads has a few tokens more than its share, the others split the rest.
    lead = visual // len(types) + 3
    most = random.some(lead, visual)
    place = torch.rand(most.shape, generator=random.generator).masked_fill(most, 2.0)
    order = place.argsort(dim=1).argsort(dim=1)
    off = torch.where(most, 0, 1 + order % (len(types) - 1))
    kind = (answers.unsqueeze(1) + off) % len(types)
    units = [Threshold(a, 0.6, 2.5 * b) for a, b in zip(types, counted, strict=True)]
    reading = Layer(moves=counted.mT @ counted)
    stack = [Layer()] * (layers - 2) + [Layer(thresholds=units), reading]
    return Constructed(
        transparent_llava(side, width, stack, random.common, 40 * counted),
        sites=("projector",),
        budget=Budget(visual_tokens=2 * len(types)),
        **_prompts(side, random.tokens(types[kind]), answers),
    )


def pooling(side: int = 8, width: int = 48, layers: int = 3, seed: int = 0) -> Constructed:
    """Make a problem in which only means over neighbours are right.

    The image has 2 x 2 regions, each with one of two signs along two directions. The answer is
    whether these are equal in most regions, so a mean over the image says little. The noise of a
    token is stronger than that, and in the same two directions, so likeness says nothing. Over a
    region it cancels.
    """
    random = _Random(width, seed)
    pair, said = random.directions(1, 2), random.directions(3, 2)
    rows, half = random.rows, side // 2
    answers = random.below(2, rows)
    # One region of four may be an exception.
    equal = 2.0 * answers - 1
    exception = torch.nn.functional.one_hot(random.below(8, rows), 8)[:, :4]
    first = 2.0 * random.below(2, rows, 4) - 1
    second = first * equal.unsqueeze(1) * (1 - 2 * exception)
    signs = torch.stack([first, second], dim=-1).view(rows, 2, 1, 2, 1, 2)
    noise = 3 * torch.randn(rows, 2, half, 2, half, 2, generator=random.generator)
    noise = noise - noise.mean(dim=(2, 4), keepdim=True)
    content = (signs + noise).reshape(rows, side * side, 2) @ pair
    a, b = pair
    units = [Threshold(x, 0.5, said[1]) for x in (a + b, -a - b)]
    units += [Threshold(x, 0.5, said[0]) for x in (a - b, b - a)]
    stack = [Layer()] * (layers - 2) + [Layer(thresholds=units), Layer(moves=said.mT @ said)]
    return Constructed(
        transparent_llava(side, width, stack, random.common, 10 * said),
        sites=("projector",),
        budget=Budget(visual_tokens=4),
        **_prompts(side, random.tokens(content), answers),
    )


def weighting(side: int = 8, width: int = 48, layers: int = 2, seed: int = 0) -> Constructed:
    """Make a problem in which one token has to be a mean of the marked ones.

    Every marked token is right but noisy, all others agree on one wrong answer.
    """
    random = _Random(width, seed)
    marks, classes = random.directions(1, 2), random.directions(3, 8)
    visual, number = side * side, len(classes)
    answers = random.below(number, random.rows)
    wrong = (answers + 1 + random.below(number - 1, random.rows)) % number
    right = random.some(visual // 3, visual)
    said = classes[torch.where(right, answers.unsqueeze(1), wrong.unsqueeze(1))]
    doubt = torch.randn(random.rows, visual, number, generator=random.generator) @ classes
    stack = [Layer()] * (layers - 1) + [Layer(moves=classes.mT @ classes)]
    return Constructed(
        transparent_llava(side, width, stack, random.common, 24 * classes),
        sites=("projector",),
        budget=Budget(visual_tokens=1),
        directions={"mark": marks[0] - marks[1]},
        **_prompts(side, random.tokens(said + doubt + marks[(~right).long()]), answers),
    )


# How much a layer looks at what it looks for.
_LOOK = 8.0


def reading(
    side: int = 4, width: int = 48, layers: int = 5, layer: int = 1, seed: int = 0
) -> Constructed:
    """Make a problem in which the text has to be read before tokens can be dropped.

    Every token has a mark of its own, and a class. The question, before the image, names a mark. In
    one layer, all tokens read it, and the one that has this mark is matched. Later, the last word
    looks at what is matched. The budget leaves no room for a reduction after a later layer.
    """
    visual = side * side
    return _asking(side, width, layers, layer, marked=visual, late=2, seed=seed)


def needing(side: int = 4, width: int = 48, layers: int = 3, seed: int = 0) -> Constructed:
    """Make a problem in which every token is needed, and the budget is that of the whole model.

    It is that of `reading`, but only the sites before the layer that reads are searched. A
    reduction costs operations of its own, so one that meets the budget has to drop something.
    """
    visual = side * side
    read = layers - 2
    problem = _asking(side, width, layers, read, marked=visual, late=visual, seed=seed)
    sites = ("projector", *(f"decoder.{i}" for i in range(read)))
    return replace(problem, sites=sites, budget=Budget(flops=1.0))


def sharing(
    side: int = 6, width: int = 48, layers: int = 4, layer: int = 0, seed: int = 0
) -> Constructed:
    """Make a problem in which two reductions must share a budget.

    It is that of `reading`, but only a few tokens have marks: the others can be dropped at once.
    All that have marks are needed until the question is read, and only one is needed after it.
    """
    return _asking(side, width, layers, layer, marked=8, late=2, seed=seed)


def _asking(
    side: int, width: int, layers: int, layer: int, *, marked: int, late: int, seed: int
) -> Constructed:
    """Make a problem with a question before the image.

    Args:
        side: Visual tokens along a side.
        width: Width of the tokens.
        layers: Decoder layers.
        layer: The one in which the question is read.
        marked: Tokens that have marks.
        late: Tokens that the budget leaves after this layer, if it leaves those before it.
        seed: The seed.
    """
    random = _Random(width, seed)
    question, match, plain = random.directions(1, 3)
    marks, asks = random.directions(4, marked), random.directions(4 + marked, marked)
    classes = random.directions(4 + 2 * marked, 12)
    rows, visual = random.rows, side * side
    # 1. The tokens: where each mark is, or none, and the class of each.
    places = torch.rand(rows, visual, generator=random.generator).argsort(dim=1)
    kinds = torch.cat([marks, plain.expand(visual - marked, -1)])
    said = random.below(len(classes), rows, visual)
    asked = random.below(marked, rows)
    where = (places == asked.unsqueeze(1)).long().argmax(dim=1)
    answers = said[torch.arange(rows), where]
    # 2. The model.
    stack = [Layer()] * layers
    units = [Threshold(mark, 1.5, 2 * match) for mark in marks]
    stack[layer] = Layer(marks.mT @ asks, 20 * question, units)
    stack[-1] = Layer(classes.mT @ classes, _LOOK * match)
    early = marked * (layer + 1) + late * (layers - layer - 1)
    return Constructed(
        transparent_llava(side, width, stack, random.common, 8 * classes, asks + question),
        # A little more, so that rounding does not decide.
        budget=Budget(visual_tokens=min(1.0, (early + 0.01) / (layers * visual))),
        directions={"match": match, "plain": plain},
        **_prompts(
            side, random.tokens(kinds[places] + classes[said]), answers, before=asked.unsqueeze(1)
        ),
    )
