"""Views of modules, and how quantised layers and blocks are told from others."""

from __future__ import annotations

import copy

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import shared_llava
from torch import nn

from deos_fx.models.blocks import Block, find_blocks
from deos_fx.models.views import (
    execution_device,
    has_codes,
    is_offloaded,
    linear_sizes,
    shallow_copy,
    with_layers,
)


class _Words(nn.Module):
    """A linear layer of integer words."""

    in_features, out_features = 3, 2

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Buffer(torch.ones(2, 3, dtype=torch.int8))


def test_a_copy_shares_weights_and_may_have_other_parts() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    twin = shallow_copy(module)
    twin[1] = nn.Identity()
    x = torch.randn(2, 3)
    assert torch.equal(module(x), twin(x).tanh())
    module[0].weight.data.zero_()
    assert not twin[0].weight.any()


def test_hooks_act_on_the_copy() -> None:
    module = add_hook_to_module(nn.Linear(3, 3), AlignDevicesHook("cpu"))
    twin = shallow_copy(module)
    twin.weight_of = "twin"
    seen = []
    module.register_forward_pre_hook(lambda m, _: seen.append(getattr(m, "weight_of", "module")))
    twin(torch.randn(1, 3))
    assert seen == ["twin"]
    assert execution_device(module) == torch.device("cpu")
    assert not is_offloaded(module)


def test_only_layers_with_codes_are_replaced() -> None:
    inner = nn.Sequential(nn.Linear(3, 3), _Words())
    outer = nn.ModuleDict({"a": inner, "b": nn.Linear(3, 3)})
    view = with_layers(outer, lambda layer: nn.Identity())
    assert [type(part) for part in view["a"]] == [nn.Linear, nn.Identity]
    assert view["b"] is not None and view["a"][0].weight is inner[0].weight
    assert isinstance(outer["a"][1], _Words)
    plain = copy.deepcopy(inner[0])
    assert with_layers(plain, lambda layer: nn.Identity()) is plain


def test_sizes_of_linear_layers_of_any_kind() -> None:
    assert linear_sizes(_Words()) == linear_sizes(nn.Linear(3, 2)) == (3, 2)
    assert linear_sizes(nn.LayerNorm(3)) is None
    assert [has_codes(m) for m in (_Words(), nn.Linear(3, 2), nn.Linear(3, 2).half())] == [
        True,
        False,
        False,
    ]


def test_blocks_of_a_model_by_the_names_of_their_sites() -> None:
    model = shared_llava(3)
    by_path = find_blocks(model).by_path()
    towers = {path: block for path, block in by_path.items() if block.stage == "vision"}
    layers = {path: block.site for path, block in by_path.items() if block.stage == "decoder"}
    assert [layers[path] for path in layers] == ["decoder.0", "decoder.1", "decoder.2"]
    for path, block in by_path.items():
        assert type(model.get_submodule(path)).__name__ in ("LlamaDecoderLayer", "CLIPEncoderLayer")
        assert path.endswith(f".{block.index}")
    assert len(towers) == model.config.vision_config.num_hidden_layers
    assert Block("vision", 1).next.name == "vision_2"
