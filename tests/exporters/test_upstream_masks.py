"""What keeps a mask [B, 1, N, N] in prefill graphs: limits of ONNX Runtime (docs/onnx.md).

If one of the refusals stops, layers that are causal but for padding may need no such mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn.functional import scaled_dot_product_attention

BATCH, TOKENS, HEADS, WIDTH = 2, 5, 2, 8
RANDOM = np.random.default_rng(0)
STATES = {
    name: RANDOM.standard_normal((BATCH, TOKENS, HEADS * WIDTH)).astype(np.float32)
    for name in ("q", "k", "v")
}
# The second row has two tokens of padding in front.
REAL = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], np.int32)
KEYS = np.where(REAL, 0, -1e9).astype(np.float32)[:, None, None]


def run(node: Any, mask: np.ndarray, opset: int = 21) -> np.ndarray:
    """Run one node on queries, keys, values and a mask, on the CPU."""
    feed = STATES | {"m": mask}
    graph = helper.make_graph(
        [node],
        "graph",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim
            )
            for name, x in feed.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 3)],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    return session.run(None, feed)[0]


def fused(*inputs: str, **options: int) -> Any:
    return helper.make_node(
        "MultiHeadAttention",
        ["q", "k", "v", *inputs],
        ["y"],
        domain="com.microsoft",
        num_heads=HEADS,
        **options,
    )


def test_the_cpu_knows_causality_and_padding() -> None:
    """On CUDA the same node has only the kernel that writes all scores to memory."""
    found = run(fused("", "m", unidirectional=1), REAL)
    causal = torch.ones(TOKENS, TOKENS).tril().bool() & torch.from_numpy(REAL)[:, None, None].bool()
    states = [
        torch.from_numpy(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in STATES.values()
    ]
    right = scaled_dot_product_attention(*states, attn_mask=causal).transpose(1, 2).flatten(2)
    # What padding sees is nobody's business.
    real = REAL.astype(bool)
    np.testing.assert_allclose(found[real], right.numpy()[real], rtol=1e-4, atol=1e-5)


def test_a_bias_of_keys_alone_is_refused() -> None:
    with pytest.raises(Exception, match="dimension 2 should be same as sequence_length"):
        run(fused("", "", "m", unidirectional=1), KEYS)


def test_standard_attention_refuses_it_too() -> None:
    node = helper.make_node(
        "Attention", ["q", "k", "v", "m"], ["y"], q_num_heads=HEADS, kv_num_heads=HEADS, is_causal=1
    )
    with pytest.raises(Exception, match="inconsistent q_sequence_length"):
        run(node, KEYS, opset=23)
