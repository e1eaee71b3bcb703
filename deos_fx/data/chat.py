"""Render a conversation by the chat template of a processor, and find the answer in it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import TemplateError

from deos_fx.data.record import IMAGE_MARK, Message

__all__ = ["ChatFormat", "Rendered", "say_once"]

# A word that no template writes by itself.
_PROBE = "deosfxprobe"


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text, with the answer in ``text[start:end]``.

    The part that answers has what a model writes by itself: the answer and the mark that ends the
    turn. Without an answer it is empty, at the end.
    """

    text: str
    start: int
    end: int

    @property
    def answer(self) -> str:
        """Return the part that answers."""
        return self.text[self.start : self.end]


class ChatFormat:
    """How the chat template of a processor is called.

    A template of the processor comes before one that only its tokenizer has. Templates of
    tokenizers are often written for contents that are texts, in which the model's placeholder
    stands for an image; which kind a template is shows when it is tried.

    Args:
        processor: A transformers processor.

    Attributes:
        image_token: The model's placeholder of an image.
        writes_images: Whether prompts have such placeholders. A model that puts images in front of
            the text itself has none, and its tokenizer would take one for words.

    Raises:
        ValueError: If its template leaves images out.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        # A few have it as a token with settings (BLIP-2).
        named = str(getattr(processor, "image_token", None) or "")
        self.image_token = named or IMAGE_MARK
        # Processors that know of queries put their tokens in front by themselves.
        in_front = getattr(processor, "num_query_tokens", None) is not None
        self.writes_images = not in_front and (
            bool(named) or _knows(processor.tokenizer, IMAGE_MARK)
        )
        self._options: dict[str, Any] = {}
        own = getattr(processor, "chat_template", None)
        of_tokenizer = getattr(processor.tokenizer, "chat_template", None)
        self.has_template = bool(own or of_tokenizer)
        if not own and of_tokenizer:
            # Templates by name: the processor knows only its own names.
            if isinstance(of_tokenizer, dict):
                of_tokenizer = of_tokenizer.get("default") or next(iter(of_tokenizer.values()))
            self._options = {"chat_template": of_tokenizer}
        self.takes_parts = not self.has_template or self._takes_parts()

    def prompt(self, turns: Sequence[Message]) -> str:
        """Return the conversation as the model is asked to answer it."""
        return self._render(turns, asks=True)

    def answered(self, turns: Sequence[Message], answer: str) -> Rendered | None:
        """Return the conversation with the answer as the assistant's turn.

        Args:
            turns: The conversation up to the answer.
            answer: The answer.

        Returns:
            The text; None if the template writes no turn of the assistant.
        """
        prompt, text = self.prompt(turns), self._with_answer(turns, answer)
        end = len(text.rstrip())
        # Case: the text goes on where the model would begin. What comes then is the answer.
        if text.startswith(prompt) and answer.strip() in text[len(prompt) :]:
            return Rendered(text, min(len(prompt), end), end)
        # Case: the prompt ends otherwise, for example in the beginning of a thought. The answer is
        # where another one makes a difference: in its first letter.
        other = self._with_answer(turns, "B" if answer.strip().startswith("A") else "A")
        if other == text:
            return None
        return Rendered(text, len(os.path.commonprefix([text, other])), end)

    def joined(self, turns: Sequence[Message]) -> str:
        """Return the conversation without a template: its images and texts, one after the other.

        The placeholders of images go after a first special token that the text has already.
        """
        parts = [part for turn in turns for part in turn["content"]]
        pieces = [part.get("text", self.image_token).strip() for part in parts]
        if not self.writes_images:
            pieces = [piece for piece in pieces if piece != self.image_token] or [""]
        bos = self.processor.tokenizer.bos_token
        first = next((i for i, piece in enumerate(pieces) if piece != self.image_token), 0)
        if bos and pieces[first].startswith(bos):
            pieces[first] = pieces[first].removeprefix(bos).lstrip()
            pieces.insert(0, bos)
        return " ".join(piece for piece in pieces if piece)

    def _with_answer(self, turns: Sequence[Message], answer: str) -> str:
        parts = [{"type": "text", "text": answer}]
        return self._render([*turns, {"role": "assistant", "content": parts}], asks=False)

    def _takes_parts(self) -> bool:
        """Find out whether contents are lists of parts, or texts."""
        content = [{"type": "image"}, {"type": "text", "text": _PROBE}]
        for takes_parts in (True, False):
            self.takes_parts = takes_parts
            try:
                text = self._render([{"role": "user", "content": content}], asks=True)
            except (TemplateError, TypeError):
                continue
            # A list that is written as a text shows its quotes.
            if _PROBE in text and f"'{_PROBE}'" not in text and self.image_token in text:
                return takes_parts
        raise ValueError(
            f"the chat template of {type(self.processor).__name__} writes no {self.image_token} "
            "where a message has an image; give the processor a template that does "
            "(processor.chat_template = ...)"
        )

    def _render(self, turns: Sequence[Message], asks: bool) -> str:
        if not self.takes_parts:
            turns = [{**turn, "content": self._as_text(turn)} for turn in turns]
        return self.processor.apply_chat_template(
            [dict(turn) for turn in turns],
            add_generation_prompt=asks,
            tokenize=False,
            **self._options,
        )

    def _as_text(self, turn: Message) -> str:
        return "\n".join(part.get("text", self.image_token).strip() for part in turn["content"])


def _knows(tokenizer: Any, token: str) -> bool:
    """Return whether a text is one token of a tokenizer."""
    number = tokenizer.convert_tokens_to_ids(token)
    return number is not None and number != tokenizer.unk_token_id


@cache
def say_once(text: str) -> None:
    """Log a warning the first time."""
    logging.getLogger("deos_fx").warning(text)
