"""Compare policies with tuned presets and with other ways to spend less, on the same questions."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from deos_fx.comparison.answers import (
    Metric,
    check_apart,
    exact_match,
    longest_answer,
)
from deos_fx.comparison.bench import RESIZED, TEXT_ONLY, Bench, Draft, Tuner
from deos_fx.data import Record
from deos_fx.models.facts import facts_of
from deos_fx.policy.budget import Budget, check_budget
from deos_fx.policy.policy import Policy
from deos_fx.policy.tier import check_count
from deos_fx.presets.rules import RULES
from deos_fx.presets.tuning import require_optuna
from deos_fx.progress import shows_progress
from deos_fx.results.comparison import Comparison
from deos_fx.results.methods import UNREDUCED, versions
from deos_fx.results.search_result import SearchResult
from deos_fx.words import counted

__all__ = ["check_names", "check_questions", "compare", "evaluate"]

EVALUATIONS = 40
"""Losses that tuning a preset may take, if no search says how many it took."""

# Tokens of an answer where none is known.
_NEW_TOKENS = 32

Given: TypeAlias = Policy | SearchResult | str | os.PathLike[str]
"""A policy, the result of a search, or a policy file."""


@shows_progress
def compare(
    model: PreTrainedModel,
    processor: Any,
    test: Sequence[Record],
    *,
    budget: Budget | None = None,
    policies: Mapping[str, Given] | None = None,
    tuning: Sequence[Record] | None = None,
    presets: Sequence[str] | None = None,
    evaluations: int | None = None,
    seeds: int = 3,
    metric: Metric = exact_match,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare policies with presets at the same budget, and with the unreduced model.

    The rows are the unreduced model, the policies, the presets (``random`` and ``uniform`` among
    them), images that are resized to as few tokens, and prompts without an image. What cannot be
    run gets the reason instead of figures. Costs and times are those of the first test prompt.

    With tuning data, the options of every preset are tuned by the loss of the right answers, with
    as many evaluations as the largest search among the policies took. Give the data that was
    searched with.

    Args:
        model: A transformers vision-language model.
        processor: Its processor.
        test: The questions, with answers; see `deos_fx.data.read_records`.
        budget: Limit on visual tokens, to which presets are fitted; left out, as many as the
            policies leave, at most. Policies are taken as they are, and a warning tells of those
            that leave more than presets may.
        policies: Policies by name.
        tuning: Questions with answers to tune presets on; without them presets have their published
            settings.
        presets: Names of the presets; all if left out.
        evaluations: Losses that the tuning of a preset may take; by default as many as a search
            took, or 40.
        seeds: Number of runs of what is random: the preset ``random``, and tuning.
        metric: Scores an answer from 0 to 1; by default, whether it is exactly the right one.
        batch_size: Questions answered at once.
        max_new_tokens: Tokens of an answer; by default two more than the longest right one.
        progress: Called with a stage, the number of methods done and their total; by default, a
            bar on a terminal, and the logger ``deos_fx`` elsewhere. Once a preset has been tuned,
            the stage is ``estimate``: then these are the seconds so far, and those of all.

    Raises:
        ImportError: If presets are to be tuned and Optuna is not installed.
        TypeError: If an argument is of a wrong type.
        ValueError: If there is neither a budget nor a policy, the budget limits anything but visual
            tokens, a preset does not exist, a policy does not fit the model, answers are missing,
            or an example is in both sets.
    """
    # Mistakes in the arguments are found before anything expensive.
    _check_budget(budget, policies)
    names = [*RULES] if presets is None else [*presets]
    if evaluations is None:
        evaluations = _as_many_losses((policies or {}).values(), len(tuning or ()), batch_size)
    check_count("seeds", seeds, 1)
    check_count("evaluations", evaluations, 1)
    check_questions(test, tuning, metric)
    check_names(names, policies or {})
    given = _given(policies, model)
    tokens = max_new_tokens or _answer_tokens(processor, test)
    bench = Bench(model.eval(), processor, test, budget, given.values(), metric, batch_size, tokens)
    # A policy that cannot run is refused before the first question is answered.
    for policy in given.values():
        bench.check_runs(policy)
    if names:
        _warn_of_more(bench, given)
    tuner = None if tuning is None else Tuner(bench, tuning, evaluations)
    others = [bench.resized, bench.text_only]
    rows = _drawn_up(bench, given, names, tuner, seeds, others, progress)
    return _measured(bench, rows, _settings(model, tuner, seeds))


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    test: Sequence[Record],
    *,
    policies: Mapping[str, Given] | None = None,
    presets: Sequence[str] = (),
    budget: Budget | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Measure what policies answer and cost on given questions, beside the unreduced model.

    This is `compare` without its other ways to spend less, and without tuning. Questions need no
    answers: then ``agreement`` with the unreduced model is all that is known of the answers.

    Args:
        model: A transformers vision-language model.
        processor: Its processor.
        test: The questions.
        policies: Policies by name.
        presets: Names of presets, with their published settings.
        budget: As for `compare`.
        batch_size: Questions answered at once.
        max_new_tokens: Tokens of an answer; by default two more than the longest right one, or 32.
        progress: Called with a stage, the number of methods done and their total.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If presets have neither a budget nor a policy beside them, the budget limits
            anything but visual tokens, a preset does not exist, a policy does not fit the model, or
            only some of the questions have answers.
    """
    if budget is not None or presets:
        _check_budget(budget, policies)
    answered = any(record.answer is not None for record in test)
    metric = exact_match if answered else None
    check_questions(test, None, metric)
    check_names(presets, policies or {})
    given = _given(policies, model)
    tokens = max_new_tokens or _answer_tokens(processor, test)
    bench = Bench(model.eval(), processor, test, budget, given.values(), metric, batch_size, tokens)
    if presets:
        _warn_of_more(bench, given)
    rows = _drawn_up(bench, given, presets, None, 1, [], progress)
    return _measured(bench, rows, _settings(model, None, 1))


def _drawn_up(
    bench: Bench,
    given: Mapping[str, Policy],
    presets: Sequence[str],
    tuner: Tuner | None,
    seeds: int,
    others: Sequence[Callable[[], Draft]],
    progress: Callable[[str, int, int], None] | None,
) -> list[Draft]:
    """Let the unreduced model and every method answer; times come later."""
    rows: list[Callable[[], Draft]] = [
        bench.unreduced,
        *(lambda name=name: bench.given(name, given[name]) for name in given),
        *(lambda name=name: bench.preset(name, tuner, seeds) for name in presets),
        *others,
    ]
    drafts: list[Draft] = []
    start, told = time.perf_counter(), tuner is None
    for i, row in enumerate(rows):
        before = time.perf_counter()
        drafts.append(row())
        if progress is None:
            continue
        progress("methods", i + 1, len(rows))
        # Tuning takes nearly all of the time, and about as long for each preset that can be fitted.
        if not told and drafts[-1].group == "preset" and drafts[-1].attempts:
            told = True
            now = time.perf_counter()
            left = (now - before) * (len(rows) - len(others) - i - 1)
            progress("estimate", round(now - start), round(now - start + left))
    return drafts


def _measured(bench: Bench, drafts: Sequence[Draft], settings: dict[str, str]) -> Comparison:
    return Comparison(
        rows=bench.timed(drafts),
        kinds=[record.kind for record in bench.test],
        limit=bench.limit,
        tokens_per_image=bench.costs.tokens_of_first_image,
        settings=settings,
    )


def _settings(model: PreTrainedModel, tuner: Tuner | None, seeds: int) -> dict[str, str]:
    presets = "published settings"
    if tuner is not None:
        questions = counted(len(tuner.records), "question")
        most = counted(tuner.evaluations, "evaluation")
        presets = f"tuned on {questions} in at most {most}"
    return {
        "presets": presets,
        "seeds": str(seeds),
        "device": str(model.device),
        "threads": str(torch.get_num_threads()),
        **versions(),
    }


# *** the arguments ***


def _check_budget(budget: Budget | None, policies: Mapping[str, Given] | None) -> None:
    if budget is None:
        if not policies:
            raise ValueError(
                "presets are fitted to a budget; give one, as Budget(visual_tokens=0.25), or "
                "policies, whose visual tokens are the limit then"
            )
        return
    check_budget(budget)
    if budget.visual_tokens is None or replace(budget, visual_tokens=None) != Budget():
        raise ValueError(f"{budget}: presets are fitted to visual_tokens; limit these and no other")


def _warn_of_more(bench: Bench, given: Mapping[str, Policy]) -> None:
    """Warn of policies that leave more visual tokens than presets may, if they drop any."""
    for name, policy in given.items():
        left = 0.0 if policy.is_empty else bench.visual_tokens(policy)
        if left > bench.limit * (1 + 1e-6):
            warnings.warn(
                f"{name} leaves {left:.4g} visual tokens of the first question, mean over the "
                f"decoder layers, and presets may leave {bench.limit:.4g}: they are no equals. "
                "Leave out the budget, or raise it, to compare at the same cost.",
                UserWarning,
                stacklevel=4,
            )


def check_names(presets: Sequence[str], policies: Mapping[str, Given]) -> None:
    """Check that presets exist, and that no policy has the name of another row.

    Raises:
        ValueError: If one does not, or has.
    """
    unknown = sorted(set(presets) - set(RULES))
    if unknown:
        raise ValueError(f"no preset {unknown[0]!r}; choose from {', '.join(RULES)}")
    taken = sorted({UNREDUCED, RESIZED, TEXT_ONLY, *presets}.intersection(policies))
    if taken:
        raise ValueError(
            f"a policy is called {taken[0]!r}, as another row is; give it another name, or leave "
            "out that preset"
        )


def check_questions(
    test: Sequence[Record], tuning: Sequence[Record] | None, metric: Metric | None
) -> None:
    """Check that there are questions, with answers where these are needed, and none in both sets.

    Raises:
        ImportError: If presets are to be tuned, and Optuna is not installed.
        ValueError: If there are none, some are missing, or one is in both sets.
    """
    given = {"test data": test} | ({} if tuning is None else {"tuning data": tuning})
    for name, records in given.items():
        if not records:
            raise ValueError(f"the {name} is empty; give at least one question")
        missing = sum(record.answer is None for record in records)
        if missing and (records is tuning or metric is exact_match):
            raise ValueError(
                f"there is no answer to {missing} of {counted(len(records), 'question')} of the "
                f"{name}; give all of them one"
            )
    if tuning is not None:
        require_optuna()
        check_apart(tuning, test)


def _given(policies: Mapping[str, Given] | None, model: PreTrainedModel) -> dict[str, Policy]:
    """Read the policies, and check that the model can run them."""
    found = {name: _read(value) for name, value in (policies or {}).items()}
    for policy in found.values():
        policy.check(facts_of(model).signature)
    return found


def _read(given: Given) -> Policy:
    if isinstance(given, Policy):
        return given
    return given.policy if isinstance(given, SearchResult) else Policy.load(given)


def _as_many_losses(policies: Iterable[Given], questions: int, batch_size: int) -> int:
    """Return how many losses of all questions take as long as the longest search."""
    searches = [given.evaluations for given in policies if isinstance(given, SearchResult)]
    if not searches or not questions:
        return EVALUATIONS
    return max(1, max(searches) // math.ceil(questions / batch_size))


def _answer_tokens(processor: Any, test: Sequence[Record]) -> int:
    # A wrong answer that is longer than any right one need not be generated to its end.
    return longest_answer(processor, test) + 2 if test[0].answer is not None else _NEW_TOKENS
