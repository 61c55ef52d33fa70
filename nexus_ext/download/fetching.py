"""What a worker does for a task: ask, compare the answer with what is known, write, journal."""

from __future__ import annotations

from contextlib import closing

from nexus_ext.download.journal import Block, Head, new_hasher
from nexus_ext.download.leftovers import adopt
from nexus_ext.download.line import BUFFER_BYTES
from nexus_ext.download.partial import Partial
from nexus_ext.download.patience import Clock, Trouble
from nexus_ext.download.source import Body
from nexus_ext.download.transfer import Task
from nexus_ext.download.verdicts import (
    can_be_pieced,
    check_size,
    first_span,
    is_right,
    needs_no_source,
)
from nexus_ext.errors import ContentMismatch

__all__ = ["Fetching"]

_SLOWEST_BYTES_PER_SECOND = 256


class Fetching:
    """Runs one task on the calling thread; blocks. Errors go to the task's transfer."""

    def __init__(self, task: Task, block_bytes: int, timeout_seconds: float, clock: Clock) -> None:
        self._task = task
        self._transfer = task.transfer
        self._block_bytes = block_bytes
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._window_began = clock.now()
        self._window_bytes = 0

    def run(self) -> None:
        with self._task:
            if self._task.kind == "open":
                self._open()
            elif self._task.kind == "block":
                self._block()
            else:
                self._whole()

    # -- opening ---------------------------------------------------------------------------------

    def _open(self) -> None:
        transfer = self._transfer
        if transfer.candidate is None and transfer.may_adopt:
            transfer.candidate = adopt(transfer.download.path, transfer.key)
        candidate = transfer.candidate
        if candidate is not None and needs_no_source(candidate, transfer.download):
            self._opened(candidate, (0, 0))
            return
        with closing(self._ask(first_span(candidate, self._block_bytes), candidate)) as body:
            check_size(transfer.download, body.facts)
            if candidate is None or is_right(candidate, transfer.download, body.facts):
                self._begin(candidate, body)
                return
        transfer.candidate, transfer.may_adopt = None, False
        candidate.remove()
        candidate.close()
        self._open()

    def _ask(self, span: tuple[int, int] | None, partial: Partial | None) -> Body:
        validator = partial.head.validator if partial is not None else ""
        body = self._transfer.source.open(self._task.line, span, validator)
        self._transfer.http_version = body.version
        return body

    def _begin(self, candidate: Partial | None, body: Body) -> None:
        """The first answer is there: make the part, let the others begin, and read on."""
        facts = body.facts
        is_all = body.offset == 0 and body.nbytes is not None and body.nbytes == facts.nbytes
        must_be_whole = not can_be_pieced(self._transfer.download, facts.validator)
        if not body.is_whole and not is_all and must_be_whole:
            body.close()
            with closing(self._ask(None, None)) as whole:
                check_size(self._transfer.download, whole.facts)
                if whole.facts.nbytes not in (None, facts.nbytes):
                    raise self._transfer.changed_error()
                self._begin_with(None, whole, is_whole=True)
            return
        self._begin_with(candidate, body, body.is_whole or must_be_whole)

    def _begin_with(self, candidate: Partial | None, body: Body, is_whole: bool) -> None:
        transfer, facts = self._transfer, body.facts
        if is_whole:
            self._check_frame(body)
        head = Head(transfer.key, facts.nbytes, facts.validator)
        partial = candidate or Partial.create(transfer.download.path, head)
        span = None if is_whole else (body.offset, body.offset + (body.nbytes or 0))
        if self._opened(partial, span):
            self._receive(partial, body)

    def _opened(self, partial: Partial, span: tuple[int, int] | None) -> bool:
        with self._transfer.changed:
            if self._transfer.opened(self._task, partial, span):
                return True
            is_new = partial is not self._transfer.candidate
        if is_new:  # nobody knows it
            partial.remove()
            partial.close()
        return False

    def _check_frame(self, body: Body) -> None:
        download = self._transfer.download
        if not body.is_framed and download.sha256 is None and download.nbytes is None:
            raise ContentMismatch(
                f"{download.source} must come with its length, or nobody can tell whether it came "
                "whole; give nbytes or sha256"
            )

    # -- going on --------------------------------------------------------------------------------

    def _block(self) -> None:
        partial = self._task.partial
        assert partial is not None
        with closing(self._ask(self._task.span, partial)) as body:
            self._check_same(body)
            if body.is_whole:
                with self._transfer.changed:
                    if not self._transfer.become_whole(self._task):
                        return
                self._check_frame(body)
            self._receive(partial, body)

    def _whole(self) -> None:
        partial = self._task.partial
        assert partial is not None
        with closing(self._ask(None, partial)) as body:
            self._check_same(body)
            self._check_frame(body)
            self._receive(partial, body)

    def _check_same(self, body: Body) -> None:
        if not self._transfer.is_same(body.facts) and self._is_wanted():
            raise self._transfer.changed_error()

    def _is_wanted(self) -> bool:
        """Whether the transfer still is at this part."""
        return not self._transfer.is_over and self._transfer.partial is self._task.partial

    # -- arriving --------------------------------------------------------------------------------

    def _receive(self, partial: Partial, body: Body) -> None:
        self._window_began, self._window_bytes = self._clock.now(), 0
        at, end = body.offset, None if body.nbytes is None else body.offset + body.nbytes
        # Bytes are put together: to hash and write every few KiB would give the interpreter's lock
        # away so often that eight threads spend more time on it than on their work.
        buffer, held = memoryview(self._task.line.buffer), 0
        try:
            while at + held != end:
                if held == (room := self._room(at, end)):
                    full, held = held, 0
                    at = self._land(partial, buffer[:full], at)
                    continue
                got = body.read_into(buffer[held:room])
                if got == 0:
                    break
                held += got
                self._watch(got)
                self._check_end(body, at + held)
            if at + held == end and body.read_into(memoryview(bytearray(1))):
                held = 0
                raise Trouble("the server sent more bytes than it said", ContentMismatch)
        finally:
            # Also of a body that broke off: what came of it is right.
            at = self._land(partial, buffer[:held], at)
        self._ended(partial, body, at)

    def _room(self, at: int, end: int | None) -> int:
        """How much of a body is held before it is written: up to a block's end, or the buffer's."""
        to_boundary = self._block_bytes - at % self._block_bytes
        return min(to_boundary, BUFFER_BYTES, to_boundary if end is None else end - at)

    def _ended(self, partial: Partial, body: Body, at: int) -> None:
        if body.nbytes is not None:
            if at < body.offset + body.nbytes:
                raise Trouble(f"the body ended {body.offset + body.nbytes - at} bytes too early")
            return
        wanted = self._transfer.download.nbytes
        if wanted is not None and at != wanted:
            raise Trouble(f"{at} bytes came where {wanted} were asked for", ContentMismatch)
        if not body.is_whole:
            raise Trouble("the server sent a part without a length", ContentMismatch)
        with self._transfer.changed:
            if partial.landed.end_of(at) > at and self._is_wanted():
                raise self._transfer.changed_error()  # an earlier answer was longer
            self._transfer.settle(partial, at)

    def _check_end(self, body: Body, at: int) -> None:
        """A body that does not tell its length may not go on beyond what was asked for."""
        wanted = self._transfer.download.nbytes
        if body.nbytes is None and wanted is not None and at > wanted:
            raise Trouble(f"more bytes came than the {wanted} asked for", ContentMismatch)

    def _watch(self, nbytes: int) -> None:
        """A download that was given up ends here; one that drips is broken off."""
        if not self._is_wanted():
            raise Trouble("given up")
        self._window_bytes += nbytes
        seconds = self._clock.now() - self._window_began
        if seconds > self._timeout_seconds:
            if self._window_bytes < seconds * _SLOWEST_BYTES_PER_SECOND:
                raise Trouble(f"{self._window_bytes} bytes came in {seconds:.0f} s")
            self._window_began, self._window_bytes = self._clock.now(), 0

    def _land(self, partial: Partial, data: memoryview, at: int) -> int:
        """Write, journal, tell; returns where the next byte belongs."""
        nbytes = len(data)
        if nbytes == 0:
            return at
        transfer = self._transfer
        with transfer.changed:
            transfer.bytes_received += nbytes
            earlier = partial.landed.pieces(at, at + nbytes)
            ours = partial.claim(at, at + nbytes)
        for start, end in ours:
            self._store(partial, data[start - at : end - at], start)
        for start, end in earlier:
            self._compare(partial, data[start - at : end - at], start)
        transfer.tell_progress()
        return at + nbytes

    def _compare(self, partial: Partial, data: memoryview, at: int) -> None:
        """What had landed earlier must be the same again."""
        if not partial.holds(data, at) and self._is_wanted():
            raise self._transfer.changed_error()

    def _store(self, partial: Partial, data: memoryview, at: int) -> None:
        algorithm, hasher = new_hasher()
        assert hasher is not None
        hasher.update(data)
        partial.write(data, at)
        partial.record(Block(at, len(data), f"{algorithm}:{hasher.hexdigest()}"))
        with self._transfer.changed:
            self._transfer.landed(partial, at, at + len(data))
