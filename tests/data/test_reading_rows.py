"""Rows of JSONL, CSV and saved datasets become records, or one error names the row."""

from __future__ import annotations

import csv
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from deos_fx.data import Record, open_image, read_records
from deos_fx.data.record import parts_of

PNG = "a.png"
ROW = {"image": PNG, "prompt": "what?", "answer": "seven"}


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    for name, shade in (("a.png", 10), ("b.png", 20)):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, rows: Any, name: str = "d.jsonl", encoding: str = "utf-8") -> Path:
    lines = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
    (folder / name).write_bytes(lines.encode(encoding))
    return folder / name


def read_one(folder: Path, row: Any) -> Record:
    (record,) = read_records(write(folder, [row]))
    return record


def image(name: str = "") -> dict[str, str]:
    return {"type": "image", "image": name} if name else {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


# *** what is read ***


def test_a_question(folder: Path) -> None:
    record = read_one(folder, ROW | {"kind": "digit", "id": 7, "source": None})
    assert record == Record(folder / PNG, "what?", "seven", "digit")
    assert record.extra == {"id": 7}
    assert record.where == f"{folder / 'd.jsonl'}, line 1"
    assert record.messages() == [{"role": "user", "content": [image(), text("what?")]}]


def test_question_is_another_word_for_prompt(folder: Path) -> None:
    assert read_one(folder, {"image": PNG, "question": "what?"}).prompt == "what?"


def test_several_images(folder: Path) -> None:
    record = read_one(folder, {"images": [PNG, "b.png"], "prompt": "<image> or <image>?"})
    assert record.images == (folder / PNG, folder / "b.png")
    (turn,) = record.messages()
    assert turn["content"] == [image(), text("or "), image(), text("?")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lines_of_text(folder: Path, encoding: str) -> None:
    # A line separator inside a text, which `splitlines` would cut at, empty lines, other line ends.
    rows = json.dumps(ROW | {"prompt": "was\u2028ist das: ö?"}, ensure_ascii=False)
    records = read_records(write(folder, f"{rows}\r\n\n  \n{rows}", encoding=encoding))
    assert [record.prompt for record in records] == ["was\u2028ist das: ö?"] * 2
    assert records[1].where.endswith("line 4")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(folder: Path, encoding: str) -> None:
    lines = """image,images,question,answer,id
a.png,,"what,\nnow?",seven,1
,"[""a.png"", ""b.png""]",x,8,
"""
    first, second = read_records(write(folder, lines, "d.CSV", encoding))
    assert first == Record(folder / PNG, "what,\nnow?", "seven")
    assert (first.extra, second.extra) == ({"id": "1"}, {})
    assert second.images == (folder / PNG, folder / "b.png")
    assert second.where.endswith("line 4")


# *** chats ***


def test_a_chat(folder: Path) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [image(PNG), text("what is it?")]},
        {"role": "assistant", "content": "a digit"},
        {"role": "user", "content": [text("which?"), image("b.png")]},
        {"role": "assistant", "content": [text("seven")]},
    ]
    record = read_one(folder, {"messages": messages})
    assert (record.answer, record.prompt) == ("seven", "which?")
    assert record.images == (folder / PNG, folder / "b.png")
    assert record.messages() == [
        {"role": "system", "content": [text("be brief")]},
        {"role": "user", "content": [image(), text("what is it?")]},
        {"role": "assistant", "content": [text("a digit")]},
        {"role": "user", "content": [text("which?"), image()]},
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": PNG}},
        {"type": "image_url", "image_url": PNG},
        {"type": "image", "path": PNG},
        {"type": "image", "url": PNG},
    ],
)
def test_parts_as_others_write_them(folder: Path, part: Any) -> None:
    record = read_one(folder, {"messages": [{"role": "user", "content": [part, text("what?")]}]})
    assert record.images == (folder / PNG,)
    assert record.messages()[0]["content"] == [image(), text("what?")]


@pytest.mark.parametrize("content", ["<image>\nwhat?", "what?", [image(), text("what?")]])
def test_images_beside_a_chat(folder: Path, content: Any) -> None:
    row = {"image": PNG, "messages": [{"role": "user", "content": content}], "answer": "seven"}
    record = read_one(folder, row)
    assert record.answer == "seven"
    assert record.messages() == [{"role": "user", "content": [image(), text("what?")]}]


def test_conversations_are_messages_in_other_words(folder: Path) -> None:
    conversations = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "a digit"},
        {"from": "human", "value": "which?"},
        {"from": "gpt", "value": "seven"},
    ]
    speakers = {"human": "user", "gpt": "assistant"}
    messages = [
        {"role": speakers[turn["from"]], "content": turn["value"]} for turn in conversations
    ]
    record = read_one(folder, {"id": "1", "image": PNG, "conversations": conversations})
    same = read_one(folder, {"id": "1", "image": PNG, "messages": messages})
    assert record == same and record.answer == "seven" and record.extra == {"id": "1"}
    path = folder / "chats.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["image", "conversations"], [PNG, json.dumps(conversations)]])
    assert read_records(path)[0].messages() == record.messages()


# *** what is refused ***

USER = {"role": "user", "content": "what?"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "is not JSON.* give JSONL, an object a line, or CSV"),
        ({"img": PNG, "text": "a"}, "line 2 has 'img, text'; give an object with image"),
        ({"image": "", "prompt": "a"}, "image is ''; give the path of a file"),
        ({"image": "data:image/png;base64,iVBO", "prompt": "a"}, "'data:.*; give the path of a"),
        ("[" * 100_000, "is not JSON"),
        ('{"image": ' + "9" * 5000 + "}", "is not JSON"),
        ("[]", "give an object"),
        ('"text"', "give an object"),
        ({"prompt": "what"}, "there is no image; give an object with image"),
        ({"image": PNG}, "give an object with image"),
        ({"image": PNG, "prompt": "a", "question": "a"}, "give an object with"),
        ({"image": PNG, "images": [PNG], "prompt": "a"}, "give an object with"),
        ({"image": [], "prompt": "a"}, "there is no image"),
        ({"image": PNG, "prompt": 3}, "prompt is 3; give a text"),
        ({"image": PNG, "prompt": "a", "answer": ["b"]}, r"answer is \['b'\]; give a text"),
        ({"image": PNG, "prompt": "a", "answer": ""}, "the answer is empty; write one"),
        (
            {"messages": [USER, {"role": "assistant", "content": " "}], "image": PNG},
            "the answer is empty",
        ),
        ({"image": PNG, "prompt": "a", "kind": True}, "kind is True; give a text"),
        ({"image": 5, "prompt": "a"}, "image is 5; give a path"),
        ({"image": {"bytes": "x"}, "prompt": "a"}, "image is {'bytes': 'x'}; give a path"),
        ({"image": "none.png", "prompt": "a"}, "there is no image .*none.png"),
        ({"image": ".", "prompt": "a"}, "is a folder, a device or a pipe"),
        ({"image": "a\0b", "prompt": "a"}, "there is no image"),
        ({"image": "x" * 5000, "prompt": "a"}, "'x+...: .*too long"),
        ({"image": PNG, "prompt": "<image> <image>"}, "places for 2 images, but comes with 1"),
        ({"image": "https://x.org/a.png", "prompt": "a"}, "is a URL, and nothing is downloaded"),
        ({"messages": [], "image": PNG}, r"messages is \[\]; give a list"),
        ({"messages": "what?", "image": PNG}, "messages is 'what\\?'; give a list"),
        (
            {"messages": [USER, {"role": "tool", "content": ""}], "image": PNG},
            "message 2: give role",
        ),
        ({"messages": [{"role": "user"}], "image": PNG}, "message 1: content is None"),
        ({"messages": [{"role": "user", "content": [3]}], "image": PNG}, "a part is 3; give"),
        ({"messages": [{"role": "system", "content": "a"}], "image": PNG}, "ask nothing"),
        ({"messages": [{"role": "assistant", "content": "a"}], "image": PNG}, "ask nothing"),
        (
            {
                "messages": [USER, {"role": "assistant", "content": "a"}],
                "answer": "b",
                "image": PNG,
            },
            "there is another one",
        ),
        ({"messages": [{"role": "user", "content": [image(PNG)]}], "image": PNG}, "not in both"),
        ({"messages": [USER]}, "there is no image"),
        ({"conversations": 3, "image": PNG}, "conversations is 3; give a list"),
        ({"conversations": [USER], "image": PNG}, "message 1: give from, one of human, gpt and"),
        ({"conversations": [{"from": ["human"]}], "image": PNG}, "message 1: give from"),
        ({"conversations": [{"from": "human"}], "image": PNG}, "message 1: content is None"),
        ({"conversations": [], "messages": [USER], "image": PNG}, "give an object with image"),
    ],
)
def test_a_wrong_row_is_named(folder: Path, row: Any, words: str) -> None:
    line = row if isinstance(row, str) else json.dumps(row)
    path = write(folder, json.dumps({"image": PNG, "prompt": "what?"}) + "\n" + line)
    with pytest.raises(ValueError, match=words) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}, line 2")


def test_the_first_row_without_an_answer_is_named(folder: Path) -> None:
    path = write(folder, [ROW, {"image": PNG, "prompt": "what?"}, ROW])
    with pytest.raises(ValueError, match=r"line 2: there is an answer in 2 of 3 rows"):
        read_records(path)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n\n", "is empty"),
        (json.dumps(ROW).encode("utf-16"), "is in UTF-16"),
        (b"PAR1\x15\x04", "is a table of Parquet; save what datasets.load_dataset reads"),
        (
            b'{"image": "a.png", "prompt": "a"}\n\n{"prompt": "\xff"}',
            "line 3 is not UTF-8.*; give a text",
        ),
    ],
)
@pytest.mark.parametrize("name", ["d.jsonl", "d.csv"])
def test_a_wrong_file_is_named(folder: Path, contents: bytes, words: str, name: str) -> None:
    (folder / name).write_bytes(contents)
    with pytest.raises(ValueError, match=words) as caught:
        read_records(folder / name)
    assert str(folder / name) in str(caught.value)


def test_a_list_is_no_lines(folder: Path) -> None:
    path = write(folder, json.dumps([ROW, ROW], indent=1))
    with pytest.raises(ValueError, match=r"d.jsonl is one list of JSON; write its objects as"):
        read_records(path)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("image,prompt\na.png,x,y\n", "line 2 has more cells than .* image, prompt"),
        ("image,prompt,image\na.png,x,a.png\n", "line 1 has a name twice"),
        ('image,prompt\na.png,"x\n', "line 2 is not CSV"),
        ("image;prompt\na.png;x\n", "line 2 has 'image;prompt'; give an object with image"),
        ("images,prompt\n[,x\n", "line 2: images is not JSON"),
    ],
)
def test_a_wrong_line_of_csv_is_named(folder: Path, lines: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_records(write(folder, lines, "d.csv"))


# *** URLs ***


@pytest.fixture(name="site")
def _site(folder: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_are_read_where_they_are_allowed(
    site: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = write(folder, [{"image": f"{site}/a.png", "prompt": "a"}])
    (record,) = read_records(path, urls=True)
    assert open_image(record.image).tobytes() == open_image(folder / PNG).tobytes()
    path = write(folder, [{"image": f"{site}/none.png", "prompt": "a"}])
    with pytest.raises(ValueError, match="line 1: http.*none.png cannot be downloaded: .*404"):
        read_records(path, urls=True)
    monkeypatch.setattr("deos_fx.data.download._MAX_BYTES", 10)
    path = write(folder, [{"image": f"{site}/a.png", "prompt": "a"}])
    with pytest.raises(ValueError, match="has more than"):
        read_records(path, urls=True)


# *** datasets ***


def test_a_folder_without_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="is not a folder that Dataset.save_to_disk wrote; save"):
        read_records(folder)
    (folder / "state.json").touch()
    with pytest.raises(ImportError, match="needs datasets .pip install datasets.; or give a JSONL"):
        read_records(folder)


class Table(list[dict[str, Any]]):
    def to_pylist(self) -> list[dict[str, Any]]:
        return list(self)


class Dataset:
    """What is used of a `datasets.Dataset`: rows as they are stored, images as bytes or paths."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def with_format(self, kind: str) -> Dataset:
        assert kind == "arrow"
        return self

    def iter(self, batch_size: int) -> Iterator[Table]:
        for start in range(0, len(self.rows), batch_size):
            yield Table(self.rows[start : start + batch_size])


@pytest.mark.parametrize("form", ["bytes", "path"])
def test_a_saved_dataset(form: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "state.json").touch()
    stored = {"bytes": (folder / PNG).read_bytes(), "path": None}
    if form == "path":
        stored = {"bytes": None, "path": PNG}
    rows = [{"image": stored, "question": "what?", "answer": None, "id": i} for i in range(70)]
    found: dict[str, Any] = {"all": Dataset(rows)}
    module: Any = ModuleType("datasets")
    module.Dataset, module.load_from_disk = Dataset, lambda path: found["all"]
    monkeypatch.setitem(sys.modules, "datasets", module)
    records = read_records(folder)
    assert [record.extra["id"] for record in records] == list(range(70))
    assert records[69].where == f"{folder}, row 70"
    assert open_image(records[3].image).tobytes() == open_image(folder / PNG).tobytes()
    rows[1] = {"image": stored, "question": 3}
    with pytest.raises(ValueError, match="row 2: question is 3"):
        read_records(folder)
    found["all"] = {"train": Dataset([]), "test": Dataset([])}
    with pytest.raises(ValueError, match="has the parts train, test; give one, as .*train"):
        read_records(folder)


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("<image>\nwhat?", [image(), text("what?")]),
        (" what? \n<image>", [text("what?"), image()]),
        ("<image> <image>\n", [image(), image()]),
        (
            "is <image> or <image> left? ",
            [text("is "), image(), text(" or "), image(), text(" left?")],
        ),
        ("", []),
    ],
)
def test_marks_of_images(written: str, parts: Any) -> None:
    assert parts_of(written) == parts
    assert parts_of(written.replace("<image>", "<|pad|>"), "<|pad|>") == parts
