"""What reductions gain on one GPU, in PyTorch and in ONNX Runtime, beside what could be gained.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --shape llava-tiny --repeats 2 --output try.json

Results are written as they come; parts that no longer fit into the time are left out and named.
benchmarks/README.md says what each figure means.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import latency
import operators
import torch
import typer
from common import (
    DTYPES,
    SHAPES,
    WARM_UP,
    Device,
    Dtype,
    build_inputs,
    build_model,
    conditions,
    device_of,
    in_turns,
    measured,
    onnx_session,
)
from common import now as seconds_now
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from deos_fx import OnnxModel, Policy, ReducedModel, Reduction, export_onnx, presets
from deos_fx.cost.amounts import Cost
from deos_fx.cost.memory import peak_bytes
from deos_fx.cost.model import CostModel
from deos_fx.exporters.session import Session
from deos_fx.inputs.call import Call
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.policy.counts import tokens_per_layer
from deos_fx.policy.site import first_layer

__all__ = ["PARTS", "Settings", "measure"]

ORIGINAL, EMPTY, PROJECTOR, FASTV = "original", "empty", "projector", "fastv"
IDEAL, PUBLISHED, PYTORCH = "ideal short run of", "as published:", "in PyTorch:"


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        shape: A name in `SHAPES`.
        device: ``cuda`` or ``cpu``.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        images: Images of a prompt, one after the other: five tiles are LLaVA-NeXT's 2,880 tokens.
        keep: Visual tokens of an image that stay; None for a ninth.
        text: Text tokens of a prompt.
        new_tokens: Tokens to decode.
        onnx_layers: Layers of the model that is exported; fewer than it has, to save time.
        policies: Random policies whose latency is predicted.
        repeats: Timed runs of everything.
        seconds: After so many, no further part begins.
    """

    shape: str = "llava-1.5-7b"
    device: str = "cuda"
    dtype: str = "bf16"
    images: Sequence[int] = (1, 5)
    keep: int | None = None
    text: int = 64
    new_tokens: int = 16
    onnx_layers: int = 4
    policies: int = 20
    repeats: int = 7
    seconds: float = 420.0


Results = dict[str, Any]
Runner = Callable[[], Any]


# *** a prompt, and what is run on it ***


@dataclass
class _Bench:
    """A model and prompts.

    Attributes:
        settings: The settings.
        model: The model.
        inputs: Prompts.
        policies: The policies, by name.
        device: Where it all is.
    """

    settings: Settings
    model: PreTrainedModel
    inputs: dict[str, Tensor]
    policies: dict[str, Policy]
    device: torch.device

    @classmethod
    def of(cls, settings: Settings, model: PreTrainedModel, images: int) -> _Bench:
        """Make prompts of so many images, and the policies for them."""
        inputs = build_inputs(model, 1, settings.text, images)
        keep = settings.keep or facts_of(model).signature.visual_tokens // 9
        return cls(
            settings,
            model,
            inputs,
            {
                PROJECTOR: Policy((Reduction("projector", keep, scores={"cls_attention": 1.0}),)),
                # At the same depth as the paper's.
                FASTV: presets.fastv(2, keep),
            },
            model.device,
        )

    def lengths(self, policy: Policy) -> list[int]:
        """Return the tokens that each decoder layer processes under a policy."""
        visual = self.inputs["input_ids"].shape[1] - self.settings.text
        images = len(self.inputs["pixel_values"])
        layers = self.model.config.get_text_config().num_hidden_layers
        kept = tokens_per_layer(policy, [visual // images] * images, layers)
        return [count + self.settings.text for count in kept]

    def variants(self) -> dict[str, Callable[..., Any]]:
        """Return everything that is called like the model, by name."""
        found: dict[str, Callable[..., Any]] = {
            ORIGINAL: self.model,
            EMPTY: ReducedModel(self.model, Policy()),
        }
        for name, policy in self.policies.items():
            found[name] = ReducedModel(self.model, policy)
            found[f"{IDEAL} {name}"] = partial(short_run, self.model, self.lengths(policy))
        (step,) = self.policies[FASTV].reductions
        keep = int(step.keep) * len(self.inputs["pixel_values"])
        found[f"{PUBLISHED} {FASTV}"] = partial(
            published_fastv, self.model, first_layer(step.site), keep
        )
        return found


def short_run(model: Any, lengths: Sequence[int], **inputs: Tensor) -> tuple[Tensor, DynamicCache]:
    """Run a model's own layers on a prompt that is cut to a length in each: nothing is chosen.

    Args:
        model: A LLaVA.
        lengths: Tokens that each decoder layer processes.
        **inputs: Prompts.

    Returns:
        Logits [B, vocabulary] of the last token, and the cache.
    """
    with tower_as_read(model):
        return _by_layers(model, inputs, lambda layer, tokens: torch.arange(lengths[layer]))


@contextmanager
def tower_as_read(model: Any) -> Iterator[None]:
    """Leave out the blocks of a LLaVA's tower behind the one whose output is read: the last.

    transformers runs them, compiled and exported models do not.
    """
    tower, config = model.model.vision_tower, model.config
    blocks, layer = tower.encoder.layers, config.vision_feature_layer
    # -2 is what the last block but one returns; states count from what goes into the first.
    read = blocks[: layer + 1]
    tower.encoder.layers, config.vision_feature_layer = read, len(read)
    try:
        yield
    finally:
        tower.encoder.layers, config.vision_feature_layer = blocks, layer


class _ShortRun(nn.Module):
    """`short_run` with tensors as outputs."""

    def __init__(self, model: PreTrainedModel, lengths: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.lengths = lengths

    def forward(self, **inputs: Tensor) -> dict[str, Any]:
        logits, cache = short_run(self.model, self.lengths, **inputs)
        layers: list[Any] = cache.layers
        # Named as those of our exports, which stay on the device.
        held = {str(i): {"key": x.keys, "value": x.values} for i, x in enumerate(layers)}
        return {"logits": logits, "present": held}


def onnx_short_run(
    model: Any, lengths: Sequence[int], inputs: Mapping[str, Tensor], folder: Path
) -> Session:
    """Export a short run with the fusions of our exports, and open it in ONNX Runtime.

    Args:
        model: A LLaVA.
        lengths: Tokens that each decoder layer processes.
        inputs: Prompts; others have the same shapes.
        folder: Where to write it.

    Returns:
        The session; it takes tensors on the CPU.
    """
    return onnx_session(_ShortRun(model, lengths), inputs, folder)[0]


def published_fastv(
    model: Any, first: int, keep: int, **inputs: Tensor
) -> tuple[Tensor, DynamicCache]:
    """Run FastV (arXiv 2403.06764) as its code does, from the attention weights of a whole layer.

    The last layer before the cut materialises its attention [B, H, N, N]; visual tokens are ranked
    by the mean over heads of what the last token gives them. Other layers keep their own attention,
    which is faster than that of the code.

    Args:
        model: A LLaVA.
        first: The first layer that gets fewer tokens.
        keep: Visual tokens of a prompt that it gets.
        **inputs: Prompts.
    """
    ids = inputs["input_ids"]
    attention = model.model.language_model.layers[first - 1].self_attn
    seen: list[Tensor] = []

    def weights(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden, tables = kwargs["hidden_states"], kwargs["position_embeddings"]
        seen.append(_attention_weights(attention, hidden, *tables))

    def shortened(layer: int, tokens: Tensor) -> Tensor:
        if layer != first:
            return torch.arange(len(tokens))
        visual = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
        given = seen.pop().mean(dim=1)[:, -1, visual]
        best = visual[given.topk(keep).indices[0]]
        text = (ids[0] != model.config.image_token_id).nonzero()[:, 0]
        return torch.cat([text, best]).sort().values

    hook = attention.register_forward_hook(weights, with_kwargs=True)
    try:
        return _by_layers(model, inputs, shortened)
    finally:
        hook.remove()


def _attention_weights(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Materialise a Llama attention's weights [B, H, N, N]."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    shape = (*hidden.shape[:2], -1, attention.head_dim)
    query = attention.q_proj(hidden).view(shape).transpose(1, 2)
    key = attention.k_proj(hidden).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    key = repeat_kv(key, attention.num_key_value_groups)
    logits = query @ key.transpose(2, 3) * attention.scaling
    length = hidden.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(dim=-1, dtype=torch.float32)


@torch.no_grad()
def _by_layers(
    model: Any, inputs: Mapping[str, Tensor], left: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, DynamicCache]:
    """Run a LLaVA layer by layer; before each, the tokens [M] at some places are left."""
    core, text = model.model, model.model.language_model
    ids = inputs["input_ids"]
    features = core.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    hidden = model.get_input_embeddings()(ids)
    place = (ids == model.config.image_token_id)[..., None]
    hidden = hidden.masked_scatter(place, torch.cat(list(features)).to(hidden.dtype))
    cache = DynamicCache(config=text.config)
    tokens = torch.arange(hidden.shape[1], device=hidden.device)
    tables = text.rotary_emb(hidden, position_ids=tokens[None])
    for i, layer in enumerate(text.layers):
        places = left(i, tokens).to(hidden.device)
        if len(places) < len(tokens):
            # Tokens keep their positions.
            hidden, tokens = hidden[:, places], tokens[places]
            tables = text.rotary_emb(hidden, position_ids=tokens[None])
        # Without a mask, attention is causal.
        hidden = layer(
            hidden,
            attention_mask=None,
            position_ids=tokens[None],
            position_embeddings=tables,
            use_cache=True,
            **{CACHE: cache},
        )
    return model.lm_head(text.norm(hidden)[:, -1]), cache


# *** timing ***


def _ratio(times: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def _prefill(call: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Any:
    with torch.no_grad():
        if isinstance(call, partial):
            # Case: a run of ours, which computes one logit anyway.
            return call(**inputs)
        return call(**inputs, logits_to_keep=1, use_cache=True)


def _generate(call: Callable[..., Any], inputs: Mapping[str, Tensor], tokens: int) -> float:
    """Decode some tokens after a prefill, and return the milliseconds of each."""
    device = inputs["input_ids"].device
    output = _prefill(call, inputs)
    token = output.logits[:, -1:].argmax(-1)
    start = seconds_now(device)
    with torch.no_grad():
        for _ in range(tokens):
            output = call(input_ids=token, use_cache=True, **{CACHE: output[CACHE]})
            token = output.logits[:, -1:].argmax(-1)
    return 1e3 * (seconds_now(device) - start) / tokens


def _peak(call: Runner, device: torch.device) -> int | None:
    """Bytes that a call holds at most on the GPU above what was there before; None on a CPU."""
    return peak_bytes(call, device) if device.type == "cuda" else None


def _keys(output: Any) -> int:
    """Bytes of the keys and values in the cache of a prefill."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in output[CACHE].layers)


# *** the parts ***


def _pytorch(bench: _Bench) -> Results:
    """Prefill, decode, memory, and the gain beside what FLOPs promise."""
    settings, device = bench.settings, bench.device
    variants = bench.variants()
    vision: Any = bench.model.get_image_features
    calls: dict[str, Runner] = {
        name: partial(_prefill, call, bench.inputs) for name, call in variants.items()
    }

    def tower() -> None:
        with torch.no_grad():
            vision(pixel_values=bench.inputs["pixel_values"])

    def read() -> None:
        with tower_as_read(bench.model):
            tower()

    times = in_turns({**calls, "tower": tower, "read": read}, settings.repeats, device)
    whole_tower, read_tower = times.pop("tower"), times.pop("read")
    # The decoder alone: a prompt's time without that of the tower. transformers' own code runs a
    # block of it that nothing reads.
    alone = {}
    for name, own in times.items():
        own_tower = whole_tower if name == ORIGINAL or PUBLISHED in name else read_tower
        alone[name] = [each - other for each, other in zip(own, own_tower, strict=True)]
    costs = _costs(bench)
    towers = {"whole": whole_tower, "read": read_tower}
    tower_ms = {name: statistics.median(own) for name, own in towers.items()}
    found: Results = {"tower_ms": tower_ms, "variants": {}}
    for name in variants:
        figure: Results = {
            "prefill_ms": statistics.median(times[name]),
            "speed_up": 1 / _ratio(times, name, ORIGINAL),
            "decoder_speed_up": 1 / _ratio(alone, name, ORIGINAL),
            "peak_bytes": _peak(calls[name], device),
        }
        if name in costs:
            decode = [
                _generate(variants[name], bench.inputs, settings.new_tokens)
                for _ in range(1 + settings.repeats)
            ]
            figure |= {
                "decode_ms": statistics.median(decode[1:]),
                "kv_bytes": _keys(_prefill(variants[name], bench.inputs)),
                "predicted_kv_bytes": costs[name].kv_bytes,
                "promised_speed_up": costs[EMPTY].flops / costs[name].flops,
            }
        if name in bench.policies:
            figure["over_ideal"] = _ratio(times, name, f"{IDEAL} {name}")
            figure["of_promise"] = figure["speed_up"] / figure["promised_speed_up"]
        if name == FASTV:
            figure["published_over_ours"] = _ratio(times, f"{PUBLISHED} {name}", name)
        found["variants"][name] = figure
    return found


def _compiled(bench: _Bench) -> Results:
    """The original and reduced models under torch.compile, beside running them as they are."""
    found: Results = {"variants": {}}
    for name, policy in {ORIGINAL: None, **bench.policies}.items():
        eager: Any = bench.model
        if policy is None:
            compiled: Any = torch.compile(bench.model)
        else:
            eager, compiled = (ReducedModel(bench.model, policy) for _ in range(2))
            compiled.compile()
        calls = {
            "eager": partial(_prefill, eager, bench.inputs),
            "compiled": partial(_prefill, compiled, bench.inputs),
        }
        start = time.perf_counter()
        calls["compiled"]()
        first = time.perf_counter() - start
        times = in_turns(calls, bench.settings.repeats, bench.device)
        new = bench.settings.new_tokens
        # Twice: the first one compiles.
        decode = [
            [_generate(call, bench.inputs, new) for call in (eager, compiled)] for _ in range(2)
        ][-1]
        found["variants"][name] = {
            "first_call_s": first,
            "prefill_ms": statistics.median(times["compiled"]),
            "over_eager": _ratio(times, "compiled", "eager"),
            "decode_ms": decode[1],
            "decode_over_eager": decode[1] / decode[0],
        }
    return found


def _onnx(bench: _Bench) -> Results:
    """ONNX Runtime beside PyTorch and beside its own ideal short runs, with fewer layers."""
    settings, device = bench.settings, bench.device
    on_cpu = {name: value.cpu() for name, value in bench.inputs.items()}
    policies = {EMPTY: Policy(), **bench.policies}
    costs = _costs(bench)
    reduced = {name: ReducedModel(bench.model, policy) for name, policy in policies.items()}
    seconds, runtimes = {}, {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in policies:
            start, target = time.perf_counter(), Path(folder) / name
            export_onnx(reduced[name], target, bench.inputs, device=device.type, verify=False)
            seconds[name] = time.perf_counter() - start
            runtimes[name] = OnnxModel.from_pretrained(target, device)
        calls: dict[str, Runner] = {}
        for name in policies:
            calls[f"{PYTORCH} {name}"] = partial(_prefill, reduced[name], bench.inputs)
            calls[name] = partial(_prefill, runtimes[name], on_cpu)
        for name, policy in bench.policies.items():
            ideal = onnx_short_run(bench.model, bench.lengths(policy), bench.inputs, Path(folder))
            calls[f"{IDEAL} {name}"] = partial(ideal, on_cpu)
        times = in_turns(calls, settings.repeats, device)
        decode = _decoding(
            {f"{PYTORCH} {name}": (reduced[name], bench.inputs) for name in policies}
            | {name: (runtimes[name], on_cpu) for name in policies},
            settings,
        )
        runtimes.clear()
        calls.clear()
        gc.collect()
    found: Results = {"layers": settings.onnx_layers, "variants": {}}
    for name in policies:
        torch_name = f"{PYTORCH} {name}"
        figure: Results = {
            "export_s": seconds[name],
            "prefill_ms": {
                "pytorch": statistics.median(times[torch_name]),
                "onnxruntime": statistics.median(times[name]),
            },
            "prefill_over_pytorch": _ratio(times, name, torch_name),
            "decode_ms": {
                "pytorch": statistics.median(decode[torch_name]),
                "onnxruntime": statistics.median(decode[name]),
            },
            "decode_over_pytorch": _ratio(decode, name, torch_name),
            "speed_up": 1 / _ratio(times, name, EMPTY),
            "promised_speed_up": costs[EMPTY].flops / costs[name].flops,
        }
        if name in bench.policies:
            figure["over_ideal"] = _ratio(times, name, f"{IDEAL} {name}")
            figure["of_promise"] = figure["speed_up"] / figure["promised_speed_up"]
        found["variants"][name] = figure
    return found


def _decoding(
    calls: Mapping[str, tuple[Callable[..., Any], Mapping[str, Tensor]]], settings: Settings
) -> dict[str, list[float]]:
    """Milliseconds of a new token, by name, in each round: all take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(1 + settings.repeats):
        for name, (call, inputs) in calls.items():
            each = _generate(call, inputs, settings.new_tokens)
            if round_:
                times[name].append(each)
    return times


def _costs(bench: _Bench) -> dict[str, Cost]:
    """What is predicted for a prefill under each policy, by name."""
    call = Call.of(facts_of(bench.model), {**bench.inputs, "logits_to_keep": 1})
    model = CostModel.of_call(call)
    policies = {ORIGINAL: Policy(), EMPTY: Policy(), **bench.policies}
    return {name: model.predict(policy) for name, policy in policies.items()}


def _selectors(bench: _Bench) -> Results:
    """What selectors and reductions cost beside a decoder layer."""
    settings = bench.settings
    keep = settings.keep or SHAPES[settings.shape]().image_seq_length // 9
    chosen = operators.Settings(
        shape=settings.shape,
        device=settings.device,
        dtype=settings.dtype,
        keep=keep,
        rounds=settings.repeats,
        only="reductions",
    )
    measured = operators.measure(chosen, Console(quiet=True), lambda results: None)
    return dict(measured["reductions"])


def _latency(bench: _Bench) -> Results:
    """How well the latency of policies follows from a profile of the model in PyTorch."""
    settings = bench.settings
    policies = latency.draw(bench.model, bench.inputs, settings.policies)
    return latency.compare(bench.model, bench.inputs, policies, "torch", settings.device)


PARTS: Mapping[str, Callable[[_Bench], Results]] = {
    "pytorch": _pytorch,
    "selectors": _selectors,
    "onnxruntime": _onnx,
    "compiled": _compiled,
    "latency": _latency,
}
"""Name of a part -> what it measures."""


def measure(settings: Settings, console: Console, save: Callable[[Results], None]) -> Results:
    """Measure everything that fits into the time.

    Args:
        settings: What to measure.
        console: Where progress is shown.
        save: Called with the results after each part.

    Returns:
        Everything that was found out, as JSON takes it. A part that fails leaves its error.

    Raises:
        ValueError: If a setting makes no sense.
    """
    device = device_of(settings.device)
    results = conditions("gpu", asdict(settings) | {"warm_up": WARM_UP}, device)
    results |= {"parts": {}, "left_out": []}
    start = time.perf_counter()
    for name, images in _plan(settings):
        key = f"{name}, {images} image{'s' * (images > 1)}"
        if time.perf_counter() - start > settings.seconds:
            results["left_out"].append(key)
            save(results)
            continue
        began = time.perf_counter()
        with _model(settings, name, device) as model:
            try:
                found = PARTS[name](_Bench.of(settings, model, images))
            except Exception as error:  # noqa: BLE001 - the other parts are worth having
                found = {"fails": f"{type(error).__name__}: {error}"[:2000]}
        found["seconds"] = time.perf_counter() - began
        results["parts"][key] = found
        console.print(f"{key}: {found['seconds']:.0f} s {found.get('fails', '')}", markup=False)
        save(results)
    return results


def _plan(settings: Settings) -> Iterator[tuple[str, int]]:
    """Yield parts and images of a prompt, what matters most first."""
    few, *more = settings.images
    yield "pytorch", few
    yield "onnxruntime", few
    yield from (("pytorch", images) for images in more)
    yield "selectors", few
    yield "compiled", few
    yield "latency", few
    yield from (("onnxruntime", images) for images in more)


@contextmanager
def _model(settings: Settings, part: str, device: torch.device) -> Iterator[PreTrainedModel]:
    """Build the model of a part, and let go of it afterwards."""
    model: Any = build_model(settings.shape, device, DTYPES[settings.dtype])
    if part == "onnxruntime":
        text = model.model.language_model
        text.layers = text.layers[: settings.onnx_layers]
        text.config.num_hidden_layers = len(text.layers)
    yield model
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# *** the command ***


def table(results: Results) -> Table:
    """Return what matters of the results as a table."""
    shown = Table("part", "variant", "ms", "gain", "of FLOPs' promise", "over ideal", "ORT/PyTorch")
    for part, found in results["parts"].items():
        for name, figure in found.get("variants", {}).items():
            numbers = [figure.get("prefill_ms")]
            if isinstance(numbers[0], dict):
                numbers = [numbers[0]["onnxruntime"]]
            names = ("speed_up", "of_promise", "over_ideal", "prefill_over_pytorch")
            numbers += [figure.get(name) for name in names]
            shown.add_row(part, name, *("" if x is None else f"{x:.3g}" for x in numbers))
    return shown


def main(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")],
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = Settings.shape,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cuda,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: bf16 on a GPU, fp32 on the CPU.")
    ] = None,
    images: Annotated[str, typer.Option(help="Images of a prompt, with commas between.")] = "1,5",
    keep: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an image that stay; default: a ninth.")
    ] = None,
    text: Annotated[int, typer.Option(min=2, help="Text tokens of a prompt.")] = Settings.text,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = Settings.new_tokens,
    onnx_layers: Annotated[
        int, typer.Option(min=3, help="Layers of the model that is exported.")
    ] = Settings.onnx_layers,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs.")] = Settings.repeats,
    seconds: Annotated[
        float, typer.Option(help="After so many, no further part begins.")
    ] = Settings.seconds,
) -> None:
    """Measure what reductions gain on one GPU."""
    default = "bf16" if device is Device.cuda else "fp32"
    settings = Settings(
        shape=shape,
        device=device.value,
        dtype=dtype.value if dtype else default,
        images=[int(number) for number in images.split(",")],
        keep=keep,
        text=text,
        new_tokens=new_tokens,
        onnx_layers=onnx_layers,
        repeats=repeats,
        seconds=seconds,
    )
    console = Console()
    results = measured(partial(measure, settings, console), output, console)
    console.print(table(results))


if __name__ == "__main__":
    typer.run(main)
