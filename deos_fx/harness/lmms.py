"""Models of lmms-eval that answer with a reduced, an exported or an unreduced model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from torch.nn import functional as F
from tqdm import tqdm

from deos_fx.cli.limits import read_limit
from deos_fx.cli.loading import checked_processor, load_generating
from deos_fx.cli.policies import Choice
from deos_fx.cli.processors import going_with
from deos_fx.comparison.answers import answer_logits, generated
from deos_fx.data import Record, batches
from deos_fx.harness.requests import (
    ended,
    generation_options,
    record_of_chat,
    record_of_text,
)

__all__ = ["ChatModel", "SimpleModel"]


class SimpleModel(lmms):
    """A model whose tasks are a text and a list of images; chosen by ``--force_simple``.

    Args:
        pretrained: Folder of a model, of a reduced model or of an export, or a hub id. A model runs
            unreduced unless one of the next four is given.
        policy: A policy file.
        preset: Name of a preset, fitted to the budget.
        budget: Visual tokens that may stay: ``0.125``, ``12.5%`` or ``18``.
        image_scale: Scale in (0, 1] at which images enter.
        dtype: Precision of the weights; by default as saved.
        device: A device; by default that of this process.
        batch_size: Questions answered at once.
        max_batch_size: Not used: there is no automatic batch size.

    Raises:
        ValueError: If the model cannot be loaded or reduced so; the message says why.
    """

    is_simple = True
    # Where the arguments of a request have the settings of `generate`.
    _settings = 1

    def __init__(
        self,
        pretrained: str,
        policy: str | None = None,
        preset: str | None = None,
        budget: str | int | float | None = None,
        image_scale: str | float | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size}; give a number of questions")
        self.accelerator = Accelerator()
        self.device = torch.device(device or self.accelerator.device)
        self.batch_size = int(batch_size)
        processor = checked_processor(pretrained)
        self.model, self._place = load_generating(
            pretrained,
            Choice(
                None if policy is None else Path(policy),
                preset,
                None if budget is None else read_limit(str(budget)),
                None if image_scale is None else float(image_scale),
            ),
            dtype=dtype,
            device=str(self.device),
        )
        self.processor = going_with(self.model, processor)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answers, each up to the first text that ends it."""
        settings = [json.dumps(request.args[self._settings]) for request in requests]
        answers = [""] * len(requests)
        for places, records in self._batches(requests, settings, self._asked):
            options, until = generation_options(json.loads(settings[places[0]]))
            found = generated(
                self.model.generate,
                self._place,
                self.processor,
                records,
                batch_size=len(records),
                images=bool(records[0].images),
                **options,
            )
            for place, answer in zip(places, found, strict=True):
                answers[place] = ended(answer, until)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return of each continuation its mean cross-entropy, and whether it is the likeliest.

        Despite the name, tasks of lmms-eval take the least of these numbers as the best, as its
        own models return losses. The tokens are those of the answer and of the mark that ends it.
        """
        found: list[Any] = [None] * len(requests)
        alike = [""] * len(requests)
        for places, records in self._batches(requests, alike, self._continued):
            with_images = bool(records[0].images)
            (batch,) = batches(self.processor, records, len(records), images=with_images)
            logits, labels = answer_logits(self.model, self._place, batch)
            counts = (labels >= 0).sum(dim=1)
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)
            likeliest = ((logits.argmax(dim=-1) == labels) | (labels < 0)).all(dim=1)
            for place, loss, same in zip(places, losses / counts, likeliest, strict=True):
                found[place] = (float(loss), bool(same))
        # The evaluator of 0.7.3 makes a text of a pair, and takes one out of this as it is.
        return [GenerationResult(pair) for pair in found]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse tasks of several rounds.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("deos_fx answers in one round; choose tasks of one round")

    def _asked(self, request: Instance) -> Record:
        """Return the question of a request."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        return record_of_text(context, visuals, f"{task} {doc_id}")

    def _continued(self, request: Instance) -> Record:
        """Return a question with the continuation that is asked about."""
        if len(request.args) == 2:
            raise NotImplementedError(
                "acc_mutual_info asks for answers without a question, which deos_fx does not score"
            )
        context, target, doc_to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        answer = target(doc) if callable(target) else target
        return record_of_text(context, doc_to_visual(doc), f"{task} {doc_id}", answer.strip())

    def _batches(
        self,
        requests: Sequence[Instance],
        keys: Sequence[str],
        read: Callable[[Instance], Record],
    ) -> Iterator[tuple[list[int], list[Record]]]:
        """Read requests in batches of equal keys, all with images or all without.

        Only the images of one batch are in memory.

        Yields:
            The places of a batch among the requests, and its records.
        """
        alike: defaultdict[str, list[int]] = defaultdict(list)
        for place, key in enumerate(keys):
            alike[key].append(place)
        with tqdm(total=len(keys), disable=self.rank != 0, desc="deos_fx") as bar:
            for places in alike.values():
                for start in range(0, len(places), self.batch_size):
                    batch = {i: read(requests[i]) for i in places[start : start + self.batch_size]}
                    for with_images in (True, False):
                        part = {
                            i: one for i, one in batch.items() if bool(one.images) == with_images
                        }
                        if part:
                            yield [*part], [*part.values()]
                            bar.update(len(part))


class ChatModel(SimpleModel):
    """A model whose tasks are conversations, with images anywhere in them."""

    is_simple = False
    _settings = 2

    def _asked(self, request: Instance) -> Record:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        return record_of_chat(messages, f"{task} {doc_id}")
