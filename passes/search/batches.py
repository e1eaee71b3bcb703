"""The data of a search: batches of prompts that are alike, each with a target for its logits.

Batches stay where the data has them, usually in the memory of the host; each is moved to the
model's device when it is used.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from deos_fx.passes.search.objective import Target, before_answer, labelled, self_distilled
from deos_fx.passes.search.processes import Progress
from deos_fx.tokens.layout import PromptLayout

__all__ = [
    "SearchBatch",
    "check_whole",
    "checked_calls",
    "moved",
    "with_targets",
    "without_labels",
]


@dataclass(frozen=True)
class SearchBatch:
    """One batch: explicit model inputs, whose prompts are alike, and the target for its logits.

    Attributes:
        number: Its place in the data, from 0.
        call: The call of the model, completed, without labels; its tensors are where the data has
            them.
        captured: The captured call that it runs through; with labels, it takes a ``prompt_mask``.
        layout: The layout of its prompts.
        target: The predictions that its logits are compared with.
        prompt: The ``prompt_mask`` [B, N]: 1 for real tokens before the answer. None without
            labels.
    """

    number: int
    call: Call
    captured: Captured
    layout: PromptLayout
    target: Target
    prompt: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """Return the inputs of graphs that are made of the captured one, on the model's device."""
        marked = {} if self.prompt is None else {PROMPT_MASK: self.prompt}
        return moved(self.call.inputs | marked, self.call.model.device)

    @property
    def kind(self) -> Hashable:
        """Return the key of the graph that it runs through: batches of one kind share it."""
        return id(self.captured), self.layout


def check_whole(model: object) -> None:
    """Refuse a model whose weights are sharded over processes: a graph would hold the shards.

    Raises:
        ValueError: If it is.
    """
    if not isinstance(model, torch.nn.Module):
        return
    # By name, because importing FSDP takes long, and fully_shard changes classes in place.
    bases = {base.__module__ for part in model.modules() for base in type(part).__mro__}
    if any(name.startswith("torch.distributed.fsdp") for name in bases):
        raise ValueError(
            f"model is a {type(model).__name__}, whose weights are sharded by FSDP, and a search "
            "runs graphs that need them whole. Load the model without FSDP; if it is larger than "
            'one device, over the devices of one process: from_pretrained(..., device_map="auto").'
        )


def checked_calls(facts: ModelFacts, data: Iterable[Mapping[str, Any]]) -> list[Call]:
    """Check the data, and complete the inputs of every batch.

    Args:
        facts: The facts of the model.
        data: Batches of model inputs, perhaps with labels.

    Returns:
        A call for each batch, whose tensors are where the data has them.

    Raises:
        ValueError: If the data or a batch of it is empty, or the batches do not fit one policy.
        TypeError: If the data holds anything but dicts.
    """
    calls = [_checked(facts, number, batch) for number, batch in enumerate(data)]
    if not calls:
        raise ValueError("data is empty: give at least one dict of model inputs.")
    _check_alike(facts, calls)
    return calls


def _checked(facts: ModelFacts, number: int, batch: Mapping[str, Any]) -> Call:
    """Check a batch, and complete its inputs."""
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
    # A search never decodes, and a cache would only take memory.
    inputs = moved(batch, facts.model.device) | {"use_cache": False}
    # What completes it may run a part of the model. Then it goes back to make room.
    call = completed(Call.of(facts, inputs))
    return replace(call, inputs=moved(call.inputs, ids.device))


def moved(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return inputs with the tensors among them on a device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _check_alike(facts: ModelFacts, calls: Sequence[Call]) -> None:
    """Check that one policy can fit all batches."""
    # 1. Images of one size, unless the model takes many.
    layouts = [call.layout for call in calls]
    images = [call.inputs["pixel_values"] for call in calls if "pixel_values" in call.inputs]
    sizes = sorted({tuple(pixels.shape[1:]) for pixels in images})
    if len(sizes) > 1 and not facts.sizes_vary:
        raise ValueError(
            f"The images of data vary in size: {', '.join(map(str, sizes))} (channels, height, "
            "width). Resize them to one size, as the model's processor does."
        )
    # 2. Equally many images in every prompt.
    counts = sorted({layout.images for layout in layouts})
    if len(counts) > 1:
        raise ValueError(
            f"The prompts of data have {counts} images; search with equally many in every prompt."
        )
    # 3. Labels for all batches or for none.
    answered = sum("labels" in call.inputs for call in calls)
    if answered not in (0, len(calls)):
        raise ValueError(
            f"{answered} of the {len(calls)} batches of data have labels: give them with all "
            "batches, or with none."
        )


def with_targets(
    captures: Captures, calls: Sequence[Call], progress: Progress | None
) -> tuple[list[SearchBatch], bool]:
    """Capture the calls of all batches, and make their targets.

    Args:
        captures: The model's captures.
        calls: The call of every batch, in the order of the data, perhaps with labels.
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
            batches.append(_with_target(captures, number, call, marked))
            if progress is not None:
                progress("capture", number + 1, len(calls))
    except KeyboardInterrupt:
        # Case: there is nothing yet to find a policy with.
        if not batches:
            raise
        return batches, True
    return batches, False


def _with_target(
    captures: Captures, number: int, batch: Call, marked: dict[Captured, Captured]
) -> SearchBatch:
    """Capture a batch's call and make its target: its labels, or the unreduced predictions."""
    own, labels = without_labels(batch), batch.inputs.get("labels")
    call = replace(own, inputs=moved(own.inputs, own.model.device))
    # A prediction at a visual token does not count, since the token may be dropped.
    visual = placeholders(own.facts, own.inputs["input_ids"])
    if labels is not None:
        # Case: labels. The model need not run.
        captured = captures.serving(call)
        if captured not in marked:
            twin = captured.copy()
            marked[captured] = replace(twin, graph_module=mark_prompt(twin.graph_module))
        target, prompt = labelled(labels, visual), before_answer(labels, padding_of(own.inputs))
        return SearchBatch(number, own, marked[captured], batch.layout, target, prompt)
    # Case: no labels. The captured graph is run, and gives the answers of the unreduced model.
    with torch.no_grad():
        captured, unreduced = captures.serve(call, lambda captured: captured.graph_module)
    target = self_distilled(own.inputs, visual, unreduced["logits"].to(visual.device))
    return SearchBatch(number, own, captured, batch.layout, target)


def without_labels(call: Call) -> Call:
    """Return the call without labels: the loss is computed outside the graph."""
    return replace(call, inputs={name: x for name, x in call.inputs.items() if name != "labels"})
