"""One download under way: what has landed, what comes next, and how it ends.

    waiting ──▶ opening ──▶ open ──▶ ended
                   ▲          │
                   └──────────┘  the source changed: anew, in another part

This file knows no network. Workers take a `Task`, and come back with landed bytes or an error; all
methods but those that say otherwise are called with the lock of `changed` held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

from nexus_ext.download.facts import Download, Fetched, key_of
from nexus_ext.download.line import Line
from nexus_ext.download.partial import Partial
from nexus_ext.download.patience import Clock, Failures, Trouble
from nexus_ext.download.progress import Progress, Teller
from nexus_ext.download.schedule import Schedule
from nexus_ext.download.source import Facts, Source
from nexus_ext.download.verdicts import changed_error, final_error, is_worth_keeping
from nexus_ext.errors import DownloadError, SourceChanged

__all__ = ["Limits", "Task", "Transfer"]

_MAX_RESTARTS = 3


@dataclass(frozen=True)
class Limits:
    """What all transfers of a Downloader keep to."""

    block_bytes: int
    max_retries: int
    progress: Progress | None


@dataclass
class Task:
    """Work for one connection, and the way back from it.

    `kind`: "open" the transfer and fetch its first block; fetch a "block"; fetch the "whole".
    As a context it hands every error to the transfer.
    """

    transfer: Transfer
    kind: Literal["open", "block", "whole"]
    partial: Partial | None
    span: tuple[int, int]
    incidents_then: int
    line: Line

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Handed to the transfer, no error ends the worker: others wait for it."""
        self.transfer.leave(self, error)
        return True


class Transfer:
    """The state of one download; see the module."""

    def __init__(
        self,
        download: Download,
        source: Source,
        limits: Limits,
        clock: Clock,
        changed: threading.Condition,
        follow: Callable[[Transfer, Partial], None],
    ) -> None:
        self.download = download
        self.source = source
        self.key = key_of(download)
        self.changed = changed
        self.partial: Partial | None = None
        self.candidate: Partial | None = None  # left by an earlier call; not yet known to be right
        self.may_adopt = True
        self.is_promised = False  # somebody was told that bytes are there
        self.is_lazy = False  # only what is wanted comes
        self.whole = False
        self.error: BaseException | None = None
        self.fetched: Fetched | None = None
        self.ended = False
        self.bytes_received = 0
        self.bytes_reused = 0
        self.num_retries = 0
        self.http_version = ""
        self._limits = limits
        self._clock = clock
        self._follow = follow  # starts a thread that hashes a part and publishes it
        self._began = clock.now()
        self._failures = Failures(limits.block_bytes, limits.max_retries, clock)
        self._restarts = 0
        self._is_opening = False
        self._whole_is_busy = False
        self._schedule = Schedule(limits.block_bytes)
        self._tasks: list[Task] = []
        self._followers = 0
        self._teller = Teller(str(download.path), limits.progress)

    # -- what comes next -------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """No more work: done, failed or cancelled; perhaps not yet wound up."""
        return self.error is not None or self.fetched is not None

    @property
    def has_wants(self) -> bool:
        return self._schedule.has_wants

    def pause_seconds(self) -> float:
        """How long no work may be taken, because a request failed."""
        return self._failures.pause_seconds()

    def take(self, line: Line) -> Task | None:
        """The next task, or None."""
        if self.is_over or self.pause_seconds() > 0:
            return None
        task: Task | None = None
        if self.partial is None:
            if not self._is_opening:
                self._is_opening = True
                task = self._task("open", (0, 0), line)
        elif self.whole:
            if not self._whole_is_busy and not self.partial.is_complete:
                self._whole_is_busy = True
                task = self._task("whole", (0, 0), line)
        else:
            part = self.partial
            span = self._schedule.take(part.nbytes or 0, self.is_lazy, part.landed)
            if span is not None:
                task = self._task("block", span, line)
        return task

    def _task(
        self, kind: Literal["open", "block", "whole"], span: tuple[int, int], line: Line
    ) -> Task:
        line.renew()
        task = Task(self, kind, self.partial, span, self._failures.num_incidents, line)
        self._tasks.append(task)
        if self.partial is not None:
            self.partial.users += 1
        return task

    def want(self, spans: Sequence[tuple[int, int]]) -> None:
        """These come next, in this order, before what was wanted earlier."""
        self._schedule.want(spans)
        self.changed.notify_all()

    # -- opening ---------------------------------------------------------------------------------

    def opened(self, task: Task, partial: Partial, span: tuple[int, int] | None) -> bool:
        """The part is there, and the opener fetches `span` of it, or all where that is None.

        False where the transfer is over, or began anew.
        """
        if self.is_over or self.partial is not None:
            return False
        self.candidate = None
        self.partial = task.partial = partial
        partial.users += 1
        self._is_opening = False
        self.whole = self._whole_is_busy = span is None
        task.kind, task.span = ("whole", (0, 0)) if span is None else ("block", span)
        self._schedule.begin(partial.landed, partial.nbytes)
        self._schedule.remove(task.span)
        self.bytes_reused = partial.landed.nbytes
        self._start_follower(partial)
        self.changed.notify_all()
        return True

    def _start_follower(self, partial: Partial) -> None:
        self._follow(self, partial)  # it may fail; its thread waits for the lock first
        partial.users += 1
        self._followers += 1

    def is_same(self, facts: Facts) -> bool:
        """Whether an answer is about the file whose part is held."""
        head = self.partial.head if self.partial is not None else None
        return head is not None and (facts.nbytes, facts.validator) == (
            head.nbytes,
            head.validator,
        )

    def become_whole(self, task: Task) -> bool:
        """A server that ignores ranges sends all: one such answer is used, the others are not."""
        if self.partial is not task.partial or self.is_over or self._whole_is_busy:
            return False
        self._return(task)
        self.whole = self._whole_is_busy = True
        task.kind = "whole"
        return True

    # -- arriving --------------------------------------------------------------------------------

    def landed(self, partial: Partial, start: int, end: int) -> None:
        """These bytes are written and journalled."""
        partial.landed.add(start, end)
        if partial is not self.partial:
            return
        self._schedule.remove((start, end))
        self._failures.landed(end - start)
        self.changed.notify_all()

    def settle(self, partial: Partial, nbytes: int) -> None:
        """The end of a file came whose size was not told."""
        partial.head = replace(partial.head, nbytes=nbytes)
        self.changed.notify_all()

    def tell_progress(self) -> None:
        """Call the user's callback. Without the lock: it may take its time, or raise."""
        self._teller.tell(self._state)

    def _state(self) -> tuple[int, int | None]:
        """How many bytes have landed, and of how many. Without the lock."""
        with self.changed:
            if self.partial is None:
                return 0, self.download.nbytes
            return self.partial.landed.nbytes, self.partial.nbytes

    def is_there(self, start: int, end: int) -> bool:
        return self.fetched is not None or (
            self.partial is not None and self.partial.landed.covers(start, end)
        )

    # -- leaving ---------------------------------------------------------------------------------

    def leave(self, task: Task, error: BaseException | None) -> None:
        """A worker is back. Called without the lock."""
        with self.changed:
            self._tasks.remove(task)
            self._return(task)
            if error is not None and not self._is_too_late(error, task):
                self._received(error, task)
            self._let_go(task.partial)
        self.wind_up()

    def _is_too_late(self, error: BaseException, task: Task) -> bool:
        """Whether an error concerns nobody: the part is another, or needs no source any more."""
        if self.is_over or task.partial is not self.partial:
            return True
        is_complete = self.partial is not None and self.partial.is_complete
        return is_complete and isinstance(error, Trouble | DownloadError)

    def _return(self, task: Task) -> None:
        """What the task did not bring is missing again."""
        if task.partial is not self.partial:
            return
        if task.kind == "open":
            self._is_opening = False
        elif task.kind == "whole":
            self._whole_is_busy = False
        elif self.partial is not None:
            self._schedule.give_back(self.partial.landed, task.span)
        self.changed.notify_all()

    def _received(self, error: BaseException, task: Task) -> None:
        if isinstance(error, Trouble):
            self.num_retries += 1
            if self._failures.may_retry(error, task.incidents_then):
                return
        self.failed(error)

    def wait_to_retry(self, trouble: Trouble) -> None:
        """Count a failure that no task had, and wait; raises it where there were too many.

        Without the lock.
        """
        with self.changed:
            self.num_retries += 1
            if self.is_over or not self._failures.may_retry(trouble, self._failures.num_incidents):
                raise trouble
            while not self.is_over and (pause := self.pause_seconds()) > 0:
                self._clock.wait(self.changed, pause)

    def failed(self, error: BaseException) -> None:
        """What a retry does not mend."""
        if isinstance(error, SourceChanged):
            self.source_changed(error)
        else:
            self.fail(final_error(self.download, self._limits.max_retries, error))

    def source_changed(self, error: SourceChanged) -> None:
        """Start anew in another part, unless somebody has used bytes of this one."""
        self._restarts += 1
        if self.is_promised or self._restarts > _MAX_RESTARTS:
            self.fail(error)
            return
        self.anew()

    def anew(self) -> None:
        """Throw away what has landed; earlier calls' parts too."""
        for old in (self.partial, self.candidate):
            if old is not None:
                old.remove()
                if old.users == 0:
                    old.close()
        for task in self._tasks:
            if task.partial is self.partial and task.partial is not None:
                task.line.abort()
        self.partial = self.candidate = None
        self.may_adopt = False
        self.whole = self._whole_is_busy = self._is_opening = False
        self.bytes_reused = 0
        self.changed.notify_all()

    def changed_error(self) -> SourceChanged:
        return changed_error(self.download)

    # -- ending ----------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """The first error counts; whatever is under way is cut."""
        if not self.is_over:
            self.error = error
            for task in self._tasks:
                task.line.abort()
            self.changed.notify_all()

    def finish(self, partial: Partial, sha256: str) -> None:
        """The file is published."""
        assert partial.nbytes is not None
        self.fetched = Fetched(
            self.download.path,
            partial.nbytes,
            sha256,
            self.bytes_received,
            self.bytes_reused,
            self.num_retries,
            self._clock.now() - self._began,
            self.http_version,
        )
        for task in self._tasks:
            task.line.abort()
        self.changed.notify_all()

    def follower_left(self, partial: Partial) -> None:
        """Called without the lock."""
        with self.changed:
            self._followers -= 1
            self._let_go(partial)
        self.wind_up()

    def _let_go(self, partial: Partial | None) -> None:
        if partial is None:
            return
        partial.users -= 1
        if partial.users == 0 and partial is not self.partial:
            partial.close()

    def wind_up(self) -> None:
        """When the last thread has left: keep or remove the part, and tell. Without the lock."""
        with self.changed:
            if self.ended or not self.is_over or self._tasks or self._followers:
                return
            parts = [part for part in (self.partial, self.candidate) if part is not None]
            self.partial = self.candidate = None
            for part in parts:
                if is_worth_keeping(part, self.download, self.error):
                    part.release()
                else:
                    part.remove()
                part.close()
            self.ended = True
            self.changed.notify_all()
