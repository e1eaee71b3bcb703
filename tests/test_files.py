"""Files and folders that are replaced as a whole, or not at all, at every instant."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from kills import contents, kills
from safetensors.torch import load_file

from deos_fx.contents import RECORD, files_in, record_of, verify, write_record
from deos_fx.files import (
    check_file,
    check_folder,
    disk_errors,
    fresh_folder,
    write_file,
    write_files,
    write_tensors,
    write_text,
)
from deos_fx.scratch import scratch_folder, sweep

posix = pytest.mark.skipif(sys.platform == "win32", reason="modes and links are those of POSIX")

# Files that are one thing; ``many-*`` may be left out.
FILES = (RECORD, "a", "b", "c", "many-[0-9]")


def write_whole(target: Path, text: str, names: tuple[str, ...] = ("a", "b", "c")) -> None:
    with fresh_folder(target, FILES, whole=True) as folder:
        for name in names:
            (folder / name).write_text(text)
        write_record(folder, {"deos_fx": "test", "text": text})


def read_whole(target: Path) -> dict[str, bytes]:
    verify(target, record_of(target))
    return {name: data for name, data in contents(target).items() if name != "mine"}


# *** folders ***


def test_fresh_folder_replaces_its_own_entries_only(tmp_path: Path) -> None:
    (tmp_path / "out" / "in").mkdir(parents=True)
    for name in ("stays", "in/stays", "in/changes"):
        (tmp_path / "out" / name).write_text("1")
    with fresh_folder(tmp_path / "out") as folder:
        (folder / "in").mkdir()
        for name in ("new", "in/new", "in/changes"):
            (folder / name).write_text("2")
    found = {name: (tmp_path / "out" / name).read_text() for name in files_in(tmp_path / "out")}
    assert found == {"stays": "1", "in/stays": "1", "new": "2", "in/new": "2", "in/changes": "2"}


def test_fresh_folder_leaves_nothing_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), fresh_folder(tmp_path / "a" / "b") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_files_of_an_earlier_whole_are_removed_and_no_others(tmp_path: Path) -> None:
    write_whole(tmp_path, "old", ("a", "b", "c", "many-1", "many-2"))
    (tmp_path / "many-x").write_text("mine")
    write_whole(tmp_path, "new", ("a", "many-2"))
    assert set(contents(tmp_path)) == {RECORD, "a", "many-2", "many-x"}


@pytest.mark.parametrize("start", ["nothing", "an empty folder", "a whole", "a folder of a user"])
def test_a_kill_leaves_the_old_state_the_new_one_or_a_folder_that_says_so(
    start: str, tmp_path: Path
) -> None:
    write_whole(tmp_path / "new", "new")
    write_whole(tmp_path / "old", "old", ("a", "b", "c", "many-1"))
    old, new = read_whole(tmp_path / "old"), read_whole(tmp_path / "new")
    target = tmp_path / "work" / "target"
    seen = set()
    runs = kills(lambda: write_whole(target, "new"))
    while True:
        for path in sorted((tmp_path / "work").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if start != "nothing":
            target.mkdir(parents=True)
        if start == "a whole":
            for name, data in old.items():
                (target / name).write_bytes(data)
        if start == "a folder of a user":
            (target / "mine").write_text("mine")
            (target / "a").write_text("old")
        if next(runs, None) is None:
            break
        try:
            found = read_whole(target)
            seen.add("new" if found == new else "old" if found == old else "a mixture")
        except FileNotFoundError:
            seen.add("no record")
        except ValueError as error:
            seen.add(str(error).split(": ")[0].removeprefix(str(target)))
        # The next write leaves nothing of the killed one.
        write_whole(target, "new")
        assert read_whole(target) == new
        assert not list((tmp_path / "work").rglob(".*"))
        assert (target / "mine").exists() == (start == "a folder of a user")
    before = {"a whole": "old"}.get(start, "no record")
    between = set() if start == "nothing" else {" is incomplete"}
    assert seen == {before, "new"} | between


def test_a_folder_in_a_folder_says_of_itself_that_it_is_incomplete(tmp_path: Path) -> None:
    def write(text: str) -> None:
        with fresh_folder(tmp_path / "out") as folder:
            write_whole(folder / "in", text)
            write_text(folder / "page", text)

    states, seen = {}, set()
    for text in ("new", "old"):
        write(text)
        states[text] = read_whole(tmp_path / "out" / "in")
    for _ in kills(lambda: write("new")):
        try:
            found = read_whole(tmp_path / "out" / "in")
            seen |= {text for text, state in states.items() if found == state} or {"a mixture"}
        except ValueError as error:
            assert "out/in is incomplete" in error.args[0].replace(os.sep, "/")
            seen.add("incomplete")
        write("old")
    assert seen == {"old", "incomplete", "new"}
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("*/*"))
    assert names == ["in", *sorted(f"in/{name}" for name in ("a", "b", "c", RECORD)), "page"]


@pytest.mark.parametrize("error", [OSError("in use"), KeyboardInterrupt()])
def test_a_failure_between_two_files_leaves_the_old_state(
    error: BaseException, tmp_path: Path
) -> None:
    for name in ("in/a", "in/gone", "user"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("user")
    write_whole(tmp_path, "old", ("a", "b", "many-1"))
    before, replace, failed = contents(tmp_path), os.replace, True
    failing = 0
    while failed:
        left, failed = failing, False

        def replace_or_fail(source: Path, place: Path) -> None:
            nonlocal left, failed
            left -= 1
            if left == -1:
                failed = True
                raise error
            replace(source, place)

        with pytest.MonkeyPatch.context() as patch, suppress(type(error)):
            patch.setattr(os, "replace", replace_or_fail)
            with fresh_folder(tmp_path, FILES, whole=True) as folder:
                (folder / "in").mkdir()
                for name in ("a", "c", "in/a", "in/new"):
                    (folder / name).write_text("new")
                write_record(folder, {})
        assert (contents(tmp_path) == before) == failed
        assert not [*tmp_path.rglob(".*")]
        failing += 1
    assert failing > 8
    verify(tmp_path, record_of(tmp_path))
    found = {name: data for name, data in contents(tmp_path).items() if name != RECORD}
    assert found == dict.fromkeys(("a", "c", "in/a", "in/new"), b"new") | dict.fromkeys(
        ("in/gone", "user"), b"user"
    )


def test_a_real_kill_leaves_a_hidden_folder_that_the_next_write_removes(tmp_path: Path) -> None:
    code = (
        "import os, sys; from deos_fx.files import fresh_folder\n"
        "with fresh_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('half'); os._exit(9)"
    )
    # The first is killed before its target exists, the second when it does.
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")])
        assert done.returncode == 9
        assert len([*tmp_path.rglob("half")]) == 1
        (tmp_path / "out").mkdir(exist_ok=True)
    with fresh_folder(tmp_path / "out"):
        assert not [*tmp_path.rglob("half")]
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_only_folders_of_dead_writers_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".deos-fx-left").mkdir()
    (tmp_path / ".deos-fx-left" / "half").write_text("half")
    (tmp_path / ".deos-fx-file").write_text("")
    (tmp_path / ".other-12345678").mkdir()
    with scratch_folder(tmp_path) as (folder, _):
        assert sweep(tmp_path) == []
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {folder.name, ".deos-fx-file", ".other-12345678"}
    assert {path.name for path in tmp_path.iterdir()} == {".deos-fx-file", ".other-12345678"}


def test_writers_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    start, texts = threading.Barrier(4), [str(i) for i in range(4)]

    def write(text: str) -> None:
        start.wait()
        for _ in range(5):
            write_whole(tmp_path / "out", text)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = read_whole(tmp_path / "out")
    assert len({found[name] for name in "abc"}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# *** what is refused before the work ***


def test_folders_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "whole" / "a").mkdir(parents=True)
    cases = {"file": NotADirectoryError, "file/below": NotADirectoryError}
    for name, kind in cases.items():
        for check in (check_folder, lambda target: fresh_folder(target).__enter__()):
            with pytest.raises(kind, match=f"cannot write the folder .*{name}"):
                check(tmp_path / name)
    with (
        pytest.raises(IsADirectoryError, match="whole/a: it is a folder"),
        fresh_folder(tmp_path / "whole", FILES),
    ):
        pytest.fail("worked before checking")
    assert not [path for path in tmp_path.rglob(".*")]
    check_folder(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_found_to_be_taken_in_the_end_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / "y").write_text("file")
    for name, error in (("z", IsADirectoryError), ("y", NotADirectoryError)):
        with pytest.raises(error, match="Move it away"), fresh_folder(tmp_path) as folder:
            (folder / "a").write_text("new")
            (folder / "z").write_text("new") if name == "z" else (folder / "y").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["y", "z"]


# *** links and modes ***


@posix
def test_links_are_followed_as_targets_and_replaced_in_folders(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "shared").write_text("shared")
    (tmp_path / "disk" / "a").symlink_to(tmp_path / "shared")
    (tmp_path / "link").symlink_to("disk")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "disk" / "a").is_symlink()
    assert (tmp_path / "shared").read_text() == "shared"
    assert read_whole(tmp_path / "disk")["a"] == b"new"
    (tmp_path / "to shared").symlink_to("shared")
    write_text(tmp_path / "to shared", "new")
    assert (tmp_path / "to shared").is_symlink()
    assert (tmp_path / "shared").read_text() == "new"


@posix
def test_links_that_lead_nowhere_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "round").symlink_to("round")
    for target in (tmp_path / "link", tmp_path / "link" / "below", tmp_path / "round"):
        with (
            pytest.raises(FileNotFoundError, match=r"is a link to .*, which does not exist"),
            fresh_folder(target),
        ):
            pytest.fail("worked before checking")
    with pytest.raises(FileNotFoundError, match=r"is a link to .*gone, which does not exist"):
        write_file(tmp_path / "link", lambda part: pytest.fail("worked before checking"))


@posix
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
def test_the_umask_holds_for_all_files(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with fresh_folder(tmp_path / "a" / "out") as folder:
            (folder / "in").mkdir()
            write_tensors(folder / "in" / "tensors", {"x": torch.ones(2)})
            os.close(os.open(folder / "private", os.O_CREAT, 0o600))
        write_text(tmp_path / "text", "text")
        write_tensors(tmp_path / "tensors", {"x": torch.ones(2)})
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        whole = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == whole & ~mask, path


# *** files ***


def test_a_file_is_replaced_or_not_at_all(tmp_path: Path) -> None:
    for _ in kills(lambda: write_text(tmp_path / "text", "new")):
        assert not (tmp_path / "text").exists() or (tmp_path / "text").read_text() == "new"
        write_text(tmp_path / "text", "new")
        assert [path.name for path in tmp_path.iterdir()] == ["text"]
        (tmp_path / "text").unlink()
    with pytest.raises(FileNotFoundError, match="cannot write the file .*none"):
        write_text(tmp_path / "none" / "text", "new")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        write_text(tmp_path, "new")


def test_no_file_of_several_is_replaced_if_one_cannot_be_written(tmp_path: Path) -> None:
    def full(part: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(text: str) -> Callable[[Path], object]:
        return lambda part: part.write_text(text)

    one, other = tmp_path / "one", tmp_path / "other"
    write_files({one: write("1"), other: write("2")})
    with pytest.raises(OSError, match="cannot write the file .*other: No space left"):
        write_files({one: write("new"), other: full})
    assert contents(tmp_path) == {"one": b"1", "other": b"2"}
    assert len([*tmp_path.iterdir()]) == 2


def test_names_may_be_those_of_temporary_files(tmp_path: Path) -> None:
    for name in ("lock", "new"):
        write_text(tmp_path / name, name)
        with fresh_folder(tmp_path / "in" / name) as folder:
            write_text(folder / "lock", name)
    expected = {"lock": b"lock", "new": b"new", "in/lock/lock": b"lock", "in/new/lock": b"new"}
    assert contents(tmp_path) == expected


def test_whether_a_file_can_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    check_file(tmp_path / "file")
    check_file(tmp_path / "new")
    for name, kind in (("none/file", FileNotFoundError), ("file/below", NotADirectoryError)):
        with pytest.raises(kind, match="cannot write the file"):
            check_file(tmp_path / name)
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        check_file(tmp_path)
    assert contents(tmp_path) == {"file": b"old"}


@posix
def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "a"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to("a")
    for path in (pipe, tmp_path / "link"):
        with pytest.raises(OSError, match="a: it is a device or a pipe"):
            write_text(path, "new")
    with pytest.raises(OSError, match="a: it is a device or a pipe"), fresh_folder(tmp_path, FILES):
        pytest.fail("worked before checking")
    with pytest.raises(OSError, match="it is a device or a pipe"), fresh_folder(tmp_path) as folder:
        (folder / "a").write_text("new")
    assert pipe.is_fifo() and len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize(
    "failing",
    [
        lambda place: OSError(errno.ENOSPC, "full", place),
        lambda place: OSError(f"{place} is full"),
        lambda place: ValueError(f"{place} cannot be run here"),
    ],
)
def test_errors_name_what_was_to_be_written(
    failing: Callable[[Path], Exception], tmp_path: Path
) -> None:
    def fail(part: Path) -> None:
        raise failing(part)

    with pytest.raises((OSError, ValueError)) as caught:
        write_file(tmp_path / "file", fail)
    assert str(tmp_path / "file") in str(caught.value) and ".deos-fx" not in str(caught.value)
    # One in the other, as a command and the function that it calls.
    with pytest.raises((OSError, ValueError)) as caught:  # noqa: SIM117
        with fresh_folder(tmp_path / "out") as outer, fresh_folder(outer) as folder:
            fail(folder / "page")
    assert str(tmp_path / "out" / "page") in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_tensors_that_cannot_be_written_are_an_error_of_the_disk(tmp_path: Path) -> None:
    write_tensors(tmp_path / "tensors", {"x": torch.arange(3)})
    assert load_file(tmp_path / "tensors")["x"].tolist() == [0, 1, 2]
    from safetensors import SafetensorError

    with pytest.raises(OSError, match="cannot write x: I/O error"), disk_errors("x"):
        raise SafetensorError("I/O error")


def test_a_full_disk_is_told_with_the_name(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=rf"^cannot write the file {tmp_path}.a: No space left"):
        write_file(tmp_path / "a", fail)
    with pytest.raises(OSError, match=rf"^cannot write the folder {tmp_path}.b: No space left"):
        with fresh_folder(tmp_path / "b") as folder:
            fail(folder / "c")
    # What names a file, or is told in words, stays as it is.
    for other in (FileNotFoundError(errno.ENOENT, "No such file", "c"), OSError("no network")):
        with pytest.raises(type(other)) as caught, fresh_folder(tmp_path / "b"):
            raise other
        assert caught.value is other
    assert not [*tmp_path.iterdir()]
