"""Turn the requests of lmms-eval into records, and its settings into options of `generate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import GenerationConfig

from deos_fx.data import Record
from deos_fx.data.chat import say_once
from deos_fx.data.record import Message, parts_of

__all__ = ["ended", "generation_options", "record_of_chat", "record_of_text"]

# Settings of tasks without a length of the answer are for models that end by themselves.
_LONGEST = 1024

_ONLY_IMAGES = "deos_fx answers about images and text alone"


def record_of_text(
    text: str, visuals: Iterable[Any] | None, where: str, answer: str | None = None
) -> Record:
    """Return a question with images, which come first unless the text has a place for each.

    Args:
        text: The question.
        visuals: Its images; other media are refused.
        where: What names it in messages.
        answer: A continuation whose probability is asked for.

    Raises:
        ValueError: If there is something else than images.
    """
    images = [_image(visual, where) for visual in visuals or ()]
    content = parts_of(text)
    if sum(part["type"] == "image" for part in content) != len(images):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    chat = ({"role": "user", "content": content},)
    return Record(tuple(images), text, answer, chat=chat, where=where)


def record_of_chat(messages: Iterable[Mapping[str, Any]], where: str) -> Record:
    """Return a conversation, with each image where its messages have it.

    Args:
        messages: Turns as lmms-eval writes them: parts with ``type`` and ``text`` or ``url``.
        where: What names it in messages.

    Raises:
        ValueError: If there is something else than texts and images.
    """
    images, turns, text = [], [], ""
    for message in messages:
        content: list[dict[str, str]] = []
        for part in message["content"]:
            if part["type"] == "text":
                text = part["text"]
                content.append({"type": "text", "text": text})
            elif part["type"] == "image":
                images.append(_image(part["url"], where))
                content.append({"type": "image"})
            else:
                raise ValueError(f"{where} has a part of type {part['type']}; {_ONLY_IMAGES}")
        turn: Message = {"role": message["role"], "content": content}
        turns.append(turn)
    return Record(tuple(images), text, chat=tuple(turns), where=where)


def generation_options(settings: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return options of `generate` and the texts that end an answer.

    A temperature above 0 asks for samples, unless ``do_sample`` says otherwise. Settings that
    transformers does not know are left aside, with one warning.

    Args:
        settings: ``generation_kwargs`` of a task.
    """
    known = vars(GenerationConfig())
    until = settings.get("until") or ()
    options = {name: value for name, value in settings.items() if name in known}
    unknown = sorted(settings.keys() - known.keys() - {"until"})
    if unknown:
        say_once(f"generation_kwargs that transformers does not know: {', '.join(unknown)}")
    options.setdefault("do_sample", bool(options.get("temperature")))
    if not options["do_sample"]:
        # transformers warns of settings that have no effect.
        for name in ("temperature", "top_p", "top_k"):
            options.pop(name, None)
    return {"max_new_tokens": _LONGEST, **options}, _texts(until)


def ended(answer: str, until: Sequence[str]) -> str:
    """Return an answer up to the first of the texts that end it."""
    for text in until:
        answer = answer.split(text)[0]
    return answer.strip()


def _texts(until: Any) -> tuple[str, ...]:
    given = (until,) if isinstance(until, str) else tuple(until)
    return tuple(text for text in given if text)


def _image(visual: Any, where: str) -> Any:
    if isinstance(visual, str):
        visual = Path(visual)
    if isinstance(visual, (Path, Image.Image)):
        return visual
    raise ValueError(f"{where} has a {type(visual).__name__} to look at; {_ONLY_IMAGES}")
