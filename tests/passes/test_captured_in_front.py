"""What a model puts in front of its text, written over placeholders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deos_fx.errors import CaptureError
from deos_fx.passes.capture.in_front import InFront
from deos_fx.passes.capture.tracer import Tracer

IDS = torch.tensor([[-1, -1, 5, 6, 7]])
FEATURES, WORDS = torch.randn(1, 2, 3), torch.randn(1, 5, 3)


@pytest.fixture
def tracer() -> Tracer:
    return Tracer(nn.Module(), {})


def in_front(tracer: Tracer, ids: torch.Tensor = IDS) -> tuple[InFront, dict[str, Any]]:
    mask = torch.ones_like(ids)
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.clamp(min=0)}
    proxies = {name: tracer.placeholder(name, value) for name, value in given.items()}
    return InFront(tracer, proxies), proxies


def test_features_take_the_places_of_the_first_tokens(tracer: Tracer) -> None:
    joins, given = in_front(tracer)
    features, words = tracer.placeholder("features", FEATURES), tracer.placeholder("words", WORDS)
    repeated = features.repeat(tracer.placeholder("times", 1), 1, 1)
    for front in (features, repeated):
        found = joins.joined([front, words], 1)
        assert torch.equal(found.value, torch.cat([FEATURES, WORDS[:, 2:]], dim=1))
        assert found.node.args[2].name == "features"
    flags = tracer.create_proxy("call_function", torch.ones_like, (features,), {})[..., 0]
    kinds = tracer.placeholder("kinds", torch.zeros(1, 5))
    assert joins.joined([flags, kinds], -1).value.tolist() == [[1, 1, 0, 0, 0]]
    assert joins.joined([flags, given["attention_mask"]], -1) is given["attention_mask"]


def test_other_joins_are_left_as_they_are(tracer: Tracer) -> None:
    joins, _ = in_front(tracer)
    features, words = tracer.placeholder("features", FEATURES), tracer.placeholder("words", WORDS)
    assert joins.joined([features, features], 1) is None
    assert joins.joined([words, words], 2) is None
    assert joins.joined([features, words, words], 1) is None
    assert joins.joined([FEATURES, words], 1) is None


def test_later_text_has_nothing_in_front(tracer: Tracer) -> None:
    joins, given = in_front(tracer, IDS[:, 2:])
    ones = tracer.placeholder("ones", torch.ones(1, 2))
    assert joins.joined([ones, given["attention_mask"]], -1) is given["attention_mask"]
    assert joins.given(given) == given


def test_a_loss_is_of_the_whole_prompt(tracer: Tracer) -> None:
    joins, given = in_front(tracer)
    given = joins.given(given)
    assert given["input_ids"].value.tolist() == [[0, 0, 5, 6, 7]]
    assert given["shift_labels"].value.tolist() == [[0, 5, 6, 7, -100]]
    every = slice(None)
    assert joins.whole(WORDS, (every, slice(2, None), every)) == (every, every, every)
    assert joins.whole(WORDS[..., 0], (every, slice(2, None))) == (every, slice(2, None))
    for key in ((every, slice(1, None)), 0, (0, 2)):
        assert joins.whole(WORDS, key) == key


def test_what_is_not_known_is_refused(tracer: Tracer) -> None:
    joins, _ = in_front(tracer)
    flags = tracer.placeholder("flags", torch.ones(1, 2))
    kinds = tracer.placeholder("kinds", torch.zeros(1, 5))
    with pytest.raises(CaptureError, match="flags, whose values are not known to be one number"):
        joins.joined([flags, kinds], 1)
    words = tracer.placeholder("words", WORDS)
    with pytest.raises(CaptureError, match="for 2 places"):
        joins.joined([tracer.placeholder("more", torch.randn(1, 3, 3)), words], 1)
    features = tracer.placeholder("features", FEATURES)
    with pytest.raises(CaptureError, match="an image that several rows share"):
        joins.joined([tracer.placeholder("half", FEATURES[:, :1]).repeat(1, 2, 1), words], 1)
    assert joins.joined([features, words], 1) is not None
