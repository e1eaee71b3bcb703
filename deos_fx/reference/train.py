"""Train the reference model from scratch: ``python -m deos_fx.reference.train --output DIR``.

Trained end to end on questions, a small model learns nothing for hours: it cannot find what it does
not see, and has no reason to see what it cannot find. So its two halves learn separately, within
minutes. They meet in a space that is fixed beforehand, that of the orthonormal word vectors:

1. ``tower``: each visual token learns to be the sum of the words that describe its patch: row,
   column, and the digit and color on it or the photograph behind it.
2. ``language``: half of the decoder layers learn to answer questions about such sums, without
   any picture. The other half starts as the identity and is left out.
3. ``join``: the whole model learns on pictures, with a decreasing weight of the descriptions in
   the loss.

In all stages with pictures the CLS token learns which digits and colors are present, so that its
attention marks what matters, as in CLIP. The layer that reads it is dropped at the end.

Every step draws from its own random generator, so an interrupted run continues from the checkpoint
in ``DIR`` as if it had not stopped.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaProcessor

from deos_fx import reference
from deos_fx.checkpoint import load_optimizer, optimizer_tensors
from deos_fx.files import write_file
from deos_fx.reading import blaming
from deos_fx.reference.lessons import IGNORE, Pack, Pictures
from deos_fx.reference.model import WIDTH, build_processor
from deos_fx.reference.student import REFERENCE, Student, Task

__all__ = [
    "STAGES",
    "Stage",
    "Student",
    "join_lesson",
    "language_lesson",
    "main",
    "options",
    "run",
    "tower_lesson",
    "train",
]

log = logging.getLogger(__name__)

Metrics = dict[str, float]


def tower_lesson(
    student: Student, rng: np.random.Generator, size: int, progress: float
) -> tuple[Tensor, Metrics]:
    """Compute one step of the stage ``tower``: pictures full of objects."""
    batch = student.task.crowd(size, rng, progress)
    tokens, present = student.look(batch)
    return _description_loss(student, batch, tokens, present)


def language_lesson(
    student: Student, rng: np.random.Generator, size: int, progress: float
) -> tuple[Tensor, Metrics]:
    """Compute one step of the stage ``language``: questions about slightly noisy descriptions."""
    task = student.task
    batch = task.sample(size, "train", rng)
    described, pack = task.describe(batch), Pack.of(batch, rng, task.layout).to(student.device)
    # Patches with objects have priorities above 1, the others below: so objects come first.
    priority = torch.from_numpy(rng.random(described.filled.shape)) + described.filled
    patches = priority.topk(task.shown, 1).indices.sort(1).values.to(student.device)
    tokens = described.to(student.device).embed(student.words)
    tokens = tokens.gather(1, patches[..., None].expand(-1, -1, WIDTH))
    noise = rng.normal(size=tokens.shape) * rng.uniform(0, 0.06, (size, 1, 1))
    tokens = tokens + torch.from_numpy(noise).to(tokens)
    return _answer_loss(student, student.answer(tokens, pack, patches), pack)


def join_lesson(
    student: Student, rng: np.random.Generator, size: int, progress: float, least: float = 0.05
) -> tuple[Tensor, Metrics]:
    """Compute one step of the stage ``join``: questions about pictures.

    The weight of the descriptions fades to the share ``least`` of what it is at first.
    """
    batch = student.task.sample(size, "train", rng)
    pack = Pack.of(batch, rng, student.task.layout).to(student.device)
    tokens, present = student.look(batch)
    loss, metrics = _answer_loss(student, student.answer(tokens, pack), pack)
    described, more = _description_loss(student, batch, tokens, present)
    # Descriptions matter less and less, but never nothing: the tower must not forget them.
    weight = 0.3 * max(least, 1 - progress / 0.7)
    return loss + weight * described, metrics | more


def _answer_loss(student: Student, logits: Tensor, pack: Pack) -> tuple[Tensor, Metrics]:
    loss = F.cross_entropy(logits.float(), pack.targets[pack.targets != IGNORE])
    return loss, {"answers": loss.item()} | student.task.layout.accuracy(logits, pack)


def _description_loss(
    student: Student, batch: Pictures, tokens: Tensor, present: Tensor
) -> tuple[Tensor, Metrics]:
    described = student.task.describe(batch).to(student.device)
    truth = student.task.present(batch).to(student.device)
    tokens, words = tokens.float(), student.words
    loss = described.loss(tokens, words)
    spotted = F.binary_cross_entropy_with_logits(present.float(), truth)
    metrics = {"described": loss.item(), "presence": spotted.item()}
    return loss + spotted, metrics | described.accuracy(tokens, words)


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Its name.
        lesson: Returns loss and metrics of a step, from student, generator, batch size, progress.
        learns: Prefixes of the names of the student's parameters that it trains.
        steps: Number of steps.
        size: Pictures in a step.
        rate: Highest learning rate.
        stride: The stage uses every ``stride``-th decoder layer.
    """

    name: str
    lesson: Callable[[Student, np.random.Generator, int, float], tuple[Tensor, Metrics]]
    learns: tuple[str, ...]
    steps: int
    size: int
    rate: float
    stride: int = 1

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step: up, constant, down to zero in the last 35 %."""
        left = (self.steps - step) / (0.35 * self.steps)
        return self.rate * min(1.0, (step + 1) / 60, left)

    def parameters(self, student: Student) -> list[nn.Parameter]:
        """Return the parameters that the stage trains."""
        named = student.named_parameters()
        return [parameter for name, parameter in named if name.startswith(self.learns)]


_SIGHT = ("presence", "model.model.vision_tower", "model.model.multi_modal_projector")
_SPEECH = ("model.model.language_model.layers", "model.model.language_model.norm", "model.lm_head")
STAGES = (
    Stage("tower", tower_lesson, _SIGHT, steps=1400, size=32, rate=1.5e-3),
    Stage("language", language_lesson, _SPEECH, steps=2400, size=16, rate=1e-3, stride=2),
    Stage("join", join_lesson, ("",), steps=1200, size=16, rate=6e-4),
)


def train(
    output: Path,
    stages: tuple[Stage, ...] = STAGES,
    seed: int = 0,
    every: int = 100,
    task: Task = REFERENCE,
) -> Student:
    """Run the stages in order, continuing from the checkpoint in ``output`` if there is one.

    Args:
        output: Folder for checkpoints.
        stages: The stages to run.
        seed: Seed of weights and data.
        every: Steps between reports and checkpoints.
        task: What to learn from.

    Returns:
        The trained student.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = Student(seed, task).to(device).train()
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "checkpoint.safetensors"
    reached, steps, moments = _resume(checkpoint, student)
    for number, stage in enumerate(stages):
        # Case: finished before the checkpoint was written.
        if number < reached:
            continue
        optimizer = torch.optim.AdamW(
            stage.parameters(student), lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.05
        )
        first = 0
        # Case: the stage that the checkpoint was written in.
        if moments and number == reached:
            load_optimizer(optimizer, moments)
            first = steps
        for step in _run(stage, student, optimizer, first, [seed, number], every):
            _save(checkpoint, student, optimizer, number, step)
    return student.eval()


def _run(
    stage: Stage,
    student: Student,
    optimizer: torch.optim.Optimizer,
    first: int,
    seed: list[int],
    every: int,
) -> Iterator[int]:
    """Run a stage, yielding the number of steps done whenever a checkpoint is due."""
    start = time.perf_counter()
    # The generator depends on the step alone, so a resumed run draws what it would have drawn.
    means: Metrics = {}
    for step in range(first, stage.steps):
        metrics = _step(stage, student, optimizer, step, np.random.default_rng([*seed, step]))
        for name, value in metrics.items():
            means[name] = 0.95 * means.get(name, value) + 0.05 * value
        done = step + 1
        if done % every == 0 or done == stage.steps:
            seconds = time.perf_counter() - start
            report = " ".join(f"{name} {value:.3f}" for name, value in means.items())
            log.info("%s %d/%d, %.0f s: %s", stage.name, done, stage.steps, seconds, report)
            log.info("  validation: %s", _validate(student, 2 * stage.size))
            yield done


def _step(
    stage: Stage,
    student: Student,
    optimizer: torch.optim.Optimizer,
    step: int,
    rng: np.random.Generator,
) -> Metrics:
    for group in optimizer.param_groups:
        group["lr"] = stage.rate_at(step)
    optimizer.zero_grad(set_to_none=True)
    with _thinned(student, stage.stride), torch.autocast(student.device.type, torch.bfloat16):
        loss, metrics = stage.lesson(student, rng, stage.size, step / stage.steps)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    return metrics


@contextmanager
def _thinned(student: Student, stride: int) -> Iterator[None]:
    """Keep only every ``stride``-th decoder layer while the context is open."""
    # The list is exchanged, not the layers: the optimizer has their parameters.
    decoder = student.model.model.language_model
    layers = decoder.layers
    decoder.layers = layers[::stride]
    try:
        yield
    finally:
        decoder.layers = layers


@torch.no_grad()
def _validate(student: Student, size: int) -> str:
    # The same scenes each time, so that reports can be compared.
    rng = np.random.default_rng(0)
    task = student.task
    batch = task.sample(size, "validation", rng)
    pack = Pack.of(batch, rng, task.layout).to(student.device)
    tokens, _ = student.look(batch)
    right = task.describe(batch).to(student.device).accuracy(tokens, student.words)
    right |= task.layout.accuracy(student.answer(tokens, pack), pack)
    return " ".join(f"{name} {value:.3f}" for name, value in right.items())


def _save(
    path: Path, student: Student, optimizer: torch.optim.Optimizer, stage: int, step: int
) -> None:
    """Write a checkpoint; a kill leaves the earlier one."""
    tensors = {f"student/{name}": value for name, value in student.state_dict().items()}
    moments = optimizer_tensors(optimizer)
    tensors |= {f"optimizer/{name}": value for name, value in moments.items()}
    # Copies, because a safetensors file cannot hold tensors that share memory.
    copies = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    place = {"stage": str(stage), "step": str(step)}
    write_file(path, lambda part: save_file(copies, part, place))


def _resume(path: Path, student: Student) -> tuple[int, int, dict[str, Tensor]]:
    """Load a checkpoint, if there is one.

    Returns:
        The stage that it was written in, the steps done in that stage, and the optimizer's tensors,
        empty if there is no checkpoint.

    Raises:
        ValueError: If it is damaged, or of another model.
    """
    if not path.exists():
        return 0, 0, {}
    with blaming(path):
        return _read(path, student)


def _read(path: Path, student: Student) -> tuple[int, int, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"student": {}, "optimizer": {}}
    with safe_open(path, framework="pt") as file:
        place = file.metadata()
        for name in file.keys():
            part, _, rest = name.partition("/")
            parts[part][rest] = file.get_tensor(name)
    student.load_state_dict(parts["student"])
    return int(place["stage"]), int(place["step"]), parts["optimizer"]


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that every training has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--hurry", type=float, default=1.0, help="fraction of the steps to take, for a quick look"
    )
    return parser


def run(
    arguments: argparse.Namespace, stages: tuple[Stage, ...] = STAGES, task: Task = REFERENCE
) -> tuple[Any, LlavaProcessor]:
    """Train as the options say and save the model.

    Returns:
        The model, on the CPU, and its processor.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    stages = tuple(
        replace(stage, steps=max(1, round(stage.steps * arguments.hurry))) for stage in stages
    )
    student = train(arguments.output, stages, arguments.seed, task=task)
    # By the annotations of transformers, ``generate`` is not a method of its own models.
    model: Any = student.model.cpu()
    processor = build_processor(task.layout.vocabulary)
    model.generation_config.update(max_new_tokens=4, do_sample=False)
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    return model, processor


def main() -> None:
    """Train the model, save it and report its accuracy on held-out scenes."""
    model, processor = run(options(main.__doc__).parse_args())
    examples = reference.make_examples(800, "test")
    for kind, right in reference.accuracy(model.generate, processor, examples).items():
        log.info("%-12s %.3f", kind, right)


if __name__ == "__main__":
    main()
