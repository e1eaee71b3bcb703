"""The data of a search: batches of prompts that are alike, each with a target for its logits.

Batches stay where the data has them, usually in the memory of the host; each is moved to the
model's device when it is used.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.inputs.media import padding_of, placeholders
from deos_fx.models.facts import ModelFacts
from deos_fx.passes.analyse.annotate_token_spaces import PROMPT_MASK
from deos_fx.passes.captures import Captures
from deos_fx.passes.pipeline import Captured
from deos_fx.passes.rewrite.mark_prompt import mark_prompt
from deos_fx.passes.search.answers import answered
from deos_fx.passes.search.objective import Target, before_answer, distilled, labelled
from deos_fx.passes.search.processes import Progress
from deos_fx.tokens.layout import PromptLayout

__all__ = [
    "SearchBatch",
    "check_one_size",
    "checked_calls",
    "moved",
    "parted",
    "with_targets",
    "without_labels",
]


_T = TypeVar("_T")


@dataclass(frozen=True)
class SearchBatch:
    """One batch: explicit model inputs, whose prompts are alike, and the target for its logits.

    Attributes:
        number: Its place in the data, from 0.
        call: The call of the model, completed, without labels; its tensors are where the data has
            them.
        captured: The captured call that it runs through, which takes a ``prompt_mask``.
        layout: The layout of its prompts.
        target: The predictions that its logits are compared with.
        prompt: The ``prompt_mask`` [B, N]: 1 for real tokens before the answer.
    """

    number: int
    call: Call
    captured: Captured
    layout: PromptLayout
    target: Target
    prompt: Tensor

    @property
    def inputs(self) -> dict[str, Any]:
        """Return the inputs of graphs that are made of the captured one, on the model's device."""
        return moved(self.call.inputs | {PROMPT_MASK: self.prompt}, self.call.model.device)

    @property
    def kind(self) -> Hashable:
        """Return the key of the graph that it runs through: batches of one kind share it."""
        return id(self.captured), self.layout


def parted(batches: Sequence[_T]) -> tuple[list[_T], list[_T]]:
    """Part batches into those for gradient steps and those that candidates are scored on.

    The last quarter is held back from the steps. Of fewer than four batches, none is: then all of
    them are for both.
    """
    held_back = len(batches) // 4
    first = len(batches) - held_back
    return [*batches[:first]], [*(batches[first:] if held_back else batches)]


def checked_calls(
    facts: ModelFacts, data: Iterable[Mapping[str, Any]], progress: Progress | None = None
) -> tuple[list[Call], bool, bool]:
    """Check the data, and complete the inputs of every batch; without labels, the model answers.

    Args:
        facts: The facts of the model.
        data: Batches of model inputs, perhaps with labels.
        progress: Called with the stage ``answers`` after each batch that the model has answered.

    Returns:
        A call with labels for each batch, whose tensors are where the data has them; whether the
        labels are those of the data; and whether it was interrupted: then the calls are those that
        were ready.

    Raises:
        ValueError: If the data or a batch of it is empty, or the batches do not fit one policy.
        TypeError: If the data holds anything but dicts.
        KeyboardInterrupt: If no call was ready.
    """
    calls: list[Call] = []
    with_labels, interrupted = 0, False
    try:
        for number, batch in enumerate(data):
            _check_batch(number, batch)
            call = _completed(facts, batch)
            with_labels += "labels" in batch
            calls.append(call)
            if progress is not None and not with_labels:
                done = number + 1
                progress("answers", done, len(data) if isinstance(data, Sized) else done)
    except KeyboardInterrupt:
        # Case: there is nothing yet to find a policy with.
        if not calls:
            raise
        interrupted = True
    if not calls:
        raise ValueError("data is empty: give at least one dict of model inputs.")
    if with_labels not in (0, len(calls)):
        raise ValueError(
            f"There are labels in {with_labels} of the {len(calls)} batches of data: give them "
            "with all batches, or with none."
        )
    _check_alike(facts, calls)
    return calls, with_labels > 0, interrupted


def _check_batch(number: int, batch: Mapping[str, Any]) -> None:
    """Check that a batch has prompts."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"data holds a {type(batch).__name__}; give dicts of model inputs, as a processor "
            "returns them."
        )
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or not ids.numel():
        given = "no input_ids" if ids is None else "input_ids without a prompt"
        raise ValueError(
            f"Batch {number} of data (from 0) is empty: it has {given}. Leave it out, or give the "
            "input_ids [B, N] that a processor returns."
        )


def _completed(facts: ModelFacts, batch: Mapping[str, Any]) -> Call:
    """Complete the inputs of a batch."""
    call = Call.of(facts, moved(batch, facts.model.device))
    if "labels" not in batch:
        call = answered(call)
    # A search never decodes, and a cache would only take memory.
    call = completed(call.having(use_cache=False))
    # What completes it may run a part of the model. Now it goes back to make room.
    return replace(call, inputs=moved(call.inputs, batch["input_ids"].device))


def moved(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return inputs with the tensors among them on a device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _check_alike(facts: ModelFacts, calls: Sequence[Call]) -> None:
    """Check that one policy can fit all batches."""
    # 1. Within a prompt, images of one size: a count or a share is of each of them.
    for number, call in enumerate(calls):
        check_one_size(call.layout, f"Batch {number} of data (from 0)")
    # 2. Between batches as well, unless the model takes many.
    images = [call.inputs["pixel_values"] for call in calls if "pixel_values" in call.inputs]
    sizes = sorted({tuple(pixels.shape[1:]) for pixels in images})
    if len(sizes) > 1 and not facts.sizes_vary:
        raise ValueError(
            f"The images of data vary in size: {', '.join(map(str, sizes))} (channels, height, "
            "width). Resize them to one size, as the model's processor does."
        )


def check_one_size(layout: PromptLayout, where: str) -> None:
    """Refuse prompts whose images have different numbers of visual tokens.

    Args:
        layout: Their layout.
        where: Where they come from, for the message.

    Raises:
        ValueError: If there are any.
    """
    sizes = sorted(set(layout.sizes))
    if len(sizes) > 1:
        raise ValueError(
            f"{where}: the images of a prompt have {' and '.join(map(str, sizes))} visual tokens. "
            "A search needs equally many in all images of a prompt, while other prompts may have "
            "others. Resize these images to one size, or ask about them one by one."
        )


def with_targets(
    captures: Captures, calls: Sequence[Call], labels: bool, progress: Progress | None
) -> tuple[list[SearchBatch], bool]:
    """Capture the calls of all batches, and make their targets.

    Args:
        captures: The model's captures.
        calls: The call of every batch, in the order of the data, with labels.
        labels: Whether the labels are the target; otherwise it is the unreduced model's
            predictions where they are.
        progress: Called with the stage ``capture`` after each batch.

    Returns:
        The batches, and whether it was interrupted: then they are those that were ready.

    Raises:
        KeyboardInterrupt: If none was ready.
    """
    batches: list[SearchBatch] = []
    # Capture -> the same with the input ``prompt_mask``.
    marked: dict[Captured, Captured] = {}
    try:
        for number, call in enumerate(calls):
            batches.append(_with_target(captures, number, call, labels, marked))
            if progress is not None:
                progress("capture", number + 1, len(calls))
    except KeyboardInterrupt:
        # Case: there is nothing yet to find a policy with.
        if not batches:
            raise
        return batches, True
    return batches, False


def _with_target(
    captures: Captures, number: int, batch: Call, labels: bool, marked: dict[Captured, Captured]
) -> SearchBatch:
    """Capture a batch's call and make its target: its labels, or the unreduced predictions."""
    own, answers = without_labels(batch), batch.inputs["labels"]
    call = replace(own, inputs=moved(own.inputs, own.model.device))
    # A prediction at a visual token does not count, since the token may be dropped.
    visual = placeholders(own.facts, own.inputs)
    if labels:
        # Case: labels. The model need not run.
        captured, target = captures.serving(call), labelled(answers, visual)
    else:
        # Case: its own answers. The captured graph is run on them.
        with torch.no_grad():
            captured, unreduced = captures.serve(call, lambda captured: captured.graph_module)
        target = distilled(answers, visual, unreduced["logits"].to(visual.device))
    if captured not in marked:
        twin = captured.copy()
        marked[captured] = replace(twin, graph_module=mark_prompt(twin.graph_module))
    prompt = before_answer(answers, padding_of(own.inputs))
    return SearchBatch(number, own, marked[captured], batch.layout, target, prompt)


def without_labels(call: Call) -> Call:
    """Return the call without labels: the loss is computed outside the graph."""
    return replace(call, inputs={name: x for name, x in call.inputs.items() if name != "labels"})
