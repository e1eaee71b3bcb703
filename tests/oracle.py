"""What a reduced model must compute, from the original model and plain loops alone.

Two oracles that share nothing with the code under test but the policy's data:

1. `masked_keys` runs the original forward with dropped tokens hidden from later layers;
2. `by_hand` runs one prompt, without padding and without a cache, layer by layer, from the vision
   tower's first block on, and applies the formulas of the operator token by token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tiny import IMAGE, VISUAL, row_of
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction


@contextlib.contextmanager
def masked_keys(
    model: LlavaForConditionalGeneration, alive: Mapping[int, Tensor]
) -> Iterator[LlavaForConditionalGeneration]:
    """The original model, in which some layers do not see some keys.

    Args:
        model: The model.
        alive: Layer -> flags [B, N] of the keys that it sees. Layers not named keep their mask.
    """

    def hide(keys: Tensor) -> Any:
        causal = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool).tril()
        # A query sees itself, or the rows of dropped tokens would be empty.
        visible = causal & keys[:, None, None, :].bool() | torch.eye(keys.shape[1]).bool()

        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            lowest = torch.finfo(args[0].dtype).min
            mask = torch.zeros(visible.shape, dtype=args[0].dtype).masked_fill(~visible, lowest)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    layers = model.model.language_model.layers
    handles = [
        layers[i].register_forward_pre_hook(hide(keys), with_kwargs=True)
        for i, keys in alive.items()
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def attention_cut(
    eager: LlavaForConditionalGeneration,
    batch: Mapping[str, Tensor],
    counts: Mapping[int, int],
    prompt: int | None = None,
) -> dict[int, Tensor]:
    """FastV and PyramidDrop on the original model: who is alive in which layer.

    Args:
        eager: The original model; its own attention weights decide.
        batch: Padded prompts, perhaps with generated tokens after them.
        counts: Layer -> visual tokens per prompt kept after it, by the attention of the last token.
        prompt: Length of the prompts; everything after was generated. By default all of it.

    Returns:
        Layer -> flags [B, N] for all layers after the first cut.
    """
    ids = batch["input_ids"]
    prompt = prompt or ids.shape[1]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    now = mask.bool()
    alive: dict[int, Tensor] = {}
    for layer, count in sorted(counts.items()):
        with masked_keys(eager, alive):
            attentions = eager(**batch, output_attentions=True).attentions
        now = now.clone()
        for row in range(len(ids)):
            last = int(mask[row, :prompt].nonzero().max())
            received = attentions[layer][row, :, last].mean(dim=0)
            there = [p for p in range(prompt) if ids[row, p] == IMAGE and now[row, p]]
            best = sorted(there, key=lambda p: float(received[p]), reverse=True)[:count]
            now[row, [p for p in there if p not in best]] = False
        alive |= {i: now for i in range(layer + 1, len(attentions))}
    return alive


class ByHand(NamedTuple):
    """What `by_hand` found out.

    Attributes:
        logits: [M, vocabulary] of the tokens that are left.
        origin: Their positions in the prompt, after every reduction.
        hidden: What goes into the first layer, and what comes out of each layer but the last,
            before it is reduced: [M_i, d].
        kept: Positions that the visual tokens that are left came from, after every reduction.
        mass: Their masses.
        moved: (position of a kept token, of a dropped one) -> share of its content that was added,
            for every reduction.
    """

    logits: Tensor
    origin: list[list[int]]
    hidden: list[Tensor]
    kept: list[list[int]]
    mass: list[list[float]]
    moved: list[dict[tuple[int, int], float]]

    def note_images(
        self, site: str, images: Sequence[_Image], visual: Sequence[int], tokens: int
    ) -> None:
        """What a reduction did to all images of a text of so many tokens."""
        left, mass, moved = [], [], {}
        for i, image in enumerate(images):
            own, masses, shares = image.after[site]
            place = visual[i * VISUAL :]
            left += [place[j] for j in own]
            mass += masses
            moved |= {(place[a], place[b]): share for (a, b), share in shares.items()}
        self.origin.append(sorted({*range(tokens)} - {*visual} | {*left}))
        self.kept.append(left)
        self.mass.append(mass)
        self.moved.append(moved)


def by_hand(
    eager: LlavaForConditionalGeneration,
    prompt: Mapping[str, Tensor],
    policy: Policy,
    generated: Sequence[int] = (),
) -> ByHand:
    """Run one prompt under a policy.

    Args:
        eager: The original model with eager attention.
        prompt: ``input_ids`` [1, N] and ``pixel_values``, without padding.
        policy: What to do.
        generated: Tokens that follow the prompt.
    """
    core = eager.model
    steps = {reduction.site: reduction for reduction in policy.reductions}
    ids = prompt["input_ids"][0].tolist()
    end = len(ids)
    visual = [p for p, token in enumerate(ids) if token == IMAGE]
    found = ByHand(torch.empty(0), [], [], [], [], [])
    images = _run_tower(eager, prompt["pixel_values"], steps)
    early = [step for step in policy.reductions if not step.site.startswith("decoder")]
    ids += list(generated)
    for step in early:
        found.note_images(step.site, images, visual, len(ids))
    state = _State(core.language_model.embed_tokens(torch.tensor(ids)), visual)
    state.last = end - 1
    state.enter(images, in_order=all(step.order == "position" for step in early))
    if early:
        rules = {step.position for step in early}
        state.renumber(next((rule for rule in ("compact", "grid") if rule in rules), "keep"))
        state.bias_by_mass(steps["projector"].mass_bias if "projector" in steps else 0.0)
    seen = [state.hidden.clone()]
    for i, layer in enumerate(core.language_model.layers):
        attention, keys = state.run(core.language_model, layer)
        seen.append(state.hidden.clone())
        step = steps.get(f"decoder.{i}")
        if step is not None:
            text = [j for j in range(state.last + 1) if j not in state.visual]
            received = {
                "last_text_attention": attention[state.last][state.visual],
                "text_attention": attention[text].mean(dim=0)[state.visual],
                "key_norm": keys[state.visual].norm(dim=-1),
            }
            moved = state.reduce(step, received, keys[state.visual], len(images))
            state.renumber(step.position)
            state.bias_by_mass(step.mass_bias)
            found.origin.append(list(state.origin))
            found.kept.append([state.patch[state.origin[p]] for p in state.visual])
            found.mass.append([state.mass[p] for p in state.visual])
            found.moved.append(
                {(state.patch[a], state.patch[b]): share for (a, b), share in moved.items()}
            )
    hidden = core.language_model.norm(state.hidden)
    return found._replace(logits=eager.lm_head(hidden), hidden=seen[:-1])


def _run_tower(
    eager: LlavaForConditionalGeneration, pixels: Tensor, steps: Mapping[str, Reduction]
) -> list[_Image]:
    """Run the tower and the projector, image by image and block by block."""
    tower = eager.model.vision_tower
    images = []
    for pixel in pixels:
        hidden = tower.embeddings(pixel[None])
        if hasattr(tower, "pre_layrnorm"):
            hidden = tower.pre_layrnorm(hidden)
        image = _Image(hidden[0])
        # The features are what comes out of the last block but one.
        for i, block in enumerate(tower.encoder.layers[:-1]):
            image.run_block(block)
            image.reduce_at(f"vision.{i}", steps)
        image.hidden = eager.model.multi_modal_projector(image.hidden[None])[0]
        image.reduce_at("projector", steps)
        images.append(image)
    return images


class _State:
    """The tokens of one prompt, or of one image, on their way through the layers."""

    def __init__(self, hidden: Tensor, visual: list[int]) -> None:
        self.hidden = hidden
        self.visual = visual
        self.last = 0
        self.origin = list(range(len(hidden)))
        self.position = list(range(len(hidden)))
        self.mass = [1.0] * len(hidden)
        self.bias = [0.0] * len(hidden)
        self.cell = {p: (i // VISUAL, i % VISUAL // 8, i % 8) for i, p in enumerate(visual)}
        self.places = list(visual)
        # Where the content of a placeholder comes from: itself, as long as the order is kept.
        self.patch = {p: p for p in visual}

    def enter(self, images: Sequence[_Image], *, in_order: bool) -> None:
        """Put what is left of the images in the place of their placeholders; the others go.

        Tokens that are not in the order of the image take its first placeholders.
        """
        gone = []
        for i, image in enumerate(images):
            own = image.left()
            here = self.visual[i * VISUAL : (i + 1) * VISUAL]
            places = own if in_order else list(range(len(own)))
            for place, p in enumerate(here):
                if place in places:
                    which = places.index(place)
                    row = image.visual[which]
                    self.hidden[p], self.mass[p] = image.hidden[row], image.mass[row]
                    self.patch[p] = here[own[which]]
                    self.cell[p] = (i, own[which] // 8, own[which] % 8)
                else:
                    gone.append(p)
        self._drop(gone)

    def run(self, decoder: Any, layer: Any) -> tuple[Tensor, Tensor]:
        """One layer of the model: attention [N, N], mean over heads, and keys [N, D]."""
        count = len(self.hidden)
        mask = torch.full((count, count), torch.finfo(torch.float32).min).triu(1)
        mask = mask + torch.tensor(self.bias)
        position = torch.tensor(self.position)[None]
        seen = {}
        handle = layer.self_attn.register_forward_hook(
            lambda module, args, output: seen.update(attention=output[1])
        )
        rotary = decoder.rotary_emb(self.hidden[None], position)
        keys = layer.self_attn.k_proj(layer.input_layernorm(self.hidden))
        keys = keys.unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(0, 1)
        half = keys.shape[-1] // 2
        turned = torch.cat([-keys[..., half:], keys[..., :half]], dim=-1)
        keys = (keys * rotary[0] + turned * rotary[1]).mean(dim=0)
        try:
            self.hidden = layer(
                self.hidden[None],
                attention_mask=mask[None, None],
                position_embeddings=rotary,
                position_ids=position,
            )[0]
        finally:
            handle.remove()
        return seen["attention"][0].mean(dim=0), keys

    def reduce(
        self, step: Reduction, received: Mapping[str, Tensor], keys: Tensor, images: int = 1
    ) -> dict[tuple[int, int], float]:
        """Apply the operator to the visual tokens.

        Returns:
            What moved: (origin of a kept token, of a dropped one) -> share of its content.
        """
        places = list(self.visual)
        x = self.hidden[places].clone()
        cells = [self.cell[self.origin[p]] for p in places]
        mass = [self.mass[p] for p in places]
        score = _score(step, x, received)
        count = step.count(VISUAL) * images
        kept = _kept(step, score, x, keys, cells, count, images)
        share = _shares(step, score, x, keys, cells, kept)
        moved = {}
        for i in kept:
            own = mass[i]
            total, content = own, own * x[i]
            for j, part in share[i].items():
                weight = float(score[j].sigmoid()) if step.weighting == "score" else 1.0
                total += part * weight * mass[j]
                content = content + part * weight * mass[j] * x[j]
                self.mass[places[i]] += part * mass[j]
                moved[self.origin[places[i]], self.origin[places[j]]] = part * weight
            y = content / own * (own / total) ** step.exponent
            if step.reweight:
                y = y * (1 + step.reweight * score[i])
            self.hidden[places[i]] = y
        order = [self.origin[places[i]] for i in kept]
        self._drop([places[j] for j in range(len(places)) if j not in kept])
        if step.order == "selection":
            self.visual = [self.origin.index(p) for p in order]
        return moved

    def renumber(self, rule: str) -> None:
        """Positions after a reduction."""
        if rule == "compact":
            self.position = list(range(len(self.hidden)))
        elif rule == "grid":
            self.position = [p - sum(q < p for q in self._trailing()) for p in self.origin]

    def _trailing(self) -> list[int]:
        """Dropped placeholders after which no kept one of their image comes."""
        images = [self.places[i : i + VISUAL] for i in range(0, len(self.places), VISUAL)]
        return [
            p
            for places in images
            for i, p in enumerate(places)
            if not set(places[i:]) & set(self.origin)
        ]

    def bias_by_mass(self, beta: float) -> None:
        """The bias of later attention."""
        self.bias = [beta * math.log(mass) for mass in self.mass]

    def _drop(self, gone: list[int]) -> None:
        stay = [p for p in range(len(self.hidden)) if p not in set(gone)]
        for name in ("origin", "position", "mass", "bias"):
            setattr(self, name, [getattr(self, name)[p] for p in stay])
        self.hidden = self.hidden[stay]
        self.visual = [stay.index(p) for p in self.visual if p in stay]
        if self.last in stay:
            self.last = stay.index(self.last)


class _Image(_State):
    """The tokens of one image in the tower, class tokens in front.

    Attributes:
        after: Site -> own indices of the patches left by it, their masses, and what moved.
    """

    def __init__(self, hidden: Tensor) -> None:
        self.first = len(hidden) - VISUAL
        super().__init__(hidden, list(range(self.first, len(hidden))))
        self.after: dict[str, tuple[list[int], list[float], dict[tuple[int, int], float]]] = {}

    def left(self) -> list[int]:
        """Which of the patches are left."""
        return [self.origin[p] - self.first for p in self.visual]

    def run_block(self, block: Any) -> None:
        """One block of the tower; what its attention saw is noted by patch."""
        count = len(self.hidden)
        mask = torch.tensor(self.bias).expand(count, count)
        attention = block.self_attn
        normed = block.layer_norm1(self.hidden)
        rows = attention(normed[None], attention_mask=mask[None, None])[1][0].mean(dim=0)
        keys = attention.k_proj(normed).unflatten(-1, (attention.num_heads, -1)).mean(dim=1)
        self.from_class = {own: rows[0, p] for own, p in zip(self.left(), self.visual, strict=True)}
        self.keys = {own: keys[p] for own, p in zip(self.left(), self.visual, strict=True)}
        self.hidden = block(self.hidden[None], mask[None, None])[0]

    def reduce_at(self, site: str, steps: Mapping[str, Reduction]) -> None:
        """Reduce, if there is a step for the site."""
        step = steps.get(site)
        if step is None:
            return
        keys = torch.stack([self.keys[own] for own in self.left()])
        received = {
            "cls_attention": torch.stack([self.from_class[own] for own in self.left()]),
            "key_norm": keys.norm(dim=-1),
        }
        first = self.first
        moved = self.reduce(step, received, keys)
        self.bias_by_mass(step.mass_bias)
        masses = [self.mass[p] for p in self.visual]
        self.after[site] = (
            self.left(),
            masses,
            {(a - first, b - first): share for (a, b), share in moved.items()},
        )


def _score(step: Reduction, x: Tensor, received: Mapping[str, Tensor]) -> Tensor:
    if not step.uses_scores:
        return torch.zeros(len(x))
    total = torch.zeros(len(x))
    for name, weight in step.scores.items():
        if name == "feature_norm":
            values = torch.stack([row.norm() for row in x])
        elif name == "novelty":
            values = torch.tensor(
                [-max(_cosine(x[i], x[j]) for j in range(len(x)) if j != i) for i in range(len(x))]
            )
        else:
            values = received[name]
        total = total + weight * (values - values.mean()) / values.std(unbiased=False)
    return total


def _kept(
    step: Reduction,
    score: Tensor,
    x: Tensor,
    keys: Tensor,
    cells: list[tuple[int, int, int]],
    count: int,
    images: int,
) -> list[int]:
    if step.selector == "grid":
        side = math.isqrt(count // images)
        assert side**2 == count // images and 8 % side == 0, "square windows only"
        width = 8 // side
        # The centre of a window, rounded down.
        centre = (width - 1) // 2
        return [
            i for i, (_, r, c) in enumerate(cells) if r % width == centre and c % width == centre
        ]
    if not step.diversity:
        best = sorted(range(len(x)), key=score.__getitem__, reverse=True)[:count]
        return best if step.order == "selection" else sorted(best)
    kept: list[int] = []
    for _ in range(count):
        gains = [
            -math.inf
            if j in kept
            else float(score[j])
            - step.diversity
            * max((_similarity(step, i, j, x, keys, cells) for i in kept), default=-1.0)
            for j in range(len(x))
        ]
        kept.append(max(range(len(x)), key=gains.__getitem__))
    return sorted(kept)


def _shares(
    step: Reduction,
    score: Tensor,
    x: Tensor,
    keys: Tensor,
    cells: list[tuple[int, int, int]],
    kept: list[int],
) -> dict[int, dict[int, float]]:
    """Kept token -> dropped token -> g P, with what the residual token takes in."""
    share: dict[int, dict[int, float]] = {i: {} for i in kept}
    for j in (j for j in range(len(x)) if j not in kept):
        if step.gain:
            near = [_similarity(step, i, j, x, keys, cells) for i in kept]
            if step.temperature == 0:
                part = [float(a == max(near)) for a in near]
            elif step.temperature == math.inf:
                part = [1 / len(kept)] * len(kept)
            else:
                part = [math.exp((a - max(near)) / step.temperature) for a in near]
            if step.temperature == 0:
                first = part.index(1.0)
                part = [float(slot == first) for slot in range(len(kept))]
            for i, p in zip(kept, part, strict=True):
                share[i][j] = step.gain * p / sum(part)
        if step.residual:
            worst = min(kept, key=lambda i: float(score[i]))
            share[worst][j] = share[worst].get(j, 0.0) + 1 - step.gain
    return share


def _similarity(
    step: Reduction,
    i: int,
    j: int,
    x: Tensor,
    keys: Tensor,
    cells: list[tuple[int, int, int]],
) -> float:
    total = 0.0
    for kind, weight in step.similarity.items():
        if kind == "grid":
            (image, row, column), (other, r, c) = cells[i], cells[j]
            near = 1 / (1 + math.hypot(row - r, column - c)) if image == other else -1.0
        elif kind == "key":
            near = _cosine(keys[i], keys[j])
        else:
            near = _cosine(x[i], x[j])
        total += weight * near
    return total


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def each_row(
    eager: LlavaForConditionalGeneration,
    batch: dict[str, Tensor],
    policy: Policy,
    generated: Tensor | None = None,
) -> list[ByHand]:
    """`by_hand` for every prompt of a batch, each alone."""
    rows = range(len(batch["input_ids"]))
    if "attention_mask" not in batch:
        batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    later = [[] if generated is None else generated[row].tolist() for row in rows]
    return [by_hand(eager, row_of(batch, row), policy, later[row]) for row in rows]
