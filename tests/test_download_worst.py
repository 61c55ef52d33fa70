"""Downloads at their worst moments: what may not come out wrong, hang or stay."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from http_server import Act, Asked, Server, Version, pattern

from nexus_ext import errors, owners
from nexus_ext.download import Download, Downloader, fetching, leftovers, patience
from nexus_ext.download import downloader as download_module
from nexus_ext.download.filesystem import FileSystemSource
from nexus_ext.download.journal import Block, Head, new_hasher
from nexus_ext.download.leftovers import adopt
from nexus_ext.download.partial import Partial
from nexus_ext.download.ranges import Ranges
from nexus_ext.download.schedule import Schedule

PATIENCE_SECONDS = 60
BLOCK = 32 << 10
DATA = pattern(3 * BLOCK)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FIRST_SECONDS", 0.001)
    monkeypatch.setattr(patience, "_MOST_SECONDS", 0.004)


def downloader(num_connections: int = 1, **options: Any) -> Downloader:
    settings: dict[str, Any] = {"timeout_seconds": PATIENCE_SECONDS} | options
    return Downloader(
        max_connections=num_connections, chunk_bytes=num_connections * BLOCK, **settings
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- wrong bytes -----------------------------------------------------------------------------------


def test_a_late_write_never_changes_what_was_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong block stands still before its write; meanwhile an answer with all brings it too."""
    is_writing, write = threading.Event(), Partial.write

    def script(asked: Asked) -> Act | None:
        if asked.span == (BLOCK, 2 * BLOCK):
            return Act(flip=5)
        if asked.span == (2 * BLOCK, 3 * BLOCK):
            assert is_writing.wait(PATIENCE_SECONDS)
            return Act(ignore_range=True)
        return None

    def slow(partial: Partial, data: bytes | memoryview, offset: int) -> None:
        if offset == BLOCK and data != DATA[BLOCK : 2 * BLOCK]:
            is_writing.set()
            with transfer.changed:
                landed = partial.landed
                assert transfer.changed.wait_for(
                    lambda: (
                        transfer.is_over
                        or (landed.covers(2 * BLOCK, 3 * BLOCK) and not landed.covers(0, 2 * BLOCK))
                    ),
                    PATIENCE_SECONDS,
                )
        write(partial, data, offset)

    monkeypatch.setattr(Partial, "write", slow)
    target = tmp_path / "file"
    with Server(DATA, script) as server, downloader(2) as loader:
        gate = server.gate = threading.Event()
        arriving = loader.start(Download(server.url, target, sha256=sha256(DATA)))
        transfer = arriving._transfer
        gate.set()
        with pytest.raises(errors.ContentMismatch):
            arriving.result()
    assert os.listdir(tmp_path) == []


def test_pieces_under_a_weak_etag_are_never_put_together(tmp_path: Path) -> None:
    """Equal weak ETags do not promise equal bytes."""
    new = pattern(len(DATA), seed=1)

    def script(asked: Asked) -> None:
        if len(server.asked) > 1:
            server.version = Version(new, 'W/"v1"')

    with Server(DATA, script, etag='W/"v1"') as server, downloader() as loader:
        loader.fetch(Download(server.url, tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() in (DATA, new)


# -- waiting for ever ------------------------------------------------------------------------------


def test_what_is_wanted_stays_so_until_it_has_landed() -> None:
    """Though others look for work while its request is under way, and that fails."""
    schedule, landed = Schedule(BLOCK), Ranges()
    schedule.begin(landed, len(DATA))
    schedule.want([(2 * BLOCK, 3 * BLOCK)])
    span = schedule.take(len(DATA), True, landed)
    assert span == (2 * BLOCK, 3 * BLOCK)
    assert schedule.take(len(DATA), True, landed) is None
    schedule.give_back(landed, span)
    assert schedule.take(len(DATA), True, landed) == span
    schedule.give_back(landed, span)
    assert schedule.take(len(DATA), False, landed) == span  # before the rest


def test_what_had_landed_in_a_part_that_was_given_up_is_wanted_again() -> None:
    schedule, landed = Schedule(BLOCK), Ranges()
    schedule.begin(landed, len(DATA))
    schedule.want([(0, BLOCK)])
    assert schedule.take(len(DATA), True, landed) == (0, BLOCK)
    landed.add(0, BLOCK)
    assert schedule.take(len(DATA), True, landed) is None
    schedule.begin(Ranges(), len(DATA))
    assert schedule.take(len(DATA), True, Ranges()) == (0, BLOCK)


def test_a_file_of_untold_length_that_became_shorter_is_fetched_anew(tmp_path: Path) -> None:
    def script(asked: Asked) -> Act:
        if len(server.asked) == 1:
            return Act(chunked=True, ignore_range=True, cut=2 * BLOCK)
        server.version = Version(DATA[:BLOCK], None)
        return Act(chunked=True, ignore_range=True)

    with Server(DATA, script, etag=None) as server, downloader() as loader:
        assert loader.fetch(Download(server.url, tmp_path / "file")).nbytes == BLOCK
    assert (tmp_path / "file").read_bytes() == DATA[:BLOCK]
    assert os.listdir(tmp_path) == ["file"]


# -- without bounds --------------------------------------------------------------------------------


def test_a_body_without_end_ends_where_the_file_does(tmp_path: Path) -> None:
    data = pattern(4 << 20)
    endless = Act(chunked=True, ignore_range=True)
    with Server(data, always=endless) as server, downloader(max_retries=0) as loader:
        with pytest.raises(errors.ContentMismatch, match="asked for"):
            loader.fetch(Download(server.url, tmp_path / "file", nbytes=5))
        assert loader.stats().bytes_received <= BLOCK
    assert os.listdir(tmp_path) == []


# -- threads ---------------------------------------------------------------------------------------


def no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_without_a_thread_that_hashes_the_download_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "start_follower", no_thread)
    with (
        Server(DATA) as server,
        downloader() as loader,
        pytest.raises(errors.DownloadError) as caught,
    ):
        loader.fetch(Download(server.url, tmp_path / "file"))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("num_threads", [0, 1])
def test_fewer_workers_than_asked_for_do_and_none_is_an_error(
    num_threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, room = threading.Thread.start, [num_threads]

    def limited(thread: threading.Thread) -> None:
        if thread.name[15:].isdigit():  # nexus-download-N
            room[0] -= 1
            if room[0] < 0:
                no_thread()
        start(thread)

    with Server(DATA) as server:
        monkeypatch.setattr(threading.Thread, "start", limited)
        with downloader(4) as loader:
            if num_threads:
                assert loader.fetch(Download(server.url, tmp_path / "file")).nbytes == len(DATA)
            else:
                with pytest.raises(errors.DownloadError, match="thread"):
                    loader.fetch(Download(server.url, tmp_path / "file"))
                assert loader.stats().active_downloads == 0


def test_an_exit_out_of_progress_costs_no_worker(tmp_path: Path) -> None:
    def leave(path: str, done_bytes: int, total_bytes: int | None) -> None:
        if path.endswith("one"):
            raise SystemExit(3)

    with Server(DATA) as server, downloader(progress=leave) as loader:
        with pytest.raises(errors.DownloadError) as caught:
            loader.fetch(Download(server.url, tmp_path / "one"))
        assert isinstance(caught.value.__cause__, SystemExit)
        loader.fetch(Download(server.url, tmp_path / "two"))
    assert os.listdir(tmp_path) == ["two"]


def test_after_close_nothing_is_published_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that waits for the disk is waited for."""
    is_syncing, may_go_on, sync = threading.Event(), threading.Event(), os.fdatasync

    def slow(descriptor: int) -> None:
        is_syncing.set()
        assert may_go_on.wait(PATIENCE_SECONDS)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    with Server(DATA) as server:
        loader = downloader()
        arriving = loader.start(Download(server.url, tmp_path / "file"))
        assert is_syncing.wait(PATIENCE_SECONDS)
        # The workers end at once; what holds `close` up then is the thread at the disk.
        threading.Timer(0.2, may_go_on.set).start()
        loader.close()
        assert arriving.has_ended


def test_a_part_that_closes_with_an_error_ends_its_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems of networks tell late that they are full."""
    close = Partial.close

    def late(descriptor: int) -> None:
        real(descriptor)
        raise OSError(122, "Disk quota exceeded")

    def failing(partial: Partial) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "close", late)
            close(partial)

    real = os.close
    monkeypatch.setattr(Partial, "close", failing)
    always = Act(cut=BLOCK // 2)
    with (
        Server(DATA, always=always) as server,
        downloader(max_retries=0) as loader,
        pytest.raises(errors.SourceUnavailable),
    ):
        loader.fetch(Download(server.url, tmp_path / "file"))


def test_what_was_started_before_a_download_that_cannot_be_is_cancelled(tmp_path: Path) -> None:
    with Server(DATA) as server, downloader() as loader:
        server.gate = threading.Event()
        downloads = [
            Download(server.url, tmp_path / "one"),
            Download("nothing://host/file", tmp_path / "two"),
        ]
        with pytest.raises(errors.ConfigError):
            loader.fetch_all(downloads)
        server.gate.set()
        loader.wait_until(lambda: loader.stats().active_downloads == 0)
        assert loader.stats().failed_downloads == 1
    assert os.listdir(tmp_path) == []


# -- sources ---------------------------------------------------------------------------------------


def test_a_last_look_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/nexus/worst", DATA)
    recheck, failures = FileSystemSource.recheck, iter([True, True])

    def shaky(source: FileSystemSource, validator: str) -> bool:
        if next(failures, False):
            raise patience.Trouble("reset")
        return recheck(source, validator)

    monkeypatch.setattr(FileSystemSource, "recheck", shaky)
    with downloader() as loader:
        fetched = loader.fetch(Download("memory://nexus/worst", tmp_path / "file"))
    memory.rm("/nexus", recursive=True)
    assert fetched.num_retries == 2
    assert (tmp_path / "file").read_bytes() == DATA


class Bare(MemoryFileSystem):  # type: ignore[misc]
    """Tells nothing of a file's version."""

    protocol = "bare"
    store: ClassVar[dict[str, Any]] = {}
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.replace("bare://", "memory://"))
        return stripped

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        told = super().info(path)
        return {name: told[name] for name in ("name", "size", "type")}


def test_pieces_of_a_file_system_that_tells_no_version_are_never_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(registry._registry, "bare", Bare)
    bare, new, cat = fsspec.filesystem("bare"), pattern(len(DATA), seed=1), Bare.cat_file
    bare.pipe_file("/file", DATA)

    def change(fs: Bare, path: str, start: int, end: int) -> bytes:
        data: bytes = cat(fs, path, start=start, end=end)
        bare.pipe_file("/file", new)
        return data

    monkeypatch.setattr(Bare, "cat_file", change)
    with downloader() as loader:
        loader.fetch(Download("bare://file", tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() in (DATA, new)


def test_a_file_system_that_connects_at_once_and_fails_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with downloader() as loader, pytest.raises(errors.SourceUnavailable, match="ftp"):
        loader.fetch(Download(f"ftp://me:hunter2@127.0.0.1:{port}/file", tmp_path / "file"))


@pytest.mark.parametrize("password", ["hun/ter2", "hun?ter2", "hun#ter2"])
def test_a_password_that_was_not_quoted_is_not_shown(password: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Download(f"https://me:{password}@host/file", tmp_path / "file")
    assert "hun" not in str(caught.value)
    assert "ter2" not in str(caught.value)


def test_time_before_a_body_is_not_held_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier call left may take minutes to read again."""
    now = [0.0]
    monkeypatch.setattr(patience.Clock, "now", lambda clock: now[0])

    def slow(target: Path, key: str) -> None:
        now[0] += 1000

    monkeypatch.setattr(fetching, "adopt", slow)
    with Server(DATA) as server, downloader(max_retries=0) as loader:
        loader.fetch(Download(server.url, tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == DATA


# -- what was left ---------------------------------------------------------------------------------


def left(target: Path, nbytes: int) -> Partial:
    """A part of DATA that was released."""
    part = Partial.create(target, Head("key", len(DATA), 'etag:"v1"'))
    part.write(DATA[:nbytes], 0)
    algorithm, hasher = new_hasher()
    assert hasher is not None
    hasher.update(DATA[:nbytes])
    part.record(Block(0, nbytes, f"{algorithm}:{hasher.hexdigest()}"))
    part.release()
    part.close()
    return part


def open_in(folder: Path) -> list[str]:
    """What of a folder this process holds open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [path for path in found if path.startswith(str(folder))]


def test_a_part_that_cannot_be_read_is_removed_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    parts = [left(target, 100), left(target, 200)]
    preadv = os.preadv

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        tried.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        if len(tried) == 2:  # the second part, whichever that is
            raise OSError(5, "Input/output error")
        return preadv(descriptor, buffers, offset)

    tried: set[str] = set()
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(errors.WriteError):
        adopt(target, "key")
    assert open_in(tmp_path) == []
    monkeypatch.undo()
    again = adopt(target, "key")
    assert again is not None
    assert again.path in [part.path for part in parts]
    again.remove()
    again.close()
    assert os.listdir(tmp_path) == []


def test_a_kill_while_a_strangers_part_is_copied_does_not_make_it_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stranger may be alive, and write: its part is copied, never gone on with."""
    target = tmp_path / "file"
    part = left(target, 100)
    (journal,) = tmp_path.glob(".*.journal")
    token = journal.name.split(".")[-3]
    journal.rename(tmp_path / f".file.{token}.{'0' * 32}-1-1-1.journal")
    copy, fates = leftovers._copy, []

    def seen(old: Partial, blocks: Any) -> Partial:
        assert old.path == part.path
        (found,) = tmp_path.glob(".*.journal")
        fates.append(owners.fate(found.name.split(".")[-2]))
        return copy(old, blocks)

    monkeypatch.setattr(leftovers, "_copy", seen)
    own = adopt(target, "key")
    assert own is not None
    assert fates == ["unknown"]
    own.remove()
    own.close()
    assert os.listdir(tmp_path) == []


def test_a_server_behind_a_redirect_that_asks_for_a_pause_gets_it(tmp_path: Path) -> None:
    busy = Act(status=429, headers={"Retry-After": "0"})
    script = [Act(redirect="/other"), Act(), busy]
    with Server(DATA, script) as server, downloader() as loader:
        fetched = loader.fetch(Download(server.url, tmp_path / "file"))
    assert fetched.num_retries == 1
    assert [asked.path for asked in server.asked] == ["/file", *["/other"] * 4]


@pytest.mark.parametrize("port", ["99999", "http", "80\\.elsewhere"])
def test_a_redirect_to_no_port_is_refused(port: str, tmp_path: Path) -> None:
    always = Act(redirect=f"http://127.0.0.1:{port}/file")
    with (
        Server(DATA, always=always) as server,
        downloader() as loader,
        pytest.raises(errors.SourceRefused),
    ):
        loader.fetch(Download(server.url, tmp_path / "file"))


def test_a_size_beyond_what_files_can_have_is_nonsense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems do not say how much is free: nothing else would refuse it."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_blocks=0))
    always = Act(headers={"Content-Range": f"bytes 0-{BLOCK - 1}/{10**19 - 1}"})
    with (
        Server(DATA, always=always) as server,
        downloader(max_retries=1) as loader,
        pytest.raises(errors.ContentMismatch),
    ):
        loader.fetch(Download(server.url, tmp_path / "file"))
    assert os.listdir(tmp_path) == []
