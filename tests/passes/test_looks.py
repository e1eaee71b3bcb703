"""What a learned score is said to look at, against correlations that numpy computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import prompts, shared
from test_descent import problem_of
from tiny import inputs, tiny_llava

from deos_fx.operator.learned import linear_probe
from deos_fx.operator.scores import feature_norm
from deos_fx.passes.search.descent import site_tokens
from deos_fx.passes.search.looks import looks_of
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.budget import Budget
from deos_fx.policy.learned import Learned
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction


def test_shares_and_correlations_are_those_of_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deos_fx.passes.search.looks._NAMED", 99)
    problem = problem_of(tiny_llava(layers=3), batches=2)
    probe = torch.randn(64, generator=torch.Generator().manual_seed(0))
    learned = Learned({"probe": probe, "place": torch.zeros(2, 2)})
    reduction = Reduction("decoder.0", 8, scores={"feature_norm": 1.0}, learned=learned)
    found = {look.part: look for look in looks_of(problem, Policy((reduction,)))}
    tokens = site_tokens(problem, [problem.sites["decoder.0"]])["decoder.0"]
    seen = linear_probe(tokens, probe).numpy()
    norms = feature_norm(tokens).numpy()
    rows = [np.corrcoef(one, other)[0, 1] for one, other in zip(seen, norms, strict=True)]
    assert found["probe"].site == "decoder.0"
    assert found["probe"].like["feature_norm"] == pytest.approx(np.mean(rows), abs=1e-4)
    # The other score of the mix is standardized: its variance is 1.
    spread = seen.var(axis=1, ddof=1)
    one = tokens.shape[1] / (tokens.shape[1] - 1)
    assert found["probe"].share == pytest.approx(np.mean(spread / (spread + one)), rel=1e-4)
    assert found["place"].share == 0
    assert "decoder.0: probe makes" in str(found["probe"])


@pytest.mark.parametrize("plain", [1, 2])
def test_plain_images_have_no_share(plain: int) -> None:
    model = tiny_llava(layers=2)
    model.model.vision_tower.embeddings.position_embedding.weight.data.zero_()
    batch = inputs(model, batch=2)
    batch["pixel_values"][:plain] = 0
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][:, -1] = batch["input_ids"][:, -1]
    problem = SearchProblem.of(model, [batch], Budget(visual_tokens=0.3))
    learned = Learned({"probe": torch.randn(64, generator=torch.Generator().manual_seed(0))})
    reduction = Reduction("projector", 8, scores={"feature_norm": 1.0}, learned=learned)
    (look,) = looks_of(problem, Policy((reduction,)))
    assert look.share == 0 if plain == 2 else 0 < look.share < 1


def test_a_policy_without_learned_scores_has_no_looks() -> None:
    problem = problem_of(tiny_llava(layers=2), batches=2)
    assert looks_of(problem, Policy((Reduction("projector", 8),))) == []


def test_scores_that_need_a_grid_are_left_out_where_there_is_none() -> None:
    # The patches of its images are sorted by tiles.
    model, batch = shared("llava_onevision"), prompts("llava_onevision", 2)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    problem = SearchProblem.of(model, [{**batch, "labels": labels}], Budget(visual_tokens=0.3))
    assert not problem.layout.placed
    learned = Learned({"probe": torch.ones(64)})
    reduction = Reduction("projector", 8, scores={"feature_norm": 1.0}, learned=learned)
    (look,) = looks_of(problem, Policy((reduction,)))
    assert look.like and "grid_coverage" not in look.like
