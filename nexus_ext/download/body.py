"""An answer's bytes, put where the caller wants them: by httpx2, or past it out of the socket.

httpx2 opens the connection, sends the request and parses the head. A body of a known length in
plain HTTP/1.1 is then bytes on a socket: to pass them through h11 costs more than to receive them.
So they are received here, and h11 is told how many are left for it; at the end it finds that none
are, and the connection is kept for the next request. That number is h11's own affair, and so is the
way to it: where anything looks other than expected, httpx2 reads the body as it always did.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from nexus_ext.download.patience import Trouble

if TYPE_CHECKING:
    import httpx2

__all__ = ["ReadInto", "answer_reader", "nothing", "pieces_reader"]

ReadInto = Callable[[memoryview], int]

# From httpx2's response to h11's connection, in httpx2 and httpcore2 2.16.
_WAY_TO_H11 = ("stream", "_stream", "_httpcore_stream", "_stream", "_connection", "_h11_state")


def nothing(buffer: memoryview) -> int:
    """Reads a body without bytes."""
    return 0


def pieces_reader(pieces: Iterator[bytes]) -> ReadInto:
    """What reads pieces of any size into buffers of any other."""
    return _Pieces(pieces).read_into


def answer_reader(response: httpx2.Response, timeout_seconds: float) -> tuple[ReadInto, bool]:
    """What reads the body of an answer, and whether it does so past h11.

    It blocks until there is at least one byte, and returns how many came; 0 is the end. It raises
    Trouble where the connection breaks, or is silent for `timeout_seconds`.
    """
    ordinary = _Pieces(_pieces(response))
    plain, h11_connection = _plain_socket(response), _h11_of(response)
    if plain is None or h11_connection is None:
        return ordinary.read_into, False
    plain.settimeout(timeout_seconds)
    return _Direct(plain, h11_connection, ordinary).read_into, True


def _pieces(response: httpx2.Response) -> Iterator[bytes]:
    import httpx2

    try:
        yield from response.iter_raw()
    except (httpx2.TransportError, httpx2.StreamError) as error:
        raise _broken(error) from None


def _broken(error: Exception) -> Trouble:
    return Trouble(f"the body broke off ({type(error).__name__})")


class _Pieces:
    """Pieces of any size, and what is left of the one that was begun."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self.held = memoryview(b"")

    def read_into(self, buffer: memoryview) -> int:
        while not self.held:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self.held = memoryview(piece)
        got = min(len(self.held), len(buffer))
        buffer[:got] = self.held[:got]
        self.held = self.held[got:]
        return got


class _Direct:
    """A body out of its socket, as soon as h11 holds nothing of it."""

    def __init__(self, plain: socket.socket, h11_connection: Any, ordinary: _Pieces) -> None:
        self._plain = plain
        self._h11 = h11_connection
        self._counter = h11_connection._reader
        self._ordinary = ordinary
        self._may_be_buffered = True

    def read_into(self, buffer: memoryview) -> int:
        left: int = self._counter._remaining
        if left == 0 or self._is_buffered():
            return self._ordinary.read_into(buffer)
        got = self._receive(buffer[:left])
        self._counter._remaining = left - got
        return got

    def _is_buffered(self) -> bool:
        """Whether there is more of what came together with the head."""
        if self._may_be_buffered:
            in_h11: bytes = self._h11.trailing_data[0]
            self._may_be_buffered = bool(in_h11 or self._ordinary.held)
        return self._may_be_buffered

    def _receive(self, buffer: memoryview) -> int:
        try:
            got = self._plain.recv_into(buffer)
        except OSError as error:
            raise _broken(error) from None
        if got == 0:
            raise Trouble("the body broke off (the connection was closed)")
        return got


def _plain_socket(response: httpx2.Response) -> socket.socket | None:
    """The socket, where what is read from it is the body: no TLS, no other layer."""
    stream = response.extensions.get("network_stream")
    if stream is None or stream.get_extra_info("ssl_object") is not None:
        return None
    plain = stream.get_extra_info("socket")
    return plain if type(plain) is socket.socket else None


def _h11_of(response: httpx2.Response) -> Any:
    """h11's connection, where it counts a body's bytes as we know it to; otherwise None."""
    import h11

    state: Any = response
    for name in _WAY_TO_H11:
        state = getattr(state, name, None)
    if not isinstance(state, h11.Connection) or state.their_state is not h11.SEND_BODY:
        return None
    counter = getattr(state, "_reader", None)
    length = response.headers.get("content-length", "")
    if type(counter).__name__ != "ContentLengthReader" or not length.isdecimal():
        return None
    return state if vars(counter) == {"_length": int(length), "_remaining": int(length)} else None
