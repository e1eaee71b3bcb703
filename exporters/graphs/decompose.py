"""Decompose exported programs node by node where torch.onnx would trace them once more.

Before it translates a program, torch.onnx (2.11 to 2.13) traces all of it a second time, so that
operators without an ONNX form fall apart into others. Most of ours have one: to trace each of the
others alone takes a tenth of the time, which was a third of an export. An operator that torch does
not take apart, and ONNX does not have, can be computed here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from deos_fx.replaced import replaced

__all__ = ["quick_decompositions"]

_aten: Any = torch.ops.aten

# For programs without tensors.
_NO_MODE: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

_SCAN = torch.ops.higher_order.scan

# In a graph, where nothing is written into, both pass on what they are given.
_NOTHING = (_aten.detach.default, _aten.lift_fresh_copy.default)


@contextlib.contextmanager
def quick_decompositions() -> Iterator[None]:
    """Let torch.onnx decompose node by node while inside, where the result is the same."""
    from torch.onnx._internal.exporter import _decomp, _fx_passes

    # Other threads that export get the same graphs, only sooner.
    quick = (_fx_passes, "decompose_with_registry", _quick)
    with replaced([quick, (_decomp, "create_onnx_friendly_decomposition_table", _larger)]):
        yield


def _larger(table: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
    return lambda known: table(known) | _WITHOUT_FORM


def _quick(decompose: Callable[..., ExportedProgram]) -> Callable[..., ExportedProgram]:
    from torch.onnx._internal.exporter import _decomp

    @functools.wraps(decompose)
    def quick(exported_program: ExportedProgram, registry: Any) -> ExportedProgram:
        known = set(_decomp.get_onnx_implemented_overloads(registry))
        table = _decomp.create_onnx_friendly_decomposition_table(known)
        modules = _modules(exported_program.graph_module)
        nodes = [node for module in modules for node in module.graph.nodes]
        if not all(map(_is_pure, nodes)):
            return decompose(exported_program, registry)
        # What is made of no tensor is to be as fake as the others.
        with detect_fake_mode([node.meta.get("val") for node in nodes]) or _NO_MODE:
            for node in nodes:
                _complete(node)
        _note_returned(exported_program)
        nothing = [node for node in nodes if _is_nothing(node)]
        falling = (node for node in nodes if node not in nothing and _falls_apart(node, known))
        parts = {node: _parts(node, table) for node in falling}
        if any(part.find_nodes(op="get_attr") for part in parts.values()):
            # Case: new constants, which would have to become the program's.
            return decompose(exported_program, registry)
        signature = exported_program.graph_signature
        with exported_program.graph_module._set_replace_hook(signature.get_replace_hook()):
            for node, part in parts.items():
                _replace(node, part)
            for node in nothing:
                _give_way(node, node.all_input_nodes[0])
        for module in modules:
            module.graph.lint()
            module.recompile()
        return exported_program

    return quick


def _modules(module: fx.GraphModule) -> list[fx.GraphModule]:
    """Return a module and the bodies of the loops in it."""
    bodies = map(_body, module.graph.nodes)
    return [module, *(each for body in bodies if body for each in _modules(body))]


def _body(node: fx.Node) -> fx.GraphModule | None:
    """Return the graph that a node names; None if it names a tensor, or is another node."""
    if node.op != "get_attr":
        return None
    named = getattr(node.graph.owning_module, str(node.target), None)
    return named if isinstance(named, fx.GraphModule) else None


def _is_pure(node: fx.Node) -> bool:
    """Return whether a node only computes what it returns, without branches; loops are scans."""
    if isinstance(node.target, OpOverload):
        # Sizes that contents decide are numbered where they come from.
        return not node.target._schema.is_mutable and "unbacked_bindings" not in node.meta
    if node.op == "get_attr":
        return _body(node) is not None
    return node.target is _SCAN or not isinstance(node.target, torch._ops.OperatorBase)


def _complete(node: fx.Node) -> None:
    """Note what a node computes that was put in after the program was traced.

    transformers puts such ones in the place of others, without values.
    """
    if node.op != "call_function" or "val" in node.meta:
        return
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
    node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _note_returned(program: ExportedProgram) -> None:
    """Note what the graph returns: torch.onnx looks for it in the signature.

    transformers puts other nodes in the place of those that write into what is returned, and leaves
    the signature as it was.
    """
    (returned,) = program.graph.output_node().args
    for spec, value in zip(program.graph_signature.output_specs, returned, strict=True):
        if isinstance(value, fx.Node):
            spec.arg.name = value.name


def _falls_apart(node: fx.Node, known: Collection[Any]) -> bool:
    """Return whether a node's operator is made of others.

    Args:
        node: A node of an exported program.
        known: Operators with an ONNX form.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    # torch.export never keeps operators that are made of others and return a view; those of them
    # that have an ONNX form have one that nobody uses.
    views = any(returned.alias_info is not None for returned in target._schema.returns)
    implicit = torch._C.DispatchKey.CompositeImplicitAutograd
    composed = views and target.has_kernel_for_dispatch_key(implicit)
    return target not in known or composed


def _parts(node: fx.Node, table: Mapping[Any, Callable[..., Any]]) -> fx.Graph:
    """Trace one node.

    Args:
        node: The node.
        table: What operators fall apart into.

    Returns:
        A graph whose placeholders are ``node.all_input_nodes``.
    """

    def run(*values: Any) -> Any:
        at = dict(zip(node.all_input_nodes, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), at.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    values = [each.meta["val"] for each in (*node.all_input_nodes, node)]
    # As above.
    with detect_fake_mode(values) or _NO_MODE:
        return make_fx(run, decomposition_table=dict(table))(*values[:-1]).graph


def _replace(node: fx.Node, part: fx.Graph) -> None:
    """Put a graph in the place of a node."""
    graph, given = node.graph, node.all_input_nodes
    with graph.inserting_before(node):
        copied = dict(zip(part.find_nodes(op="placeholder"), given, strict=True))
        new: Any = graph.graph_copy(part, copied)
    for each in copied.values():
        if each not in given:
            # Where in the model it is from.
            each.meta = node.meta | each.meta
    if isinstance(new, fx.Node):
        _give_way(node, new)
        return
    # Case: several results, of which each user takes one.
    for user in list(node.users):
        user.replace_all_uses_with(new[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def _give_way(node: fx.Node, new: fx.Node) -> None:
    """Put a node in the place of another."""
    graph = node.graph
    if new in node.all_input_nodes and any(user.op == "output" for user in node.users):
        # Case: the program returns it, and what it returns has to be of its own.
        with graph.inserting_before(node):
            new = graph.call_function(_aten.clone.default, (new,))
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _is_nothing(node: fx.Node) -> bool:
    """Return whether a node passes on what it is given."""
    if node.target is not _aten.reshape.default:
        return node.target in _NOTHING
    # Case: a tensor gets the shape that it has.
    sizes, before = (each.meta["val"].shape for each in (node, node.all_input_nodes[0]))
    return len(sizes) == len(before) and all(
        statically_known_true(new == old) for new, old in zip(sizes, before, strict=True)
    )


# *** operators that neither torch takes apart nor ONNX has ***


def _erfinv(x: Tensor) -> Tensor:
    """Compute the inverse of the error function, to about 1e-7 of its value.

    Source: M. Giles, Approximating the erfinv function, GPU Computing Gems Jade Edition, 2011,
    table 5 (single precision).
    """
    given = x.float()
    far = -torch.log((1 - given) * (1 + given))
    middle = _polynomial(far - 2.5, _MIDDLE)
    ends = _polynomial(torch.sqrt(far) - 3, _ENDS)
    return (torch.where(far < 5, middle, ends) * given).to(x.dtype)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Evaluate a polynomial by Horner's rule; the highest power comes first."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


_MIDDLE = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_ENDS = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)

_WITHOUT_FORM = {_aten.erfinv.default: _erfinv}
