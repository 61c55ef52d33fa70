"""Downloads over HTTP: whatever a server does, the right file arrives or a typed error says why."""

from __future__ import annotations

import gc
import hashlib
import itertools
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from http_server import Act, Asked, Server, Version, pattern

from nexus_ext import errors
from nexus_ext.download import Arriving, Download, Downloader, facts, patience
from nexus_ext.download.line import http2_state

PATIENCE_SECONDS = 60
BLOCK = 32 << 10
NUM_CONNECTIONS = 4
DATA = pattern(10 * BLOCK + 17)
SECRET = "hunter2"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FIRST_SECONDS", 0.001)
    monkeypatch.setattr(patience, "_MOST_SECONDS", 0.004)
    monkeypatch.setattr(patience, "_MOST_RETRY_AFTER_SECONDS", 0.01)


def downloader(**options: Any) -> Downloader:
    settings: dict[str, Any] = {
        "max_connections": NUM_CONNECTIONS,
        "chunk_bytes": NUM_CONNECTIONS * BLOCK,
        "timeout_seconds": PATIENCE_SECONDS,
    }
    return Downloader(**settings | options)


# One request after the other: what the server sent before has landed.
ONE = {"max_connections": 1, "chunk_bytes": BLOCK}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def left_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


# -- behaviours as data ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A server's behaviour, what is asked of it, and what must come out.

    `wants` names an error, or is None: then the file must be right. `spares` says that what had
    arrived may stay for a later call.
    """

    script: Any = ()
    always: Act | None = None
    wants: type[Exception] | None = None
    data: bytes = DATA
    etag: str | None = '"v1"'
    modified: str | None = None
    path: str = "/file"
    asks: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    spares: bool = False


def every(n: int, act: Act) -> Callable[[Asked], Act | None]:
    """Every n-th request gets this."""
    count = itertools.count(1)
    return lambda asked: act if next(count) % n == 0 else None


def numbered(make: Callable[[int], Act]) -> Callable[[Asked], Act]:
    """Another answer to each request."""
    count = itertools.count()
    return lambda asked: make(next(count))


def answer(status: int, **headers: str) -> Act:
    return Act(status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})


RIGHT = {"sha256": sha256(DATA)}
SIZE = {"nbytes": len(DATA)}
MISMATCH, UNAVAILABLE = errors.ContentMismatch, errors.SourceUnavailable
REFUSED, DENIED, MISSING = errors.SourceRefused, errors.AccessDenied, errors.SourceMissing
BAD_CHUNK = (
    b"HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 0-9/327697\r\n\r\nzz"
)

CASES = {
    "as it should be": Case(),
    "with its digest": Case(asks=RIGHT | SIZE),
    "one byte": Case(data=b"x"),
    "one block": Case(data=DATA[:BLOCK]),
    "one block and a byte": Case(data=DATA[: BLOCK + 1]),
    "empty": Case(data=b""),
    "empty, as expected": Case(data=b"", asks={"nbytes": 0, "sha256": sha256(b"")}),
    "empty, ranges ignored": Case(data=b"", always=Act(ignore_range=True)),
    "ranges ignored": Case(always=Act(ignore_range=True)),
    "ranges ignored at first": Case([Act(ignore_range=True)]),
    "ranges ignored at first, cut": Case([Act(ignore_range=True, cut=50_000)]),
    "ranges ignored later": Case([Act(), Act(), Act(ignore_range=True)]),
    "ranges ignored now and then": Case(every(3, Act(ignore_range=True))),
    "ranges ignored, resets": Case(
        [Act(ignore_range=True, cut=n * 40_000, reset=True) for n in range(6)],
        always=Act(ignore_range=True),
    ),
    "parts in chunks": Case(always=Act(chunked=True)),
    "all in chunks": Case(always=Act(chunked=True, ignore_range=True)),
    "parts without a length": Case(always=Act(until_close=True)),
    "all without a length, size known": Case(
        always=Act(until_close=True, ignore_range=True), asks=SIZE
    ),
    "all without a length, digest known": Case(
        always=Act(until_close=True, ignore_range=True), asks=RIGHT
    ),
    "all without a length, cut, size known": Case(
        [Act(until_close=True, ignore_range=True, cut=99)],
        always=Act(until_close=True, ignore_range=True),
        asks=SIZE,
    ),
    "all without a length": Case(always=Act(until_close=True, ignore_range=True), wants=MISMATCH),
    "a date for a version": Case(etag=None, modified="Tue, 01 Jan 2030 00:00:00 GMT"),
    "a weak ETag": Case(etag='W/"v1"'),
    "no version": Case(etag=None),
    "no version, cut": Case([Act(), Act(cut=70_000)], etag=None),
    "no version, digest known": Case(etag=None, asks=RIGHT),
    "shorter parts than asked for": Case(always=Act(halve=True)),
    "cut once": Case([Act(cut=1000)]),
    "cut at every third": Case(every(3, Act(cut=20_000))),
    "cut before the first byte": Case([Act(cut=0)] * 5),
    "reset once": Case([Act(cut=1000, reset=True)]),
    "reset without an answer": Case([Act(silent=True, reset=True)] * 3),
    "closed without an answer": Case([Act(silent=True)] * 3),
    "always closed": Case(always=Act(silent=True), wants=UNAVAILABLE),
    "always reset": Case(always=Act(silent=True, reset=True), wants=UNAVAILABLE),
    "always cut": Case(always=Act(cut=0), wants=UNAVAILABLE),
    "in the end always cut": Case([Act()] * 4, Act(cut=10), wants=UNAVAILABLE, spares=True),
    "stalls": Case([Act(), Act(cut=9, stall=True)], options={"timeout_seconds": 2}),
    "stalls before the body": Case([Act(cut=0, stall=True)], options={"timeout_seconds": 2}),
    "500": Case([answer(500)] * 3),
    "502, 503, 504": Case([answer(502), answer(503), answer(504)]),
    "408 and 425": Case([answer(408), answer(425)]),
    "always 500": Case(always=answer(500), wants=UNAVAILABLE),
    "429": Case([answer(429)]),
    "429, wait a second": Case([answer(429, Retry_After="1")] * 2),
    "429, wait until a date": Case([answer(429, Retry_After="Tue, 01 Jan 2030 00:00:00 GMT")]),
    "503, wait for nonsense": Case([answer(503, Retry_After="soon")]),
    "503, wait for ever": Case([answer(503, Retry_After="9" * 40)]),
    "always 429": Case(always=answer(429, Retry_After="1"), wants=UNAVAILABLE),
    "another range is told": Case([Act(lie=5)]),
    "another range is sent": Case([Act(shift=5)]),
    "always another range told": Case(always=Act(lie=5), wants=MISMATCH),
    "always another range sent": Case(always=Act(shift=5), wants=MISMATCH),
    "a part of nothing": Case([Act(headers={"Content-Range": None})]),
    "always a part of nothing": Case(always=Act(headers={"Content-Range": None}), wants=MISMATCH),
    "a range of nonsense": Case([Act(headers={"Content-Range": "bytes x-y/z"})]),
    "a range of unknown size": Case(
        always=Act(headers={"Content-Range": "bytes 0-9/*"}), wants=MISMATCH
    ),
    "another size told": Case(
        [Act(), Act(), Act(headers={"Content-Range": f"bytes {BLOCK}-{2 * BLOCK - 1}/9999999"})]
    ),
    "many ranges in one": Case(
        always=Act(headers={"Content-Range": None, "Content-Type": "multipart/byteranges"}),
        wants=MISMATCH,
    ),
    "a length beyond the range": Case([Act(headers={"Content-Length": "999999"}, cut=BLOCK)]),
    "two lengths": Case([Act(headers={"Content-Length": "5, 6"}, cut=5)]),
    "a length of nonsense": Case([Act(headers={"Content-Length": "many"}, cut=5)]),
    "a length beyond the end": Case(
        [Act(ignore_range=True, headers={"Content-Length": "999999"}, cut=len(DATA))],
    ),
    "always a length beyond the end": Case(
        always=Act(ignore_range=True, headers={"Content-Length": "999999"}, cut=len(DATA)),
        wants=UNAVAILABLE,
        spares=True,
    ),
    "bytes after the end": Case([Act(extra=b"HTTP/1.1 200 OK\r\n\r\nmore")] * 3),
    "no HTTP": Case([Act(raw=b"SSH-2.0-OpenSSH\r\n")]),
    "half a head": Case([Act(raw=b"HTTP/1.1 206 Partial Cont")]),
    "a head without an end": Case([Act(raw=b"HTTP/1.1 206 P\r\nX: " + b"a" * 300_000)]),
    "broken chunks": Case([Act(raw=BAD_CHUNK)]),
    "always no HTTP": Case(always=Act(raw=b"\x16\x03\x01\r\n\r\n"), wants=UNAVAILABLE),
    "identity": Case(always=Act(headers={"Content-Encoding": "identity"})),
    "gzip": Case(always=Act(headers={"Content-Encoding": "gzip"}), wants=MISMATCH),
    "gzip and all": Case(
        always=Act(headers={"Content-Encoding": "gzip"}, ignore_range=True), wants=MISMATCH
    ),
    "gzip later": Case(
        [Act(), Act(), Act()], Act(headers={"Content-Encoding": "br"}), wants=MISMATCH
    ),
    "a web page": Case(
        always=Act(
            body=b"<html>", ignore_range=True, headers={"Content-Type": "text/html; charset=x"}
        ),
        wants=MISMATCH,
    ),
    "a web page in parts": Case(
        always=Act(headers={"Content-Type": "TEXT/HTML"}), wants=MISMATCH, asks=RIGHT
    ),
    "a page that was asked for": Case(
        always=Act(headers={"Content-Type": "text/html"}), path="/page.html"
    ),
    "400": Case(always=answer(400), wants=REFUSED),
    "401": Case(always=answer(401), wants=DENIED),
    "403": Case(always=answer(403), wants=DENIED),
    "403 later": Case([Act()] * 3, answer(403), wants=DENIED, spares=True),
    "404": Case(always=answer(404), wants=MISSING),
    "404 later": Case([Act()] * 3, answer(404), wants=MISSING),
    "404 with a page": Case(
        always=Act(status=404, body=b"<html>no", headers={"Content-Type": "text/html"}),
        wants=MISSING,
    ),
    "410": Case(always=answer(410), wants=MISSING),
    "416": Case(always=answer(416), wants=REFUSED),
    "418": Case(always=answer(418), wants=REFUSED),
    "204": Case(always=answer(204), wants=REFUSED),
    "304": Case(always=answer(304), wants=REFUSED),
    "302 to nowhere": Case(always=answer(302), wants=REFUSED),
    "redirected": Case([Act(redirect="/other")]),
    "redirected, absolute": Case([Act(redirect="http://localhost:{port}/other")]),
    "redirected ten times": Case([Act(redirect=f"/{n}") for n in range(10)]),
    "redirected eleven times": Case([Act(redirect=f"/{n}") for n in range(11)], wants=REFUSED),
    "redirected in a circle": Case(always=Act(redirect="/file"), wants=REFUSED),
    "redirected to a file": Case(always=Act(redirect="file:///etc/passwd"), wants=REFUSED),
    "redirected to ftp": Case(always=Act(redirect="ftp://host/file"), wants=REFUSED),
    "redirected to nonsense": Case(always=Act(redirect="http://[::/"), wants=REFUSED),
    "redirected to no host": Case(always=Act(redirect="http:///file"), wants=REFUSED),
    "a wrong byte": Case([Act(), Act(flip=5)], asks=RIGHT, wants=MISMATCH),
    "another digest": Case(asks={"sha256": sha256(b"")}, wants=MISMATCH),
    "another size": Case(asks={"nbytes": 5}, wants=MISMATCH),
    "another size, ranges ignored": Case(
        always=Act(ignore_range=True), asks={"nbytes": 5}, wants=MISMATCH
    ),
    "another size, in chunks": Case(
        always=Act(ignore_range=True, chunked=True), asks={"nbytes": 5}, wants=MISMATCH
    ),
    "an ETag that never stays": Case(
        numbered(lambda n: Act(headers={"ETag": f'"{n}"'})),
        wants=errors.SourceChanged,
    ),
    "a date that never stays": Case(
        numbered(lambda n: Act(headers={"Last-Modified": f"Tue, 01 Jan 2030 00:00:{n} GMT"})),
        etag=None,
        wants=errors.SourceChanged,
    ),
}


def test_there_are_many_behaviours() -> None:
    print(f"{len(CASES)} scripted behaviours")
    assert len(CASES) >= 50


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_right_file_arrives_or_a_typed_error(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with Server(case.data, case.script, case.always, case.etag, case.modified) as server:
        url = f"http://user:{SECRET}@127.0.0.1:{server.port}{case.path}?token={SECRET}"
        download = Download(url, folder / "file", **case.asks)
        with downloader(**case.options) as loader:
            if case.wants is None:
                fetched = loader.fetch(download)
                assert (fetched.nbytes, fetched.sha256) == (len(case.data), sha256(case.data))
                assert fetched.bytes_received >= len(case.data)
            else:
                with pytest.raises(case.wants) as caught:
                    loader.fetch(download)
                assert type(caught.value) is case.wants
                assert SECRET not in str(caught.value)
        assert server.most_at_once <= NUM_CONNECTIONS + 1  # one may be closing
    if case.wants is None:
        assert (folder / "file").read_bytes() == case.data
        assert left_in(folder) == ["file"]
    elif not case.spares:
        assert left_in(folder) == []
    else:
        assert not (folder / "file").exists()


def test_what_arrived_before_the_network_failed_is_not_fetched_again(tmp_path: Path) -> None:
    with Server(DATA, [Act()] * 5, Act(silent=True)) as server, downloader(**ONE) as loader:
        download = Download(server.url, tmp_path / "file")
        with pytest.raises(UNAVAILABLE, match="what arrived is kept"):
            loader.fetch(download)
        assert [name.rpartition(".")[2] for name in left_in(tmp_path)] == ["journal", "part"]
        server._always = Act()
        fetched = loader.fetch(download)
        assert fetched.bytes_reused == 5 * BLOCK
        assert fetched.bytes_reused + fetched.bytes_received == len(DATA)
        assert server.sent == len(DATA)
    assert left_in(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == DATA


def test_half_a_block_is_not_fetched_again(tmp_path: Path) -> None:
    with Server(DATA, [Act(cut=BLOCK - 5)]) as server, downloader() as loader:
        fetched = loader.fetch(Download(server.url, tmp_path / "file"))
        assert fetched.num_retries == 1
        assert server.sent == len(DATA)


@pytest.mark.parametrize("etag", ['"v2"', None])
def test_a_source_that_changed_between_two_calls_starts_anew(
    tmp_path: Path, etag: str | None
) -> None:
    new = pattern(len(DATA), seed=1)
    with Server(DATA, [Act()] * 5, Act(silent=True)) as server, downloader(**ONE) as loader:
        download = Download(server.url, tmp_path / "file")
        with pytest.raises(UNAVAILABLE):
            loader.fetch(download)
        assert left_in(tmp_path) != []
        server._always, server.version = Act(), Version(new, etag)
        fetched = loader.fetch(download)
        assert fetched.bytes_reused == 0
    assert (tmp_path / "file").read_bytes() == new
    assert left_in(tmp_path) == ["file"]


@pytest.mark.parametrize("nbytes", [len(DATA), len(DATA) - 3 * BLOCK, len(DATA) + 5])
def test_a_source_that_changes_meanwhile_is_fetched_anew(tmp_path: Path, nbytes: int) -> None:
    new = pattern(nbytes, seed=1)
    with Server(DATA) as server, downloader() as loader:
        count = itertools.count()

        def change(asked: Asked) -> None:
            if next(count) == 6:
                server.version = Version(new, '"v2"')

        server._script = change
        fetched = loader.fetch(Download(server.url, tmp_path / "file"))
        assert fetched.nbytes == nbytes
    assert (tmp_path / "file").read_bytes() == new
    assert left_in(tmp_path) == ["file"]


def test_bytes_that_were_given_out_do_not_change(tmp_path: Path) -> None:
    with Server(DATA) as server, downloader(**ONE) as loader:
        server.gate = threading.Event()
        server.gate.set()
        arriving = loader.start(Download(server.url, tmp_path / "file"))
        arriving.wait(0, 10)
        server.version = Version(pattern(len(DATA), seed=1), '"v2"')
        # Either every request was answered before, or the change is an error.
        try:
            arriving.result()
        except errors.SourceChanged:
            assert left_in(tmp_path) == []
        else:
            assert (tmp_path / "file").read_bytes() == DATA


def test_wrong_bytes_of_an_earlier_call_are_thrown_away(tmp_path: Path) -> None:
    script = [Act(flip=7), *[Act()] * 4]
    with Server(DATA, script, Act(silent=True)) as server, downloader(**ONE) as loader:
        download = Download(server.url, tmp_path / "file", **RIGHT)
        with pytest.raises(UNAVAILABLE):
            loader.fetch(download)
        server._always = Act()
        fetched = loader.fetch(download)
        assert (fetched.sha256, fetched.bytes_reused) == (RIGHT["sha256"], 0)
        assert fetched.bytes_received > len(DATA)
    assert left_in(tmp_path) == ["file"]


def test_many_files_share_the_connections(tmp_path: Path) -> None:
    with Server(DATA) as server, downloader() as loader:
        downloads = [Download(f"{server.url}{n}", tmp_path / str(n), **RIGHT) for n in range(20)]
        fetched = loader.fetch_all(downloads)
        assert [one.path.name for one in fetched] == [str(n) for n in range(20)]
        assert server.most_at_once <= NUM_CONNECTIONS
        stats = loader.stats()
    assert all((tmp_path / str(n)).read_bytes() == DATA for n in range(20))
    assert stats.bytes_received == 20 * len(DATA)
    assert (stats.finished_downloads, stats.failed_downloads, stats.active_downloads) == (20, 0, 0)
    assert stats.connections_opened == server.num_connections <= NUM_CONNECTIONS
    assert stats.connections_opened + stats.connections_reused == len(server.asked)
    assert stats.http_versions == {"HTTP/1.1": len(server.asked)}
    assert stats.http2 == http2_state()
    assert stats.seconds > 0


def test_the_first_error_is_raised_when_the_others_have_ended(tmp_path: Path) -> None:
    def script(asked: Asked) -> Act | None:
        return {"/1": answer(404), "/3": answer(403)}.get(asked.path)

    with Server(DATA, script) as server, downloader() as loader:
        base = server.url.removesuffix("/file")
        with pytest.raises(MISSING):
            loader.fetch_all([Download(f"{base}/{n}", tmp_path / str(n)) for n in range(5)])
    assert left_in(tmp_path) == ["0", "2", "4"]


# -- while it arrives ------------------------------------------------------------------------------


def gated(server: Server, first: int) -> threading.Event:
    """Only so many requests are answered before the event is set."""
    open_ = threading.Event()
    count = itertools.count()

    def script(asked: Asked) -> None:
        if next(count) >= first:
            open_.wait(PATIENCE_SECONDS)

    server._script = script
    return open_


def test_what_is_wanted_comes_next_and_in_order(tmp_path: Path) -> None:
    with Server(DATA) as server, downloader(**ONE) as loader:
        rest = gated(server, first=1)
        arriving = loader.start(Download(server.url, tmp_path / "file"))
        assert arriving.nbytes == len(DATA)
        arriving.wait(0, BLOCK)
        # One request more waits at the gate; what is said now concerns those after it.
        arriving.want([(7 * BLOCK + 5, 10), (4 * BLOCK - 1, 2)])
        arriving.want([(9 * BLOCK, 2 * BLOCK)])
        rest.set()
        arriving.result()
        starts = [span[0] // BLOCK for span in server.spans if span]
    assert starts[0] == 0
    assert sorted(starts) == list(range(11))
    wanted = [start for start in starts[1:] if start in (9, 10, 7, 3, 4)]
    under_way = starts[1]
    expected = [start for start in (9, 10, 7, 3, 4) if start != under_way]
    assert [start for start in wanted if start != under_way] == expected
    assert starts[2 : 2 + len(expected)] == expected


def test_bytes_can_be_read_as_soon_as_they_were_waited_for(tmp_path: Path) -> None:
    with Server(DATA) as server, downloader(max_connections=2) as loader:
        rest = gated(server, first=1)
        arriving = loader.start(Download(server.url, tmp_path / "file"))
        part = arriving.part_path
        arriving.wait(0, 1000)
        assert part.read_bytes()[:1000] == DATA[:1000]
        assert part.parent == tmp_path
        with pytest.raises(errors.DownloadTimeout):
            arriving.wait(len(DATA) - 10, 10, timeout_seconds=0.01)
        with arriving.open() as file:
            rest.set()
            arriving.wait(len(DATA) - 10, 10)
            arriving.result()
            assert file.read() == DATA
        assert arriving.part_path == tmp_path / "file"
        assert arriving.nbytes == len(DATA)
        arriving.wait(5, 10)
        with arriving.open() as file:
            assert file.read() == DATA
        with pytest.raises(errors.ConfigError, match="lie in the file"):
            arriving.wait(len(DATA), 1)
        with pytest.raises(errors.ConfigError):
            arriving.want([(-1, 5)])


def test_who_waits_hears_why_nothing_comes(tmp_path: Path) -> None:
    with Server(DATA, always=answer(404)) as server, downloader() as loader:
        arriving = loader.start(Download(server.url, tmp_path / "file"))
        for ask in (
            lambda: arriving.wait(0, 1),
            lambda: arriving.nbytes,
            lambda: arriving.part_path,
            arriving.open,
            arriving.result,
        ):
            with pytest.raises(MISSING):
                ask()


def cancelled(loader: Downloader, arriving: Arriving) -> None:
    arriving.cancel()


def closed(loader: Downloader, arriving: Arriving) -> None:
    loader.close()


@pytest.mark.parametrize("end", [cancelled, closed])
def test_a_download_that_is_given_up_ends_at_once_and_can_go_on(
    tmp_path: Path, end: Callable[[Downloader, Arriving], None]
) -> None:
    stuck = threading.Event()
    count = itertools.count()

    def script(asked: Asked) -> Act | None:
        if next(count) < 3:
            return None
        stuck.set()
        return Act(cut=5, stall=True)

    with Server(DATA, script) as server:
        download = Download(server.url, tmp_path / "file")
        with downloader(**ONE) as loader:
            arriving = loader.start(download)
            arriving.wait(0, BLOCK)
            assert stuck.wait(PATIENCE_SECONDS)
            end(loader, arriving)
            with pytest.raises(errors.DownloadCancelled):
                arriving.result()
            with pytest.raises(errors.DownloadCancelled):
                arriving.wait(0, 1)
        assert not (tmp_path / "file").exists()
        server._script = lambda asked: None
        with downloader(**ONE) as loader:
            assert loader.fetch(download).bytes_reused >= 3 * BLOCK
    assert left_in(tmp_path) == ["file"]


def test_a_worker_that_is_about_to_connect_is_cut_too(tmp_path: Path) -> None:
    connecting, go_on = threading.Event(), threading.Event()
    connect = socket.create_connection

    def slowly(*arguments: Any, **options: Any) -> socket.socket:
        connecting.set()
        assert go_on.wait(PATIENCE_SECONDS)
        return connect(*arguments, **options)

    with (
        Server(DATA) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        server.gate = threading.Event()  # no answer comes
        patch.setattr(socket, "create_connection", slowly)
        # Nobody would wait so long: without the cut this ends by the test's own limit.
        with downloader(timeout_seconds=10_000) as loader:
            arriving = loader.start(Download(server.url, tmp_path / "file"))
            assert connecting.wait(PATIENCE_SECONDS)
            arriving.cancel()
            go_on.set()
            with pytest.raises(errors.DownloadCancelled):
                arriving.result()
    assert left_in(tmp_path) == []


def test_a_closed_downloader_says_so(tmp_path: Path) -> None:
    with Server(DATA) as server:
        loader = downloader()
        loader.close()
        loader.close()
        with pytest.raises(errors.ConfigError, match="closed"):
            loader.fetch(Download(server.url, tmp_path / "file"))


def test_nothing_stays_open(tmp_path: Path) -> None:
    def open_now() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with Server(DATA, every(5, Act(cut=100))) as server, downloader() as loader:
        loader.fetch(Download(server.url, tmp_path / "first"))
    before = open_now()
    for n in range(5):
        with Server(DATA, every(5, Act(cut=100))) as server, downloader() as loader:
            loader.fetch(Download(server.url, tmp_path / str(n)))
        with (
            Server(DATA, [Act()] * 3, answer(404)) as server,
            downloader() as loader,
            pytest.raises(MISSING),
        ):
            loader.fetch(Download(server.url, tmp_path / "none"))
    assert open_now() == before


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    with Server(DATA) as server, downloader(progress=lambda *one: told.append(one)) as loader:
        loader.fetch(Download(server.url, tmp_path / "file"))
    assert {(what, total) for what, _, total in told} == {(str(tmp_path / "file"), len(DATA))}
    done = [one[1] for one in told]
    assert done == sorted(set(done))
    assert done[-1] == len(DATA)


def test_what_progress_raises_ends_the_download(tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        raise KeyError("mine")

    with (
        Server(DATA) as server,
        downloader(progress=progress) as loader,
        pytest.raises(errors.DownloadError, match="KeyError") as caught,
    ):
        loader.fetch(Download(server.url, tmp_path / "file"))
    assert isinstance(caught.value.__cause__, KeyError)
    assert left_in(tmp_path) == []


# -- secrets ---------------------------------------------------------------------------------------


def test_credentials_go_to_their_own_host_only(tmp_path: Path) -> None:
    with Server(DATA) as far, Server(DATA) as near:
        near._script = lambda asked: Act(redirect=f"http://127.0.0.1:{far.port}/far?sig={SECRET}")
        headers = {"Authorization": f"Bearer {SECRET}", "X-Token": SECRET}
        with downloader() as loader:
            loader.fetch(Download(near.url, tmp_path / "file", headers=headers))
        assert {one.headers.get("authorization") for one in near.asked} == {f"Bearer {SECRET}"}
        assert all(SECRET not in str(one.headers) for one in far.asked)
        # Where it led is remembered: one question, and perhaps one of each worker at the start.
        assert len(near.asked) <= NUM_CONNECTIONS
        assert len(far.asked) == 11


def test_userinfo_is_sent_as_a_header_and_a_header_wins(tmp_path: Path) -> None:
    with Server(b"x") as server, downloader() as loader:
        url = f"http://me:pass%20word@127.0.0.1:{server.port}/file"
        loader.fetch(Download(url, tmp_path / "a"))
        loader.fetch(Download(url, tmp_path / "b", headers={"authorization": "Bearer t"}))
        sent = [one.headers["authorization"] for one in server.asked]
    assert sent == ["Basic bWU6cGFzcyB3b3Jk", "Bearer t"]


def test_an_address_that_ran_out_is_asked_for_again(tmp_path: Path) -> None:
    count = itertools.count()

    def script(asked: Asked) -> Act | None:
        if asked.path == "/file":
            return Act(redirect=f"/signed{next(count)}")
        far = sum(one.path == asked.path for one in server.asked)
        return answer(403) if far > 3 else None

    with Server(DATA, script) as server, downloader(**ONE) as loader:
        loader.fetch(Download(server.url, tmp_path / "file", **RIGHT))
    assert next(count) > 1


def test_no_secret_is_logged_or_journalled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with Server(DATA) as server, downloader(**ONE) as loader:
        server._script = lambda asked: (
            Act(redirect=f"/to?sig={SECRET}", headers={"Set-Cookie": f"a={SECRET}"})
            if asked.path.startswith("/file")
            else (None if len(server.asked) < 9 else Act(silent=True))
        )
        url = f"http://me:{SECRET}@127.0.0.1:{server.port}/file?token={SECRET}"
        download = Download(url, tmp_path / "file", headers={"X-Token": SECRET})
        assert SECRET not in repr(download)
        arriving = loader.start(download)
        assert SECRET not in repr(arriving)
        with pytest.raises(UNAVAILABLE) as caught:
            arriving.result()
    assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text
    assert all("cookie" not in one.headers for one in server.asked)
    journals = list(tmp_path.glob(".file.*.journal"))
    assert journals
    assert all(SECRET.encode() not in path.read_bytes() for path in journals)


def test_an_application_still_sees_its_own_requests_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import httpx2

    caplog.set_level(logging.INFO)
    with Server(b"x") as server:
        with downloader() as loader:
            loader.fetch(Download(server.url, tmp_path / "file"))
        assert "HTTP Request" not in caplog.text
        with httpx2.Client() as client:
            client.get(server.url)
    assert "HTTP Request" in caplog.text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://a:b@host:8/x/y?q=1#f", "https://host:8/x/y"),
        ("s3://bucket/key?versionId=1", "s3://bucket/key"),
        ("http://[bad", "(a URL that cannot be read)"),
        ("simplecache::https://a:b@host/x?q=1", "simplecache::https://host/x"),
        ("zip://in/it::s3://a:b@bucket/key?q=1", "zip://in/it::s3://bucket/key"),
    ],
)
def test_a_url_is_shown_without_what_may_be_secret(url: str, shown: str) -> None:
    assert facts.shown(url) == shown


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asks",
    [
        {"url": "plain/path"},
        {"url": "http://"},
        {"url": "http://host:port/"},
        {"url": "http://host/a b"},
        {"nbytes": -1},
        {"sha256": "abc"},
        {"headers": {"Range": "bytes=0-1"}},
        {"headers": {"Accept-Encoding": "gzip"}},
        {"headers": {"X": "a\r\nY: b"}},
        {"headers": {"X": "\u00e9"}},
        {"headers": {"X:": "b"}},
        {"url": "memory://x", "headers": {"X": "b"}},
    ],
)
def test_a_download_that_cannot_be_is_refused(asks: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError):
        Download(**{"url": "http://host/file", "path": "file"} | asks)


@pytest.mark.parametrize(
    "options",
    [
        {"max_connections": 0},
        {"max_connections": 1000},
        {"chunk_bytes": 1000},
        {"max_retries": -1},
        {"timeout_seconds": 0},
    ],
)
def test_a_downloader_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError):
        Downloader(**options)


def test_nobody_there(tmp_path: Path) -> None:
    with Server() as server:
        port = server.port
    with downloader(max_retries=2) as loader, pytest.raises(UNAVAILABLE, match="2 times in a row"):
        loader.fetch(Download(f"http://127.0.0.1:{port}/file", tmp_path / "file"))
    assert left_in(tmp_path) == []


def test_without_httpx2_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nexus_ext.download import line

    monkeypatch.setattr(line.importlib.util, "find_spec", lambda name: None)
    with downloader() as loader:
        assert "h2 is not installed" in loader.stats().http2
        with pytest.raises(errors.MissingExtra, match=r"nexus_ext\[hub\]"):
            loader.fetch(Download("http://host/file", tmp_path / "file"))


# -- the disk --------------------------------------------------------------------------------------


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with Server(DATA) as server, downloader() as loader:
        with pytest.raises(errors.WriteError, match="must take the file"):
            loader.fetch(Download(server.url, tmp_path / "plain" / "file"))
        with pytest.raises(errors.WriteError):
            loader.fetch(Download(server.url, Path("/proc/none/file")))
        (tmp_path / "folder").mkdir()
        with pytest.raises(errors.WriteError):
            loader.fetch(Download(server.url, tmp_path / "folder"))
    assert left_in(tmp_path) == ["folder", "plain"]


@pytest.fixture
def full_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """The disk takes so many writes of data, then none."""
    write = os.pwrite
    left = [10**9]

    def limited(descriptor: int, data: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", limited)
    return lambda num_writes: left.__setitem__(0, num_writes)


@pytest.mark.parametrize("num_writes", [0, 1, 7])
def test_a_full_disk_is_told_and_nothing_is_left(
    tmp_path: Path, full_after: Callable[[int], None], num_writes: int
) -> None:
    full_after(num_writes)
    with (
        Server(DATA) as server,
        downloader() as loader,
        pytest.raises(errors.WriteError, match="No space left"),
    ):
        loader.fetch(Download(server.url, tmp_path / "file"))
    assert left_in(tmp_path) == []


def test_a_file_larger_than_what_is_free_is_refused_before_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = os.statvfs(tmp_path)
    small = os.statvfs_result((*room[:3], 1, 1, *room[5:10]))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    with Server(DATA) as server, downloader() as loader:
        with pytest.raises(errors.WriteError, match="are to come"):
            loader.fetch(Download(server.url, tmp_path / "file"))
        assert len(server.asked) == 1
    assert left_in(tmp_path) == []


def test_a_disk_that_takes_half_of_a_write_gets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:10_000], at))
    with Server(DATA) as server, downloader() as loader:
        loader.fetch(Download(server.url, tmp_path / "file", **RIGHT))
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_part_that_somebody_took_is_missed(tmp_path: Path) -> None:
    with Server(DATA) as server, downloader() as loader:
        rest = gated(server, first=1)
        arriving = loader.start(Download(server.url, tmp_path / "file"))
        arriving.part_path.unlink()
        rest.set()
        with pytest.raises(errors.DownloadError, match="removed or replaced"):
            arriving.result()
    assert left_in(tmp_path) == []
