"""What stands in for functions of other packages while a model of a few lines is captured."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput
from transformers.utils.import_utils import torch_compilable_check

from deos_fx.errors import CaptureError
from deos_fx.models.blocks import Block
from deos_fx.passes.capture.capture import capture
from deos_fx.passes.capture.leaves import ImageEncoder, MaskBuilder, check_guard
from deos_fx.passes.capture.proxy import ValueProxy
from deos_fx.passes.capture.replacements import _encode, _length
from deos_fx.passes.capture.tracer import Tracer

BLOCKS = {"block": Block("decoder", 0)}
IDS, OTHER = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6, 7], [7, 6, 5, 4]])


def create_handmade_mask(config: Any, ids: Tensor, least: int = 3) -> Tensor:
    """Looks at values, so it cannot be recorded operation by operation."""
    return torch.tensor([[int(i) >= least + config.more for i in row] for row in ids])


@dataclass
class Output(ModelOutput):
    """With the output of an encoder and that of a language model inside."""

    encoded: ModelOutput | None = None
    inner: CausalLMOutput | None = None
    own: Tensor | None = None


@dataclass
class Encoded(ModelOutput):
    """What an image encoder returns, with features of several depths."""

    pooler_output: Any = None
    deepstack_features: Any = None
    for_layers: Any = None
    hidden_states: Any = None
    sizes: Any = None


class Model(PreTrainedModel):
    """An embedding, something in between, a block and a head."""

    config_class = PreTrainedConfig

    def __init__(self, between: Callable[[Model, Tensor, Tensor], Tensor]) -> None:
        super().__init__(PreTrainedConfig())
        self.config.more = 1
        self.between = between
        self.embed, self.block, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.block(self.between(self, self.embed(input_ids), input_ids))
        inner = CausalLMOutput(logits=self.head(hidden))
        return Output(ModelOutput(features=hidden), inner, hidden + 1)

    def _prepare_decoder_attention_mask(self, mask: Tensor, shape: Any, length: int) -> Tensor:
        return mask.flip(1) * (length + 2)

    def _maybe_slice_kv_shared_inputs(self, *given: Any) -> Any:
        raise AssertionError("a shortcut is taken while capturing")


def captured(between: Callable[[Model, Tensor, Tensor], Tensor]) -> tuple[Model, fx.GraphModule]:
    model = Model(between).eval()
    return model, capture(model, {"input_ids": IDS}, BLOCKS)


def assert_same(model: Model, graph_module: fx.GraphModule) -> None:
    output = model(OTHER)
    fields = graph_module(OTHER)
    # Those of the language model inside, and not those of the encoder.
    assert fields.keys() == {"logits", "own"}
    assert torch.equal(fields["logits"], output.inner.logits)
    assert torch.equal(fields["own"], output.own)


def leaves(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.find_nodes(op="call_module")]


def test_functions_that_make_masks_are_one_node() -> None:
    def between(model: Model, hidden: Tensor, ids: Tensor) -> Tensor:
        first = create_handmade_mask(model.config, ids)
        again = create_handmade_mask(model.config, ids, least=5)
        return hidden * first[..., None] + again[..., None]

    model, graph_module = captured(between)
    first, second = [name for name in leaves(graph_module) if "mask" in name]
    assert first == "handmade_mask" and second.startswith("handmade_mask_")
    builder = graph_module.get_submodule(first)
    assert isinstance(builder, MaskBuilder) and not builder.own and builder.config is model.config
    assert_same(model, graph_module)


def test_methods_that_make_masks_are_one_node() -> None:
    def between(model: Model, hidden: Tensor, ids: Tensor) -> Tensor:
        return hidden * model._prepare_decoder_attention_mask(ids, ids.shape, length=1)[..., None]

    model, graph_module = captured(between)
    builder = graph_module.get_submodule("own_mask")
    assert isinstance(builder, MaskBuilder) and builder.own and builder.config is model.config
    assert_same(model, graph_module)


def test_shortcuts_give_back_what_they_are_given() -> None:
    def between(model: Model, hidden: Tensor, ids: Tensor) -> Tensor:
        if isinstance(hidden, ValueProxy):
            hidden, *others = model._maybe_slice_kv_shared_inputs(hidden, 2, 3, 4, 5)
            assert others == [2, 3, 4]
        return hidden

    assert_same(*captured(between))


def test_checks_of_values_are_left_out() -> None:
    def between(model: Model, hidden: Tensor, ids: Tensor) -> Tensor:
        torch_compilable_check((ids > 0).all(), "no id is 0")
        return hidden

    model, graph_module = captured(between)
    assert not graph_module.graph.find_nodes(op="call_function", target=check_guard)
    assert_same(model, graph_module)


def test_hooks_see_what_a_module_is_given_and_may_change_what_it_returns() -> None:
    seen: list[Any] = []
    model = Model(lambda model, hidden, ids: hidden * 2).eval()
    model.block.register_forward_hook(lambda module, given, output: seen.append((*given, output)))
    model.head.register_forward_hook(
        lambda module, given, named, output: output + len(given) + len(named), with_kwargs=True
    )
    graph_module = capture(model, {"input_ids": IDS}, BLOCKS)
    ((given, output),) = seen
    assert [x.node.name for x in (given, output)] == ["mul", "decoder_0"]
    assert_same(model, graph_module)


def test_a_block_may_ask_what_its_own_layer_holds_and_not_how_long_the_text_is() -> None:
    tracer, cache = Tracer(nn.Module(), {}), DynamicCache()
    assert _length(tracer, Cache.get_seq_length, (cache,), {}) == 0
    tracer.block = Block("decoder", 1)
    assert _length(tracer, Cache.get_seq_length, (cache, 0), {}) == 0
    assert _length(tracer, Cache.get_seq_length, (cache,), {"layer_idx": 0}) == 0
    assert _length(tracer, Cache.get_mask_sizes, (cache, 3, 0), {}) == (3, 0)
    with pytest.raises(CaptureError, match="^decoder_1 counts positions itself"):
        _length(tracer, Cache.get_seq_length, (cache,), {})


def test_other_threads_go_on_as_before() -> None:
    embed = nn.Embedding(2, 4)

    def elsewhere() -> Tensor:
        return torch.full((2,), 3.0) @ embed(torch.arange(2))

    def between(model: Model, hidden: Tensor, ids: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(elsewhere).result(), expected)
        return hidden

    expected = elsewhere()
    assert_same(*captured(between))


def test_an_encoder_inside_of_another_one_runs() -> None:
    tracer = Tracer(nn.Module(), {})
    assert _encode(tracer, lambda core, x, more: (core, x, more), ("core", IDS), {"more": 2}) == (
        "core",
        IDS,
        2,
    )
    assert not [*tracer.graph.nodes]


def test_features_of_several_images_are_joined_at_every_depth() -> None:
    one, two = torch.randn(2, 4), torch.randn(3, 4)
    both = torch.cat([one, two])
    levels = {
        "pooler_output": (one, two),
        "deepstack_features": [(one, two), (two, two)],
        "for_layers": [(3, [one, two]), (5, (two, two))],
        "hidden_states": (one, two),
        "sizes": [one, two],
    }
    made = ImageEncoder(nn.Module(), lambda core, **given: Encoded(**given))(**levels)
    assert torch.equal(made.pooler_output[0], both)
    assert [torch.equal(level[0], both) for level in made.deepstack_features] == [True, False]
    assert [(layer, len(level[0])) for layer, level in made.for_layers] == [(3, 5), (5, 6)]
    # What is no such list stays.
    assert made.hidden_states is levels["hidden_states"] and made.sizes is levels["sizes"]
    made = ImageEncoder(nn.Module(), lambda core, x: Encoded(pooler_output=x))(one)
    assert made.pooler_output is one
