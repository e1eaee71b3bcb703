"""What kernels of ONNX Runtime cost on this CPU, which decides how an export is written.

    python benchmarks/onnx_kernels.py --output onnx-kernels.json

benchmarks/README.md says what each figure means.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import process_time
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import typer
from common import conditions
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from deos_fx.exporters.quantise import quantiser
from deos_fx.files import write_text

__all__ = ["masks", "products"]

RANDOM = np.random.default_rng(0)


def products(inputs: int, outputs: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time a product with one matrix of weights [K, N] in each form.

    Args:
        inputs: K.
        outputs: N.
        rounds: Runs of each form; they take turns.

    Returns:
        Form -> tokens of a row x rows -> milliseconds.
    """
    matrix = (RANDOM.standard_normal((inputs, outputs)) * inputs**-0.5).astype(np.float32)
    forms = {"float32": _session(*_product(matrix, None, 0), packed=True)}
    forms["float32, not rearranged"] = _session(*_product(matrix, None, 0), packed=False)
    for bits in (8, 4):
        for accuracy, name in ((4, f"int{bits}"), (0, f"int{bits}, activations of float32")):
            forms[name] = _session(*_product(matrix, bits, accuracy), packed=True)
        name = f"int{bits}, not rearranged"
        forms[name] = _session(*_product(matrix, bits, 4), packed=False)
    found: dict[str, dict[str, float]] = {name: {} for name in forms}
    for tokens, rows in ((1, 1), (1, 4), (640, 1)):
        x = RANDOM.standard_normal((rows, tokens, inputs)).astype(np.float32)
        for name, took in _take_turns(forms, {"x": x}, rounds).items():
            found[name][f"{tokens} x {rows}"] = took
    return found


def _product(matrix: np.ndarray, bits: int | None, accuracy: int) -> tuple[Any, dict[str, Any]]:
    """A node that multiplies x with a matrix, and its constants."""
    if bits is None:
        return helper.make_node("MatMul", ["x", "w"], ["y"]), {"w": matrix}
    integers, scales = quantiser(bits, symmetric=True).qbits_block_quant(matrix)[:2]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=matrix.shape[0],
        N=matrix.shape[1],
        bits=bits,
        block_size=32,
        accuracy_level=accuracy,
    )
    return node, {"w": integers, "s": scales}


def masks(tokens: int, heads: int, width: int, rounds: int) -> dict[str, float]:
    """Time causal attention over one padded prompt, with a bias [1, 1, N, N] or without.

    Args:
        tokens: N.
        heads: Number of heads.
        width: Of a head.
        rounds: Runs of each form; they take turns.

    Returns:
        Form -> milliseconds.
    """
    real = np.ones((1, tokens), np.int32)
    real[:, : tokens // 32] = 0
    seen = np.tril(np.ones((tokens, tokens), bool)) & real.astype(bool)
    bias = np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)[None, None]
    states = RANDOM.standard_normal((3, 1, tokens, heads * width)).astype(np.float32)
    feed = dict(zip("qkv", states, strict=True)) | {"bias": bias, "real": real}
    forms = {}
    for name, inputs, options in (
        ("bias", ["", "", "bias"], {}),
        ("unidirectional and key_padding_mask", ["", "real"], {"unidirectional": 1}),
    ):
        node = helper.make_node(
            "MultiHeadAttention",
            [*"qkv", *inputs],
            ["y"],
            domain="com.microsoft",
            num_heads=heads,
            **options,
        )
        forms[name] = _session(node, {}, packed=True, integers=("real",))
    return _take_turns(forms, feed, rounds)


def _session(
    node: Any, constants: Mapping[str, np.ndarray], packed: bool, integers: Sequence[str] = ()
) -> Any:
    """A session of one node, with as many threads as torch has."""
    given = [name for name in node.input if name and name not in constants]
    kinds = [TensorProto.INT32 if name in integers else TensorProto.FLOAT for name in given]
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(*pair, None) for pair in zip(given, kinds, strict=True)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def _take_turns(
    forms: Mapping[str, Any], feed: Mapping[str, np.ndarray], rounds: int
) -> dict[str, float]:
    """Median milliseconds of each session, after a first run that does not count.

    They are processor time, which other programs on the machine change less than the elapsed time.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, session in forms.items():
            own = {spec.name: feed[spec.name] for spec in session.get_inputs()}
            start = process_time()
            session.run(None, own)
            times[name].append(1e3 * (process_time() - start))
    return {name: statistics.median(took[1:]) for name, took in times.items()}


def main(
    output: Annotated[Path | None, typer.Option(help="File for all results.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each form.")] = 9,
) -> None:
    """Measure what kernels of ONNX Runtime cost on this CPU."""
    start = conditions("onnx_kernels", {"rounds": rounds}, torch.device("cpu"))
    found = {"products": products(2048, 5504, rounds), "masks": masks(2944, 16, 64, rounds)}
    table = Table("product with 2,048 x 5,504", *next(iter(found["products"].values())))
    for name, times in found["products"].items():
        table.add_row(name, *(f"{took:.2f} ms" for took in times.values()))
    Console().print(table)
    for name, took in found["masks"].items():
        Console().print(f"attention over 2,944 tokens, {name}: {took:.0f} ms", highlight=False)
    if output is not None:
        write_text(output, json.dumps(start | found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
