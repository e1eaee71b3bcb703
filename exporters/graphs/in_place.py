"""Let a decode graph write new keys and values into the buffers that hold the old ones.

By themselves, the graphs take exactly the keys that a layer holds and return them with a new one
behind, so each step copies the whole cache. On the CPU, ONNX Runtime's GroupQueryAttention writes
into the past instead, if the present is the same memory, which may be longer than what it holds.
How much it holds then has to come from another input.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["BUFFER", "write_in_place"]

BUFFER = "buffer"
"""What the name of an axis of keys begins with that may be longer than what it holds."""

_PAST = "past"
# Places of past keys and values among the inputs of GroupQueryAttention, and of the new ones among
# its outputs.
_PLACES = {3: 1, 4: 2}


def write_in_place(program: onnx_ir.Model) -> None:
    """Let keys and values be longer than what a layer holds, where nothing else reads them.

    Afterwards, the axes of such inputs and outputs are named `BUFFER`, and the graph gives the same
    for buffers that are longer as for those that are not.

    Args:
        program: A fused graph for one new token of each row. Changed in place: lengths of keys come
            from the mask of their space, and not from the keys.
    """
    graph = program.graph
    # Masks, biases and positions of all keys of a space, past and new: axis -> input.
    seen = {
        axis.removeprefix("seen"): value
        for value in graph.inputs
        if len(value.shape or ()) == 2 and (axis := _axis(value, 1)).startswith("seen")
    }
    spaces: dict[str, list[onnx_ir.Value]] = defaultdict(list)
    for value in graph.inputs:
        if str(value.name).startswith(f"{_PAST}_key_values.") and len(value.shape or ()) == 4:
            spaces[_axis(value, 2).removeprefix(_PAST)].append(value)
    for space, pasts in spaces.items():
        if space in seen and all(map(_is_only_attended, pasts)):
            _measure(graph, pasts, seen[space])
            for past in pasts:
                _name_axis(past, BUFFER + space)
                for value in _presents(past):
                    _name_axis(value, BUFFER + space)


def _axis(value: onnx_ir.Value, place: int) -> str:
    """Return the name of an axis."""
    assert value.shape is not None
    return str(getattr(value.shape[place], "value", value.shape[place]))


def _name_axis(value: onnx_ir.Value, name: str) -> None:
    """Name the axis of tokens."""
    import onnx_ir

    assert value.shape is not None
    value.shape = onnx_ir.Shape([*value.shape[:2], name, *value.shape[3:]])


def _is_only_attended(past: onnx_ir.Value) -> bool:
    """Return whether attention alone reads keys or values, besides what asks for one axis."""
    uses = list(past.uses())
    attended = [use for use in uses if _is_attention(use)]
    others = [use for use in uses if not _is_attention(use)]
    return len(attended) == 1 and all(
        use.node.op_type == "Shape" and _asks_for(use.node) in (0, 2) for use in others
    )


def _is_attention(use: Any) -> bool:
    """Return whether it is attention that returns the new keys or values as a graph output."""
    if use.node.op_type != "GroupQueryAttention" or use.idx not in _PLACES:
        return False
    return use.node.outputs[_PLACES[use.idx]].is_graph_output()


def _asks_for(node: onnx_ir.Node) -> int | None:
    """Return the one axis that a Shape asks for."""
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", 0)
    return start if end == start + 1 else None


def _presents(past: onnx_ir.Value) -> list[onnx_ir.Value]:
    return [use.node.outputs[_PLACES[use.idx]] for use in past.uses() if _is_attention(use)]


def _measure(graph: onnx_ir.Graph, pasts: list[onnx_ir.Value], seen: onnx_ir.Value) -> None:
    """Let the length of keys be that of all that is seen, without the one new token."""
    import onnx_ir

    asking = {
        use.node
        for past in pasts
        for use in past.uses()
        if use.node.op_type == "Shape" and _asks_for(use.node) == 2
    }
    if not asking:
        return
    one = onnx_ir.tensor([1], dtype=onnx_ir.DataType.INT64, name=f"one_of_{seen.name}")
    new = onnx_ir.node("Constant", [], attributes={"value": one})
    every = onnx_ir.node("Shape", [seen], attributes={"start": 1, "end": 2})
    past = onnx_ir.node("Sub", [every.outputs[0], new.outputs[0]])
    for node, name in ((new, "one"), (every, "seen"), (past, "past")):
        node.outputs[0].name = f"{name}_of_{seen.name}"
    graph.insert_before(graph[0], [new, every, past])
    for node in asking:
        node.outputs[0].replace_all_uses_with(past.outputs[0])
        graph.remove(node, safe=True)
