"""Predicted times, and the costs of a block in symbols."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deos_fx.cost.growth import Growth
from deos_fx.cost.latency import in_turns, latency_table
from deos_fx.cost.model import CostModel
from deos_fx.cost.parts import BlockCost, at_most, heads_of
from deos_fx.policy.latency import LatencyTable
from deos_fx.policy.policy import ModelSignature, Policy
from deos_fx.policy.reduction import Reduction
from tests.tiny import shared_llava

MODEL = ModelSignature(model_type="m", vision_layers=1, decoder_layers=2, visual_tokens=9)
TABLE = LatencyTable(
    model=MODEL,
    machine="abacus",
    lengths=(1, 8, 64),
    layers=((2.0, 3.0, 11.0), (1.0, 1.5, 9.0)),
    encoder=5.0,
    encoder_flops=100,
)


def test_times_are_linear_between_measured_lengths() -> None:
    lengths = [5, 30]
    expected = sum(
        np.interp(length, TABLE.lengths, times)
        for length, times in zip(lengths, TABLE.layers, strict=True)
    )
    assert abs(TABLE.decoder(lengths).item() - expected) < 1e-5
    # Beyond the ends, the outermost lines go on.
    assert abs(TABLE.decoder([120, 64]).item() - (11 + 8 + 9)) < 1e-5
    kept = torch.tensor(30.0, requires_grad=True)
    (slope,) = torch.autograd.grad(TABLE.decoder([kept, 64]), kept)
    assert abs(slope.item() - 8 / 56) < 1e-6


def test_a_table_is_saved_as_json(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == TABLE
    text = (tmp_path / "latency.json").read_text()
    for wrong, message in ((text.replace("8", "1", 1), "ascending"), (text[:-9], "not JSON")):
        (tmp_path / "latency.json").write_text(wrong)
        with pytest.raises(ValueError, match=f"latency.json is not a latency table: .*{message}"):
            LatencyTable.load(tmp_path / "latency.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (8, 1, 64)}, "ascending"),
        ({"lengths": (1,)}, "at least two"),
        ({"layers": ((1.0, 2.0, 3.0),)}, "for each decoder layer, of which there are 2"),
        ({"layers": ((1.0, 2.0), (1.0, 2.0))}, "for each decoder layer, of which there are 2"),
        ({"encoder": math.nan}, "no time of a layer"),
        ({"encoder": -1.0}, "no time of a layer"),
        ({"encoder": 1e300}, "give 0 to 1e[+]09"),
    ],
)
def test_wrong_tables_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TABLE, **changes)


def test_a_prediction_adds_up_what_was_measured() -> None:
    """All layers at a measured length, all patches, no reduction: the measured prefill itself."""
    cost = CostModel.of_images(shared_llava(), images=1, text_tokens=4)
    visual, layers = cost.tokens_per_image, cost.signature.decoder_layers
    prefills = {4 + visual // 4: 30.0, 4 + visual: 90.0}
    table = latency_table(cost, "abacus", prefills, encoder=10.0)
    timed = cost.with_latency(table)
    assert math.isclose(timed.amounts(Policy(), ["latency_ms"])["latency_ms"], 90.0, rel_tol=1e-5)
    # A quarter of the tokens from the first layer on, and the whole tower.
    policy = Policy((Reduction("projector", 0.25, scores={"grid_coverage": 1.0}),))
    assert math.isclose(timed.amounts(policy, ["latency_ms"])["latency_ms"], 30.0, rel_tol=1e-5)
    # The first layer stays as it is; all layers are alike.
    later = Policy((Reduction("decoder.0", 0.25, scores={"grid_coverage": 1.0}),))
    expected = 30.0 + 60.0 / layers
    assert math.isclose(timed.amounts(later, ["latency_ms"])["latency_ms"], expected, rel_tol=1e-5)
    with pytest.raises(ValueError, match="that of m .*, and this model is llava"):
        cost.with_latency(TABLE)


def test_calls_take_turns() -> None:
    called: list[str] = []
    calls = [lambda name=name: called.append(name) for name in "ab"]
    times = in_turns(calls, torch.device("cpu"))
    assert len(times) == 2 and min(times) >= 0
    assert called == ["a", "b"] * (len(called) // 2) and len(called) > 2


def test_growth_is_found_from_a_few_lengths() -> None:
    attention = Growth(10, 2)
    assert attention.flops(3) == 3 * 10 + 2 * 9
    assert Growth.of_attention(attention.flops, 2, 4) == attention
    state = Growth(10, 0, constant=7, per_chunk=100, per_chunks=0, chunk=64)
    assert [state.flops(n) for n in (1, 64, 65)] == [117, 747, 857]
    both = Growth(10, 2, constant=-7, per_chunk=100, per_chunks=3, chunk=16)
    assert [Growth.of_state(growth.flops) for growth in (state, both)] == [state, both]
    tokens = torch.tensor(65.0, requires_grad=True)
    flops = state.flops(tokens)
    (slope,) = torch.autograd.grad(flops, tokens)
    assert (flops.item(), slope.item()) == (857, 10 + 100 / 64)


def test_what_a_score_observes_of_a_block() -> None:
    block = BlockCost(Growth(10.0, 2.0), heads=4, key_heads=2, dim=8, width=32)
    assert block.row_flops(1, 5) == 2 * 4 * 8 * 5
    assert block.peek_flops(3) == 3 * 2 * 32 * (4 + 2 + 2) * 8
    assert heads_of(torch.nn.Linear(2, 2)) == (0, 0, 0, 0)


def test_a_window_limits_what_is_seen() -> None:
    assert (at_most(9, None), at_most(9, 4), at_most(3, 4)) == (9, 4, 3)
    assert at_most(torch.tensor(9.0), 4).item() == 4


def test_lengths_that_float32_does_not_tell_apart() -> None:
    table = replace(TABLE, lengths=(1, 2**30, 2**30 + 1))
    assert table.decoder([2**30, 2**30 + 1]) == 3.0 + 9.0
