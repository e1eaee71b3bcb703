"""What a lowered graph looks like.

The texts under goldens/ are the code of lowered graphs. After a change that is meant, write
them again with UPDATE_GOLDENS=1 and transformers 5.23, and read the difference.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from lowered import lowered
from tiny import inputs, shared_llava
from torch import fx

from deos_fx import presets
from deos_fx.attention.seam import ObservedBlock
from deos_fx.errors import PassError
from deos_fx.models.upstream import CACHE, FORMER_CACHE
from deos_fx.operator import top_k
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

GOLDENS = Path(__file__).parent / "goldens"


def targets(graph_module: fx.GraphModule) -> set[str]:
    return {getattr(node.target, "__name__", node.target) for node in graph_module.graph.nodes}


# *** lowering ***


def test_pruning_has_neither_assignment_nor_matmul() -> None:
    graph_module = lowered(Reduction("projector", 32), Reduction("decoder.1", 8))
    unwanted = {"matmul", "similarity", "nearest", "soft", "uniform", "merge", "merged_mass", "put"}
    assert not targets(graph_module) & unwanted
    assert {"top_k", "last_text_attention", "cls_attention"} <= targets(graph_module)


def test_what_a_policy_does_not_use_leaves_no_node() -> None:
    graph_module = lowered(Reduction("decoder.1", 16, scores={"feature_norm": 1.0}))
    unwanted = {"standardize", "combine", "last_token", "text_tokens", "mass_bias", "key_norm"}
    assert not targets(graph_module) & unwanted
    observed = [m for m in graph_module.modules() if isinstance(m, ObservedBlock)]
    assert not observed, "a score of the hidden states needs no look into attention"
    assert not [n for n in graph_module.graph.nodes if n.op == "get_attr"]


def test_only_the_block_that_is_looked_into_is_replaced() -> None:
    layers = shared_llava().model.language_model.layers
    graph_module = lowered(Reduction("decoder.2", 16))
    for i, layer in enumerate(layers):
        block = graph_module.get_submodule(f"decoder_{i}")
        assert (block is layer) == (i != 2)
    own = dict(graph_module.decoder_2.named_parameters())
    assert {p.data_ptr() for p in own.values()} == {p.data_ptr() for p in layers[2].parameters()}


def test_a_graph_has_one_selection_for_each_reduction() -> None:
    steps = [Reduction("projector", 32), Reduction("decoder.0", 16), Reduction("decoder.3", 4)]
    graph_module = lowered(*steps)
    picks = [node for node in graph_module.graph.nodes if node.target is top_k]
    names = [f"top_k_{step.site.replace('.', '')}" for step in steps]
    assert [node.name for node in picks] == names
    assert [node.args[2] for node in picks] == [32, 16, 4]
    assert len(graph_module.graph.output_node().args[0]["spaces"]) == 3


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("fastv", presets.fastv(layer=2, keep=0.25)),
        ("merge", presets.merge(site="projector", keep=0.25)),
        ("pyramid_drop", presets.pyramid_drop(layers=(2, 4), keep=(0.5, 0.25))),
        ("tome", presets.tome(merged=8, blocks=2, visual_tokens=64)),
        ("visionzip", presets.visionzip(dominant=10, contextual=6, block=1)),
        ("prumerge", presets.prumerge(keep=17, block=1)),
        ("vispruner", presets.vispruner(keep=16, block=1)),
        ("empty", Policy()),
    ],
)
def test_lowered_code_reads_as_before(name: str, policy: Policy) -> None:
    path = GOLDENS / f"{name}.txt"
    code = lowered(*policy.reductions).code.strip() + "\n"
    if os.environ.get("UPDATE_GOLDENS"):
        path.write_text(code, encoding="utf-8")
    expected = path.read_text(encoding="utf-8")
    # They are written with transformers 5.23, where they are compared to the letter.
    if CACHE != FORMER_CACHE:
        code, expected = of_any_version(code), of_any_version(expected)
    assert code == expected, "see the docstring of this file"


def of_any_version(code: str) -> str:
    """Leave out what transformers 5.23 and 5.24 write differently for the same computation."""
    code = re.sub(rf"\b{FORMER_CACHE}\b", "cache", code)
    # 5.24 returns no features of images but what the encoder returned, which graphs leave out.
    code = re.sub(r", 'image_hidden_states': \w+", "", code)
    # So the last use of the features, after which they are freed, is another one.
    code = re.sub(r";  [\w = ]+ = None$", "", code, flags=re.MULTILINE)
    # 5.24 hands arguments of the language model to the blocks of the vision tower as well.
    return re.sub(r"(= self\.vision_.*), use_cache = True", r"\1", code)


# *** verify ***


def test_a_pass_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fold_unstack(graph_module: fx.GraphModule) -> fx.GraphModule:
        raise LookupError("no such node")

    monkeypatch.setattr("deos_fx.passes.pipeline.fold_unstack", fold_unstack)
    model = shared_llava()
    with pytest.raises(PassError, match="pass fold_unstack failed .*LookupError: no such node"):
        ReducedModel(model, Policy())(**inputs(model))
