"""Models whose language model answers for them: those with a Q-Former, and Phi-4-multimodal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from families import prompts, shared
from masked import STEPS, alive_of, generate, masked_from
from test_families import NORM, PRUNED, reduce

import deos_fx
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction

NAMES = ["blip-2", "instructblip", "phi4_multimodal", "kosmos-2", "kosmos-2.5"]


@pytest.mark.parametrize("name", NAMES)
def test_beams(name: str) -> None:
    batch, reduced = prompts(name, 2), reduce(name, PRUNED["both"])
    options: dict[str, Any] = {"max_new_tokens": STEPS, "num_beams": 3, "num_return_sequences": 2}
    ours = reduced.generate(**batch, **options)
    alive = alive_of(reduced(**batch)[CACHE], batch["input_ids"])
    with masked_from(shared(name), alive) as masked:
        assert torch.equal(ours, masked.generate(**batch, **options))


@pytest.mark.parametrize("name", ["blip-2", "instructblip", "kosmos-2"])
def test_text_alone_is_read_by_the_language_model(name: str) -> None:
    reduced, inside = reduce(name, PRUNED["both"]), facts_of(shared(name)).text_model
    text = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4).long()}
    assert inside is shared(name).get_submodule(
        "text_model" if name == "kosmos-2" else "language_model"
    )
    assert torch.equal(reduced(**text).logits, inside(**text).logits)
    (tokens, logits), (expected, others) = generate(reduced, text), generate(inside, text)
    assert torch.equal(tokens, expected)
    assert_close(logits, others)


@pytest.mark.parametrize("name", NAMES)
def test_visual_tokens_have_no_places(name: str) -> None:
    batch = prompts(name, 1)
    by_place = Policy((Reduction("projector", 8, selector="grid", gain=1.0),))
    with pytest.raises(ValueError, match="projector: rows and columns .* are not known"):
        deos_fx.ReducedModel(shared(name), by_place)(**batch)
    explanation = reduce(name, PRUNED["projector"]).explain(**batch)
    assert explanation[0].kept.shape[1] == round(0.25 * explanation[0].positions_in.shape[1])
    with pytest.raises(ValueError, match="where the visual tokens lie on the image is not known"):
        explanation.steps()


def test_merged_queries_make_a_difference() -> None:
    batch = prompts("instructblip", 2)
    merging = Reduction("projector", 0.25, gain=1.0, mass_bias=1.0, **NORM)
    merge = reduce("instructblip", (merging,))
    prune = reduce("instructblip", PRUNED["projector"])
    assert not torch.equal(merge(**batch).logits, prune(**batch).logits)
