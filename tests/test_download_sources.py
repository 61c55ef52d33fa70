"""Downloads from where else bytes come: fsspec's file systems, TLS, HTTP/2."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from http_server import Act, Server, pattern

from nexus_ext import errors
from nexus_ext.download import Download, Downloader, patience

BLOCK = 32 << 10
DATA = pattern(7 * BLOCK + 3)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FIRST_SECONDS", 0.001)
    monkeypatch.setattr(patience, "_MOST_SECONDS", 0.004)


def downloader(**options: Any) -> Downloader:
    return Downloader(
        **{"max_connections": 4, "chunk_bytes": 4 * BLOCK, "max_retries": 3} | options
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- fsspec ----------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "file"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A URL with DATA behind it."""
    if request.param == "file":
        (tmp_path / "source").write_bytes(DATA)
        yield f"file://{tmp_path}/source"
        return
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/nexus/source", DATA)
    yield "memory://nexus/source"
    memory.rm("/nexus", recursive=True)


def put(source: str, data: bytes) -> None:
    fs, path = fsspec.core.url_to_fs(source)
    fs.pipe_file(path, data)


@pytest.mark.parametrize("digest", [None, sha256(DATA)])
def test_any_file_system_is_a_source(source: str, tmp_path: Path, digest: str | None) -> None:
    with downloader() as loader:
        fetched = loader.fetch(Download(source, tmp_path / "to" / "file", len(DATA), digest))
        assert loader.stats().bytes_received == len(DATA)
    assert (fetched.nbytes, fetched.sha256) == (len(DATA), sha256(DATA))
    assert fetched.http_version == source.partition(":")[0]
    assert (tmp_path / "to" / "file").read_bytes() == DATA
    assert os.listdir(tmp_path / "to") == ["file"]


def test_an_empty_file_of_a_file_system(source: str, tmp_path: Path) -> None:
    put(source, b"")
    with downloader() as loader:
        assert loader.fetch(Download(source, tmp_path / "to" / "file")).nbytes == 0
    assert (tmp_path / "to" / "file").read_bytes() == b""


class Shaky:
    """Reads of a file system that fail after some, until told otherwise."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        source: str,
        num_good: int,
        failure: type[Exception] = OSError,
    ) -> None:
        self.num_good = num_good
        self._failure = failure
        self.read: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        fs = fsspec.core.url_to_fs(source)[0]
        self._cat = fs.cat_file
        monkeypatch.setattr(fs, "cat_file", self)

    def __call__(self, path: str, start: int, end: int) -> bytes:
        with self._lock:
            self.num_good -= 1
            if self.num_good < 0:
                raise self._failure(5, "signed=secret")
            self.read.append((start, end))
        return self._cat(path, start=start, end=end)


def test_a_file_system_that_fails_is_gone_on_with(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shaky = Shaky(monkeypatch, source, num_good=5)
    download = Download(source, tmp_path / "to" / "file")
    with downloader(max_connections=1, chunk_bytes=BLOCK) as loader:
        with pytest.raises(errors.SourceUnavailable, match="OSError") as caught:
            loader.fetch(download)
        assert "secret" not in str(caught.value)
        shaky.num_good = 10**9
        fetched = loader.fetch(download)
    assert fetched.bytes_reused == 5 * BLOCK
    assert len(shaky.read) == len(set(shaky.read)) == 8


@pytest.mark.parametrize(
    ("module", "name", "wants"),
    [
        ("aiohttp", "ClientError", errors.SourceUnavailable),
        ("botocore.exceptions", "BotoCoreError", errors.SourceUnavailable),
        ("botocore.exceptions", "NoCredentialsError", errors.AccessDenied),
        ("azure.core.exceptions", "ClientAuthenticationError", errors.AccessDenied),
    ],
)
def test_what_a_driver_raises_is_told_as_what_it_is(
    module: str,
    name: str,
    wants: type[errors.DownloadError],
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are no OSErrors, and their texts hold URLs."""
    failure = type(name, (Exception,), {})
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: failure}))
    shaky = Shaky(monkeypatch, source, num_good=3, failure=failure)
    download = Download(source, tmp_path / "to" / "file")
    with downloader(max_connections=1, chunk_bytes=BLOCK) as loader:
        with pytest.raises(wants) as caught:
            loader.fetch(download)
        assert "secret" not in "".join(traceback.format_exception(caught.value))
        shaky.num_good = 10**9
        assert loader.fetch(download).bytes_reused == 3 * BLOCK


def test_a_file_that_is_replaced_meanwhile_is_fetched_anew(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shaky = Shaky(monkeypatch, source, num_good=3)
    new = pattern(len(DATA), seed=1)
    download = Download(source, tmp_path / "to" / "file")
    with downloader(max_connections=1, chunk_bytes=BLOCK) as loader:
        with pytest.raises(errors.SourceUnavailable):
            loader.fetch(download)
        put(source, new)
        shaky.num_good = 10**9
        assert loader.fetch(download).bytes_reused == 0
    assert (tmp_path / "to" / "file").read_bytes() == new


def test_a_change_under_way_is_seen_at_the_end(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.core.url_to_fs(source)[0]
    cat, new, changes = fs.cat_file, pattern(len(DATA), seed=1), [4]

    def change(path: str, start: int, end: int) -> bytes:
        changes[0] -= 1
        if changes[0] == 0:
            put(source, new)
        return cat(path, start=start, end=end)

    monkeypatch.setattr(fs, "cat_file", change)
    with downloader(max_connections=1, chunk_bytes=BLOCK) as loader:
        loader.fetch(Download(source, tmp_path / "to" / "file"))
    assert (tmp_path / "to" / "file").read_bytes() == new


def test_a_short_read_is_no_file(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.core.url_to_fs(source)[0]
    monkeypatch.setattr(fs, "cat_file", lambda path, start, end: b"x" * (end - start - 1))
    with downloader() as loader, pytest.raises(errors.SourceUnavailable, match="bytes came where"):
        loader.fetch(Download(source, tmp_path / "to" / "file"))
    assert os.listdir(tmp_path / "to") == []


@pytest.mark.parametrize(
    ("url", "wants"),
    [
        ("memory://nexus/none", errors.SourceMissing),
        ("file:///nexus/none", errors.SourceMissing),
        ("file:///proc", errors.ContentMismatch),
        ("nothing://host/file", errors.ConfigError),
    ],
)
def test_what_no_file_system_has(url: str, wants: type[Exception], tmp_path: Path) -> None:
    with downloader() as loader, pytest.raises(wants):
        loader.fetch(Download(url, tmp_path / "file"))
    assert os.listdir(tmp_path) == []


def test_a_file_system_whose_package_is_missing_is_named(tmp_path: Path) -> None:
    with downloader() as loader, pytest.raises(errors.MissingExtra, match="needs a package"):
        loader.fetch(Download("adl://store/file", tmp_path / "file"))


def test_without_fsspec_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with downloader() as loader, pytest.raises(errors.MissingExtra, match=r"nexus_ext\[hub\]"):
        loader.fetch(Download("memory://x", tmp_path / "file"))


# -- TLS and HTTP/2 --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 and its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        f"-keyout {folder}/key -out {folder}/cert -subj /CN=nexus "
        "-addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_bytes((folder / "key").read_bytes() + (folder / "cert").read_bytes())
    return both


def context_of(certificate: Path, *protocols: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


def test_tls(certificate: Path, tmp_path: Path) -> None:
    with (
        Server(DATA, tls=context_of(certificate)) as server,
        downloader(ssl_context=trusting(certificate)) as loader,
    ):
        fetched = loader.fetch(Download(server.url, tmp_path / "file"))
        assert server.num_connections <= 4
    assert fetched.http_version == "HTTP/1.1"
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_certificate_that_is_not_trusted_is_refused_at_once(
    certificate: Path, tmp_path: Path
) -> None:
    with (
        Server(DATA, tls=context_of(certificate)) as server,
        downloader() as loader,
        pytest.raises(errors.SourceRefused, match="certificate"),
    ):
        loader.fetch(Download(server.url, tmp_path / "file"))
    assert os.listdir(tmp_path) == []


def test_a_redirect_from_https_to_http_is_refused(certificate: Path, tmp_path: Path) -> None:
    with (
        Server(DATA) as plain,
        Server(DATA, tls=context_of(certificate)) as server,
        downloader(ssl_context=trusting(certificate)) as loader,
    ):
        server._script = lambda asked: Act(redirect=f"{plain.url}?sig=hunter2")
        with pytest.raises(errors.SourceRefused, match="from https to http") as caught:
            loader.fetch(Download(server.url, tmp_path / "file"))
        assert "hunter2" not in str(caught.value)
        assert plain.asked == []


def test_a_redirect_from_http_to_https_is_followed_without_credentials(
    certificate: Path, tmp_path: Path
) -> None:
    with (
        Server(DATA) as plain,
        Server(DATA, tls=context_of(certificate)) as server,
        downloader(ssl_context=trusting(certificate)) as loader,
    ):
        plain._script = lambda asked: Act(redirect=server.url)
        headers = {"Authorization": "Bearer t"}
        loader.fetch(Download(plain.url, tmp_path / "file", headers=headers))
        assert all("authorization" not in one.headers for one in server.asked)
    assert (tmp_path / "file").read_bytes() == DATA


class Http2Server:
    """Answers ranges over HTTP/2; resets the streams that `resets` numbers."""

    def __init__(self, data: bytes, context: ssl.SSLContext, resets: set[int]) -> None:
        self._data, self._context, self._resets = data, context, resets
        self.num_requests = self.num_connections = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}/file"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                plain = self._listener.accept()[0]
            except OSError:
                return
            self.num_connections += 1
            thread = threading.Thread(target=self._serve, args=(plain,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, plain: socket.socket) -> None:
        import h2.config
        import h2.connection
        import h2.events

        # How the other side goes away does not matter here.
        with (
            contextlib.suppress(OSError),
            self._context.wrap_socket(plain, server_side=True) as tls,
        ):
            http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
            http.initiate_connection()
            waiting: dict[int, bytes] = {}
            tls.sendall(http.data_to_send())
            while data := tls.recv(65536):
                for event in http.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        self._begin(http, event, waiting)
                self._go_on(http, waiting)
                tls.sendall(http.data_to_send())

    def _begin(self, http: Any, event: Any, waiting: dict[int, bytes]) -> None:
        with self._lock:
            number = self.num_requests
            self.num_requests += 1
        if number in self._resets:
            http.reset_stream(event.stream_id)
            return
        match = re.search(rb"bytes=(\d+)-(\d+)", dict(event.headers)[b"range"])
        assert match
        start, end = int(match[1]), min(int(match[2]) + 1, len(self._data))
        headers = [
            (":status", "206"),
            ("etag", '"h2"'),
            ("content-length", str(end - start)),
            ("content-range", f"bytes {start}-{end - 1}/{len(self._data)}"),
        ]
        http.send_headers(event.stream_id, headers)
        waiting[event.stream_id] = self._data[start:end]

    def _go_on(self, http: Any, waiting: dict[int, bytes]) -> None:
        for stream, body in list(waiting.items()):
            while body:
                room = min(http.local_flow_control_window(stream), http.max_outbound_frame_size)
                if room == 0:
                    break
                http.send_data(stream, body[:room])
                body = body[room:]
            if body:
                waiting[stream] = body
            else:
                http.end_stream(stream)
                del waiting[stream]

    def close(self) -> None:
        socket.socket.shutdown(self._listener, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()


@pytest.mark.parametrize("resets", [set(), {0}, {2, 3, 5}])
def test_http2_where_the_server_offers_it(
    certificate: Path, tmp_path: Path, resets: set[int]
) -> None:
    server = Http2Server(DATA, context_of(certificate, "h2"), resets)
    with downloader(ssl_context=trusting(certificate)) as loader:
        fetched = loader.fetch(Download(server.url, tmp_path / "file"))
        stats = loader.stats()
    server.close()
    assert fetched.http_version == "HTTP/2"
    assert (tmp_path / "file").read_bytes() == DATA
    assert fetched.num_retries == len(resets)
    assert stats.http_versions["HTTP/2"] == 8
    assert server.num_connections <= 4


def test_without_h2_it_is_http_1(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexus_ext.download import line

    find = line.importlib.util.find_spec
    monkeypatch.setattr(
        line.importlib.util, "find_spec", lambda name: None if name == "h2" else find(name)
    )
    with (
        Server(DATA, tls=context_of(certificate, "h2", "http/1.1")) as server,
        downloader(ssl_context=trusting(certificate)) as loader,
    ):
        fetched = loader.fetch(Download(server.url, tmp_path / "file"))
        assert "h2 is not installed" in loader.stats().http2
    assert fetched.http_version == "HTTP/1.1"
    assert (tmp_path / "file").read_bytes() == DATA
