"""Whether layers with a state go on from it."""

from __future__ import annotations

import pytest
import torch
from closeness import difference
from families import shared

from deos_fx.models.states import goes_on
from deos_fx.models.upstream import CACHE


@pytest.mark.parametrize(
    ("name", "remembers"),
    [("qwen3_5", True), ("lfm2_vl", True), ("qwen4_exp", True), ("llava_jamba", False)],
)
def test_a_model_goes_on_if_its_generation_says_so(name: str, remembers: bool) -> None:
    assert goes_on(shared(name)) is remembers
    # Word by word, all of them do: what tells them apart is several words at once.
    decoder, words = shared(name).get_decoder(), torch.tensor([[11, 12, 13, 14, 15]])
    whole = decoder(input_ids=words, use_cache=False)[0][:, -1]
    for new in (1, 2):
        first = decoder(input_ids=words[:, :-new], use_cache=True)
        again = decoder(input_ids=words[:, -new:], use_cache=True, **{CACHE: first[CACHE]})
        assert (difference(again[0][:, -1], whole) < 1e-3) is (remembers or new == 1)
