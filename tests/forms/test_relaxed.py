"""The relaxed form: equal to the static one when it is saturated, and differentiable."""

from __future__ import annotations

import pytest
import torch
from behaviours import BEHAVIOURS, COUNTS, STATIC, reduction_of, relaxed_behaviours
from closeness import assert_close
from hypothesis import assume, given
from hypothesis import strategies as st
from site_inputs import TOKENS, gather, inputs, quick, seeds
from torch import Tensor
from torch.nn import functional as F

from deos_fx import operator
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.forms.relaxed_parameters import has_relaxed_form
from deos_fx.forms.static import static_reduce
from deos_fx.operator import SELECTORS
from deos_fx.policy.reduction import RANGES, Reduction


def _saturated(reduction: Reduction, fraction: float) -> RelaxedReduction:
    return RelaxedReduction.from_reduction(reduction, fraction).double()


@relaxed_behaviours
@quick
@given(seed=seeds, count=st.sampled_from(COUNTS))
def test_saturated_relaxed_is_static(behaviour: str, seed: int, count: int) -> None:
    tokens, mass, features = inputs(seed, dtype=torch.float64)
    reduction = reduction_of(behaviour, count)
    static = static_reduce(reduction, count, tokens, mass, features)
    alive = torch.ones_like(mass)
    relaxed = _saturated(reduction, count / TOKENS)(tokens, alive, mass, features)
    # Now and then two scores are closer than the gates are wide.
    assume(not ((relaxed.alive > 1e-5) & (relaxed.alive < 1 - 1e-5)).any())
    expected = F.one_hot(static.kept, TOKENS).sum(1).double()
    # Gates are open or shut to 1e-5 only, and so is what follows from them.
    torch.testing.assert_close(relaxed.alive, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        gather(relaxed.tokens, static.kept), static.tokens, atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(gather(relaxed.mass, static.kept), static.mass, atol=1e-3, rtol=1e-5)


@relaxed_behaviours
@pytest.mark.parametrize("runners_up", [0, 5])
@pytest.mark.parametrize("gates", ["soft", "hard"])
def test_runners_up_stay_and_all_others_leave(behaviour: str, runners_up: int, gates: str) -> None:
    tokens, mass, features = inputs(5, dtype=torch.float64)
    count, alive = 9, torch.ones_like(mass)
    reduction = reduction_of(behaviour, count)
    static = static_reduce(reduction, count, tokens, mass, features)
    site = _saturated(reduction, count / TOKENS)
    site.runners_up, site.gates = runners_up, gates
    relaxed = site(tokens, alive, mass, features)
    assert relaxed.tokens.shape == (3, count + runners_up, tokens.shape[-1])
    assert (relaxed.kept.diff(dim=1) > 0).all()
    # What the static form keeps is among them, and the rest has closed gates.
    place = (relaxed.kept.unsqueeze(1) == static.kept.expand(3, -1).unsqueeze(-1)).float()
    assert place.sum(-1).eq(1).all()
    index = place.argmax(-1)
    torch.testing.assert_close(gather(relaxed.tokens, index), static.tokens, atol=1e-4, rtol=1e-5)
    assert_close(relaxed.alive.sum(-1).float(), torch.full((3,), float(count)))


@pytest.mark.parametrize("gates", ["hard", "gumbel"])
def test_hard_gates_are_a_choice_with_the_gradient_of_soft_ones(gates: str) -> None:
    tokens, mass, features = inputs(0)
    site = RelaxedReduction(
        reduction_of("learned", 9), activation=1.0, retention=0.25, runners_up=6, gates=gates
    )
    torch.manual_seed(0)
    relaxed = site(tokens, torch.ones_like(mass), mass, features)
    assert relaxed.alive.sum(-1).tolist() == [9, 9, 9]
    assert set(relaxed.alive.detach().round(decimals=6).unique().tolist()) == {0.0, 1.0}
    (relaxed.alive.square() * relaxed.mass.detach()).sum().backward()
    for name, value in site.learned.items():
        if name != "metric":
            assert value.grad is not None and value.grad.abs().max() > 0, name


def _left(name: str, values: Tensor, kept: Tensor) -> Tensor:
    """The feature of the tokens that are kept."""
    if name in ("sides", "text_tokens", "text_mask", "text_score", "normed_text", "class_token"):
        return values
    return gather(values.expand(len(kept), -1, -1) if name == "grid" else values, kept)


@pytest.mark.parametrize(
    ("first", "behaviour"),
    [
        (first, second)
        for first in ("merge", "prune", "pool", "everything")
        for second in BEHAVIOURS
        # A policy refuses grid anchors where the grid is incomplete.
        if first == "pool" or BEHAVIOURS[second].get("selector") != "grid"
    ],
)
def test_saturated_relaxed_is_static_after_another(first: str, behaviour: str) -> None:
    tokens, mass, features = inputs(3, dtype=torch.float64)
    one, two = reduction_of(first, 9), reduction_of(behaviour, 4, "decoder.1")
    static = static_reduce(one, 9, tokens, mass, features)
    left = {name: _left(name, value, static.kept) for name, value in features.items()}
    if first == "pool":
        left["grid"] = features["grid"][static.kept[0]]
    again = static_reduce(two, 4, static.tokens, static.mass, left)
    kept = static.kept.gather(1, again.kept)
    relaxed = _saturated(one, 9 / TOKENS)(tokens, torch.ones_like(mass), mass, features)
    relaxed = _saturated(two, 4 / 9)(relaxed.tokens, relaxed.alive, relaxed.mass, features)
    assert torch.equal(operator.in_order(operator.top_k(relaxed.alive, None, 4)), kept)
    # As above, gates are not saturated to the last digit.
    torch.testing.assert_close(gather(relaxed.tokens, kept), again.tokens, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(gather(relaxed.mass, kept), again.mass, atol=1e-3, rtol=1e-5)


def test_what_has_a_relaxed_form_is_tested() -> None:
    searched = {name for name, row in SELECTORS.items() if row.relaxed}
    assert searched == {fields.get("selector", "top_k") for fields in BEHAVIOURS.values()}
    for behaviour in BEHAVIOURS:
        assert has_relaxed_form(reduction_of(behaviour, 9))
    for behaviour in STATIC:
        assert not has_relaxed_form(reduction_of(behaviour, 9))
        with pytest.raises(ValueError, match="has no relaxed form"):
            RelaxedReduction(reduction_of(behaviour, 9), activation=0.5, retention=0.5)


@relaxed_behaviours
def test_an_inactive_site_is_the_identity(behaviour: str) -> None:
    tokens, mass, features = inputs(0, dtype=torch.float64)
    alive = 0.1 + 0.9 * torch.rand(
        mass.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    site = RelaxedReduction(reduction_of(behaviour, 9), activation=0.0, retention=0.5)
    relaxed = site(tokens, alive, mass, features)
    # Constants of the grid are in single precision.
    assert_close(relaxed.tokens.float(), tokens.float())
    assert_close(relaxed.alive.float(), alive.float(), 8)
    assert_close(relaxed.mass.float(), mass.float())
    assert_close(site.keep_fraction(0.7), torch.tensor(0.7))
    assert_close(site.bias_after(0.3), torch.tensor(0.3))


@relaxed_behaviours
def test_gates_sum_to_the_fraction_kept(behaviour: str) -> None:
    tokens, mass, features = inputs(0)
    site = RelaxedReduction(reduction_of(behaviour, 9), activation=0.8, retention=0.3)
    relaxed = site(tokens, torch.ones_like(mass), mass, features)
    assert_close(relaxed.alive.mean(-1), site.keep_fraction().expand(3))
    assert_close(site.keep_fraction(), torch.tensor(1 - 0.8 * 0.7))


@relaxed_behaviours
@pytest.mark.parametrize("extreme", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_gradients_are_finite_at_extreme_parameters(behaviour: str, extreme: float) -> None:
    tokens, mass, features = inputs(0)
    tokens.requires_grad_()
    for gate_temperature in (1.0, 1e-4):
        site = RelaxedReduction(
            reduction_of(behaviour, 9),
            activation=0.9,
            retention=0.25,
            gate_temperature=gate_temperature,
        )
        for moved in [*site.parameters()]:
            before = moved.detach().clone()
            with torch.no_grad():
                moved.fill_(extreme)
            relaxed = site(tokens, torch.ones_like(mass), mass, features)
            loss = relaxed.tokens.square().mean() + (relaxed.alive * relaxed.mass.log()).mean()
            loss = loss + site.bias_after() + site.keep_fraction()
            site.zero_grad()
            loss.backward()
            grads = [p.grad for p in site.parameters() if p.grad is not None] + [tokens.grad]
            assert all(grad is not None and grad.isfinite().all() for grad in grads)
            with torch.no_grad():
                moved.copy_(before)


@relaxed_behaviours
@pytest.mark.parametrize("extreme", [-1e4, -30.0, 30.0, 1e4])
def test_extreme_parameters_make_a_policy(behaviour: str, extreme: float) -> None:
    site = RelaxedReduction(reduction_of(behaviour, 9), activation=0.9, retention=0.25)
    for moved in [*site.parameters()]:
        before = moved.detach().clone()
        with torch.no_grad():
            moved.fill_(extreme)
        found = site.to_reduction("projector", 9)
        assert all(low <= getattr(found, name) <= high for name, (low, high) in RANGES.items())
        with torch.no_grad():
            moved.copy_(before)


def test_every_learned_parameter_has_a_gradient() -> None:
    tokens, mass, features = inputs(0)
    start = Reduction(
        "projector", 9, **BEHAVIOURS["everything"] | {"scores": {"novelty": 1, "key_norm": 2}}
    )
    site = RelaxedReduction(start, activation=0.9, retention=0.3)
    relaxed = site(tokens, torch.ones_like(mass), mass, features)
    (relaxed.tokens.square().sum() + site.bias_after()).backward()
    for name, parameter in site.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_relaxed_gradients_are_those_of_finite_differences() -> None:
    tokens, mass, features = inputs(0, rows=2, dtype=torch.float64)
    start = Reduction(
        "projector",
        9,
        scores={"novelty": 1, "text_attention": 2},
        gain=0.6,
        temperature=0.3,
        similarity={"feature": 1, "key": 1},
        weighting="score",
        reweight=0.1,
        exponent=0.5,
    )
    site = RelaxedReduction(start, activation=0.8, retention=0.3).double()

    def output(*parameters: Tensor) -> Tensor:
        named = dict(zip([name for name, _ in site.named_parameters()], parameters, strict=True))
        given_ = (tokens, torch.ones_like(mass), mass, features)
        result = torch.func.functional_call(site, named, given_)
        return torch.cat([result.tokens.flatten(), result.alive.flatten(), result.mass.flatten()])

    parameters = [value.detach().clone().requires_grad_() for value in site.parameters()]
    assert torch.autograd.gradcheck(output, parameters, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_relaxed_in_half_precision(dtype: torch.dtype) -> None:
    tokens, mass, features = inputs(0)
    features = {k: v if k in ("grid", "sides") else v.to(dtype) for k, v in features.items()}
    site = RelaxedReduction(reduction_of("everything", 9), activation=0.9, retention=0.3)
    relaxed = site(tokens.to(dtype), torch.ones_like(mass), mass, features)
    assert relaxed.tokens.dtype == dtype
    assert relaxed.alive.dtype == relaxed.mass.dtype == torch.float32
    assert torch.isfinite(relaxed.tokens).all()


@relaxed_behaviours
def test_discretising_a_saturated_site_gives_the_reduction_back(behaviour: str) -> None:
    reduction = reduction_of(behaviour, 9)
    found = RelaxedReduction.from_reduction(reduction, 0.25).to_reduction("projector", 9)
    for name in ("scores", "similarity"):
        assert getattr(found, name) == pytest.approx(getattr(reduction, name), abs=1e-4)
    for name in ("selector", "weighting", "exponent", "residual", "position", "keep", "site"):
        assert getattr(found, name) == getattr(reduction, name)
    for name in ("diversity", "gain", "reweight", "mass_bias", "temperature"):
        assert getattr(found, name) == pytest.approx(getattr(reduction, name), abs=1e-4)


def test_discretising_drops_what_is_negligible() -> None:
    start = Reduction(
        "decoder.1",
        9,
        scores={"novelty": 999, "key_norm": 1},
        selector="greedy",
        diversity=0.001,
        gain=0.002,
        temperature=0.1,
        reweight=0.003,
        mass_bias=0.004,
    )
    site = RelaxedReduction(start, activation=0.9, retention=0.5)
    expected = Reduction("decoder.3", 0.25, scores={"novelty": 1})
    assert site.to_reduction("decoder.3", 0.25) == expected


def test_grid_search_passes_through_counts_without_a_layout() -> None:
    tokens, mass, features = inputs(0)
    alive = torch.ones_like(mass)
    for retention in torch.linspace(0.01, 0.99, 15).tolist():
        site = RelaxedReduction(reduction_of("pool", 9), activation=1.0, retention=retention)
        relaxed = site(tokens, alive, mass, features)
        assert_close(relaxed.alive.mean(-1), torch.full((3,), retention))


@pytest.mark.parametrize("gates", ["soft", "hard"])
def test_damaged_features_give_no_numbers_and_no_error(gates: str) -> None:
    tokens, mass, features = inputs(0)
    alive = torch.full_like(mass, torch.nan)
    settings = {"activation": 1.0, "retention": 0.25, "runners_up": 6, "gates": gates}
    site = RelaxedReduction(Reduction("decoder.1", 9, selector="greedy", diversity=1.0), **settings)
    assert site(tokens * torch.nan, alive, mass, features).tokens.isnan().all()
