"""A reduction as the nodes of a graph, and in ONNX Runtime."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from behaviours import WITH_CLASS_TOKEN, behaviours, reduce, reduction_of
from closeness import assert_onnx_close
from site_inputs import TOKENS, grid, inputs
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from deos_fx.forms.needs import required_features
from deos_fx.forms.static import static_reduce
from deos_fx.policy.reduction import Reduction


def _record(reduction: Reduction, *, mass: bool) -> fx.GraphModule:
    """Writes a reduction into a graph; operators on constants alone are run at once."""
    graph = fx.Graph()
    needed = sorted(required_features(reduction) - {"tokens", "grid"})
    features = {name: graph.placeholder(_plain(name)) for name in needed}
    tokens = graph.placeholder("tokens")
    module = nn.Module()

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        if not any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(arguments)):
            return function(*arguments)
        return graph.call_function(function, pytree.tree_map(constant, arguments))

    def constant(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        name = f"constant_{len(module.state_dict())}"
        module.register_buffer(name, value)
        return graph.get_attr(name)

    masses = graph.placeholder("mass") if mass else None
    count = reduction.count(TOKENS)
    result = static_reduce(reduction, count, tokens, masses, {**features, "grid": grid()}, call)
    graph.output((result.tokens, result.kept))
    return fx.GraphModule(module, graph)


def _plain(name: str) -> str:
    """The name of a feature as that of a placeholder."""
    return name.replace("@", "_").replace(".", "_")


def _operators(module: fx.GraphModule) -> list[str]:
    return [node.target.__name__ for node in module.graph.nodes if node.op == "call_function"]


@behaviours
@pytest.mark.parametrize("mass", [False, True])
def test_a_recorded_reduction_computes_the_same(behaviour: str, mass: bool) -> None:
    tokens, masses, features = inputs(0)
    reduction = reduction_of(behaviour, 9)
    module = _record(reduction, mass=mass)
    needed = required_features(reduction) - {"tokens", "grid"}
    values = {_plain(name): features[name] for name in needed} | {"tokens": tokens}
    if mass:
        values["mass"] = masses
    reduced, kept = module(**values)
    plain = reduce(reduction, tokens, masses if mass else None, features)
    assert torch.equal(kept, plain.kept)
    assert torch.equal(reduced, plain.tokens)


def test_a_graph_has_only_the_operators_it_needs() -> None:
    def operators(behaviour: str) -> list[str]:
        module = _record(reduction_of(behaviour, 9), mass=False)
        module.graph.eliminate_dead_code()
        return _operators(module)

    chosen = ["cls_attention", "top_k", "in_order"]
    assert operators("prune") == [*chosen, "take"]
    assert operators("merge") == [*chosen, "others", "similarity", "nearest", "merge"]
    assert operators("pool") == ["merge", "for_each_row"]
    assert operators("uniform") == [*chosen, "others", "uniform", "merge"]
    rest = ["cls_attention", "top_k", "narrow", "in_order", "others", "slot_of", "rest", "merge"]
    assert operators("residual") == rest


def test_the_code_of_a_graph_reads_like_the_method() -> None:
    module = _record(reduction_of("merge", 9), mass=False)
    module.graph.eliminate_dead_code()
    module.recompile()
    body = [line.split(";")[0].strip() for line in module.code.splitlines() if " = " in line]
    assert body == [
        "cls_attention = deos_fx_operator_scores_cls_attention(attention_cls)",
        "top_k = deos_fx_operator_top_k(cls_attention, None, 9)",
        "in_order = deos_fx_operator_in_order(top_k)",
        "others = deos_fx_operator_others(in_order, tokens)",
        "similarity = deos_fx_operator_similarity({'feature': tokens}, {'feature': 1.0}, "
        "in_order, others)",
        "nearest = deos_fx_operator_nearest(similarity)",
        "merge = deos_fx_operator_merge(tokens, in_order, others, nearest)",
    ]


_ONNX_INPUTS = ("tokens", "mass", *(name for name in inputs(0)[2] if name != "grid"))


def _onnx_inputs(seed: int, rows: int) -> tuple[Tensor, ...]:
    tokens, mass, features = inputs(seed, rows=rows)
    return tuple((features | {"tokens": tokens, "mass": mass})[name] for name in _ONNX_INPUTS)


class _Several(nn.Module):
    """Several reductions side by side, so that one export serves them all."""

    behaviours = (
        "everything",
        "pool",
        "uniform",
        "every score",
        "max_min in steps",
        "determinantal",
        "distinct",
        "probe",
        "windows",
        "quota",
        "bipartite sorted",
        "neighbourhood",
        "contextual",
        "neighbours and rest",
        "interpolate",
    )
    # Nothing is dropped, so nothing moves: empty matrices have no product in ONNX.
    of_all = ("merge", "uniform", "residual by score", "contextual sorted", "bipartite sorted")

    def __init__(self) -> None:
        super().__init__()
        self.recorded = nn.ModuleList(
            _record(reduction, mass=True)
            for reduction in (
                *(reduction_of(name, 4) for name in self.behaviours),
                *(reduction_of(name, TOKENS) for name in self.of_all),
                WITH_CLASS_TOKEN,
            )
        )

    def forward(self, *values: Tensor) -> list[Tensor]:
        given_ = dict(zip(map(_plain, _ONNX_INPUTS), values, strict=True))
        results = []
        for module in self.recorded:
            assert isinstance(module, fx.GraphModule)
            names = [node.name for node in module.graph.find_nodes(op="placeholder")]
            results.extend(module(**{name: given_[name] for name in names}))
        return results


# torch.onnx of 2.13 warns of its own deprecations, and that inputs share their batch axis.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:# The axis name"
)
def test_onnx_runtime_agrees_at_another_batch() -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = _Several().eval()
    values = _onnx_inputs(0, rows=3)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model,
        values,
        dynamo=True,
        dynamic_shapes=(tuple({0: batch} for _ in values),),
        verbose=False,
        optimize=False,
    )
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    operators = {node.op_type for node in program.model.graph}
    assert not operators & {"NonZero", "ScatterND", "Loop", "If"}
    scatters = [node for node in program.model.graph if node.op_type == "ScatterElements"]
    assert all(node.attributes.get_string("reduction", "none") == "none" for node in scatters)
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    values = _onnx_inputs(1, rows=5)
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, values, strict=True)}
    for found, expected in zip(session.run(None, feed), model(*values), strict=True):
        assert_onnx_close(torch.from_numpy(found), expected)
