"""Quantised models, of any library: the oracle is the quantised model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import prompts, shared
from masked import alive_of, masked_from
from tiny import call_of, inputs, shared_llava, tiny_llava
from torch import Tensor, nn

import deos_fx
from deos_fx.cost.model import CostModel
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.models.upstream import CACHE
from deos_fx.passes.pipeline import capture_call, run_graph
from deos_fx.passes.rewrite.straight_through import StraightThrough
from deos_fx.passes.search.descent import relaxed_graph
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

NORM = {"scores": {"feature_norm": 1.0}}
POLICY = Policy((Reduction("projector", 0.5, **NORM), Reduction("decoder.2", 0.25)))


class Coded(Tensor):
    """Integers with a scale, as a tensor that computes for itself and knows linear layers alone."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        x, weight, bias = args
        # What has no numbers cannot be looked at.
        assert torch.isfinite(x.sum())
        return nn.functional.linear(x, weight.codes.to(x.dtype) * weight.scale, bias)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


class Words(nn.Module):
    """A linear map with integer words that are unpacked elsewhere; it does not tell its sizes."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.words, self.scale, self.bias = nn.Buffer(codes.int()), nn.Buffer(scale), bias

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.from_numpy(self.words.numpy().astype("float32"))
        return nn.functional.linear(x, codes * self.scale, self.bias)


def codes_of(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    scale = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    return (layer.weight / scale).round().char(), scale


def with_subclass(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(Coded(*codes_of(layer)), requires_grad=False)
    return layer


def with_words(layer: nn.Linear) -> nn.Module:
    return Words(*codes_of(layer), layer.bias)


def bitsandbytes_8bit(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    return of_bitsandbytes(Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0), layer)


def bitsandbytes_4bit(layer: nn.Linear, kind: str = "nf4", nested: bool = False) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    if layer.in_features % 64:
        # Its blocks have 64 numbers.
        return layer
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    options = {"quant_type": kind, "compress_statistics": nested}
    return of_bitsandbytes(Linear4bit(*sizes, torch.float32, **options), layer)


def bitsandbytes_fp4(layer: nn.Linear) -> nn.Module:
    return bitsandbytes_4bit(layer, "fp4", nested=True)


def of_bitsandbytes(other: nn.Module, layer: nn.Linear) -> nn.Module:
    other.load_state_dict(layer.state_dict())
    return other.to("cpu").eval().requires_grad_(False)


def torchao(name: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def quantise(layer: nn.Linear) -> nn.Module:
        from torchao import quantization

        holder = nn.Sequential(layer)
        quantization.quantize_(holder, getattr(quantization, name)(**options))
        return holder[0]

    return quantise


# How a layer is quantised, and how many roundings of float32 lie between two ways to the same: more
# where inputs are rounded to eight bits, which a last bit can turn.
KINDS: dict[str, tuple[Callable[[Any], nn.Module], float]] = {
    "subclass": (with_subclass, 64),
    "words": (with_words, 64),
    "torchao int8": (torchao("Int8WeightOnlyConfig"), 64),
    "torchao int8 activations": (torchao("Int8DynamicActivationInt8WeightConfig"), 2**18),
    "torchao int4": (torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4), 64),
    "torchao float8": (torchao("Float8WeightOnlyConfig"), 64),
    "bitsandbytes int8": (bitsandbytes_8bit, 2**18),
    "bitsandbytes nf4": (bitsandbytes_4bit, 2**18),
    "bitsandbytes fp4": (bitsandbytes_fp4, 2**18),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def quantised(model: Any, kind: str) -> Any:
    """A copy whose linear layers, but for the head, are quantised; it has never been called."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in path:
            model.set_submodule(path, KINDS[kind][0](module))
    return model


@every_kind
def test_it_is_the_model_and_pruning_is_masking(kind: str) -> None:
    model = quantised(shared("vipllava"), kind)
    batch, roundings = prompts("vipllava", 2), KINDS[kind][1]
    with torch.no_grad():
        whole = ReducedModel(model, Policy())(**batch).logits
        assert torch.equal(whole, model(**batch).logits)
        ours = ReducedModel(model, POLICY)(**batch)
        with masked_from(model, alive_of(ours[CACHE], batch["input_ids"])):
            theirs = model(**batch).logits
    assert_close(ours.logits[:, -1], theirs[:, -1], roundings)
    with pytest.raises(AssertionError, match="differ by"):
        assert_close(ours.logits[:, -1], whole[:, -1], roundings)


@every_kind
def test_it_has_the_costs_sites_and_default_policy_of_the_model(kind: str) -> None:
    plain, batch = shared("vipllava"), prompts("vipllava", 2)
    model = quantised(plain, kind)
    policy = Policy((Reduction("vision.0", 0.5, **NORM), Reduction("decoder.1", 0.5)))
    ours, theirs = (ReducedModel(one, policy).cost(**batch) for one in (model, plain))
    assert ours == theirs
    assert deos_fx.transform(model).policy == deos_fx.transform(plain).policy
    ours, theirs = (capture_call(one, call_of(one, batch).inputs).sites for one in (model, plain))
    assert ours == theirs


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "gemma3"])
def test_generate_and_explain(name: str) -> None:
    model, batch = quantised(shared(name), "subclass"), prompts(name, 2)
    reduced = ReducedModel(model, POLICY)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    output = reduced.generate(**batch, **options)
    with masked_from(model, alive_of(output[CACHE], batch["input_ids"])):
        assert torch.equal(output.sequences, model.generate(**batch, **options).sequences)
    kept = [site.kept for site in reduced.explain(**prompts(name))]
    assert len(kept) == 2


def test_quantised_embeddings() -> None:
    """Their kernel wants numbers, and gets those of the prompt."""

    class Table(nn.Module):
        def __init__(self, table: nn.Embedding) -> None:
            super().__init__()
            self.codes = nn.Buffer((100 * table.weight).round().short())

        def forward(self, ids: Tensor) -> Tensor:
            return torch.from_numpy(self.codes.numpy()[ids.numpy()] / 100).float()

    model = tiny_llava()
    batch = inputs(model, 2)
    model.set_input_embeddings(Table(model.get_input_embeddings()))
    assert torch.equal(ReducedModel(model, Policy())(**batch).logits, model(**batch).logits)
    assert ReducedModel(model, POLICY).cost(**batch) == (
        ReducedModel(shared_llava(), POLICY).cost(**batch)
    )


def test_a_kernel_that_cannot_be_counted_has_no_cost() -> None:
    class Opaque(Words):
        def forward(self, x: Tensor) -> Tensor:
            product = x.detach().numpy() @ (self.words * self.scale).T.numpy()
            return torch.from_numpy(product)

    model = tiny_llava()
    batch, layer = inputs(model), model.model.language_model.layers[0].mlp
    layer.up_proj = Opaque(*codes_of(layer.up_proj), None)
    assert torch.equal(ReducedModel(model, Policy())(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="What a Opaque costs is not known"):
        CostModel.of_call(call_of(model, batch)).predict(Policy())


def test_a_head_with_an_adapter_counts_in_full() -> None:
    import peft

    model = tiny_llava()
    plain, batch = tiny_llava(), inputs(model)
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"]))
    ours, theirs = (ReducedModel(one, Policy()).cost(**batch) for one in (model, plain))
    text = plain.config.text_config
    added = 2 * 4 * (text.hidden_size + text.vocab_size)
    assert ours.before.flops - theirs.before.flops == added * batch["input_ids"].shape[1]


# *** gradients ***


@pytest.mark.parametrize("kind", [kind for kind in KINDS if " " in kind])
def test_gradients_pass_a_layer(kind: str) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind][0](nn.Linear(64, 96))
    x = torch.randn(2, 5, 64, requires_grad=True)
    with torch.no_grad():
        matrix = (layer(torch.eye(64)) - layer(torch.zeros(1, 64))).mT
    for _ in range(2):
        output = StraightThrough(layer)(x)
        assert torch.equal(output, layer(x.detach()))
        along = torch.randn_like(output)
        (ours,) = torch.autograd.grad(output, x, along)
        theirs = along @ matrix
        # Some compute their own gradient in half precision.
        assert_close(ours.half(), theirs.half())


def gradients(model: Any) -> Tensor:
    """Of the task of a relaxed graph, with respect to the parameters of a reduction."""
    batch = inputs(model, 2)
    # Answers that both models are asked for, which they would not give alike by themselves.
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    batch["labels"] = labels
    budget = deos_fx.Budget(visual_tokens=0.5)
    problem = SearchProblem.of(model, [batch], budget)
    reduction = RelaxedReduction.from_reduction(Reduction("decoder.0", 0.5, gain=0.5, **NORM), 0.5)
    (only,) = problem.training
    graph = relaxed_graph({"decoder.0": reduction}, only)
    task = only.target.loss(run_graph(graph, only.inputs)["logits"])
    found = torch.autograd.grad(task, [*reduction.parameters()], allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


@pytest.mark.parametrize("kind", ["torchao int8 activations", "bitsandbytes int8"])
def test_a_search_sees_the_gradients_of_the_model_itself(kind: str) -> None:
    """Inputs rounded to eight bits hand on no gradient of their own."""
    plain = tiny_llava(layers=3)
    ours, theirs = gradients(quantised(plain, kind)), gradients(plain)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.95


# *** saving ***


def config_of(kind: str) -> Any:
    import transformers
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    inside = {"llm_int8_skip_modules": ["model.vision_tower", "model.multi_modal_projector"]}
    return {
        "torchao": lambda: transformers.TorchAoConfig(Int8WeightOnlyConfig()),
        "activations": lambda: transformers.TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
        "8bit": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
        "4bit": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True, **inside),
    }[kind]()


def loaded(kind: str, folder: Path) -> Any:
    """A model quantised by transformers while it is loaded."""
    plain = shared_llava()
    plain.save_pretrained(folder / "plain")
    config = config_of(kind)
    return type(plain).from_pretrained(folder / "plain", quantization_config=config).eval()


@pytest.mark.parametrize("kind", ["torchao", "activations", "8bit", "4bit"])
def test_loaded_as_saved(kind: str, tmp_path: Path) -> None:
    model = loaded(kind, tmp_path)
    reduced = deos_fx.transform(model, policy=POLICY)
    reduced.save_pretrained(tmp_path / "reduced")
    again = ReducedModel.from_pretrained(tmp_path / "reduced")
    batch = inputs(model, 2)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, reduced(**batch).logits)
        assert torch.equal(again.model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", ["torchao", "8bit"])
def test_adapters_of_quantised_layers_are_not_saved(kind: str, tmp_path: Path) -> None:
    import peft

    model = loaded(kind, tmp_path)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"in the place of .*q_proj.*merge_and_unload"):
        ReducedModel(model, POLICY).save_pretrained(tmp_path / "reduced")
    assert not (tmp_path / "reduced").exists()


def test_layers_quantised_by_hand_are_not_saved(tmp_path: Path) -> None:
    model = quantised(shared_llava(), "torchao int8")
    with pytest.raises(ValueError, match="quantization_config"):
        ReducedModel(model, POLICY).save_pretrained(tmp_path / "reduced")
    assert not (tmp_path / "reduced").exists()


def test_weights_that_were_repacked_are_not_saved(tmp_path: Path) -> None:
    """bitsandbytes does so on some processors, and does not find back."""
    model: Any = tiny_llava()
    model.hf_quantizer = object()
    model.lm_head.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(ValueError, match=r"lm_head.weight .* before its first call"):
        ReducedModel(model, POLICY).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# *** exporting ***


def test_what_has_no_onnx_form_says_what_to_export(tmp_path: Path) -> None:
    model = quantised(shared_llava(), "bitsandbytes int8")
    with pytest.raises(ValueError, match="without quantization_config.* same policy"):
        deos_fx.export_onnx(ReducedModel(model, POLICY), tmp_path, inputs(model))
    assert not list(tmp_path.iterdir())
