"""Files from a stranger: bombs, special files, links. A typed error or a bounded answer."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.errors import CheckpointError, CheckpointFormatError, TruncatedCheckpoint
from tests import bombs
from tests.conftest import RecordCount
from tests.hostile_headers import header, tensor, with_length
from tests.test_untrusted_index import write, write_index

# Bytes of memory that reading headers may take beside what it was before.
PER_BYTE = 10  # of header or index: text outside of the first plane is four bytes a character
PER_TENSOR = 1024  # accepted: our entry, and the library's while it is asked
BASE = 200_000_000


# ------------------------------------------------------------------------------------- the bombs


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of each bomb, in a child that a crash would end and a hang would hold up."""
    done = subprocess.run(
        [sys.executable, bombs.__file__, str(tmp_path_factory.mktemp("bombs"))],
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.pop("name"): line for line in told}


ANSWERS = {
    "900,000 tensors": "opened",
    "more than a million tensors": "an object has at most 1000000 members",
    "white space": "opened",
    "100,000 dimensions": "'a' must be JSON of at most 4096 characters",
    "lists": "'a' must be JSON of at most 4096 characters",
    "objects": "'a' must be JSON of at most 4096 characters",
    "numbers": "'a' must be JSON of at most 4096 characters",
    "digits": "from 0 to 2**63 - 1",
    "nesting": "'a' must be JSON of at most 4096 characters",
    "nested objects": "'' must be JSON of at most 4096 characters",
    "metadata": "an object has at most 1000000 members",
    "a long metadata": "opened",
    "a long name": "a name has at most 4096 bytes",
    "an open string of quotes": "Unterminated string",
    "index: lists": "'x' must be JSON of at most 1048576 characters",
    "index: nesting": "'x' is nested deeper than 16",
    "index: an open string of quotes": "'x' must be JSON of at most 1048576 characters",
    "index: digits": "a number has at most 4300 digits",
    "index: a long shard name": "is the plain name of a file beside the index",
    "index: more than a million tensors": "an object has at most 1000000 members",
}


def test_every_bomb_has_an_answer() -> None:
    assert ANSWERS.keys() == {*bombs.HEADERS, *bombs.INDEXES}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
def test_a_bomb_is_opened_or_refused_in_bounded_memory(
    name: str,
    measured: dict[str, dict[str, Any]],
    record_count: RecordCount,
) -> None:
    told = measured[name]
    assert ANSWERS[name] in told["answer"]
    assert len(told["answer"]) < 2000
    sizes = {"bytes of files": told["nbytes"], "bytes of memory": max(0, told["grown_bytes"])}
    record_count("header and index bombs", 1, sizes)
    limit = PER_BYTE * told["nbytes"] + PER_TENSOR * told["num_tensors"] + BASE
    assert told["grown_bytes"] <= limit


@pytest.mark.parametrize("claimed", [3, 10**6, 99_999_999, 100_000_001, 2**40, 2**63, 2**64 - 1])
def test_a_lie_about_the_length_allocates_nothing(claimed: int, tmp_path: Path) -> None:
    """A claim above the file's size is refused before a buffer of that size is made."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little") + header(tensor()).encode() + b"xx")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)


# ------------------------------------------------------------------------- special files and links


def refusal(path: Path) -> str:
    """The refusal of a path, in a thread, so that a hang fails this test and not the run."""
    messages: list[str] = []

    def attempt() -> None:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(path)
        messages.append(str(caught.value))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(120)
    assert messages, f"opening {path} hung, or was not refused"
    return messages[0]


@pytest.fixture(params=["alone", "as a shard", "behind a link"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Where to put a special file, and what to open then."""
    if request.param == "alone":
        return tmp_path / "model.safetensors", tmp_path
    if request.param == "as a shard":
        return tmp_path / "x.safetensors", write_index(tmp_path, {"a": "x.safetensors"})
    link = tmp_path / "model.safetensors"
    link.symlink_to("target")
    return tmp_path / "target", link


def test_a_socket_is_refused(place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = place
    monkeypatch.chdir(path.parent)  # the path of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
        assert "must be there and readable" in refusal(opened)


def test_a_fifo_with_a_writer_is_refused_and_keeps_its_bytes(place: tuple[Path, Path]) -> None:
    path, opened = place
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(end, with_length(b"{}"))
        assert "must be a regular file, but is a FIFO" in refusal(opened)
        assert os.read(end, 100) == with_length(b"{}")
    finally:
        os.close(end)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/urandom", "/dev/ptmx"])
def test_a_device_is_refused(device: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to(device)
    message = refusal(write_index(tmp_path, {"a": "x.safetensors"}))
    assert "but is a character device" in message or "must be there and readable" in message


def test_a_directory_is_refused(place: tuple[Path, Path]) -> None:
    path, opened = place
    path.mkdir()
    message = refusal(opened)
    # Behind a link it is a folder to look in.
    assert "must be a regular file, but is a directory" in message or "holds nothing" in message


def test_an_empty_file_is_truncated(place: tuple[Path, Path]) -> None:
    path, opened = place
    path.touch()
    with pytest.raises(TruncatedCheckpoint, match="must have 8 bytes"):
        Checkpoint.open(opened)


@pytest.mark.parametrize("target", ["/proc/self/mem", "/proc/self/environ", "/proc/cpuinfo"])
def test_a_file_that_claims_to_be_empty_is_truncated(target: str, tmp_path: Path) -> None:
    """Files of /proc are regular and have bytes, but their size is 0."""
    (tmp_path / "model.safetensors").symlink_to(target)
    with pytest.raises(TruncatedCheckpoint, match="must have 8 bytes"):
        Checkpoint.open(tmp_path)


def test_an_empty_index_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.touch()
    assert "Expecting '{'" in refusal(index)


@pytest.mark.parametrize("length", [2, 3, 41])
def test_a_loop_of_links_is_refused(length: int, place: tuple[Path, Path]) -> None:
    path, opened = place
    steps = [path, *(path.with_name(f"step{number}") for number in range(1, length))]
    for link, target in zip(steps, [*steps[1:], path], strict=True):
        link.symlink_to(target.name)
    assert "must be there and readable" in refusal(opened)


def test_a_file_that_may_not_be_read_is_refused(
    place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the answer of the system is made up."""
    path, opened = place
    write(path)
    plain_open = os.open

    def denied(name: str, flags: int) -> int:
        if os.fspath(name) == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return plain_open(name, flags)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(CheckpointFormatError, match=r"must be there and readable.*Permission"):
        Checkpoint.open(opened)


def test_links_are_followed_out_of_the_folder_only_where_its_owner_made_them(
    tmp_path: Path,
) -> None:
    """The hub's layout is links out of the folder. An index can only name what is in it."""
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.mkdir()
    outer.mkdir()
    target = write(outer / "blob")
    index = write_index(inner, {"a": "x.safetensors"})
    (inner / "x.safetensors").symlink_to(Path("..", "outer", "blob"))
    assert Checkpoint.open(index).files[0].path == target
    for name in ("../outer/blob", str(target)):
        with pytest.raises(CheckpointFormatError, match="is the plain name of a file beside"):
            Checkpoint.open(write_index(inner, {"a": name}))


def test_a_folder_that_is_a_link_is_the_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    write(inner / "x.safetensors")
    write_index(inner, {"a": "x.safetensors"})
    (tmp_path / "link").symlink_to("inner")
    assert Checkpoint.open(tmp_path / "link").files[0].path == inner / "x.safetensors"


def test_a_hard_link_is_the_file(tmp_path: Path) -> None:
    target = write(tmp_path / "blob")
    inner = tmp_path / "inner"
    inner.mkdir()
    os.link(target, inner / "model.safetensors")
    assert Checkpoint.open(inner).files[0].stamp.inode == target.stat().st_ino


def test_one_file_under_two_names_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors")
    os.link(path, tmp_path / "y.safetensors")
    index = write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    assert "lacks 1: 'b'" in refusal(index)


def test_an_index_that_names_itself_is_refused(tmp_path: Path) -> None:
    index = write_index(tmp_path, {"a": "model.safetensors.index.json"})
    assert "a safetensors file begins with a header length" in refusal(index)
