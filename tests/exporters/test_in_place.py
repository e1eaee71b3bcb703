"""Decode graphs that write into buffers: by hand, and of a model in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from tiny import shared_llava

from deos_fx.exporters import session_cache
from deos_fx.exporters.graphs.in_place import write_in_place
from deos_fx.exporters.session import as_tensor, open
from deos_fx.exporters.session_cache import SessionCache

ROWS, HEADS, HELD, WIDTH = 2, 2, 5, 8
RANDOM = np.random.default_rng(0)


def value(name: str, kind: str, *shape: int | str) -> onnx_ir.Value:
    dtype = onnx_ir.TensorType(onnx_ir.DataType[kind])
    return onnx_ir.Value(name=name, type=dtype, shape=onnx_ir.Shape(shape))


def graph(*extra: str) -> onnx_ir.Model:
    """Attention over past keys and a new one, which measures the past; `extra` read it as well."""
    keys, values = (
        value(f"past_key_values.0.{name}", "FLOAT", ROWS, HEADS, "past", WIDTH)
        for name in ("key", "value")
    )
    qkv = value("qkv", "FLOAT", ROWS, 1, 3 * HEADS * WIDTH)
    mask = value("attention_mask", "INT64", ROWS, "seen")
    length = onnx_ir.node("Shape", [keys], attributes={"start": 2, "end": 3})
    rows = onnx_ir.node("Shape", [values], attributes={"start": 0, "end": 1})
    kind = {"to": onnx_ir.DataType.INT32.value}
    held = onnx_ir.node("Cast", [length.outputs[0]], attributes=kind)
    each = onnx_ir.node("Expand", [held.outputs[0], rows.outputs[0]])
    one = onnx_ir.tensor(np.array([1], np.int32), name="one")
    new = onnx_ir.node("Constant", [], attributes={"value": one})
    total = onnx_ir.node("Add", [held.outputs[0], new.outputs[0]])
    attention = onnx_ir.node(
        "GroupQueryAttention",
        [qkv, None, None, keys, values, each.outputs[0], total.outputs[0]],
        attributes={"num_heads": HEADS, "kv_num_heads": HEADS},
        domain="com.microsoft",
        num_outputs=3,
    )
    found, *presents = attention.outputs
    for output, name in zip(attention.outputs, ("found", "key", "value"), strict=True):
        output.name = name if name == "found" else f"present.0.{name}"
        output.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    for output in presents:
        output.shape = onnx_ir.Shape([ROWS, HEADS, "past + 1", WIDTH])
    others = [onnx_ir.node(kind, [values]) for kind in extra]
    for i, node in enumerate(others):
        node.outputs[0].name = f"other_{i}"
        node.outputs[0].type = onnx_ir.TensorType(
            onnx_ir.DataType.INT64 if node.op_type == "Shape" else onnx_ir.DataType.FLOAT
        )
    made = onnx_ir.Graph(
        [qkv, keys, values, mask],
        [found, *presents, *(node.outputs[0] for node in others)],
        nodes=[length, rows, held, each, new, total, attention, *others],
        opset_imports={"": 21, "com.microsoft": 1},
        name="step",
    )
    return onnx_ir.Model(made, ir_version=10)


def axes(program: onnx_ir.Model) -> set[str]:
    named = (*program.graph.inputs[1:3], *program.graph.outputs[1:3])
    return {str(getattr(each.shape[2], "value", "")) for each in named if each.shape}


def test_a_longer_buffer_gives_the_same_and_is_written_in_place(tmp_path: Path) -> None:
    program = graph()
    onnx_ir.save(program, tmp_path / "copying.onnx")
    write_in_place(program)
    assert axes(program) == {"buffer"}
    onnx_ir.save(program, tmp_path / "in_place.onnx")
    copying, in_place = (
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("copying", "in_place")
    )
    given = {
        "qkv": RANDOM.standard_normal((ROWS, 1, 3 * HEADS * WIDTH), np.float32),
        "attention_mask": np.ones((ROWS, HELD + 1), np.int64),
    }
    names = [f"past_key_values.0.{name}" for name in ("key", "value")]
    pasts = {name: RANDOM.standard_normal((ROWS, HEADS, HELD, WIDTH), np.float32) for name in names}
    # The original does not read the mask, so a session has no such input.
    known = {spec.name for spec in copying.get_inputs()}
    exact = {name: x for name, x in (given | pasts).items() if name in known}
    found, *presents = copying.run(None, exact)
    # As long as what it holds, and longer: what is behind does not matter.
    for room in (0, 3):
        binding = in_place.io_binding()
        # Outputs come in the order in which they are bound.
        binding.bind_output("found")
        for name, x in given.items():
            binding.bind_cpu_input(name, x)
        buffers = []
        for name in names:
            behind = np.full((ROWS, HEADS, room, WIDTH), np.nan, np.float32)
            longer = np.concatenate([pasts[name], behind], axis=2)
            buffers.append(onnxruntime.OrtValue.ortvalue_from_numpy(longer))
            binding.bind_ortvalue_input(name, buffers[-1])
            output = name.replace("past_key_values", "present")
            if room:
                binding.bind_ortvalue_output(output, buffers[-1])
            else:
                binding.bind_output(output)
        in_place.run_with_iobinding(binding)
        mixed, *held = (output.numpy() for output in binding.get_outputs())
        np.testing.assert_array_equal(mixed, found)
        for longer, present in zip(held, presents, strict=True):
            assert longer.shape[2] == HELD + max(room, 1)
            np.testing.assert_array_equal(longer[:, :, : HELD + 1], present)


def test_a_cache_makes_room_and_is_cut_for_graphs_that_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_cache, "ROOM", 2)
    program = graph()
    onnx_ir.save(program, tmp_path / "copying.onnx")
    write_in_place(program)
    onnx_ir.save(program, tmp_path / "in_place.onnx")
    copying, in_place = (open(tmp_path / f"{name}.onnx", "cpu") for name in ("copying", "in_place"))
    names = {f"past_key_values.0.{name}" for name in ("key", "value")}
    assert (copying.buffers, in_place.buffers) == (frozenset(), names)
    config = shared_llava(2).config.get_text_config()
    expected, cache = SessionCache(config), SessionCache(config)
    expected.begin(copying.empty_states(ROWS))
    cache.begin(in_place.empty_states(ROWS))
    sizes, places = [], []
    for step, session in enumerate([in_place] * 5 + [copying, in_place], start=1):
        given = {
            "qkv": torch.randn(ROWS, 1, 3 * HEADS * WIDTH),
            "attention_mask": torch.ones(ROWS, step, dtype=torch.int64),
        }
        found = []
        for own, runs in ((expected, copying), (cache, session)):
            outputs = runs(given | own.states_for(runs))
            own.take_states(outputs, step, runs)
            found.append(as_tensor(outputs["found"]))
        assert torch.equal(*found)
        assert cache.lengths == dict.fromkeys(names, step) and cache.get_seq_length() == step
        for name in names:
            held = as_tensor(cache.states[name])
            assert torch.equal(held[:, :, :step], as_tensor(expected.states[name]))
        sizes.append(held.shape[2])
        places.append(held.data_ptr())
    # Room for two at a time; where all is copied, there is none.
    assert sizes == [2, 2, 4, 4, 6, 6, 8]
    assert places[0] == places[1] != places[2] == places[3] != places[4]


@pytest.mark.parametrize("extra", ["Identity", "Shape"])
def test_what_something_else_reads_stays_as_long_as_what_it_holds(extra: str) -> None:
    program = graph(extra)
    before = onnx_ir.to_proto(program)
    write_in_place(program)
    assert onnx_ir.to_proto(program) == before and axes(program) == {"past", "past + 1"}


def test_a_space_whose_tokens_nothing_counts_stays() -> None:
    program = graph()
    program.graph.inputs[-1].shape = onnx_ir.Shape([ROWS, "others"])
    write_in_place(program)
    assert axes(program) == {"past", "past + 1"}
