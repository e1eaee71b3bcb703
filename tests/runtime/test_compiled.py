"""Reduced models under torch.compile, against themselves without it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import prompts, shared

from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

NORM = {"scores": {"feature_norm": 1.0}}
# Attention is observed in the tower, and in a layer of the decoder that has not run yet.
IN_THE_TOWER = Policy(
    (Reduction("vision.0", 0.75), Reduction("decoder.1", 0.5, gain=1.0, observe="next"))
)
# The encoder reads the sizes of images, and layers have windows.
AFTER_IT = Policy((Reduction("projector", 0.5, **NORM), Reduction("decoder.2", 0.25)))


def generate(reduced: ReducedModel, batch: dict[str, Any], tokens: int) -> Any:
    given = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True}
    output = reduced.generate(**copy.deepcopy(batch), **given, output_logits=True)
    return torch.stack(output.logits)


# torch warns of its own modules when its compiler is first imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("vipllava", IN_THE_TOWER),
        ("qwen2_5_vl", AFTER_IT),
        pytest.param("gemma3", AFTER_IT, marks=pytest.mark.slow),
    ],
)
def test_prefill_and_decode_are_one_graph_each(name: str, policy: Policy) -> None:
    batch, reduced = prompts(name, 2), ReducedModel(shared(name), policy)
    expected = generate(reduced, batch, 4)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    reduced.compile(backend=backend)
    assert_close(generate(reduced, batch, 4), expected)
    # The prefill, a decode step of these lengths, and one of any.
    assert len(graphs) == 3
    generate(reduced, batch, 6)
    assert len(graphs) == 3
