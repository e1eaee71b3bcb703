"""What a peek into a decoder layer costs is measured once for each kind of layers."""

from __future__ import annotations

import pytest
from families import FAMILIES, built

from deos_fx.cost import peek
from deos_fx.cost.growth import Growth
from deos_fx.models.facts import facts_of


@pytest.mark.parametrize(("name", "kinds"), [("llava", 1), ("gemma3", 2)])
def test_layers_of_one_kind_are_measured_once(
    name: str, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(FAMILIES[name].config())
    facts = facts_of(model)
    measured: list[int] = []
    whole = peek._measure
    monkeypatch.setattr(peek, "_measure", lambda f, i: measured.append(i) or whole(f, i))
    costs = [peek.measure_peek(facts, i) for i in range(len(facts.blocks.decoder))]
    # The first of each kind; layers with a window are another one.
    assert measured == list(range(kinds))
    # Queries, keys and values of 4 heads and 2 key heads: 2 d (H + 2 H_kv) D for each token.
    text = model.config.get_text_config()
    dim = getattr(text, "head_dim", None) or text.hidden_size // 4
    assert costs == [Growth(2 * text.hidden_size * (4 + 2 * 2) * dim, 0)] * len(costs)
