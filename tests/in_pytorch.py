"""Exports whose graphs PyTorch runs, in place of ONNX Runtime.

Nearly all of the half a minute that an export takes is spent in torch.export. What it is given, and
what is done with the graphs, is ours: here the modules themselves take the place of what is traced.
They are held to what a trace of them would hold them to: every axis that is not dynamic has the
length that it was traced with, and axes of one name have one length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deos_fx.exporters import genai, genai_check, onnx, onnx_model
from deos_fx.exporters.graphs.exportable import Exportable
from deos_fx.exporters.session import HOST, as_tensor
from deos_fx.exporters.shared import ort_value
from deos_fx.passes.rewrite.free_counts import KEEP


class Program:
    """A graph in place of its ONNX form.

    Args:
        graph: The graph.
        fixed: Lengths of dynamic axes by name, if they are no longer dynamic.
    """

    def __init__(self, graph: Exportable, **fixed: int) -> None:
        self.graph = graph
        self.fixed = fixed
        self.opset_imports = {"": 23}
        self.axes = dict(_leaves(graph.shapes))
        self.traced = {name: value.shape for name, value in _leaves(graph.inputs)}
        lengths = self.lengths(self.traced, {})
        # torch.export takes an axis of one entry for a constant, and two of one length for one.
        assert min(lengths.values(), default=2) > 1, lengths
        free = [length for name, length in lengths.items() if not name.startswith(KEEP)]
        assert len({*free}) == len(free), lengths

    def lengths(self, shapes: Mapping[str, Any], fixed: Mapping[str, int]) -> dict[str, float]:
        """Return the lengths of dynamic axes; fail if other axes are not what was traced."""
        found: dict[str, float] = dict(fixed)
        assert shapes.keys() == self.axes.keys()
        for name, shape in shapes.items():
            assert len(shape) == len(self.traced[name]), name
            for axis, length in enumerate(shape):
                dim = self.axes[name].get(axis)
                if dim is None:
                    assert length == self.traced[name][axis], (name, axis)
                    continue
                # Such as the images of a batch, which are a multiple of its rows.
                root, each = getattr(dim, "root", dim), getattr(dim, "fn", int)(1)
                assert found.setdefault(root.__name__, length / each) == length / each, name
        return found


class Session:
    """What runs a graph, as `deos_fx.exporters.session.Session` does in ONNX Runtime."""

    device = HOST

    def __init__(self, program: Program) -> None:
        self.program = program
        given = dict(_leaves(program.graph.inputs))
        self.inputs = {
            name: torch.int64 if name.startswith(KEEP) else value.dtype
            for name, value in given.items()
        }
        self.outputs = list(self._run(given))
        self.buffers: frozenset[str] = frozenset()

    def empty_states(self, rows: int) -> dict[str, Any]:
        return {
            name: ort_value(
                torch.zeros(
                    rows,
                    *(
                        0 if axis in self.program.axes[name] else length
                        for axis, length in enumerate(self.program.traced[name][1:], start=1)
                    ),
                )
            )
            for name in self.inputs
            if name.startswith("past_key_values.")
        }

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        given = {}
        for name, dtype in self.inputs.items():
            value = values[name]
            value = value.to(dtype) if isinstance(value, Tensor) else as_tensor(value)
            # A count is the length of what was traced.
            given[name] = torch.zeros(int(value)) if name.startswith(KEEP) else value
        self.program.lengths({name: x.shape for name, x in given.items()}, self.program.fixed)
        found = self._run(given)
        if "next_position" in found:
            # Text goes on after the largest position, also where each has coordinates.
            rows = given["position_ids"].movedim(-2, 0).flatten(1)
            assert torch.equal(found["next_position"][:, 0], rows.amax(dim=1) + 1)
        return {name: ort_value(value) for name, value in found.items()}

    @torch.no_grad()
    def _run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        nested: dict[str, Any] = {}
        for name, value in given.items():
            *outer, last = name.split(".")
            inside = nested
            for part in outer:
                inside = inside.setdefault(part, {})
            inside[last] = value
        return dict(_leaves(self.program.graph.module(**nested)))


@contextmanager
def without_tracing() -> Iterator[None]:
    """Let exports be written and run like this while inside."""
    written: dict[str, Program] = {}

    def write_graphs(programs: Mapping[str, Program], folder: Path) -> None:
        written.update(programs)
        for name in programs:
            (folder / f"{name}.onnx").write_text(name)

    def open(path: Path, device: Any, shared: Any = None) -> Session:
        assert device in (None, "cpu", HOST) and shared is None
        return Session(written[path.stem])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exportable, "export", lambda graph: Program(graph))
        for writing in (onnx, genai):
            patch.setattr(writing, "of_one", lambda whole, axis: Program(whole.graph, **{axis: 1}))
            patch.setattr(writing, "fuse", lambda programs, device: None)
            patch.setattr(writing, "write_graphs", write_graphs)
        for running in (onnx_model, genai_check):
            patch.setattr(running, "open", open)
        # It is given a graph.
        patch.setattr(onnx, "take_counts", lambda program: program.axes)
        yield


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield values by name; those of inner dicts behind a dot."""
    for name, value in values.items():
        if isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
