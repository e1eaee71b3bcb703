"""Generating with layers that keep a state, against the original's layers on the kept tokens.

Some of the layers of GLM-5-Next keep an index of their keys as well.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close, roundings_of
from families import IMAGE, PAD, VIDEO, alone, continued, prompts, shared
from shortened import kept_of, shortened_from
from test_families import PRUNED, reduce
from torch import Tensor

from deos_fx.models.upstream import CACHE

NAME = "qwen3_5"
STEPS = 3
each = pytest.mark.parametrize("name", [NAME, "glm5_next_shared"])


def generate(reduced: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(11)
    given = {name: value.clone() for name, value in batch.items()}
    # A placeholder among the new tokens would have no image.
    fixed = {"max_new_tokens": STEPS, "output_logits": True, "suppress_tokens": [IMAGE, VIDEO]}
    options = {"do_sample": False, **fixed, **options}
    return reduced.generate(**given, **options, return_dict_in_generate=True)


def expected(name: str, batch: dict[str, Tensor], cache: Any, row: int, sequence: Tensor) -> Tensor:
    """The original's logits [t, vocabulary] of what follows a prompt of a padded batch, whose
    dropped tokens no layer gets."""
    prompt = alone(name, batch, row)
    length = prompt["input_ids"].shape[1]
    padding = batch["input_ids"].shape[1] - length
    longer = continued(name, prompt, sequence[None, padding + length :])
    end = padding + longer["input_ids"].shape[1]
    # Positions are those of the batch, in which this prompt has some padding before it.
    kept = {
        first: left[row][left[row] >= padding] - padding
        for first, left in kept_of(cache, end).items()
    }
    with shortened_from(shared(name), kept):
        whole = shared(name)(**longer, use_cache=False).logits[0]
    return whole[length - 1 : -1]


@each
@pytest.mark.parametrize(
    "how", [{"num_beams": 5}, {"do_sample": True, "num_return_sequences": 3}], ids=str
)
def test_states_follow_their_rows(name: str, how: dict[str, Any]) -> None:
    batch, reduced = prompts(name, 2), reduce(name, PRUNED["both"])
    output = generate(reduced, batch, **how)
    logits = torch.stack(output.logits, dim=1)
    if "num_beams" in how:
        # Which beam of which prompt each returned token was chosen from.
        steps = range(STEPS)
        logits = torch.stack([logits[output.beam_indices[:, t], t] for t in steps], dim=1)
        assert output.beam_indices.unique(dim=1).shape[1] > 1
    cache, answers = reduced(**batch)[CACHE], len(output.sequences) // 2
    for row, sequence in enumerate(output.sequences):
        theirs = expected(name, batch, cache, row // answers, sequence)
        assert_close(logits[row], theirs, roundings_of(name))


def test_padding_is_on_the_left() -> None:
    batch, reduced = prompts(NAME, 2), reduce(NAME, PRUNED["both"])
    right = {
        name: torch.stack(
            [
                row.roll(-int((mask == 0).sum()))
                for row, mask in zip(batch[name], batch["attention_mask"], strict=True)
            ]
        )
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    with pytest.raises(ValueError, match="padding after real tokens"):
        reduced(**batch | right)
    # Without a cache nothing is continued.
    length = int(batch["attention_mask"][1].sum())
    ours = reduced(**batch | right, use_cache=False).logits[1]
    theirs = reduced(**alone(NAME, batch, 1), use_cache=False).logits[0]
    assert_close(ours[: len(theirs)], theirs, roundings_of(NAME))
    assert len(theirs) < len(ours) <= length


@each
def test_turns_of_a_chat(name: str) -> None:
    batch, reduced = prompts(name, 2), reduce(name, PRUNED["both"])
    first = generate(reduced, batch)
    cache = first[CACHE]
    words = torch.randint(1, 100, (2, 4), generator=torch.Generator().manual_seed(5))
    ids = torch.cat([first.sequences, words], dim=1)
    mask = torch.cat([batch["attention_mask"], ids.new_ones(2, STEPS + 4)], dim=1)
    second = generate(reduced, {"input_ids": ids, "attention_mask": mask}, **{CACHE: cache})
    for row, sequence in enumerate(second.sequences):
        theirs = expected(name, batch, reduced(**batch)[CACHE], row, sequence)[-STEPS:]
        ours = torch.stack(second.logits, dim=1)[row]
        assert_close(ours, theirs, roundings_of(name))
    # The shorter question of a row would be padded in the middle of its text.
    ids, mask = ids.clone(), mask.clone()
    ids[1, -4:-2], mask[1, -4:-2] = PAD, 0
    with pytest.raises(ValueError, match="padding after real tokens"):
        generate(reduced, {"input_ids": ids, "attention_mask": mask}, **{CACHE: first[CACHE]})
