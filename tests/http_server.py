"""A web server that misbehaves as told: behaviours are data, and what was asked and sent is kept.

An `Act` changes one answer; a server takes the acts of its script in the order of requests, and
answers as it should when none is left. Every connection is a thread; nothing sleeps.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Act", "Asked", "Server", "pattern"]

_SEND_BYTES = 64 << 10


def pattern(nbytes: int, seed: int = 0) -> bytes:
    """Bytes of which no two blocks are alike."""
    import random

    return random.Random(seed).randbytes(nbytes)


@dataclass(frozen=True)
class Act:
    """How one answer differs from the right one.

    Attributes:
        status: Another status; the body stays away unless `body` is given.
        headers: Set, or with None left out.
        body: Other bytes, with their own length.
        ignore_range: 200 and the whole file.
        shift: The range that is told and sent lies so many bytes further on.
        lie: The range that is told lies so many bytes further on than the one that is sent.
        halve: Half of the bytes that were asked for, honestly told.
        cut: Close after so many bytes of the body.
        reset: Close with a reset.
        silent: Close before any answer.
        stall: After `cut` bytes say nothing until the other side goes away.
        chunked: Transfer-Encoding: chunked.
        until_close: No length; the end of the connection is the end of the body.
        extra: Bytes after the body's end.
        raw: These bytes in place of an answer, then close.
        flip: The byte at this offset of the body is another one.
        redirect: Status 302 to this address; `{port}` is filled in.
    """

    status: int | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    body: bytes | None = None
    ignore_range: bool = False
    shift: int = 0
    lie: int = 0
    halve: bool = False
    cut: int | None = None
    reset: bool = False
    silent: bool = False
    stall: bool = False
    chunked: bool = False
    until_close: bool = False
    extra: bytes = b""
    raw: bytes | None = None
    flip: int | None = None
    redirect: str | None = None


@dataclass
class Asked:
    """One request, and how many bytes of the body went out."""

    path: str
    headers: dict[str, str]
    span: tuple[int, int] | None
    sent: int = 0


@dataclass(frozen=True)
class Version:
    data: bytes
    etag: str | None = '"v1"'
    modified: str | None = None


class Server:
    """Serves `data` at every path, on a port of its own, until it is closed.

    Args:
        script: What to do with the first requests. A function is asked about each of them.
        always: What to do with all others.
    """

    def __init__(
        self,
        data: bytes = b"",
        script: Sequence[Act] | Callable[[Asked], Act | None] = (),
        always: Act | None = None,
        etag: str | None = '"v1"',
        modified: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.version = Version(data, etag, modified)
        self.asked: list[Asked] = []
        self.num_connections = 0
        self.most_at_once = 0
        self.gate: threading.Event | None = None  # answers wait for it
        self._script = script if callable(script) else iter(script)
        self._always = always or Act()
        self._tls = tls
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._is_closing = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)

    @property
    def url(self) -> str:
        scheme = "https" if self._tls else "http"
        return f"{scheme}://127.0.0.1:{self.port}/file"

    @property
    def sent(self) -> int:
        """Bytes of bodies that went out."""
        with self._lock:
            return sum(one.sent for one in self.asked)

    @property
    def spans(self) -> list[tuple[int, int] | None]:
        with self._lock:
            return [one.span for one in self.asked]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
            connections = list(self._open)
        if self.gate is not None:
            self.gate.set()
        for one in [self._listener, *connections]:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(one, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    # -- connections -----------------------------------------------------------------------------

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            # Head and body are two sends; the second must not wait for an acknowledgement.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                if self._is_closing:
                    connection.close()
                    return
                self._open.add(connection)
                self.num_connections += 1
                self.most_at_once = max(self.most_at_once, len(self._open))
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        plain = connection
        try:
            # Both sides of a reset or a closed connection are what is tested here.
            with contextlib.suppress(OSError):
                if self._tls is not None:
                    connection = self._tls.wrap_socket(connection, server_side=True)
                    with self._lock:
                        self._open.discard(plain)
                        self._open.add(connection)
                for asked in self._requests(connection):
                    if not self._answer(connection, asked):
                        break
        finally:
            with self._lock:
                self._open.discard(plain)
                self._open.discard(connection)
            connection.close()

    def _requests(self, connection: socket.socket) -> Iterator[Asked]:
        held = b""
        while True:
            while b"\r\n\r\n" not in held:
                data = connection.recv(_SEND_BYTES)
                if not data:
                    return
                held += data
            head, _, held = held.partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            headers = {}
            for line in lines:
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
            span = (int(match[1]), int(match[2]) + 1) if match else None
            asked = Asked(first.split()[1], headers, span)
            with self._lock:
                self.asked.append(asked)
            yield asked

    # -- answers ---------------------------------------------------------------------------------

    def _next_act(self, asked: Asked) -> Act:
        if callable(self._script):
            return self._script(asked) or self._always
        with self._lock:
            return next(self._script, self._always)

    def _answer(self, connection: socket.socket, asked: Asked) -> bool:
        """Answer one request; whether the connection is good for another one."""
        if self.gate is not None:
            self.gate.wait()
        act = self._next_act(asked)
        if act.silent or act.raw is not None:
            connection.sendall(act.raw or b"")
            return self._end(connection, act)
        status, headers, body = self._right(asked, act)
        if act.redirect is not None:
            status, headers, body = 302, {"Location": act.redirect.format(port=self.port)}, b""
        if act.status is not None:
            status, headers, body = act.status, {}, act.body or b""
        elif act.body is not None:
            body = act.body
        if act.flip is not None:
            body = body[: act.flip] + bytes([body[act.flip] ^ 1]) + body[act.flip + 1 :]
        if act.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif not act.until_close:
            headers["Content-Length"] = str(len(body))
        for name, value in act.headers.items():
            headers[name] = "" if value is None else value
        wanted = {name: v for name, v in headers.items() if act.headers.get(name, "") is not None}
        lines = [f"HTTP/1.1 {status} Said"] + [f"{name}: {v}" for name, v in wanted.items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        return self._send_body(connection, asked, act, body)

    def _right(self, asked: Asked, act: Act) -> tuple[int, dict[str, str], bytes]:
        version = self.version
        total = len(version.data)
        headers = {"Content-Type": "application/octet-stream"}
        if version.etag is not None:
            headers["ETag"] = version.etag
        if version.modified is not None:
            headers["Last-Modified"] = version.modified
        told = asked.headers.get("if-range")
        if asked.span is None or act.ignore_range or (told and told != version.etag):
            return 200, headers, version.data
        start, end = asked.span[0] + act.shift, min(asked.span[1] + act.shift, total)
        if start >= total:
            return 416, {**headers, "Content-Range": f"bytes */{total}"}, b""
        end = start + max(1, (end - start) // 2) if act.halve else end
        headers["Content-Range"] = f"bytes {start + act.lie}-{end - 1 + act.lie}/{total}"
        return 206, headers, version.data[start:end]

    def _send_body(self, connection: socket.socket, asked: Asked, act: Act, body: bytes) -> bool:
        limit = len(body) if act.cut is None else min(act.cut, len(body))
        for at in range(0, limit, _SEND_BYTES):
            piece = body[at : min(at + _SEND_BYTES, limit)]
            with self._lock:
                asked.sent += len(piece)  # before: who reads it may ask at once
            if act.chunked:
                piece = b"%x\r\n%s\r\n" % (len(piece), piece)
            connection.sendall(piece)
        if act.stall:
            while connection.recv(_SEND_BYTES):
                pass
            return False
        if act.cut is not None or act.until_close or act.reset:
            return self._end(connection, act)
        connection.sendall((b"0\r\n\r\n" if act.chunked else b"") + act.extra)
        return not act.extra

    def _end(self, connection: socket.socket, act: Act) -> bool:
        if act.reset:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return False
