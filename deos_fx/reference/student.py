"""The model in training, and what a task gives it to learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deos_fx.reference.lessons import (
    IGNORE,
    LAYOUT,
    PRESENCE,
    Described,
    Description,
    Pack,
    PackLayout,
    Pictures,
    presence,
)
from deos_fx.reference.model import VISUAL_TOKENS, WIDTH, build_model, word_embedding
from deos_fx.reference.sampling import sample_mosaics, sample_scenes
from deos_fx.reference.scenes import SceneBatch, Split

__all__ = ["REFERENCE", "Student", "Task"]


@dataclass(frozen=True)
class Task:
    """What a model learns from; ``REFERENCE`` is the task of the reference model.

    Attributes:
        layout: Layout of its packs of questions, which has the vocabulary.
        presence: Number of things that may be present in a picture.
        sample: Returns as many scenes of a split, from a generator.
        crowd: Returns as many training pictures to learn to see from, from a generator and the
            progress of the stage, 0 to 1.
        describe: Returns what the patches of a batch show.
        present: Flags what is present in each picture, float ``[B, presence]``.
        shown: Visual tokens of a scene that the language stage shows: those with objects first.
    """

    layout: PackLayout
    presence: int
    sample: Callable[[int, Split, np.random.Generator], Pictures]
    crowd: Callable[[int, np.random.Generator, float], Pictures]
    describe: Callable[..., Description]
    present: Callable[..., Tensor]
    shown: int


def _crowd(count: int, rng: np.random.Generator, progress: float) -> SceneBatch:
    """Sample easy pictures full of digits first, scenes later."""
    # Easy for the first tenth of the stage, then harder during the next quarter.
    difficulty = min(1.0, max(0.0, (progress - 0.1) / 0.25))
    if progress > 0.3 and rng.random() < 0.5:
        return sample_scenes(count, "train", rng, (3, 9), difficulty)
    return sample_mosaics(count, "train", rng, difficulty)


REFERENCE = Task(LAYOUT, PRESENCE, sample_scenes, _crowd, Described.of, presence, shown=36)


class Student(nn.Module):
    """The model in training, with the layer that reads its CLS token."""

    def __init__(self, seed: int = 0, task: Task = REFERENCE) -> None:
        super().__init__()
        self.task = task
        self.model = build_model(seed, task.layout.vocabulary)
        self.presence = nn.Linear(WIDTH, task.presence)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.presence.weight.device

    @property
    def words(self) -> Tensor:
        """Return the word vectors, without gradient, ``[vocabulary, width]``."""
        return word_embedding(self.model).weight.detach()

    def look(self, batch: Pictures) -> tuple[Tensor, Tensor]:
        """Run the tower and the projector on pictures.

        Args:
            batch: The pictures.

        Returns:
            Visual tokens ``[B, VISUAL_TOKENS, width]``, and logits ``[B, task.presence]`` that
            the CLS token gives for what is present.
        """
        pixels = torch.from_numpy(batch.render()).to(self.device).permute(0, 3, 1, 2)
        seen = self.model.model.vision_tower(pixels / 127.5 - 1)
        tokens = self.model.model.multi_modal_projector(seen.last_hidden_state[:, 1:])
        return tokens, self.presence(seen.pooler_output)

    def answer(self, tokens: Tensor, pack: Pack, patches: Tensor | None = None) -> Tensor:
        """Answer packs of questions.

        Args:
            tokens: Visual tokens, ``[B, V, width]``.
            pack: The questions, on the device of the model.
            patches: The patch that each token comes from, ``[B, V]``; by default all patches.

        Returns:
            Logits for every word that has a target, ``[A, vocabulary]``.
        """
        batch, visual = tokens.shape[:2]
        if patches is None:
            patches = torch.arange(VISUAL_TOKENS, device=tokens.device).expand(batch, -1)
        embed, layout = word_embedding(self.model), self.task.layout
        begin = embed.weight[layout.vocabulary["<bos>"]].expand(batch, 1, -1)
        # Positions are those of a whole prompt, even if only some patches are shown, and every
        # question of a pack starts right after the image.
        after = (1 + VISUAL_TOKENS + layout.position).to(tokens.device).expand(batch, -1)
        hidden = self.model.model.language_model(
            inputs_embeds=torch.cat([begin, tokens, embed(pack.words)], 1),
            position_ids=torch.cat([torch.zeros_like(after[:, :1]), 1 + patches, after], 1),
            attention_mask=layout.mask(visual).to(tokens.device).expand(batch, -1, -1, -1),
            use_cache=False,
        ).last_hidden_state
        return self.model.lm_head(hidden[:, 1 + visual :][pack.targets != IGNORE])
