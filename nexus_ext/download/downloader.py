"""Downloads under one limit of connections: the workers, and who works on what."""

from __future__ import annotations

import os
import ssl
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from types import TracebackType

from nexus_ext.download.arrival import Arriving
from nexus_ext.download.facts import Download, DownloadStats, Fetched
from nexus_ext.download.fetching import Fetching
from nexus_ext.download.filesystem import FileSystemSource
from nexus_ext.download.follower import Follower, start_follower
from nexus_ext.download.line import Line, LineSettings, http2_state
from nexus_ext.download.patience import Clock
from nexus_ext.download.progress import Progress
from nexus_ext.download.source import Source
from nexus_ext.download.transfer import Limits, Task, Transfer
from nexus_ext.download.web import WebSource
from nexus_ext.errors import ConfigError, DownloadError
from nexus_ext.memory import parse_bytes

__all__ = ["Downloader"]

_SMALLEST_BLOCK_BYTES = 4 << 10
_MAX_CONNECTIONS = 64


class Downloader:
    """Fetches files, several at once, each over several connections.

    Args:
        max_connections: Connections, and worker threads, of all downloads together.
        chunk_bytes: What a kill costs at most, over all connections: each request is for
            `chunk_bytes / max_connections`. Larger is faster where answers take long.
        max_retries: Failures in a row, with less than one request's bytes between them, before a
            download fails. Pauses double from 0.5 s to 30 s; Retry-After is obeyed up to 120 s.
        timeout_seconds: Silence that ends a request, and a connection attempt.
        progress: Called with (path, done_bytes, total_bytes or None) from worker threads, one call
            at a time for each file. What it raises ends that download.
        ssl_context: For hosts with private authorities; the default trusts the system's.

    Use it in a `with` block, or call `close`. Not usable in a forked child.

    Raises:
        ConfigError: A value that cannot be.
    """

    def __init__(
        self,
        *,
        max_connections: int = 8,
        chunk_bytes: str | int = "64MiB",
        max_retries: int = 6,
        timeout_seconds: float = 30.0,
        progress: Progress | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if not 1 <= max_connections <= _MAX_CONNECTIONS:
            raise ConfigError(
                f"max_connections must lie in 1..{_MAX_CONNECTIONS}, got {max_connections}; 8 "
                "suits most servers."
            )
        if max_retries < 0 or timeout_seconds <= 0:
            raise ConfigError(
                "max_retries must be 0 or more and timeout_seconds above 0, got "
                f"{max_retries} and {timeout_seconds}."
            )
        block_bytes = parse_bytes(chunk_bytes) // max_connections
        if block_bytes < _SMALLEST_BLOCK_BYTES:
            raise ConfigError(
                f"chunk_bytes must be at least {_SMALLEST_BLOCK_BYTES} for each connection, got "
                f"{chunk_bytes} for {max_connections}; 64MiB suits most networks."
            )
        self._max_connections = max_connections
        self._limits = Limits(block_bytes, max_retries, progress)
        self._timeout_seconds = timeout_seconds
        self._line_settings = LineSettings(timeout_seconds, ssl_context)
        self._clock = Clock()
        self._changed = threading.Condition()
        self._active: deque[Transfer] = deque()
        self._workers: list[threading.Thread] = []
        self._is_closed = False
        self._pid = os.getpid()
        self._began: float | None = None
        self._opened_connections = self._reused_connections = 0
        self._versions: Counter[str] = Counter()
        self._bodies: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()

    # -- for users -------------------------------------------------------------------------------

    def fetch(self, download: Download) -> Fetched:
        """Fetch one file; blocks. Interrupted, it cancels the download.

        Raises:
            DownloadError, WriteError, ConfigError, MissingExtra: See docs/downloads.md.
        """
        return self.fetch_all([download])[0]

    def fetch_all(self, downloads: Iterable[Download]) -> list[Fetched]:
        """Fetch files, several at once; blocks until all have ended.

        Raises:
            DownloadError, WriteError, ConfigError, MissingExtra: The first download's, in order,
                that failed; the others have ended then, and those that succeeded are there.
        """
        arriving: list[Arriving] = []
        try:
            for download in downloads:  # one by one: `except` must know them
                arriving.append(self.start(download))
            with self._changed:
                while not all(one.has_ended for one in arriving):
                    self._changed.wait()
        except BaseException:
            for one in arriving:
                one.cancel()
            raise
        return [one.result() for one in arriving]

    def start(self, download: Download, *, lazily: bool = False) -> Arriving:
        """Begin a download; does not wait.

        Args:
            download: What.
            lazily: Fetch only what is wanted or waited for, until `want_all`, and a first block.

        Raises:
            ConfigError: Closed; a scheme that nobody knows.
            MissingExtra: Its source needs a package that is not installed.
            DownloadError: No thread is to be had; a file system that connects at once, and fails.
        """
        if self._pid != os.getpid():
            raise ConfigError(
                "a Downloader works in the process that made it, got a forked child; make another"
            )
        source: Source = WebSource(download) if download.is_web else FileSystemSource(download)
        with self._changed:
            if self._is_closed:
                raise ConfigError("a Downloader fetches until it is closed; make another one")
            if self._began is None:
                self._began = self._clock.now()
            transfer = Transfer(
                download, source, self._limits, self._clock, self._changed, start_follower
            )
            transfer.is_lazy = lazily
            self._start_workers()
            self._active.append(transfer)
            self._changed.notify_all()
        return Arriving(transfer)

    def wait_until(self, is_true: Callable[[], bool]) -> None:
        """Block until `is_true`, which is asked at the start and whenever something landed or
        ended, with everything else held up meanwhile.
        """
        with self._changed:
            self._changed.wait_for(is_true)

    def wake(self) -> None:
        """Have `wait_until` ask again. Does not wait."""
        with self._changed:
            self._changed.notify_all()

    def stats(self) -> DownloadStats:
        """What was done until now."""
        with self._changed:
            self._forget_ended()
            now = self._clock.now()
            return DownloadStats(
                self._ended["bytes_received"] + sum(one.bytes_received for one in self._active),
                self._ended["bytes_reused"] + sum(one.bytes_reused for one in self._active),
                len(self._active),
                self._ended["finished"],
                self._ended["failed"],
                self._opened_connections,
                self._reused_connections,
                self._ended["retries"] + sum(one.num_retries for one in self._active),
                0.0 if self._began is None else now - self._began,
                dict(self._versions),
                http2_state(),
                self._bodies["direct"],
                self._bodies["ordinary"],
            )

    def close(self) -> None:
        """Cancel what is under way, wait for the workers, and close the connections. Idempotent.

        A worker that is looking up a name or connecting ends within `timeout_seconds`. A file that
        is being brought to the disk is waited for: nothing appears later.
        """
        if self._pid != os.getpid():
            return  # a forked child has no workers
        with self._changed:
            self._is_closed = True
            active = list(self._active)
            self._changed.notify_all()
        for transfer in active:
            Arriving(transfer).cancel()
        for worker in self._workers:
            worker.join()
        if not isinstance(threading.current_thread(), Follower):  # `progress` may close
            self.wait_until(lambda: all(transfer.ended for transfer in active))

    def __enter__(self) -> Downloader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- for workers -----------------------------------------------------------------------------

    def _start_workers(self) -> None:
        """All at the first download: the blocks of one file are work for many."""
        while len(self._workers) < self._max_connections:
            worker = threading.Thread(
                target=self._work, name=f"nexus-download-{len(self._workers)}", daemon=True
            )
            try:
                worker.start()
            except RuntimeError as error:
                if self._workers:
                    return  # fewer do; the next download tries again
                raise DownloadError(
                    f"a download needs a thread, and the system gives none ({error}); end some, or "
                    "raise the limit of processes"
                ) from error
            self._workers.append(worker)

    def _work(self) -> None:
        line = Line(self._line_settings, self)
        try:
            while (task := self._next_task(line)) is not None:
                Fetching(task, self._limits.block_bytes, self._timeout_seconds, self._clock).run()
        finally:
            line.close()

    def _next_task(self, line: Line) -> Task | None:
        """Wait for work; None when it is over."""
        with self._changed:
            while True:
                self._forget_ended()
                for transfer in sorted(self._active, key=lambda one: not one.has_wants):
                    if (task := transfer.take(line)) is not None:
                        return task
                if self._is_closed:
                    return None
                pauses = [one.pause_seconds() for one in self._active if not one.is_over]
                waiting = [pause for pause in pauses if pause > 0]
                self._clock.wait(self._changed, min(waiting, default=None))

    def _forget_ended(self) -> None:
        for transfer in [one for one in self._active if one.ended]:
            self._active.remove(transfer)
            self._ended["finished" if transfer.error is None else "failed"] += 1
            self._ended["bytes_received"] += transfer.bytes_received
            self._ended["bytes_reused"] += transfer.bytes_reused
            self._ended["retries"] += transfer.num_retries

    def count_request(self, version: str, is_new: bool) -> None:
        with self._changed:
            self._versions[version] += 1
            if is_new:
                self._opened_connections += 1
            else:
                self._reused_connections += 1

    def count_body(self, is_direct: bool) -> None:
        with self._changed:
            self._bodies["direct" if is_direct else "ordinary"] += 1
