"""Turn a row of a file into a record, or say what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deos_fx.data.download import download
from deos_fx.data.record import ImageSource, Message, Record, parts_of

__all__ = ["CHATS", "FORM", "record_of"]

FORM = (
    "give an object with image (or images) and prompt (or question), or with messages (or "
    "conversations), and, if you have them, answer and kind"
)
"""What a row is, in words."""

CHATS = ("messages", "conversations")
"""Names of entries that hold the turns of a chat."""

_TEXTS = ("prompt", "question", "answer", "kind")
_KNOWN = {*_TEXTS, *CHATS, "image", "images"}
_ROLES = ("system", "user", "assistant")
# As LLaVA's files name them, in `conversations`.
_SPEAKERS = {"human": "user", "gpt": "assistant"}


def record_of(row: Any, folder: Path, where: str, urls: bool) -> Record:
    """Read one row.

    Args:
        row: What the file has; entries that are None count as absent.
        folder: The folder that paths of images are relative to.
        where: The file and the line.
        urls: Whether images may be downloaded.

    Raises:
        ValueError: If it is not a question about images; the message begins with `where`.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {_short(row)}; {FORM}")
    row = {name: value for name, value in row.items() if value is not None}
    for name in _TEXTS:
        if not isinstance(row.get(name, ""), str):
            raise ValueError(f"{where}: {name} is {_short(row[name])}; give a text")
    questions = [name for name in ("prompt", "question", *CHATS) if name in row]
    if len(questions) != 1 or {"image", "images"} <= set(row):
        # A separator that is no comma shows here.
        raise ValueError(f"{where} has {_short(', '.join(map(str, row)))}; {FORM}")
    reader = _Images(folder, where, urls)
    given = [reader.read(value) for value in _list(row.get("images", row.get("image", [])))]
    answer = row.get("answer")
    chat: tuple[Message, ...] = ()
    if questions[0] in CHATS:
        # Case: a chat. Its last turn is the answer if it is the assistant's.
        turns = _turns(row, questions[0], where, reader)
        if turns[-1]["role"] == "assistant":
            if answer is not None:
                raise ValueError(
                    f"{where}: {questions[0]} end with an answer, and there is another one"
                )
            answer = _text(turns.pop())
        chat = _with_places(turns, len(given) + len(reader.inside))
        # Images stand in the parts themselves or in a list, not in both.
        if given and reader.inside:
            raise ValueError(f"{where}: give images in the messages or as images, not in both")
        given = given or reader.inside
    # A single question; in a chat it is the last turn, for tables.
    prompt = _text(chat[-1]) if chat else row[questions[0]]
    if not given:
        raise ValueError(f"{where}: there is no image; {FORM}")
    image = given[0] if len(given) == 1 else tuple(given)
    extra = {name: value for name, value in row.items() if name not in _KNOWN}
    record = Record(image, prompt, answer, row.get("kind", ""), chat, extra, where)
    # Places that do not fit the images are found now, and not when the row's turn comes.
    record.messages()
    return record


class _Images:
    """Read the images of a row.

    Args:
        folder: The folder that paths are relative to.
        where: The file and the line.
        urls: Whether images may be downloaded.
    """

    def __init__(self, folder: Path, where: str, urls: bool) -> None:
        self.folder = folder
        self.where = where
        self.urls = urls
        self.inside: list[ImageSource] = []

    def read(self, value: Any) -> ImageSource:
        """Return one image: a path, a URL, or the contents of a file as `datasets` keeps them."""
        if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
            return value["bytes"]
        if isinstance(value, Mapping) and isinstance(value.get("path"), str):
            value = value["path"]
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: image is {_short(value)}; give a path as a text")
        if value.startswith(("https://", "http://")):
            if not self.urls:
                raise ValueError(
                    f"{self.where}: {value} is a URL, and nothing is downloaded unasked; say "
                    "--urls (in Python read_records(file, urls=True)), or save the image"
                )
            return download(value, self.where)
        if not value or value.startswith("data:"):
            raise ValueError(f"{self.where}: image is {_short(value)}; give the path of a file")
        path = self.folder / value
        try:
            found, is_file = path.exists(), path.is_file()
        except OSError as error:
            raise ValueError(f"{self.where}: {_short(value)}: {error}") from error
        if not is_file:
            what = (
                f"{path} is a folder, a device or a pipe" if found else f"there is no image {path}"
            )
            raise ValueError(f"{self.where}: {what}")
        return path


def _turns(row: Mapping[str, Any], name: str, where: str, reader: _Images) -> list[Message]:
    """Check the turns of a chat and give each content one form, a list of parts."""
    messages = row[name]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: {name} is {_short(messages)}; give a list of turns")
    turns: list[Message] = []
    for number, turn in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        if isinstance(turn, Mapping) and name == "conversations":
            speaker = str(turn.get("from"))
            turn = {"role": _SPEAKERS.get(speaker, speaker), "content": turn.get("value")}
        if not isinstance(turn, Mapping) or turn.get("role") not in _ROLES:
            raise ValueError(f"{place}: give {_form(name)}")
        content = turn.get("content")
        if isinstance(content, str):
            parts = parts_of(content)
        elif isinstance(content, list):
            parts = [found for part in content for found in _parts(part, place, reader)]
        else:
            raise ValueError(f"{place}: content is {_short(content)}; give a text or a list")
        turns.append({"role": turn["role"], "content": parts})
    if turns[-1]["role"] == "system" or len(turns) == 1 and turns[0]["role"] == "assistant":
        raise ValueError(f"{where}: {name} ask nothing; give a turn of the user")
    return turns


def _form(name: str) -> str:
    """Return what a turn is, in words."""
    if name == "conversations":
        return "from, one of human, gpt and system, and value"
    return f"role, one of {', '.join(_ROLES)}, and content"


def _parts(part: Any, where: str, reader: _Images) -> list[dict[str, str]]:
    """Read one part of a message, as transformers or OpenAI write it."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return parts_of(part["text"])
    if kind in ("image", "image_url"):
        names = ("image", "path", "url", "image_url")
        given = next((part[name] for name in names if part.get(name) is not None), None)
        if isinstance(given, Mapping) and "url" in given:
            given = given["url"]
        if given is not None:
            reader.inside.append(reader.read(given))
        return [{"type": "image"}]
    raise ValueError(
        f"{where}: a part is {_short(part)}; give {{'type': 'text', 'text': ...}} or "
        "{'type': 'image', 'image': ...}"
    )


def _with_places(turns: list[Message], images: int) -> tuple[Message, ...]:
    """Put images that no turn has a place for before the user's first words."""
    if any(part["type"] == "image" for turn in turns for part in turn["content"]):
        return tuple(turns)
    first = next(i for i, turn in enumerate(turns) if turn["role"] == "user")
    content = [{"type": "image"}] * images + turns[first]["content"]
    return (*turns[:first], {"role": "user", "content": content}, *turns[first + 1 :])


def _text(turn: Message) -> str:
    return " ".join(part["text"].strip() for part in turn["content"] if part["type"] == "text")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _short(value: Any) -> str:
    """Return a value in few characters, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
