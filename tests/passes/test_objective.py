"""The objective of a search: its targets prompt by prompt, and a penalty that finds a bound."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from torch.nn import functional as F

from deos_fx.passes.search.objective import AugmentedLagrangian, distilled, labelled

B, N, WORDS = 2, 6, 11
VISUAL = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]).bool()
LABELS = torch.tensor([[-100, -100, -100, 7, 8, 9], [-100, -100, -100, -100, -100, 3]])
LOGITS = torch.randn(B, N, WORDS)


def test_labels_are_predicted_one_token_before_and_never_at_visual_tokens() -> None:
    target = labelled(LABELS, VISUAL)
    # The 7 is predicted at a visual token.
    expected = [
        F.cross_entropy(LOGITS[row, i], LABELS[row, i + 1]) for row, i in [(0, 3), (0, 4), (1, 4)]
    ]
    assert_close(target.loss(LOGITS), torch.stack(expected).mean())
    with pytest.raises(ValueError, match="labels are -100 everywhere"):
        labelled(torch.full((1, 3), -100), torch.zeros(1, 3, dtype=torch.bool))


def test_reduced_logits_are_compared_at_the_positions_they_come_from() -> None:
    target = labelled(LABELS, VISUAL)
    origin = torch.tensor([[0, 2, 3, 4, 5], [0, 1, 3, 4, 5]])
    left = LOGITS.gather(1, origin[..., None].expand(-1, -1, WORDS))
    assert_close(target.loss(left, origin), target.loss(LOGITS))


def test_the_unreduced_model_is_a_target_where_it_answers() -> None:
    target = distilled(LABELS, VISUAL, LOGITS)
    assert target.positions.nonzero().tolist() == [[0, 3], [0, 4], [1, 4]]
    assert_close(1 + target.loss(LOGITS), torch.tensor(1.0))
    other = torch.randn(B, N, WORDS)
    p, q = LOGITS[target.positions].softmax(-1), other[target.positions].softmax(-1)
    assert_close(target.loss(other), (p * (p / q).log()).sum(-1).mean())


def test_the_penalty_leads_to_the_bound_and_no_further() -> None:
    # The least x ** 2 with 1 / x <= 0.5 is at x = 2, that with 1 / x <= 10 at 0.1.
    for limit, best in ((0.5, 2.0), (10.0, 0.1)):
        x = torch.tensor(3.0, requires_grad=True)
        lagrangian = AugmentedLagrangian({"cost": limit})
        optimizer = torch.optim.Adam([x], lr=0.02)
        for step in range(1500):
            costs = {"cost": 1 / x}
            optimizer.zero_grad()
            (x.square() + lagrangian.penalty(costs)).backward()
            optimizer.step()
            if step % 30 == 29:
                lagrangian.update({"cost": 1 / x.detach()})
        assert abs(x.item() - best) < 0.05


def test_a_cost_under_its_limit_is_free() -> None:
    lagrangian = AugmentedLagrangian({"cost": 2.0})
    assert lagrangian.penalty({"cost": torch.tensor(1.5)}) == 0
    lagrangian.update({"cost": torch.tensor(1.5)})
    assert lagrangian.multipliers == {"cost": 0.0}
    assert lagrangian.penalty({"cost": torch.tensor(2.5)}) > 0
