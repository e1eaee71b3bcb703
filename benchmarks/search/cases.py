"""The cases of the ablations: which descents are run, and what is measured of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.search.descents import PARTS, Reached, descend, places, with_parts
from benchmarks.search.task import Task
from deos_fx.passes.search.descent import Descent
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.run import SearchRun
from deos_fx.passes.search.search import default_steps
from deos_fx.policy.budget import Budget

__all__ = ["CASES", "Case", "Cases", "Row", "Settings"]


@dataclass(frozen=True)
class Settings:
    """The settings that ablations have in common.

    Attributes:
        seeds: Seeds of the questions and of the steps.
        questions: Questions to train on; a third as many are held back.
        tests: Test questions.
        tokens: Visual tokens that may stay, mean over the decoder layers.
        steps: Gradient steps; as many as a search takes, if None.
    """

    seeds: Sequence[int] = (0, 1, 2)
    questions: int = 384
    tests: int = 960
    tokens: int = 8
    steps: int | None = None


@dataclass(frozen=True)
class Case:
    """One run of an ablation.

    Attributes:
        name: What is varied: a line or a bar of the plot.
        at: Where it is drawn: a number on the axis, or a group of bars.
        seed: The seed.
        run: Returns the figures, ``right`` (in per cent) among them.
    """

    name: str
    at: float | str
    seed: int
    run: Callable[[], dict[str, Any]]


Row = dict[str, Any]
Cases = Callable[[Task, Settings], Iterator[Case]]


# *** what is ablated ***


def _constraints(task: Task, settings: Settings) -> Iterator[Case]:
    """One-sided against two-sided constraints, with a second limit that does not bind."""
    limits = {
        "one limit": {"visual_tokens": 18},
        "and a slack one": {"visual_tokens": 18, "flops": 0.75},
    }
    for seed in settings.seeds:
        for at, given in limits.items():
            for name, two_sided in (("one-sided", False), ("two-sided", True)):

                def run(seed: int = seed, given: Any = given, two: bool = two_sided) -> Row:
                    data = task.data(settings.questions, seed)
                    problem = SearchProblem.of(task.model, data, Budget(**given))
                    # Counts are trained where there are several sites.
                    pair = places(problem)[-1]
                    reached = descend(problem, pair, seed, steps=settings.steps, two_sided=two)
                    end = reached.history[-1]
                    share = end["visual_tokens"] / problem.limits["visual_tokens"]
                    return _figures(task, settings, reached) | {"used": share}

                yield Case(name, at, seed, run)


def _jointly(task: Task, settings: Settings) -> Iterator[Case]:
    """Where, how many and how, each alone, against all of them jointly."""

    def where(problem: SearchProblem, seed: int) -> Reached:
        best = min(places(problem), key=problem.static_loss)
        return Reached(best, problem.static_loss(best), [])

    def many(problem: SearchProblem, seed: int) -> Reached:
        return descend(
            problem,
            places(problem)[-1],
            seed,
            steps=settings.steps,
            trained=lambda name: name == "retention",
        )

    def how(problem: SearchProblem, seed: int) -> Reached:
        return descend(problem, places(problem)[0], seed, steps=settings.steps)

    def jointly(problem: SearchProblem, seed: int) -> Reached:
        run = SearchRun(problem, settings.steps or default_steps(problem), seed, None, None)
        run.advance(("steps",))
        return Reached(run.scoring.best.policy, run.scoring.best.loss, run.history)

    variants = {"where": where, "how many": many, "how": how, "jointly": jointly}
    for seed in settings.seeds:
        for tokens in (18, settings.tokens):
            for name, find in variants.items():

                def run(seed: int = seed, tokens: int = tokens, find: Any = find) -> Row:
                    problem = task.problem(tokens, settings.questions, seed)
                    return _figures(task, settings, find(problem, seed))

                yield Case(name, f"{tokens} tokens", seed, run)


def _gates(task: Task, settings: Settings) -> Iterator[Case]:
    """Soft gates, hard ones with a soft gradient, and Gumbel noise."""
    yield from _at_projector(
        task, settings, {gates: {"gates": gates} for gates in ("soft", "hard", "gumbel")}
    )


def _targets(task: Task, settings: Settings) -> Iterator[Case]:
    """Labels against the unreduced model's own predictions; both answer the same questions."""
    for seed in settings.seeds:
        for name, labels in (("labels", True), ("self-distillation", False)):

            def run(seed: int = seed, labels: bool = labels) -> Row:
                problem = task.problem(settings.tokens, settings.questions, seed, labels=labels)
                reached = descend(problem, places(problem)[0], seed, steps=settings.steps)
                return _figures(task, settings, reached)

            yield Case(name, f"{settings.tokens} tokens", seed, run)


def _parts(task: Task, settings: Settings) -> Iterator[Case]:
    """Each learned part alone, none, all, and those of the search."""
    chosen = {"none": (), **{part: (part,) for part in PARTS}}
    chosen |= {"probe + metric": ("probe", "metric"), "all": PARTS}
    for seed in settings.seeds:
        for name, parts in chosen.items():

            def run(seed: int = seed, parts: Sequence[str] = parts) -> Row:
                problem = task.problem(settings.tokens, settings.questions, seed)
                start = with_parts(places(problem)[0], parts, seed)
                return _figures(task, settings, descend(problem, start, seed, steps=settings.steps))

            yield Case(name, f"{settings.tokens} tokens", seed, run)


def _gap(task: Task, settings: Settings) -> Iterator[Case]:
    """The relaxed and the static loss on held-back data over the steps."""
    for seed in settings.seeds:
        for gates in ("soft", "hard"):

            def run(seed: int = seed, gates: str = gates) -> Row:
                problem = task.problem(settings.tokens, settings.questions, seed)
                curve: list[tuple[int, float, float]] = []

                def measure(descent: Descent) -> None:
                    # About a dozen points of the curve.
                    if descent.state.step % max(1, descent.steps // 12) == 0:
                        curve.append((descent.state.step, descent.held_back(), descent.judge()))

                start = places(problem)[0]
                reached = descend(
                    problem, start, seed, steps=settings.steps, gates=gates, after_step=measure
                )
                return _figures(task, settings, reached) | {"curve": curve}

            yield Case(gates, f"{settings.tokens} tokens", seed, run)


def _steps(task: Task, settings: Settings) -> Iterator[Case]:
    """Right answers over the number of steps."""
    for seed in settings.seeds:
        for steps in (12, 24, 48, 96, 192, 384):

            def run(seed: int = seed, steps: int = steps) -> Row:
                problem = task.problem(settings.tokens, settings.questions, seed)
                return _figures(
                    task, settings, descend(problem, places(problem)[0], seed, steps=steps)
                )

            yield Case(f"{settings.questions} questions", steps, seed, run)


def _examples(task: Task, settings: Settings) -> Iterator[Case]:
    """Right answers over the number of questions to search with, held-back ones included."""
    for seed in settings.seeds:
        for total in (32, 64, 128, 256, 512, 1024, 2048):

            def run(seed: int = seed, total: int = total) -> Row:
                problem = task.problem(settings.tokens, 3 * total // 4, seed)
                start = places(problem)[0]
                before = task.accuracy(start, settings.tests)["overall"]
                reached = descend(problem, start, seed, steps=settings.steps)
                return _figures(task, settings, reached) | {"start": 100 * before}

            yield Case(f"{settings.tokens} tokens", total, seed, run)


def _transfer(task: Task, settings: Settings) -> Iterator[Case]:
    """A policy trained at one budget, with its counts fitted to others."""
    budgets = (36, 18, 8, 4)
    for seed in settings.seeds:
        for trained_at in budgets:

            def run(seed: int = seed, trained_at: int = trained_at) -> Row:
                problem = task.problem(trained_at, settings.questions, seed)
                reached = descend(problem, places(problem)[0], seed, steps=settings.steps)
                right = {}
                for tokens in budgets:
                    limits = {"visual_tokens": float(tokens)}
                    moved = replace(problem, limits=limits).fit(reached.policy)
                    assert moved is not None
                    right[tokens] = 100 * task.accuracy(moved, settings.tests)["overall"]
                return {"right": right[trained_at], "at_budgets": right, "loss": reached.loss}

            yield Case(f"trained at {trained_at}", trained_at, seed, run)


def _stages(task: Task, settings: Settings) -> Iterator[Case]:
    """A tight budget at once, against half of the steps at twice the budget first."""
    for seed in settings.seeds:
        for tokens in (8, 4):
            for name in ("at once", "in two stages"):

                def run(seed: int = seed, tokens: int = tokens, staged: bool = name != "at once"):
                    problem = task.problem(tokens, settings.questions, seed)
                    steps = settings.steps or default_steps(problem)
                    start = places(problem)[0]
                    if staged:
                        loose = replace(problem, limits={"visual_tokens": 2.0 * tokens})
                        wide = loose.fit(start)
                        assert wide is not None
                        first = descend(loose, wide, seed, steps=steps // 2)
                        start = problem.fit(first.policy) or start
                        steps -= steps // 2
                    return _figures(task, settings, descend(problem, start, seed, steps=steps))

                yield Case(name, f"{tokens} tokens", seed, run)


def _at_projector(
    task: Task, settings: Settings, variants: Mapping[str, Mapping[str, Any]]
) -> Iterator[Case]:
    """Descend at the projector with each variant of the settings of `descend`."""
    for seed in settings.seeds:
        for name, variant in variants.items():

            def run(seed: int = seed, variant: Mapping[str, Any] = variant) -> Row:
                problem = task.problem(settings.tokens, settings.questions, seed)
                start = places(problem)[0]
                return _figures(
                    task, settings, descend(problem, start, seed, steps=settings.steps, **variant)
                )

            yield Case(name, f"{settings.tokens} tokens", seed, run)


def _figures(task: Task, settings: Settings, reached: Reached) -> Row:
    right = task.accuracy(reached.policy, settings.tests)
    return {
        "right": 100 * right["overall"],
        "kinds": right,
        "loss": reached.loss,
        "policy": [str(reduction) for reduction in reached.policy.reductions],
    }


CASES: Mapping[str, Cases] = {
    "constraints": _constraints,
    "jointly": _jointly,
    "gates": _gates,
    "targets": _targets,
    "parts": _parts,
    "gap": _gap,
    "steps": _steps,
    "examples": _examples,
    "transfer": _transfer,
    "stages": _stages,
}
"""Name of an ablation -> its cases."""
