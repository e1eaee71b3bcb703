"""What the operator costs: beside a decoder layer, beside ToMe written directly, and in parallel.

    python benchmarks/operators.py --output cpu.json
    python benchmarks/operators.py --device cuda --output gpu.json

benchmarks/README.md says what each figure means. Everything that is compared takes turns in one
run, so that whatever else slows the machine slows all of it, and ratios stay fair.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import DTYPES, SHAPES, WARM_UP, Device, Dtype, conditions, device_of, in_turns, measured
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from deos_fx import Reduction, presets, reference, tokens
from deos_fx.attention.observation import OBSERVED, AttentionView, Observation, received_attention
from deos_fx.cli.terminal import Advance, stages
from deos_fx.forms.needs import required_features
from deos_fx.forms.static import static_reduce

__all__ = ["Settings", "direct_tome", "measure", "random_features", "reduction_rows"]

PARTS = ("reductions", "tome", "at_once")
AT_ONCE = (1, 4, 8, 16)
APPROXIMATED = ("greedy", "max_min")
LAYER, DIRECT, OURS = "layer", "direct", "ours"

Call = Callable[[], object]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        shape: A name in ``SHAPES``: of the decoder layer, and of the tower for ToMe.
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        batch: Images, and prompts of one image each.
        text: Text tokens of each prompt.
        keep: Visual tokens that a reduction leaves.
        merged: Tokens that ToMe merges in one block of the tower.
        rounds: How often everything is timed.
        calls: Calls of a reduction that are timed together; the layer is called once.
        scenes: Held-out scenes of the reference model, on which the choices of selectors that
            pick several tokens at once are compared with those of one at a time.
        only: Name of the one part to measure; None for all.
    """

    shape: str = "llava-1.5-7b"
    device: str = "cpu"
    dtype: str = "fp32"
    batch: int = 1
    text: int = 64
    keep: int = 64
    merged: int = 16
    rounds: int = 15
    calls: int = 3
    scenes: int = 256
    only: str | None = None


def measure(
    settings: Settings, console: Console, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measure all there is.

    Args:
        settings: What to measure.
        console: Where to show progress.
        save: Called with the results so far after each part.

    Returns:
        Everything that was found out, as JSON takes it.

    Raises:
        ValueError: If a setting makes no sense.
    """
    if settings.shape not in SHAPES:
        raise ValueError(f"no shape {settings.shape!r}; choose from {', '.join(SHAPES)}")
    device, shape = device_of(settings.device), SHAPES[settings.shape]()
    visual = shape.image_seq_length
    if not 0 < settings.keep < visual:
        raise ValueError(f"keep is {settings.keep}; an image of this shape has {visual} tokens")
    if settings.only not in (None, *PARTS):
        raise ValueError(f"no part {settings.only!r}; choose from {', '.join(PARTS)}")
    results = conditions("operators", asdict(settings) | {"warm_up": WARM_UP}, device)
    parts = {
        "reductions": _measure_reductions,
        "tome": _measure_tome,
        "at_once": _measure_at_once,
    }
    torch.manual_seed(0)
    with stages(console) as stage, torch.no_grad():
        for name in PARTS if settings.only is None else (settings.only,):
            with stage(name.replace("_", " ")) as advance:
                results[name] = parts[name](shape, settings, advance)
            save(results)
    return results


# *** timing ***


def _take_turns(
    calls: Mapping[str, tuple[Call, int]], settings: Settings, advance: Advance
) -> Times:
    """Milliseconds of each call: one after the other, back and forth, without the warm-up.

    Args:
        calls: By name, what to call, and how often for one time.
        settings: Device and rounds.
        advance: Told of progress.
    """
    often = {name: partial(_often, *call) for name, call in calls.items()}
    times = in_turns(often, settings.rounds, torch.device(settings.device), advance)
    return {name: [time / calls[name][1] for time in own] for name, own in times.items()}


def _often(call: Call, repeats: int) -> None:
    for _ in range(repeats):
        call()


def _figure(times: Times, name: str, baseline: str) -> dict[str, Any]:
    """Median of the times, and of the ratios to the baseline of the same round."""
    ratios = [time / base for time, base in zip(times[name], times[baseline], strict=True)]
    return {
        "ms": statistics.median(times[name]),
        "ratio": statistics.median(ratios),
        "samples_ms": times[name],
    }


# *** reductions beside a decoder layer ***


@dataclass(frozen=True)
class _Row:
    """A reduction to measure.

    Attributes:
        reduction: What to do.
        target: The most it may cost, as a part of the layer; None where there is no limit.
    """

    reduction: Reduction
    target: float | None = None

    def count(self, visual: int) -> int:
        return self.reduction.count(visual)


def reduction_rows(keep: int, visual: int) -> dict[str, _Row]:
    """One reduction for each kind of choice and of transfer, most of them of a published method."""
    return {
        "prune (fastv)": _Row(presets.fastv(keep=keep).reductions[0], 0.02),
        "merge": _Row(presets.merge("decoder.1", keep).reductions[0], 0.04),
        "redistribute": _Row(presets.redistribute("decoder.1", keep).reductions[0]),
        "pool (avg_pool)": _Row(presets.avg_pool(keep=keep).reductions[0]),
        "windows, merge (vscan)": _Row(presets.vscan(keep=keep).reductions[0]),
        "quota (holov)": _Row(presets.holov(keep=keep).reductions[0]),
        "probe (dart)": _Row(presets.dart(keep=keep).reductions[0]),
        # It cannot merge more than half of the tokens.
        "bipartite (tome)": _Row(presets.tome(visual // 2, 1, visual).reductions[0]),
        "greedy": _Row(_several_at_once("greedy", keep, 1)),
        "max_min (divprune)": _Row(presets.divprune(keep=keep).reductions[0]),
        "determinantal (cdpruner)": _Row(presets.cdpruner(keep=keep).reductions[0]),
        "distinct (vispruner)": _Row(presets.vispruner(keep=keep).reductions[0]),
    }


def _several_at_once(selector: str, keep: int, at_once: int) -> Reduction:
    return Reduction(
        "projector",
        keep,
        selector=selector,
        diversity=1.0 if selector == "greedy" else 0.0,
        options={"at_once": at_once},
    )


def _measure_reductions(shape: LlavaConfig, settings: Settings, advance: Advance) -> dict[str, Any]:
    """Reductions, what they observe, and the layer that they are behind, by turns."""
    layer, view = _decoder_layer(shape, settings)
    features = random_features(shape, settings)
    rows = reduction_rows(settings.keep, shape.image_seq_length)
    calls: dict[str, tuple[Call, int]] = {LAYER: (layer, 1)}
    for name, row in rows.items():
        calls[name] = (_reduce_call(row.reduction, row.count, features), settings.calls)
        observe = _observe_call(row.reduction, view, features, settings)
        if observe is not None:
            calls[f"observe: {name}"] = (observe, settings.calls)
    times = _take_turns(calls, settings, advance)
    found: dict[str, Any] = {LAYER: _figure(times, LAYER, LAYER)}
    for name, row in rows.items():
        found[name] = _figure(times, name, LAYER) | {
            "policy": row.reduction.to_dict(),
            "kept": row.count(shape.image_seq_length),
            "target": row.target,
            "observed": None,
        }
        if f"observe: {name}" in times:
            found[name]["observed"] = _figure(times, f"observe: {name}", LAYER)
    return found


def _reduce_call(
    reduction: Reduction, count: Callable[[int], int], features: Mapping[str, Tensor]
) -> Call:
    known = {name: features[name.partition("@")[0]] for name in required_features(reduction)}
    visual = features["tokens"].shape[1]
    mass = None
    return partial(static_reduce, reduction, count(visual), features["tokens"], mass, known)


def _decoder_layer(shape: LlavaConfig, settings: Settings) -> tuple[Call, AttentionView]:
    """A decoder layer of random weights with its prompt, and what its attention is given."""
    config: Any = shape.text_config
    length = shape.image_seq_length + settings.text
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    config._attn_implementation = "sdpa"
    with device:
        layer = LlamaDecoderLayer(config, 0).to(dtype).eval().requires_grad_(False)
        hidden = torch.randn(settings.batch, length, config.hidden_size, dtype=dtype)
        places = torch.arange(length).unsqueeze(0)
        tables = LlamaRotaryEmbedding(config)(hidden, places)
        heads = (config.num_attention_heads, config.num_key_value_heads)
        query, key = (
            torch.randn(settings.batch, count, length, layer.self_attn.head_dim, dtype=dtype)
            for count in heads
        )
    view = AttentionView(query, key, None, layer.self_attn.scaling, causal=True)
    return partial(layer, hidden, position_embeddings=tables, position_ids=places), view


def random_features(shape: LlavaConfig, settings: Settings) -> dict[str, Tensor]:
    """Whatever a reduction of the decoder's visual tokens can ask for."""
    config: Any = shape.text_config
    visual, batch = shape.image_seq_length, settings.batch
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    width, joint = config.hidden_size, config.num_key_value_heads * config.head_dim
    # As near to a square as it gets.
    side = next(side for side in range(math.isqrt(visual), 0, -1) if visual % side == 0)
    with device:
        row, column = torch.arange(visual) // side, torch.arange(visual) % side
        attention = torch.randn(batch, visual).softmax(dim=-1)
        words = torch.randn(batch, settings.text, width, dtype=dtype)
        hidden = torch.randn(batch, visual, width, dtype=dtype)
        return {
            "tokens": hidden,
            "normed_tokens": hidden,
            "grid": torch.stack([torch.zeros_like(row), row, column], dim=-1),
            "keys": torch.randn(batch, visual, config.head_dim, dtype=dtype),
            "joint_keys": torch.randn(batch, visual, joint, dtype=dtype),
            "attention_last": attention,
            "attention_cls": attention,
            "text_tokens": words,
            "normed_text": words,
            "text_mask": torch.ones(batch, settings.text),
            "text_score": torch.rand(batch, settings.text),
        }


# *** what a reduction observes ***


def _observe_call(
    reduction: Reduction, view: AttentionView, features: Mapping[str, Tensor], settings: Settings
) -> Call | None:
    """What a block does more for this reduction, each thing once; None if that is nothing."""
    visual = torch.arange(features["tokens"].shape[1], device=view.query.device)
    visual = visual.expand(settings.batch, -1)
    names = {name.partition("@")[0] for name in required_features(reduction)}
    asked = {OBSERVED[name] for name in names if name in OBSERVED}
    makers = [partial(_observe, view, *item, visual) for item in sorted(asked, key=str)]
    if "normed_tokens" in names:
        hidden = features["tokens"]
        makers.append(partial(F.rms_norm, hidden, hidden.shape[-1:]))
    return (lambda: [make() for make in makers]) if makers else None


def _observe(view: AttentionView, observation: Observation, whose: str, visual: Tensor) -> Tensor:
    """One observation of the visual tokens, which come first here."""
    if observation.kind == "keys":
        seen = view.key.mean(dim=1)
    elif observation.kind == "joint_keys":
        seen = view.key.transpose(1, 2).flatten(2)
    else:
        last = torch.full_like(visual[:, :1], view.query.shape[2] - 1)
        queries = {"last": last, "class": torch.zeros_like(last)}
        seen = received_attention(view, observation, (queries[whose], None, None))
    return tokens.take(seen, visual)


# *** a block of ToMe ***


def direct_tome(hidden: Tensor, size: Tensor, metric: Tensor, merged: int) -> tuple[Tensor, Tensor]:
    """Token Merging (Bolya et al., ICLR 2023) of one block, straight from its description.

    Tokens in even places are A, the others B. Of A, the ``merged`` tokens whose best cosine to a
    token of B is largest go to that token; means are weighted by size. The class token, first in
    A, never goes.

    Args:
        hidden: [B, N, d], class token first.
        size: Patches that each token stands for, [B, N, 1].
        metric: Mean of the keys over the heads [B, N, D].
        merged: r.

    Returns:
        The tokens that are left [B, N - r, d], first those of A in their order, then B; and their
        sizes.
    """
    unit = metric / metric.norm(dim=-1, keepdim=True)
    score = unit[:, ::2] @ unit[:, 1::2].mT
    score[:, 0] = -math.inf
    best, partner = score.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    moving, staying = order[:, :merged], order[:, merged:].sort(dim=-1).values
    target = partner.gather(1, moving)

    def sums(values: Tensor) -> Tensor:
        half_a, half_b = values[:, ::2], values[:, 1::2]
        width = (-1, -1, values.shape[-1])
        alone = half_a.gather(1, staying.unsqueeze(-1).expand(width))
        sources = half_a.gather(1, moving.unsqueeze(-1).expand(width))
        into = target.unsqueeze(-1).expand(width)
        return torch.cat([alone, half_b.scatter_reduce(1, into, sources, "sum")], dim=1)

    sizes = sums(size)
    return sums(hidden * size) / sizes, sizes


def _measure_tome(shape: LlavaConfig, settings: Settings, advance: Advance) -> dict[str, Any]:
    """Our reduction of the patches, with the class token put in front again, and the direct one."""
    config: Any = shape.vision_config
    patches = shape.image_seq_length
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    rows, length = settings.batch, patches + 1
    reduction = presets.tome(settings.merged, 1, patches).reductions[0]
    with device:
        hidden = torch.randn(rows, length, config.hidden_size, dtype=dtype)
        metric = torch.randn(rows, length, config.hidden_size // config.num_attention_heads)
        metric = metric.to(dtype)
        # Sizes as a later block finds them, except that CLS has none.
        mass = torch.randint(1, 4, (rows, patches)).float()
    features = {"keys": tokens.without_class(metric, 1)}
    size = F.pad(mass, (1, 0), value=1.0).unsqueeze(-1).to(dtype)

    def ours() -> tuple[Tensor, Tensor]:
        inside = tokens.without_class(hidden, 1)
        found = static_reduce(reduction, patches - settings.merged, inside, mass, features)
        return tokens.with_patches(hidden, found.tokens, 1), found.mass

    direct = partial(direct_tome, hidden, size, metric, settings.merged)
    calls: dict[str, tuple[Call, int]] = {
        DIRECT: (direct, settings.calls),
        OURS: (ours, settings.calls),
    }
    # A call takes a thousandth of what a layer does.
    often = Settings(**asdict(settings) | {"rounds": 20 * settings.rounds})
    times = _take_turns(calls, often, advance)
    return {name: _figure(times, name, DIRECT) for name in calls} | {
        "policy": reduction.to_dict(),
        "target": 1.1,
        "difference": float((direct()[0] - ours()[0]).abs().max()),
    }


# *** several picks at once ***


def _measure_at_once(shape: LlavaConfig, settings: Settings, advance: Advance) -> dict[str, Any]:
    """Selectors with several picks at once: their time, and how much else they pick."""
    features = random_features(shape, settings)
    choices = {
        f"{selector}, {number}": _several_at_once(selector, settings.keep, number)
        for selector in APPROXIMATED
        for number in AT_ONCE
    }
    calls = {
        name: (_reduce_call(reduction, reduction.count, features), settings.calls)
        for name, reduction in choices.items()
    }
    times = _take_turns(calls, settings, advance)
    real = _reference_features(settings.scenes)
    few = real["tokens"].shape[1] // 8
    found = {}
    for selector in APPROXIMATED:
        alone = _picked(_several_at_once(selector, few, 1), real)
        for number in AT_ONCE:
            name = f"{selector}, {number}"
            chosen = _picked(_several_at_once(selector, few, number), real)
            same = (alone.unsqueeze(-1) == chosen.unsqueeze(-2)).any(dim=-1).float().mean()
            found[name] = _figure(times, name, f"{selector}, 1")
            likeness = _likeness(real["tokens"], chosen)
            found[name] |= {"disagreement": 1 - float(same), "likeness": likeness, "kept": few}
    return found


def _likeness(visual: Tensor, kept: Tensor) -> float:
    """Cosine of a kept token to the kept one most similar to it, on average."""
    unit = F.normalize(tokens.take(visual, kept), dim=-1)
    cosine = unit @ unit.mT - 4 * torch.eye(kept.shape[1])
    return float(cosine.amax(dim=-1).mean())


def _picked(reduction: Reduction, features: Mapping[str, Tensor]) -> Tensor:
    """Indices [B, K] of what stays."""
    visual = features["tokens"]
    count = reduction.count(visual.shape[1])
    return static_reduce(reduction, count, visual, None, features).kept


def _reference_features(count: int) -> dict[str, Tensor]:
    """Projected features of held-out scenes and the attention of CLS, by the reference model."""
    model, processor = reference.load()
    model.set_attn_implementation("eager")
    images = [scene.image for scene in reference.make_scenes(count, "test")]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    encode: Any = model.get_image_features
    seen = encode(pixel_values=pixels, output_attentions=True)
    attention = seen.attentions[model.config.vision_feature_layer]
    return {
        "tokens": torch.stack(list(seen.pooler_output)),
        "attention_cls": attention[:, :, 0, 1:].mean(dim=1),
    }


# *** the command ***


def _print(results: Mapping[str, Any], console: Console) -> None:
    settings = results["settings"]
    where = f"{settings['shape']}, {settings['dtype']}, {settings['device']}"
    if "reductions" in results:
        layer = f"{where}: a layer takes {results['reductions'][LAYER]['ms']:.1f} ms"
        console.print(_reductions_table(results["reductions"], layer))
    if "tome" in results:
        console.print(_tome_table(results["tome"], f"one block of ToMe, {where}"))
    if "at_once" in results:
        console.print(_at_once_table(results["at_once"], "several picks at once"))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _reductions_table(found: Mapping[str, Any], title: str) -> Table:
    columns = ("kept", "ms", "of layer", "observe ms", "of layer", "at most")
    table = _table(title, "reduction", *columns)
    for name, figure in found.items():
        if name == LAYER:
            continue
        seen, target = figure["observed"], figure["target"]
        table.add_row(
            name,
            str(figure["kept"]),
            f"{figure['ms']:.2f}",
            f"{figure['ratio']:.2%}",
            f"{seen['ms']:.2f}" if seen else "-",
            f"{seen['ratio']:.2%}" if seen else "-",
            f"{target:.0%}" if target else "-",
        )
    return table


def _tome_table(found: Mapping[str, Any], title: str) -> Table:
    table = _table(title, "", "ms", "ratio", "at most")
    for name, limit in ((DIRECT, "-"), (OURS, f"{found['target']:g}")):
        table.add_row(name, f"{found[name]['ms']:.3f}", f"{found[name]['ratio']:.3f}", limit)
    return table


def _at_once_table(found: Mapping[str, Any], title: str) -> Table:
    columns = ("ms", "ratio", "disagreement", "likeness")
    table = _table(title, "selector, picks at once", *columns)
    for name, figure in found.items():
        table.add_row(
            name,
            f"{figure['ms']:.2f}",
            f"{figure['ratio']:.2f}",
            f"{figure['disagreement']:.1%}",
            f"{figure['likeness']:.3f}",
        )
    return table


def main(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = Settings.shape,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: fp32 on the CPU, fp16 on a GPU.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = Settings.batch,
    text: Annotated[int, typer.Option(min=4, help="Text tokens of a prompt.")] = Settings.text,
    keep: Annotated[int, typer.Option(min=8, help="Visual tokens that stay.")] = Settings.keep,
    merged: Annotated[int, typer.Option(min=1, help="Tokens that ToMe merges.")] = Settings.merged,
    rounds: Annotated[int, typer.Option(min=1, help="Times of everything.")] = Settings.rounds,
    calls: Annotated[int, typer.Option(min=1, help="Calls for one time.")] = Settings.calls,
    scenes: Annotated[
        int, typer.Option(min=1, help="Scenes on which choices are compared.")
    ] = Settings.scenes,
    only: Annotated[
        str | None, typer.Option(help=f"Just this part: {', '.join(PARTS)}.")
    ] = Settings.only,
) -> None:
    """Measure what the operator costs."""
    settings = Settings(
        shape=shape,
        device=device,
        dtype=dtype or ("fp16" if device is Device.cuda else "fp32"),
        batch=batch,
        text=text,
        keep=keep,
        merged=merged,
        rounds=rounds,
        calls=calls,
        scenes=scenes,
        only=only,
    )
    console = Console()
    results = measured(partial(measure, settings, console), output, console)
    _print(results, console)


if __name__ == "__main__":
    typer.run(main)
