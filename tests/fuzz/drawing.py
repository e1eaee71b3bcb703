"""Draw cases at random: a family, a policy that its sites allow, and a batch of prompts.

A case follows from its number alone, so that a failure is replayed by the number.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from families import FAMILIES, REFUSED, STATEFUL, TWINS, prompts, shared
from torch import Tensor

from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.models.facts import configs_of, facts_of
from deos_fx.models.families import auto_class
from deos_fx.operator import SELECTORS, SIMILARITIES
from deos_fx.passes.analyse.sites import Site
from deos_fx.passes.captures import Captures
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import POSITIONS, WEIGHTINGS, Reduction
from deos_fx.policy.site import split_site
from deos_fx.policy.tier import known_options

__all__ = ["Case", "draw"]

T = TypeVar("T")

_RUNNABLE = sorted({*FAMILIES, *TWINS} - REFUSED)
# Padding changes what the original says in a call without positions.
_ALONE = {"hunyuan_vl", "mistral_large4", "git"}
# A value for every option without a default.
_NEEDED = {"windows": 4, "stride": 2, "rows": 2, "side": 2}
# Tries to draw settings that go together.
_TRIES = 50


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        number: Its number.
        family: Name of a family.
        policy: A policy for its sites.
        batch: Prompts; every further one is two tokens shorter and padded.
        eager: Whether attention is computed by torch's plain operations.
    """

    number: int
    family: str
    policy: Policy
    batch: dict[str, Tensor]
    eager: bool

    @property
    def model(self) -> Any:
        """The model of the family; it is shared, and must be left as it is."""
        return _model(self.family, self.eager)

    @property
    def rows(self) -> int:
        """Prompts of the batch."""
        return len(self.batch["input_ids"])

    @property
    def prunes(self) -> bool:
        """Whether the decoder misses tokens, all its layers look at keys, and that is all."""
        return self.family not in STATEFUL and all(
            step.regime == "prune"
            and not step.mass_bias
            and step.position == "keep"
            and split_site(step.site)[0] != "vision"
            for step in self.policy.reductions
        )

    def __str__(self) -> str:
        steps = "; ".join(map(str, self.policy.reductions))
        return f"case {self.number}: {self.family}, {self.rows} prompts, {steps}"


def draw(number: int) -> Case:
    """Draw the case of a number."""
    rng = random.Random(number)
    family = rng.choice(_RUNNABLE)
    policy = _valid(lambda: _policy(rng, _sites(family)))
    if facts_of(shared(family)).counts_positions:
        # Its layers know no other positions.
        policy = Policy(tuple(replace(step, position="compact") for step in policy.reductions))
    rows = 1 if family in _ALONE or _by_place(policy) else rng.choice([1, 2, 3])
    return Case(
        number=number,
        family=family,
        policy=policy,
        batch=prompts(family, rows),
        eager=rng.random() < 0.5,
    )


def _policy(rng: random.Random, sites: Sequence[Site]) -> Policy:
    """Draw one to three reductions; they may be refused."""
    chosen = rng.sample(sites, min(rng.choice([1, 1, 2, 3]), len(sites)))
    left, steps = 1.0, []
    for site in sorted(chosen, key=sites.index):
        left *= rng.uniform(0.1, 0.95)
        steps.append(_valid(lambda site=site, left=left: _reduction(rng, site, left)))
    return Policy(tuple(steps))


def _by_place(policy: Policy) -> bool:
    """Whether choices depend on where a prompt begins, as the L1 norm of rotated keys does.

    Padding moves a prompt, if a call has no positions.
    """
    return any(
        step.selector == "probe" or "key_l1_norm" in step.scores for step in policy.reductions
    )


def _valid(make: Callable[[], T]) -> T:
    """Make something, again and again until its settings go together."""
    for _ in range(_TRIES):
        try:
            return make()
        except ValueError as error:
            last = error
    raise last


def _reduction(rng: random.Random, site: Site, keep: float) -> Reduction:
    """Draw a reduction at a site; it may be refused."""
    # `random` ranks by the place in the batch, which is not a property of a prompt.
    known = [name for name in site.scores if name != "random"]
    scores = {name: rng.random() for name in rng.sample(known, rng.choice([1, 1, 2]))}
    selector = rng.choice(["top_k", *SELECTORS])
    options = {
        name: _NEEDED.get(name, 2)
        for name, default in known_options(selector, scores).items()
        if default is None
    }
    chosen: dict[str, Any] = {"scores": scores, "selector": selector, "options": options}
    if selector == "greedy":
        chosen["diversity"] = rng.uniform(0.1, 4)
    if rng.random() < 0.6:
        # Case: more than pruning.
        chosen |= {
            "gain": rng.choice([0.0, 1.0, rng.random()]),
            "temperature": rng.choice([0.0, rng.uniform(0.02, 1), math.inf]),
            "exponent": rng.choice([1.0, rng.uniform(0, 2)]),
            "weighting": rng.choice(["one", *WEIGHTINGS]),
            "reweight": rng.choice([0.0, 0.0, rng.uniform(-0.5, 1)]),
            "residual": rng.random() < 0.2,
            "mass_bias": rng.choice([0.0, rng.uniform(0, 1.5)]),
        }
        kinds = [kind for kind in SIMILARITIES if kind != "learned"]
        chosen["similarity"] = {kind: rng.random() for kind in rng.sample(kinds, 1)}
    return Reduction(site.name, keep, position=rng.choice(["keep"] * 3 + [*POSITIONS]), **chosen)


@functools.cache
def _sites(family: str) -> list[Site]:
    model = shared(family)
    call = completed(Call.of(facts_of(model), prompts(family)))
    found = Captures(model).serving(call).sites
    assert found is not None
    return list(found.available())


@functools.cache
def _model(family: str, eager: bool) -> Any:
    if not eager:
        return shared(family)
    known = shared(family)
    # Built with it: some encoders choose a class for their attention when they are made.
    config = copy.deepcopy(known.config)
    model = auto_class(config).from_config(config, attn_implementation="eager")
    model.load_state_dict(known.state_dict())
    model.generation_config = copy.deepcopy(known.generation_config)
    model.eval().requires_grad_(False)
    # Of the implementations of experts, the one whose operations are counted in full.
    for config in configs_of(model.config):
        config._experts_implementation_internal = "batched_mm"
    return model
