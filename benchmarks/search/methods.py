"""The searches that are compared.

Each gets a problem of its own, whose counter is at 0, a seed and a number of evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks.search.depthwise import depthwise
from benchmarks.search.space import MERGE, START, HandSpace
from deos_fx import presets
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.run import JUDGED, SearchRun
from deos_fx.passes.search.search import default_steps
from deos_fx.policy.policy import Policy

__all__ = ["LONG", "METHODS", "SHARE", "Found"]

LONG = 10
"""How many times as many evaluations the long run of an optimiser gets."""
SHARE = 10
"""By what the evaluations of the short run of the gradient are divided."""
# Trials in a row that are no policy, or one that is known, after which an optimiser has run dry.
_PATIENCE = 200


@dataclass
class Found:
    """What a search has found.

    Attributes:
        policy: The policy with the lowest loss on held-back data.
        loss: That loss.
        trace: Evaluations so far and the lowest loss so far, at every improvement that is known.
    """

    policy: Policy
    loss: float
    trace: list[tuple[int, float]] = field(default_factory=list)


def _gradient(problem: SearchProblem, seed: int, evaluations: int | None) -> Found:
    """Places, trials and steps alone; others get as many evaluations as this takes."""
    return _staged(problem, seed, ("steps",), 0)


def _tenth(problem: SearchProblem, seed: int, evaluations: int | None) -> Found:
    """Take steps at the first place, in one round, for a tenth of the evaluations."""
    assert evaluations is not None
    run = SearchRun(problem, default_steps(problem), seed, None, None)
    start = run.places(problem.searched_sites())[0]
    # What is left beside the static losses; a step on one batch is three evaluations.
    left = evaluations // SHARE - problem.effort.evaluations
    left -= (JUDGED + 1) * len(problem.scoring)
    run.descend("steps", start, max(1, left // 3))
    best = run.scoring.best
    return Found(best.policy, best.loss)


def _both(problem: SearchProblem, seed: int, evaluations: int | None) -> Found:
    """Run `deos_fx.search` as it is: presets, gradient, variations of the best."""
    return _staged(problem, seed, ("presets", "steps", "variations"), None)


def _polish(problem: SearchProblem, seed: int, evaluations: int | None) -> Found:
    """Presets, and variations of the best for as long as evaluations are left."""
    assert evaluations is not None
    return _staged(problem, seed, ("presets", "variations"), evaluations)


def _polish_start(problem: SearchProblem, seed: int, evaluations: int | None) -> Found:
    """Presets, the starts of the gradient's steps as they are, and variations of the best."""
    assert evaluations is not None
    run = SearchRun(problem, default_steps(problem), seed, None, None)
    starts = run.places(problem.searched_sites())
    run.scoring.add_all("starts", [("start", policy) for policy in starts])
    return _advanced(run, ("presets", "variations"), evaluations)


def _staged(
    problem: SearchProblem, seed: int, stages: tuple[str, ...], evaluations: int | None
) -> Found:
    return _advanced(
        SearchRun(problem, default_steps(problem), seed, None, None), stages, evaluations
    )


def _advanced(run: SearchRun, stages: tuple[str, ...], evaluations: int | None) -> Found:
    """Go through stages of a search; variations take what is left of the evaluations."""
    if evaluations is None:
        # Case: as many evaluations of variations as in a search.
        run.advance(stages)
    else:
        run.advance(stages[:-1] if "variations" in stages else stages)
        left = evaluations - run.problem.effort.evaluations
        if "variations" in stages:
            run.advance(stages[-1:], left)
    best = run.scoring.best
    return Found(best.policy, best.loss)


def _sampled(sampler: str, times: int = 1) -> Callable[[SearchProblem, int, int | None], Found]:
    """Make the search with one of Optuna's samplers over the settings that a hand can turn."""

    def find(problem: SearchProblem, seed: int, evaluations: int | None) -> Found:
        assert evaluations is not None
        return _best(problem, _trials(problem, sampler, seed), times * evaluations)

    return find


def _trials(problem: SearchProblem, sampler: str, seed: int) -> Iterator[tuple[Policy, float]]:
    """Yield the policies that a sampler proposes, with their losses."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=getattr(optuna.samplers, sampler)(seed=seed))
    space = HandSpace(problem, problem.searched_sites())
    # What the gradient starts from and the best preset: all searches know the same.
    for values in (START, MERGE):
        study.enqueue_trial(space.start(values))
    known: dict[str, float] = {}
    idle = 0
    while idle < _PATIENCE:
        trial = study.ask()
        try:
            policy = space.suggest(trial)
        except ValueError:
            # Case: settings that exclude each other.
            policy = None
        if policy is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            idle += 1
            continue
        text = policy.to_json()
        if text in known:
            # Case: the same policy again costs no evaluation.
            study.tell(trial, known[text])
            idle += 1
            continue
        known[text] = problem.static_loss(policy)
        study.tell(trial, known[text])
        idle = 0
        yield policy, known[text]


def _depthwise(problem: SearchProblem, seed: int, evaluations: int | None) -> Found:
    """DOP's search."""
    assert evaluations is not None
    sites = problem.searched_sites()
    return _best(problem, depthwise(problem, sites, evaluations), evaluations)


def _preset(problem: SearchProblem, seed: int, evaluations: int | None) -> Found:
    """Tune the options of every published method, each with an equal part of the evaluations.

    What a method does not need is for the others.
    """
    assert evaluations is not None
    model, visual = problem.model, problem.visual_tokens
    tokens = problem.limits["visual_tokens"] / problem.layout.images
    # Methods that need one evaluation alone come first.
    settings = {name: _settings(problem, name, tokens) for name in presets.names()}
    names = sorted((name for name in settings if settings[name]), key=lambda n: settings[n] > 1)
    left = evaluations // len(problem.scoring)
    best: Found | None = None
    for place, name in enumerate(names):
        each = max(1, left // (len(names) - place))
        loss = problem.checked_loss
        tuned = presets.tune(name, tokens, model, loss, each, seed=seed, visual_tokens=visual)
        left -= tuned.evaluations
        if best is None or tuned.loss < best.loss:
            best = Found(tuned.policy, tuned.loss)
    assert best is not None
    return best


def _settings(problem: SearchProblem, name: str, tokens: float) -> int:
    """Return 0 for a preset that does not fit, 1 for one without options, and 2 for others."""
    try:
        problem.check(presets.fit(name, tokens, problem.model, problem.visual_tokens))
    except ValueError:
        return 0
    options = presets.options(name, problem.model, problem.visual_tokens)
    return 1 + any(option.tuned for option in options.values())


def _best(
    problem: SearchProblem, scored: Iterator[tuple[Policy, float]], evaluations: int
) -> Found:
    """Take policies until the evaluations are used up, and return the best."""
    best: Found | None = None
    for policy, loss in scored:
        spent = problem.effort.evaluations
        if best is None or loss < best.loss:
            trace = [] if best is None else best.trace
            best = Found(policy, loss, [*trace, (spent, loss)])
        # The next one must fit, too.
        if spent + len(problem.scoring) > evaluations:
            break
    assert best is not None
    return best


METHODS: Mapping[str, Callable[[SearchProblem, int, int | None], Found]] = {
    "gradient": _gradient,
    f"gradient/{SHARE}": _tenth,
    "preset": _preset,
    "polish": _polish,
    "both": _both,
    "tpe": _sampled("TPESampler"),
    "random": _sampled("RandomSampler"),
    "evolution": _sampled("NSGAIISampler"),
    "dop": _depthwise,
    "polish-start": _polish_start,
    f"tpe-x{LONG}": _sampled("TPESampler", LONG),
}
"""Name -> search. All but ``gradient`` and ``both`` get the evaluations that ``gradient`` used."""
