"""A checkpoint that is streamed while it is downloaded: which bytes come next, and who is told.

    headers ──▶ a Checkpoint ──▶ feed(gate, spans): what is needed first, then the rest
                                   │
              landed ──▶ announce ─┴─▶ whole and right ──▶ settle ──▶ keep

The gate (an engine) reads nothing that was not announced. Owns the downloader, the descriptors of
the files that grow, and one thread.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from nexus_ext.checkpoint import Checkpoint, Gate
from nexus_ext.download import Downloader
from nexus_ext.errors import (
    ContentMismatch,
    DeviceLost,
    DownloadError,
    EngineClosed,
    NexusError,
    TruncatedCheckpoint,
)

__all__ = ["Here", "Inbound", "Shard"]

_log = logging.getLogger("nexus_ext")

_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
# More of a header is not fetched: the checkpoint refuses it by its length.
_MAX_HEADER_BYTES = 100_000_000

Span = tuple[int, int, int]  # file, offset, nbytes


class Shard(Protocol):
    """A file on its way; see `nexus_ext.download.Arriving`."""

    @property
    def nbytes(self) -> int: ...
    @property
    def has_ended(self) -> bool: ...
    def open(self) -> BinaryIO: ...
    def want(self, ranges: Sequence[tuple[int, int]]) -> None: ...
    def want_all(self) -> None: ...
    def wait(self, offset: int, nbytes: int) -> None: ...
    def landed(self) -> list[tuple[int, int]]: ...
    def result(self) -> object: ...


class Here:
    """A file that was fetched before: a shard that has come."""

    has_ended = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self.nbytes = path.stat().st_size

    def open(self) -> BinaryIO:
        return open(self._path, "rb", buffering=0)

    def want(self, ranges: Sequence[tuple[int, int]]) -> None:
        """There it is."""

    def want_all(self) -> None:
        """There it is."""

    def wait(self, offset: int, nbytes: int) -> None:
        if offset + nbytes > self.nbytes:
            raise TruncatedCheckpoint(
                f"{self._path} must have {offset + nbytes} bytes, but has {self.nbytes}; fetch it "
                "again"
            )

    def landed(self) -> list[tuple[int, int]]:
        return [(0, self.nbytes)]

    def result(self) -> Path:
        return self._path


class Inbound:
    """The files of a checkpoint, on their way. One model's, once."""

    def __init__(
        self,
        downloader: Downloader,
        folder: Path,
        index: Path,
        shards: Mapping[str, Shard],
        targets: Mapping[str, Path],
        keep: Callable[[], None],
        *,
        window_bytes: int,
    ) -> None:
        """Take over what was started.

        Args:
            downloader: Whose `shards` are; closed by this class.
            folder: Where what describes the model is, all of it.
            index: The index, which is there; or the path of the one file, where there is none.
            shards: By file name: what arrives. Started lazily.
            targets: By file name: where it will be.
            keep: Called when all is there and right, from a thread: links and notes.
            window_bytes: How many are asked for at a time: enough for every connection, and few
                enough that the order is kept.
        """
        self.folder = folder
        self._downloader = downloader
        self._index = index
        self._names = sorted(shards)
        self._shards = [shards[name] for name in self._names]
        self._targets = [Path(os.path.realpath(targets[name])) for name in self._names]
        self._keep = keep
        self._window_bytes = window_bytes
        self._descriptors: list[int] = []
        self._plan: deque[Span] = deque()
        self._asked: list[Span] = []
        self._has_all_asked = False
        self._told = (-1, -1)
        self._settled: set[int] = set()
        self._is_closed = False
        self._has_ended = False
        self._thread: threading.Thread | None = None

    # -- for a checkpoint and a streamer ---------------------------------------------------------

    @property
    def descriptors(self) -> Sequence[int]:
        """Of each file, in the order of their names, until the arrival ends."""
        return self._descriptors

    @property
    def is_arriving(self) -> bool:
        """Whether there is more to come: not whole, not failed, not closed."""
        return not self._has_ended

    @property
    def bytes_received(self) -> int:
        """Over the network."""
        return self._downloader.stats().bytes_received

    def open(self) -> Checkpoint:
        """The checkpoint, from its headers: those of all files are fetched first. Blocks for them.

        Raises:
            DownloadError, WriteError: They did not come.
            CheckpointFormatError: As `Checkpoint.open`.
        """
        for shard in self._shards:
            shard.want([(0, _LENGTH_BYTES)])
        for shard in self._shards:
            file = shard.open()
            with file:
                self._descriptors.append(os.dup(file.fileno()))
        lengths = [self._header_end(number) for number in range(len(self._shards))]
        for shard, end in zip(self._shards, lengths, strict=True):
            shard.want([(0, end)])
        for shard, end in zip(self._shards, lengths, strict=True):
            shard.wait(0, end)
        files = zip(self._targets, self._descriptors, strict=True)
        shards = dict(zip(self._names, files, strict=True))
        return Checkpoint.open_arriving(self._index, shards, self)

    def _header_end(self, number: int) -> int:
        """Where the header ends, if it is one; the checkpoint will judge."""
        shard = self._shards[number]
        nbytes = shard.nbytes
        first = min(_LENGTH_BYTES, nbytes)
        shard.wait(0, first)
        length = int.from_bytes(os.pread(self._descriptors[number], first, 0), "little")
        return min(_LENGTH_BYTES + min(length, _MAX_HEADER_BYTES), nbytes)

    def feed(self, gate: Gate, spans: Sequence[Span]) -> None:
        """Fetch (file, offset, nbytes) in this order, then the rest, and tell the gate what is
        there. Does not block.
        """
        self._plan.extend(spans)
        self._thread = threading.Thread(
            target=self._run, args=(gate,), name="nexus-arrival", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Fetch all that is missing, without a model. Blocks; the arrival is over then.

        Raises:
            DownloadError, WriteError: As `Downloader.fetch`.
        """
        try:
            for shard in self._shards:
                shard.want_all()
            for shard in self._shards:
                shard.result()
            self._keep()
        finally:
            self._end()

    def close(self) -> None:
        """Fetch no more; what arrived is kept for a later call. Does not block."""
        self._is_closed = True
        if self._thread is None:
            self._end()
        else:  # it may be this very one: a model may be collected in any thread
            self._downloader.wake()

    # -- the thread ------------------------------------------------------------------------------

    def _run(self, gate: Gate) -> None:
        # Whatever happens here: who waits for bytes that will not come is told.
        failure: NexusError | None = DownloadError(
            "a download must not stop before its end, but its thread did; stream the model again"
        )
        try:
            try:
                failure = self._carry(gate)
            finally:
                if failure is not None:
                    self._tell(gate, failure)
        except (EngineClosed, DeviceLost):
            _log.info("a model was closed while it still arrived; what came is kept")
        finally:
            self._end()

    def _carry(self, gate: Gate) -> NexusError | None:
        """Until everything is there, or nothing more will come; why."""
        while not self._is_closed:
            error = self._announce(gate)
            if error is not None:
                return error
            if len(self._settled) == len(self._shards):
                self._try_to_keep()
                return None
            self._ask()
            self._downloader.wait_until(self._has_news)
        return None

    def _try_to_keep(self) -> None:
        """The model has its bytes, whatever becomes of links and notes."""
        try:
            self._keep()
        except (NexusError, OSError) as error:
            _log.warning(
                "a model arrived whole, but could not be filed, and is fetched again: %s", error
            )

    def _has_news(self) -> bool:
        return self._is_closed or self._news() != self._told

    def _news(self) -> tuple[int, int]:
        """Changes whenever there is something to tell."""
        ended = sum(shard.has_ended for shard in self._shards)
        return ended, sum(nbytes for shard in self._shards for _, nbytes in shard.landed())

    def _announce(self, gate: Gate) -> NexusError | None:
        """Tell what has landed since; returns what ended a file's download, if something did."""
        self._told = self._news()
        spans = [(n, *one) for n, shard in enumerate(self._shards) for one in shard.landed()]
        gate.announce(spans)
        for number, shard in enumerate(self._shards):
            if number in self._settled or not shard.has_ended:
                continue
            try:
                shard.result()
            except NexusError as error:
                return error
            gate.settle(number, os.fstat(self._descriptors[number]).st_mtime_ns)
            self._settled.add(number)
        return None

    @staticmethod
    def _tell(gate: Gate, failure: NexusError) -> None:
        if isinstance(failure, ContentMismatch):
            _log.error("what was computed may be wrong: %s", failure)
            gate.refuse(failure)
        else:
            gate.end_arrival(failure)

    def _ask(self) -> None:
        """Keep a window's worth of bytes wanted, in the order of need."""
        if self._has_all_asked:
            return
        self._asked = [span for span in self._asked if not self._is_there(span)]
        missing = sum(nbytes for _, _, nbytes in self._asked)
        while self._plan and missing < self._window_bytes:
            span = self._plan.popleft()
            if not self._is_there(span):
                self._asked.append(span)
                missing += span[2]
        for number in {file for file, _, _ in self._asked}:
            # All of them again: what is wanted last comes first.
            self._shards[number].want(
                [(offset, nbytes) for file, offset, nbytes in self._asked if file == number]
            )
        if not self._plan:
            self._has_all_asked = True
            for shard in self._shards:
                shard.want_all()

    def _is_there(self, span: Span) -> bool:
        file, offset, nbytes = span
        return any(
            start <= offset and offset + nbytes <= start + length
            for start, length in self._shards[file].landed()
        )

    def _end(self) -> None:
        """Idempotent."""
        self._has_ended = True
        self._downloader.close()
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)
