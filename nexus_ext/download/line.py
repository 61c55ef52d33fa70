"""A worker's own connection: httpx2 underneath, one host at a time, and it can be cut from outside.

HTTP/2 where a server offers it. What httpx2 and its parts would log holds URLs and headers, so
records that come from our threads are dropped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from nexus_ext.download.body import ReadInto, answer_reader
from nexus_ext.errors import MissingExtra

if TYPE_CHECKING:
    import httpx2

__all__ = ["BUFFER_BYTES", "Line", "LineSettings", "Tally", "http2_state", "needs_httpx2"]

_LOGGERS = (
    "httpx2",
    "httpcore2.connection",
    "httpcore2.http11",
    "httpcore2.http2",
    "httpcore2.proxy",
    "httpcore2.socks",
    "hpack.hpack",
    "hpack.table",
)
_WARNING = logging.WARNING

BUFFER_BYTES = 1 << 20


class _OurThreads(threading.local):
    is_ours = False


_threads = _OurThreads()


def _is_told(record: logging.LogRecord) -> bool:
    """A filter: what libraries tell about requests of our threads holds secrets."""
    return not (_threads.is_ours and record.levelno < _WARNING)


def _keep_quiet() -> None:
    _threads.is_ours = True
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_told)  # a second time changes nothing


def needs_httpx2() -> None:
    """Raises MissingExtra where httpx2 is not installed."""
    if importlib.util.find_spec("httpx2") is None:
        raise MissingExtra(
            "downloads over http need httpx2, which is not installed: pip install 'nexus_ext[hub]' "
            "(Python 3.11 or newer)."
        )


def http2_state() -> str:
    """ "offered", or why HTTP/2 is not."""
    if importlib.util.find_spec("h2") is None:
        return "not offered: h2 is not installed (pip install 'nexus_ext[hub]')"
    return "offered"


@dataclass
class LineSettings:
    """What all lines of a Downloader share."""

    timeout_seconds: float
    ssl_context: ssl.SSLContext | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def _default_context(self) -> ssl.SSLContext:
        import httpx2

        return httpx2.create_ssl_context()

    def context_for(self, scheme: str) -> ssl.SSLContext:
        """For https the user's or the system's authorities; for http one that trusts nobody."""
        if scheme != "https":
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ssl_context is not None:
            return self.ssl_context
        with self.lock:  # made once: it reads every authority of the system
            return self._default_context


class Tally(Protocol):
    """What counts what lines do, whoever's they are. Called from the owners' threads."""

    def count_request(self, version: str, is_new: bool) -> None:
        """An answer's head came, over HTTP/1.1 or HTTP/2, on a new connection or a kept one."""

    def count_body(self, is_direct: bool) -> None:
        """Its body is about to be read, past h11 or through it."""


class Line:
    """One connection at most, kept while it is useful. One thread's, but for `abort`."""

    def __init__(self, settings: LineSettings, tally: Tally) -> None:
        self._settings = settings
        self._tally = tally
        self._clients: dict[str, httpx2.Client] = {}
        self._socket: Any = None
        self._has_connected = False
        self._is_cut = False
        self.buffer = bytearray(BUFFER_BYTES)  # the owner's, for what is arriving

    def get(self, url: str, headers: Mapping[str, str]) -> httpx2.Response:
        """Send one GET; returns when the headers are there. Follows nothing, keeps no cookie.

        Raises:
            httpx2.HTTPError, httpx2.InvalidURL: As the library does.
        """
        _keep_quiet()
        client = self._client("https" if url.lower().startswith("https:") else "http")
        self._has_connected = False
        request = client.build_request(
            "GET", url, headers=dict(headers), extensions={"trace": self._trace}
        )
        response = client.send(request, stream=True, auth=None, follow_redirects=False)
        client.cookies.clear()
        self._tally.count_request(response.http_version, self._has_connected)
        return response

    def reader_of(self, response: httpx2.Response) -> ReadInto:
        """What reads the body of the answer that `get` gave last; see `Body.read_into`."""
        read_into, is_direct = answer_reader(response, self._settings.timeout_seconds)
        self._tally.count_body(is_direct)
        return read_into

    def renew(self) -> None:
        """Another task begins; what was cut before is forgotten."""
        self._is_cut = False

    def abort(self) -> None:
        """Cut what is under way, and what is only about to connect, until `renew`. From any thread.

        A read of the owner ends at once.
        """
        self._is_cut = True  # first: who connects meanwhile looks here when it has a socket
        self._shut_down()

    def _shut_down(self) -> None:
        connected = self._socket
        if connected is not None:
            # Not SSLSocket.shutdown, which would go on to read in the clear. If it is closed
            # already there is nothing to cut.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection back. The owner does it, at its end."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _client(self, scheme: str) -> httpx2.Client:
        if scheme not in self._clients:
            self.close()  # one connection at most
            import httpx2

            self._clients[scheme] = httpx2.Client(
                verify=self._settings.context_for(scheme),
                http2=scheme == "https" and http2_state() == "offered",
                timeout=self._settings.timeout_seconds,
                limits=httpx2.Limits(max_connections=1, max_keepalive_connections=1),
                headers={"User-Agent": "nexus_ext"},
            )
        return self._clients[scheme]

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._has_connected = True
            self._socket = info["return_value"].get_extra_info("socket")
            if self._is_cut:
                self._shut_down()
