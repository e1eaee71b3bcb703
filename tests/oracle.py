"""What a reduced model must compute, from the original model and plain loops alone.

Two oracles that share nothing with the code under test but the policy's data:

1. `masked_keys` runs the original forward with dropped tokens hidden from later layers;
2. `by_hand` runs one prompt, without padding and without a cache, layer by layer, and applies the
   formulas of the operator token by token.
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

from deos_fx.policy import Policy, Reduction


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
        batch: Padded prompts, perhaps with generated tokens behind them.
        counts: Layer -> visual tokens per prompt kept after it, by the attention of the last token.
        prompt: Length of the prompts; everything behind was generated. By default all of it.

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
        mass: Masses of the visual tokens, after every reduction.
        moved: (position of a kept token, of a dropped one) -> share of its content that was added,
            for every reduction.
    """

    logits: Tensor
    origin: list[list[int]]
    hidden: list[Tensor]
    mass: list[list[float]]
    moved: list[dict[tuple[int, int], float]]


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
    features, class_attention = _image_features(eager, prompt["pixel_values"])
    ids += list(generated)
    hidden = core.language_model.embed_tokens(torch.tensor(ids))
    visual = [p for p, token in enumerate(ids) if token == IMAGE]
    hidden[visual] = features
    state = _State(hidden, visual, end)
    origins: list[list[int]] = []
    masses: list[list[float]] = []
    moves: list[dict[tuple[int, int], float]] = []

    def record() -> None:
        origins.append(list(state.origin))
        masses.append([state.mass[p] for p in state.visual])
        moves.append(state.moved)
        state.moved = {}

    if "projector" in steps:
        for image in reversed(range(len(features) // VISUAL)):
            state.reduce(
                steps["projector"],
                range(image * VISUAL, (image + 1) * VISUAL),
                {"cls_attention": class_attention[image]},
                None,
            )
        state.renumber(steps["projector"])
        record()
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
            images = len(features) // VISUAL
            state.reduce(step, range(len(state.visual)), received, keys[state.visual], images)
            state.renumber(step)
            record()
    hidden = core.language_model.norm(state.hidden)
    return ByHand(eager.lm_head(hidden), origins, seen[:-1], masses, moves)


def _image_features(
    eager: LlavaForConditionalGeneration, pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """Features [I * V, d], and the attention [I, V] that CLS pays in the block they come from."""
    tower = eager.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    features = eager.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])
    return features.flatten(0, 1), tower.attentions[-2].mean(dim=1)[:, 0, 1:]


class _State:
    """The tokens of one prompt on their way through the layers."""

    def __init__(self, hidden: Tensor, visual: list[int], end: int) -> None:
        self.hidden = hidden
        self.visual = visual
        self.last = end - 1
        self.origin = list(range(len(hidden)))
        self.position = list(range(len(hidden)))
        self.mass = [1.0] * len(hidden)
        self.bias = [0.0] * len(hidden)
        self.moved: dict[tuple[int, int], float] = {}
        self.cell = {p: (i // VISUAL, i % VISUAL // 8, i % 8) for i, p in enumerate(visual)}

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
        self,
        step: Reduction,
        which: Sequence[int],
        received: Mapping[str, Tensor],
        keys: Tensor | None,
        images: int = 1,
    ) -> None:
        """Apply the operator to some of the visual tokens (all of a prompt, or of an image)."""
        places = [self.visual[i] for i in which]
        x = self.hidden[places].clone()
        cells = [self.cell[self.origin[p]] for p in places]
        mass = [self.mass[p] for p in places]
        score = _score(step, x, received)
        count = step.count(VISUAL) * images
        kept = _kept(step, score, x, keys, cells, count, images)
        share = _shares(step, score, x, keys, cells, kept)
        for i in kept:
            own = mass[i]
            total, content = own, own * x[i]
            for j, part in share[i].items():
                weight = float(score[j].sigmoid()) if step.weighting == "score" else 1.0
                total += part * weight * mass[j]
                content = content + part * weight * mass[j] * x[j]
                self.mass[places[i]] += part * mass[j]
                self.moved[self.origin[places[i]], self.origin[places[j]]] = part * weight
            y = content / own * (own / total) ** step.exponent
            if step.reweight:
                y = y * (1 + step.reweight * score[i])
            self.hidden[places[i]] = y
        self._drop([places[j] for j in range(len(places)) if j not in kept])

    def renumber(self, step: Reduction) -> None:
        """Positions and the bias of later attention, after a reduction."""
        if step.position == "compact":
            self.position = list(range(len(self.hidden)))
        self.bias = [step.mass_bias * math.log(mass) for mass in self.mass]

    def _drop(self, gone: list[int]) -> None:
        stay = [p for p in range(len(self.hidden)) if p not in set(gone)]
        for name in ("origin", "position", "mass", "bias"):
            setattr(self, name, [getattr(self, name)[p] for p in stay])
        self.hidden = self.hidden[stay]
        self.visual = [stay.index(p) for p in self.visual if p in stay]
        self.last = stay.index(self.last)


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
    keys: Tensor | None,
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
        return sorted(sorted(range(len(x)), key=score.__getitem__, reverse=True)[:count])
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
    keys: Tensor | None,
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
    keys: Tensor | None,
    cells: list[tuple[int, int, int]],
) -> float:
    total = 0.0
    for kind, weight in step.similarity.items():
        if kind == "grid":
            (image, row, column), (other, r, c) = cells[i], cells[j]
            near = 1 / (1 + math.hypot(row - r, column - c)) if image == other else -1.0
        elif kind == "key":
            assert keys is not None
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
