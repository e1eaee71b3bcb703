"""Any number of threads at once: every result is that of one thread, and nothing stays replaced."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from batches import batch_of, grid
from families import prompts, shared
from tiny import inputs, tiny_llava
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from transformers import AttentionInterface, AttentionMaskInterface, Cache, masking_utils

from deos_fx import presets
from deos_fx.models.shapes_only import ShapesOnly
from deos_fx.models.upstream import CACHE
from deos_fx.passes.search.search import search
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.replaced import replaced
from deos_fx.runtime.graphs import Graphs
from deos_fx.runtime.reduced_model import ReducedModel

THREADS = 8
MERGE = Policy((Reduction("projector", 0.25, scores={"cls_attention": 1.0}, gain=1.0),))
LATE = Policy((Reduction("decoder.1", 16, scores={"text_attention": 1.0}),))


@pytest.fixture(autouse=True)
def _impatient() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls give, each in a thread of its own; their errors are raised here."""
    gate = threading.Barrier(len(calls))
    results: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        gate.wait()
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def replaceable(*models: nn.Module) -> dict[tuple[str, str], Any]:
    """Everything that capture or an analysis replaces for a while, and the models' own hooks."""
    places: dict[str, Any] = {
        "torch": vars(torch),
        "functional": vars(nn.functional),
        "masks": vars(masking_utils),
        "module": vars(nn.Module),
        "cache": vars(Cache),
        "attention": AttentionInterface._global_mapping,
        "made": AttentionMaskInterface._global_mapping,
    }
    for model in models:
        for module in model.modules():
            kind = type(module)
            places[f"class {kind.__qualname__}"] = vars(kind)
            places[f"file {kind.__module__}"] = vars(sys.modules[kind.__module__])
            places[f"hooks {id(module)}"] = {
                "pre": len(module._forward_pre_hooks),
                "forward": module.__dict__.get("forward"),
            }
    return {(place, name): value for place in places for name, value in places[place].items()}


def same(before: dict[Any, Any], after: dict[Any, Any]) -> bool:
    return not [key for key in before if before[key] is not after.get(key, same)]


def plain_torch(stop: threading.Event) -> bool:
    """Code that has nothing to do with us, until it is told to stop."""
    expected = torch.arange(5).repeat(2).float().softmax(dim=0)
    layer = nn.Linear(10, 3)
    right = layer(expected)
    while not stop.is_set():
        values = torch.cat([torch.arange(5), torch.arange(5)]).float().softmax(dim=0)
        if not (torch.equal(values, expected) and torch.equal(layer(values), right)):
            return False
    return True


def unreduced(model: Any, batch: dict[str, Tensor], right: Tensor, stop: threading.Event) -> bool:
    while not stop.is_set():
        if not torch.equal(model(**batch).logits, right):
            return False
    return True


def beside(calls: list[Callable[[], Any]], model: Any, batch: dict[str, Tensor]) -> list[Any]:
    """The same, beside threads that run plain torch code and a model that is not reduced."""
    stop, right = threading.Event(), model(**batch).logits
    fine: list[bool] = []
    others = [
        threading.Thread(target=lambda: fine.append(plain_torch(stop))),
        threading.Thread(target=lambda: fine.append(unreduced(model, batch, right, stop))),
    ]
    for other in others:
        other.start()
    try:
        return at_once(calls)
    finally:
        stop.set()
        for other in others:
            other.join()
        assert fine == [True, True]


@pytest.mark.parametrize("policy", [MERGE, LATE], ids=["tower", "decoder"])
def test_first_and_later_calls_of_one_model(policy: Policy) -> None:
    model = tiny_llava(4)
    batches = [inputs(model, 1 + i % 2, text=i) for i in range(THREADS)]
    right = [ReducedModel(model, policy)(**batch).logits for batch in batches]
    before = replaceable(model)
    for _ in range(3):
        reduced = ReducedModel(model, policy)
        # The first call of each captures or waits; the others run while some still capture.
        calls = [
            lambda batch=batch, reduced=reduced: [reduced(**batch).logits for _ in range(3)]
            for batch in batches
        ]
        for found, expected in zip(beside(calls, model, batches[0]), right, strict=True):
            assert all(torch.equal(logits, expected) for logits in found)
    assert same(before, replaceable(model))


def test_two_policies_on_one_model_and_another_model() -> None:
    one, other = tiny_llava(4), tiny_llava(4, seed=3)
    batch = inputs(one, 2)
    pairs = [(one, MERGE), (one, LATE), (other, presets.fastv(1, 16)), (other, MERGE)] * 2
    right = [ReducedModel(model, policy)(**batch).logits for model, policy in pairs]
    before = replaceable(one, other)
    calls = [
        lambda model=model, policy=policy: ReducedModel(model, policy)(**batch).logits
        for model, policy in pairs
    ]
    for found, expected in zip(beside(calls, other, batch), right, strict=True):
        assert torch.equal(found, expected)
    assert same(before, replaceable(one, other))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v"])
def test_positions_that_a_model_remembers_are_those_of_the_own_prompt(name: str) -> None:
    model = shared(name)
    policy = Policy((Reduction("decoder.1", 0.5),))
    if name == "qwen2_5_vl":
        batches = [batch_of(name, [[grid(2 + i, 4 + i % 3)]]) for i in range(THREADS)]
    else:
        batches = [prompts(name, 1 + i % 2) for i in range(THREADS)]

    def answer(reduced: ReducedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        tokens = reduced.generate(**batch, max_new_tokens=4, do_sample=False)
        first = reduced(**batch)
        word = first.logits[:, -1:].argmax(dim=-1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(word)], dim=1)
        after = reduced(input_ids=word, attention_mask=mask, **{CACHE: first[CACHE]})
        return tokens, after.logits

    right = [answer(ReducedModel(model, policy), batch) for batch in batches]
    reduced = ReducedModel(model, policy)
    found = at_once([lambda batch=batch: answer(reduced, batch) for batch in batches])
    for ours, expected in zip(found, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.slow
def test_search_cost_explain_and_calls_at_once() -> None:
    model = tiny_llava(3)
    batch = inputs(model, 2)
    labels = {"labels": torch.where(batch["input_ids"] == 120, -100, batch["input_ids"])}

    def found_policy() -> Policy:
        data, budget = [batch | labels] * 2, Budget(visual_tokens=0.3)
        return search(model, data, budget=budget, steps=1, sites=["projector"]).policy

    def told() -> list[list[int]]:
        return [site.kept.tolist() for site in ReducedModel(model, LATE).explain(**batch)]

    calls: list[Callable[[], Any]] = [
        found_policy,
        told,
        lambda: ReducedModel(model, MERGE).cost(**batch),
        lambda: ReducedModel(model, LATE)(**batch).logits.tolist(),
    ]
    right = [call() for call in calls]
    before = replaceable(model)
    # A search is long enough without threads that take turns all the time.
    sys.setswitchinterval(5e-3)
    assert at_once([*calls, found_policy]) == [*right, right[0]]
    assert same(before, replaceable(model))


def test_costs_are_counted_beside_other_models() -> None:
    model = tiny_llava(3)
    batch = inputs(model, 2)
    right = ReducedModel(model, LATE).cost(**batch)

    def counted() -> Any:
        # A model of its own, whose costs nobody has counted before.
        return ReducedModel(tiny_llava(3), LATE).cost(**batch)

    before = fx_config.meta_nonzero_assume_all_nonzero
    assert beside([counted] * 4, model, batch) == [right] * 4
    assert fx_config.meta_nonzero_assume_all_nonzero == before
    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    assert not any(hooks)


def test_other_threads_keep_their_attention_while_shapes_are_run() -> None:
    model = tiny_llava(2, attn="eager")
    batch = inputs(model, 2)
    right = model(**batch).logits
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with ShapesOnly():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    seen = model(**batch).logits
    done.set()
    thread.join()
    assert torch.equal(seen, right)


def test_everything_is_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava(2)
    before = replaceable(model)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no head today")

    monkeypatch.setattr(model.lm_head, "forward", fail)
    with pytest.raises(RuntimeError, match="no head today"):
        ReducedModel(model, MERGE)(**inputs(model))
    monkeypatch.undo()
    assert same(before, replaceable(model))


def test_a_replacement_by_somebody_else_survives() -> None:
    table: dict[str, Any] = {"one": len}
    with replaced([(table, "one", lambda original: lambda *args: original(*args) + 1)]):
        assert table["one"]([0]) == 2
        table["one"] = max
    assert table["one"] is max


def test_a_copy_makes_graphs_of_its_own() -> None:
    reduced = ReducedModel(tiny_llava(2), MERGE)
    batch = inputs(reduced.model)
    logits = reduced(**batch).logits
    twin = copy.deepcopy(reduced)
    assert isinstance(twin.graphs, Graphs) and twin.graphs is not reduced.graphs
    twin.model.lm_head.weight.data.zero_()
    assert not twin(**batch).logits.any() and torch.equal(reduced(**batch).logits, logits)
