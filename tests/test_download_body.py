"""Bodies: read past h11 where that is safe, by httpx2 elsewhere."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from http_server import Act, Server, pattern

from nexus_ext.download import Download, Downloader, body, patience

BLOCK = 32 << 10
NUM_CONNECTIONS = 2
DATA = pattern(20 * BLOCK + 5)
PATIENCE_SECONDS = 60


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FIRST_SECONDS", 0.001)
    monkeypatch.setattr(patience, "_MOST_SECONDS", 0.004)


def loader_of(**options: Any) -> Downloader:
    settings: dict[str, Any] = {
        "max_connections": NUM_CONNECTIONS,
        "chunk_bytes": NUM_CONNECTIONS * BLOCK,
        "timeout_seconds": PATIENCE_SECONDS,
    }
    return Downloader(**settings | options)


# -- which way -------------------------------------------------------------------------------------


def test_plain_bodies_go_past_h11_and_connections_are_kept(tmp_path: Path) -> None:
    """With the httpx2, httpcore2 and h11 that are installed."""
    with Server(DATA) as server, loader_of() as loader:
        loader.fetch(Download(server.url, tmp_path / "file"))
        stats = loader.stats()
    assert (tmp_path / "file").read_bytes() == DATA
    assert (stats.direct_bodies, stats.ordinary_bodies) == (len(server.asked), 0)
    assert stats.connections_opened == server.num_connections <= NUM_CONNECTIONS
    assert stats.connections_reused == len(server.asked) - server.num_connections > 10


def another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_WAY_TO_H11", ("stream", "_something_else", "_h11_state"))


def another_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    from h11 import _readers

    class ContentLengthReader(_readers.ContentLengthReader):
        def __init__(self, length: int) -> None:
            super().__init__(length)
            self._seen = 0

    monkeypatch.setitem(_readers.READERS[_readers.SEND_BODY], "content-length", ContentLengthReader)


def another_name_of_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from h11 import _readers

    class ContentLengthReader:
        def __init__(self, length: int) -> None:
            self._reader = _readers.ContentLengthReader(length)

        def __call__(self, buffer: Any) -> Any:
            return self._reader(buffer)

    monkeypatch.setitem(_readers.READERS[_readers.SEND_BODY], "content-length", ContentLengthReader)


def another_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    from httpcore2._backends.sync import SyncStream

    monkeypatch.setattr(SyncStream, "get_extra_info", lambda self, info: None)


@pytest.mark.parametrize(
    "change", [another_way, another_counter, another_name_of_its_count, another_socket]
)
def test_where_the_libraries_look_different_httpx2_reads(
    change: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    with Server(DATA) as server, loader_of() as loader:
        loader.fetch(Download(server.url, tmp_path / "file"))
        stats = loader.stats()
    assert (tmp_path / "file").read_bytes() == DATA
    assert (stats.direct_bodies, stats.ordinary_bodies) == (0, len(server.asked))


@pytest.mark.parametrize("act", [Act(chunked=True), Act(until_close=True)])
def test_bodies_whose_length_h11_does_not_count_go_through_it(act: Act, tmp_path: Path) -> None:
    with Server(DATA, always=act) as server, loader_of() as loader:
        loader.fetch(Download(server.url, tmp_path / "file"))
        stats = loader.stats()
    assert (tmp_path / "file").read_bytes() == DATA
    assert (stats.direct_bodies, stats.ordinary_bodies) == (0, len(server.asked))


def test_what_lies_below_tls_is_never_read() -> None:
    """A socket below TLS in TLS is a plain one to look at."""
    one, two = socket.socketpair()
    with one, two:
        stream = SimpleNamespace(get_extra_info={"socket": one, "ssl_object": object()}.get)
        response: Any = SimpleNamespace(extensions={"network_stream": stream})
        assert body._plain_socket(response) is None
        stream.get_extra_info = {"socket": one}.get
        assert body._plain_socket(response) is one


# -- right bytes -----------------------------------------------------------------------------------


def head_of(nbytes: int) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % nbytes


@pytest.fixture
def once() -> Iterator[Callable[[list[bytes]], str]]:
    """Serves one connection: an answer to a request is one send."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(answers: list[bytes]) -> None:
        connection = listener.accept()[0]
        with connection:
            for answer in answers:
                held = b""
                while not held.endswith(b"\r\n\r\n"):
                    held += connection.recv(1 << 16)
                connection.sendall(answer)

    def start(answers: list[bytes]) -> str:
        threads.append(threading.Thread(target=serve, args=(answers,)))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"

    yield start
    for thread in threads:
        thread.join()
    listener.close()


def read_all(read_into: body.ReadInto, step: int) -> bytes:
    data, buffer = b"", memoryview(bytearray(step))
    while got := read_into(buffer):
        data += bytes(buffer[:got])
    return data


@pytest.mark.parametrize("step", [7, 1000, 1 << 20])
def test_what_came_with_the_head_comes_first_and_once(
    step: int, once: Callable[[list[bytes]], str]
) -> None:
    """However much of a body the head brought along, and however small the buffers are."""
    bodies = [pattern(size, seed=size) for size in (1, 6, 4096, 70_000, 200_000)]
    url = once([head_of(len(one)) + one for one in bodies])
    with httpx2.Client(timeout=PATIENCE_SECONDS) as client:
        for right in bodies:  # over one connection, which the server opens to nobody else
            response = client.send(client.build_request("GET", url), stream=True)
            read_into, is_direct = body.answer_reader(response, PATIENCE_SECONDS)
            assert is_direct
            assert read_all(read_into, step) == right
            assert read_into(memoryview(bytearray(1))) == 0
            response.close()


def test_what_follows_a_body_stays_in_the_socket(once: Callable[[list[bytes]], str]) -> None:
    right = pattern(200_000)
    url = once([head_of(len(right)) + right + b"more"])
    with httpx2.Client(timeout=PATIENCE_SECONDS) as client:
        response = client.send(client.build_request("GET", url), stream=True)
        read_into, _ = body.answer_reader(response, PATIENCE_SECONDS)
        assert read_all(read_into, 1 << 20) == right
        response.close()


@pytest.mark.parametrize("nbytes", [0, 5, 100_000])
def test_a_body_that_breaks_off_is_trouble_and_its_connection_is_not_kept(
    nbytes: int, once: Callable[[list[bytes]], str]
) -> None:
    url = once([head_of(nbytes + 1) + bytes(nbytes)])
    with httpx2.Client(timeout=PATIENCE_SECONDS) as client:
        response = client.send(client.build_request("GET", url), stream=True)
        read_into, _ = body.answer_reader(response, PATIENCE_SECONDS)
        with pytest.raises(patience.Trouble, match="broke off"):
            read_all(read_into, 1 << 20)
        stream = response.extensions["network_stream"]
        response.close()
        assert stream.get_extra_info("socket").fileno() == -1


def test_silence_in_a_body_is_trouble() -> None:
    silent = Act(cut=BLOCK, stall=True)
    with Server(DATA, always=silent) as server, httpx2.Client(timeout=None) as client:
        response = client.send(client.build_request("GET", server.url), stream=True)
        read_into, is_direct = body.answer_reader(response, 0.05)
        with pytest.raises(patience.Trouble, match="TimeoutError"):
            read_all(read_into, 1 << 20)
        response.close()
    assert is_direct


def test_bytes_after_the_body_are_not_the_next_one(tmp_path: Path) -> None:
    forged = b"HTTP/1.1 206 OK\r\nContent-Length: 9\r\n\r\nforged..."
    with Server(DATA, always=Act(extra=forged)) as server, loader_of(max_retries=99) as loader:
        loader.fetch(Download(server.url, tmp_path / "file", nbytes=len(DATA)))
    assert (tmp_path / "file").read_bytes() == DATA


def test_pieces_of_any_size_fill_buffers_of_any_other() -> None:
    for size in (1, 3, 10, 64, 1000):
        cuts = [DATA[at : at + size] for at in range(0, 1000, size)]
        for step in (1, 7, 10, 999, 5000):
            pieces = iter([b"", *cuts, b""])
            assert read_all(body.pieces_reader(pieces), step) == DATA[: len(b"".join(cuts))]
