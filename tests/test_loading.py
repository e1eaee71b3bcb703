"""However a model was loaded: attention implementations, precisions, devices, quantised weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from closeness import assert_close, difference, tolerance
from families import IMAGE, PAD, prompts, shared
from masked import alive_of, masked_from
from tiny import call_of, inputs, tiny_llava
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface

from deos_fx.errors import CaptureError
from deos_fx.models.upstream import CACHE
from deos_fx.passes.lower import lower_reductions
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

STEPS = 3
NORM = {"scores": {"feature_norm": 1.0}}
POLICY = Policy((Reduction("projector", 0.5, **NORM), Reduction("decoder.2", 0.25)))
MERGE = Policy((Reduction("decoder.1", 0.5, gain=1.0, mass_bias=1.0),))
# Sums of half-precision numbers are in single precision: a layer rounds a few times only.
HALF_ROUNDINGS = 3


def own(name: str) -> Any:
    """A model that a test may change."""
    return copy.deepcopy(shared(name))


def generate(model: Any, batch: dict[str, Tensor]) -> Any:
    return model.generate(
        **{name: value.clone() for name, value in batch.items()},
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


def assert_same(ours: Any, theirs: Any) -> None:
    """The same tokens; a step's logits are compared as long as the tokens before it are equal."""
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert_close(a, b)
    assert torch.equal(ours.sequences, theirs.sequences)


def assert_masked(model: Any, batch: dict[str, Tensor]) -> Any:
    """Pruning is masking, for the model as it is."""
    ours = generate(ReducedModel(model, POLICY), batch)
    with masked_from(model, alive_of(ours[CACHE], batch["input_ids"])):
        theirs = generate(model, batch)
    seen, whole = theirs.logits[0], generate(model, batch).logits[0]
    assert difference(seen, whole) > 10 * tolerance(seen)
    assert_same(ours, theirs)
    return ours


# *** attention implementations ***


@pytest.mark.parametrize("name", ["vipllava", "gemma3", "qwen2_5_vl"])
def test_eager(name: str) -> None:
    model = own(name)
    model.set_attn_implementation("eager")
    assert_masked(model, prompts(name, 2))


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """transformers compiles flex_attention, which takes longer than all of these tests."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


# torch warns of its own modules when its compiler is first imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["vipllava", "gemma3", "paligemma"])
def test_flex_attention(name: str) -> None:
    """Plain causal masks, windows beside blocks of images, and a prefix seen in both directions."""
    model, batch = own(name), prompts(name, 2)
    model.set_attn_implementation("flex_attention")
    reduced = ReducedModel(model, POLICY)
    assert_same(generate(reduced, batch), generate(ReducedModel(shared(name), POLICY), batch))
    with pytest.raises(ValueError, match="'flex_attention' takes no bias"):
        ReducedModel(model, MERGE)(**batch)


def _flash_stand_in(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What flash attention computes: masks are of real keys, the last query is the last key."""
    new, held = query.shape[2], key.shape[2]
    visible = torch.ones(new, held, dtype=torch.bool).tril(held - new)[None, None]
    if not getattr(module, "is_causal", True):
        visible = torch.ones_like(visible)
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, -held:].bool()
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> str:
    name = "flash_attention_2"
    monkeypatch.setitem(AttentionInterface._global_mapping, name, _flash_stand_in)
    return name


def test_flash_attention(flash: str) -> None:
    name = "vipllava"
    model, batch = own(name), prompts(name, 2)
    model.config._attn_implementation = flash
    reduced = ReducedModel(model, POLICY)
    assert_same(generate(reduced, batch), generate(ReducedModel(shared(name), POLICY), batch))
    with pytest.raises(ValueError, match="'flash_attention_2' takes no bias"):
        ReducedModel(model, MERGE)(**batch)


def test_flash_attention_counts_windows_in_tokens_that_are_left(flash: str) -> None:
    model = own("gemma3")
    model.config._attn_implementation = flash
    with pytest.raises(ValueError, match="has no mask of windows, blocks of image tokens"):
        ReducedModel(model, POLICY)(**prompts("gemma3"))


# *** precision ***


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vipllava", "qwen2_5_vl"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, batch = own(name).to(dtype), prompts(name, 2)
    batch = {
        key: value.to(dtype) if key.startswith("pixel") else value for key, value in batch.items()
    }
    for policy in (POLICY, MERGE):
        reduced = ReducedModel(model, policy)
        output = reduced(**batch, output_hidden_states=True)
        assert output.logits.dtype == dtype
        assert {hidden.dtype for hidden in output.hidden_states} == {dtype}
        held = output[CACHE].layers
        assert {states.dtype for layer in held for states in (layer.keys, layer.values)} == {dtype}
    ours = ReducedModel(model, POLICY)(**batch)
    spaces = ours[CACHE].spaces
    alive = alive_of(ours[CACHE], batch["input_ids"])
    with masked_from(model, alive):
        whole = model(**batch).logits
    left = alive[spaces[-1].first_layer] & batch["attention_mask"].bool()
    real = batch["attention_mask"].gather(1, spaces[-1].origin).bool()
    assert_close(ours.logits[real], whole[left], HALF_ROUNDINGS)
    assert difference(model(**batch).logits[left], whole[left]) > 0.5


def test_autocast_and_a_model_that_changes_its_precision() -> None:
    name = "vipllava"
    model, batch = own(name), prompts(name, 2)
    for policy in (POLICY, MERGE):
        reduced = ReducedModel(model, policy)
        exact = reduced(**batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            lower = reduced(**batch).logits
        assert lower.dtype == torch.bfloat16
        assert_close(exact[:, -1], lower[:, -1], HALF_ROUNDINGS)
        assert difference(exact[:, -1], lower[:, -1]) > 0
        assert torch.equal(reduced(**batch).logits, exact)
    model.half()
    half = batch | {"pixel_values": batch["pixel_values"].half()}
    halved = reduced(**half).logits
    assert halved.dtype == torch.float16
    assert torch.equal(halved, ReducedModel(model, MERGE)(**half).logits)
    assert difference(halved[:, -1], exact[:, -1]) > 0


# *** weights ***


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    name = "gemma3"
    model, batch = own(name), prompts(name)
    assert model.config.tie_word_embeddings

    def storages(of: Any) -> set[int]:
        return {
            of.get_input_embeddings().weight.data_ptr(),
            of.get_output_embeddings().weight.data_ptr(),
        }

    before = storages(model)
    reduced = ReducedModel(model, POLICY)
    output = generate(reduced, batch)
    assert len(before) == 1
    assert storages(model) == before
    graph_module = reduced.graph_module
    assert {
        graph_module.embed_tokens.weight.data_ptr(),
        graph_module.lm_head.weight.data_ptr(),
    } == (before)
    reduced.save_pretrained(tmp_path)
    again = ReducedModel.from_pretrained(tmp_path)
    assert len(storages(again.model)) == 1
    assert_same(generate(again, batch), output)


class Quantised(nn.Module):
    """A linear map with integer weights, as quantisation libraries put them in a model."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().char(), requires_grad=False)
        self.scale = nn.Buffer(scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Adapted(nn.Module):
    """A linear map with a low-rank addition."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        noise = [torch.randn(4, linear.in_features), torch.randn(linear.out_features, 4)]
        self.down, self.up = (nn.Parameter(0.05 * part, requires_grad=False) for part in noise)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.mT @ self.up.mT


@pytest.mark.parametrize("kind", [Quantised, Adapted])
@pytest.mark.parametrize("name", ["vipllava", "qwen2_5_vl"])
def test_other_linear_layers_are_left_alone(name: str, kind: Any) -> None:
    model, batch = own(name), prompts(name, 2)
    torch.manual_seed(0)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in path:
            model.set_submodule(path, kind(module))
    assert difference(model(**batch).logits, shared(name)(**batch).logits) > 1e-3
    assert_masked(model, batch)
    reduced = ReducedModel(model, POLICY)
    reduced(**batch)
    graph, decoder, whole = (
        {id(part) for part in module.modules() if isinstance(part, kind)}
        for module in (reduced.graph_module, model.get_decoder(), model)
    )
    # Blocks of the tower after the features are not run.
    assert decoder < graph <= whole


def test_gradient_checkpointing() -> None:
    name = "vipllava"
    model, batch = own(name), prompts(name)
    model.activation_checkpointing_enable()
    model.train()
    reduced = ReducedModel(model, POLICY)
    assert not model.training
    assert_same(generate(reduced, batch), generate(ReducedModel(shared(name), POLICY), batch))


# *** padding ***


@pytest.mark.parametrize("name", ["vipllava", "gemma3", "qwen2_5_vl", "paligemma", "llava_next"])
def test_padding_on_the_right(name: str) -> None:
    """Each row of a batch padded on its right is what the masked original model says."""
    model, batch = shared(name), prompts(name, 2)
    length = batch["input_ids"].shape[1]
    for row, real in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        for value in batch.values():
            if value.shape == (2, length):
                value[row] = value[row].roll(real - length)
    assert batch["attention_mask"][1, -1] == 0
    assert (batch["input_ids"][1, -2:] == PAD).all()
    output = ReducedModel(model, POLICY)(**batch)
    alive = alive_of(output[CACHE], batch["input_ids"])
    with masked_from(model, alive):
        whole = model(**batch).logits
    spaces = output[CACHE].spaces
    left = alive[spaces[-1].first_layer] & batch["attention_mask"].bool()
    real = batch["attention_mask"].gather(1, spaces[-1].origin).bool()
    assert (
        left[batch["input_ids"] != IMAGE].sum()
        == batch["attention_mask"][batch["input_ids"] != IMAGE].sum()
    )
    assert_close(output.logits[real], whole[left])


# *** devices ***


def in_parts(model: Any, place: str, layers: range) -> dict[str, str]:
    """A device map with the tower and some decoder layers at a place, the rest on the CPU."""
    inner = model.get_decoder()
    decoder = next(path for path, module in model.named_modules() if module is inner)
    places: dict[str, str] = {}

    def put(prefix: str, module: nn.Module) -> None:
        places.update({prefix + name: "cpu" for name, _ in module.named_parameters(recurse=False)})
        for name, part in module.named_children():
            path = prefix + name
            if decoder.startswith(path):
                put(f"{path}.", part)
            elif isinstance(part, nn.ModuleList):
                chosen = {f"{path}.{i}": place if i in layers else "cpu" for i in range(len(part))}
                places.update(chosen)
            else:
                places[path] = place if "vis" in path else "cpu"

    put("", model)
    return places


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")
@pytest.mark.parametrize("name", ["vipllava", "gemma3", "qwen2_5_vl", "llava_next"])
def test_offloaded_weights(name: str, tmp_path: Path) -> None:
    """Hooks of accelerate bring weights in when a module of the graph, or a view of it, is run."""
    model, batch = own(name), prompts(name, 2)
    places = in_parts(model, "disk", range(1, 4))
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    layers = model.get_decoder().layers
    assert {next(layer.parameters()).device.type for layer in layers} == {"meta", "cpu"}
    for policy in (POLICY, MERGE):
        ours = generate(ReducedModel(model, policy), batch)
        assert_same(ours, generate(ReducedModel(shared(name), policy), batch))


def test_a_wholly_offloaded_model() -> None:
    name = "qwen2_5_vl"
    model, batch = own(name), prompts(name, 2)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    ours = generate(ReducedModel(model, POLICY), batch)
    assert_same(ours, generate(ReducedModel(shared(name), POLICY), batch))


def test_offloaded_weights_between_layers_are_refused() -> None:
    model = own("llava_next")
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(CaptureError, match="image_newline of model are offloaded"):
        ReducedModel(model, POLICY)(**prompts("llava_next"))


DEVICES = (torch.device("cpu"), torch.device("cpu:1"))
SPREAD = {
    "attention": (Reduction("decoder.1", 0.5), Reduction("decoder.2", 0.25)),
    "merge": (
        Reduction("vision.0", 0.75, **NORM),
        Reduction("projector", 0.5, gain=1.0, mass_bias=1.0, **NORM),
        Reduction("decoder.2", 0.25, gain=0.5, temperature=0.2, mass_bias=1.0),
    ),
    "positions": (
        Reduction("decoder.1", 0.5, position="compact"),
        Reduction("decoder.3", 0.25, gain=1.0, similarity={"grid": 1.0}, position="grid"),
    ),
    "text": (
        Reduction("decoder.1", 0.5, scores={"grid_coverage": 1.0}),
        Reduction("decoder.2", 0.25, scores={"text_relevance": 1.0, "random": 0.1}),
        Reduction("decoder.3", 0.125, scores={"rater_attention": 1.0}, residual=True),
    ),
}


@pytest.mark.parametrize("policy", SPREAD)
def test_layers_on_several_devices(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors know on which device they would be, and refuse to be mixed.

    The decoder layers from 2 on are on a second device, and get what they are given there.
    """
    monkeypatch.setattr(lower_reductions, "has_several_devices", lambda module: True)
    model = tiny_llava(5)
    batch = {**inputs(model, 2, 2, layout="between"), "use_cache": False}
    reduced = ReducedModel(model, Policy(SPREAD[policy]))
    reduced.capture(**batch)
    graph_module = reduced.graph_module
    given = call_of(model, batch).inputs
    with FakeTensorMode() as mode, torch.no_grad():
        for name, part in graph_module.named_children():
            late = name in [*(f"decoder_{i}" for i in range(2, 5)), "norm", "lm_head"]
            _move(part, mode, DEVICES[late])
        _move(graph_module, mode, DEVICES[0], hook=False)
        names = [node.target for node in graph_module.graph.find_nodes(op="placeholder")]
        output = graph_module(**{name: mode.from_tensor(given[name]) for name in names})
    assert output["logits"].device == DEVICES[1]
    assert len(output["spaces"]) >= 2


def _move(part: nn.Module, mode: FakeTensorMode, device: torch.device, hook: bool = True) -> None:
    for module in part.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None and not isinstance(value, FakeTensor):
                    held[name] = mode.from_tensor(value).to(device)

    def bring(module: Any, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda value: value.to(device), (args, kwargs))

    if hook:
        part.register_forward_pre_hook(bring, with_kwargs=True)
