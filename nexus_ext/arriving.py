"""A checkpoint that is streamed while it is downloaded: what has come, and who is told.

    headers ──▶ a Checkpoint ──▶ feed(gate, spans): what is needed first, then the rest
                                   │
              landed ──▶ announce ─┴─▶ whole and right ──▶ settle ──▶ keep

The gates (engines) read nothing that was not announced. Owns the downloader, the descriptors of
the files that grow, and one thread. What is asked for next is `nexus_ext.asking`'s to say.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nexus_ext.asking import Asking
from nexus_ext.checkpoint import Checkpoint, Gate
from nexus_ext.download import Downloader
from nexus_ext.errors import (
    ContentMismatch,
    DeviceLost,
    DownloadCancelled,
    DownloadError,
    EngineClosed,
    NexusError,
)
from nexus_ext.shards import Shard, Span

__all__ = ["Inbound"]

_log = logging.getLogger("nexus_ext")

_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
# More of a header is not fetched: the checkpoint refuses it by its length.
_MAX_HEADER_BYTES = 100_000_000


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
            window_bytes: How many are asked for at a time; see `Asking`.
        """
        self.folder = folder
        self._downloader = downloader
        self._index = index
        self._names = sorted(shards)
        self._shards = [shards[name] for name in self._names]
        self._targets = [Path(os.path.realpath(targets[name])) for name in self._names]
        self._keep = keep
        self._asking = Asking(self._shards, window_bytes)
        self._descriptors: list[int] = []
        self._told = (-1, -1)
        # What gates were told, for those that join later; both under the lock.
        self._telling = threading.Lock()
        self._gates: list[Gate] = []
        self._settled: dict[int, int] = {}  # file, and when it was last written to
        self._failure: NexusError | None = None
        self._is_closed = False
        self._has_ended = False
        self._thread: threading.Thread | None = None

    # -- for a checkpoint, a streamer and a store ------------------------------------------------

    @property
    def descriptors(self) -> Sequence[int]:
        """Of each file, in the order of their names, until `close`."""
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
        self.bring([(number, 0, end) for number, end in enumerate(lengths)])
        files = zip(self._targets, self._descriptors, strict=True)
        shards = dict(zip(self._names, files, strict=True))
        return Checkpoint.open_arriving(self._index, shards, self)

    def _header_end(self, number: int) -> int:
        """Where the header ends, if it is one; the checkpoint will judge."""
        nbytes = self._shards[number].nbytes
        length = int.from_bytes(self.read(number, 0, min(_LENGTH_BYTES, nbytes)), "little")
        return min(_LENGTH_BYTES + min(length, _MAX_HEADER_BYTES), nbytes)

    def bring(self, spans: Sequence[Span]) -> None:
        """Have these (file, offset, nbytes) here, before all else. Blocks.

        Raises:
            DownloadError, WriteError: They did not come.
        """
        for number, shard in enumerate(self._shards):
            shard.want([(offset, nbytes) for file, offset, nbytes in spans if file == number])
        for file, offset, nbytes in spans:
            self._shards[file].wait(offset, nbytes)

    def read(self, file: int, offset: int, nbytes: int) -> bytes:
        """A few bytes, when they are here; fewer where the file ends. Blocks. Raises as `bring`."""
        self._shards[file].wait(offset, nbytes)
        if self._is_closed:
            raise DownloadCancelled(
                f"{self._targets[file].name} can be read until its model is closed; stream the "
                "model again"
            )
        return os.pread(self._descriptors[file], nbytes, offset)

    def feed(self, gate: Gate, spans: Sequence[Span]) -> None:
        """Fetch (file, offset, nbytes) in this order, then the rest, and tell the gate what is
        there. Once. Does not block.
        """
        self._asking.expect(spans)
        self.join(gate)
        self._thread = threading.Thread(target=self._run, name="nexus-arrival", daemon=True)
        self._thread.start()

    def join(self, gate: Gate) -> None:
        """Tell this gate, too: now what was told to others, from now on the same. Does not block.

        Raises:
            EngineClosed, DeviceLost: The gate's own error.
        """
        with self._telling:
            self._gates.append(gate)
            gate.announce(self._landed())
            for number, mtime_ns in self._settled.items():
                gate.settle(number, mtime_ns)
            if self._failure is not None:
                _tell(gate, self._failure)

    def expect(self, spans: Sequence[Span]) -> None:
        """These come behind what is expected so far, and before the rest. Does not block."""
        self._asking.expect(spans)
        self._downloader.wake()

    def hasten(self, spans: Sequence[Span]) -> None:
        """Somebody waits for these: they come before what is expected. Does not block."""
        self._asking.hasten(spans)
        self._downloader.wake()

    def wait(self) -> None:
        """Until all is there and right. Blocks; `close` ends it, too.

        Raises:
            DownloadError, WriteError: What ended the arrival.
        """
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Fetch no more; what arrived is kept for a later call. Does not block once it is fed."""
        self._is_closed = True
        if self._thread is None:
            self._end()
        else:  # it may be this very one: a model may be collected in any thread
            self._downloader.wake()
            self._let_go()

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        # Whatever happens here: who waits for bytes that will not come is told.
        failure: NexusError | None = DownloadError(
            "a download must not stop before its end, but its thread did; stream the model again"
        )
        try:
            try:
                failure = self._carry()
            finally:
                if failure is not None:
                    self._fail(failure)
        except (EngineClosed, DeviceLost):
            _log.info("a model was closed while it still arrived; what came is kept")
        finally:
            self._end()

    def _carry(self) -> NexusError | None:
        """Until everything is there, or nothing more will come; why."""
        while not self._is_closed:
            error = self._announce()
            if error is not None:
                return error
            if len(self._settled) == len(self._shards):
                self._try_to_keep()
                return None
            self._asking.ask()
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
        return self._is_closed or self._asking.is_new or self._news() != self._told

    def _news(self) -> tuple[int, int]:
        """Changes whenever there is something to tell."""
        ended = sum(shard.has_ended for shard in self._shards)
        return ended, sum(nbytes for shard in self._shards for _, nbytes in shard.landed())

    def _landed(self) -> list[Span]:
        return [(n, *one) for n, shard in enumerate(self._shards) for one in shard.landed()]

    def _announce(self) -> NexusError | None:
        """Tell what has landed since; returns what ended a file's download, if something did."""
        errors: list[NexusError] = []
        with self._telling:
            self._told = self._news()
            landed = self._landed()
            for gate in self._gates:
                gate.announce(landed)
            for number, shard in enumerate(self._shards):
                if number in self._settled or not shard.has_ended:
                    continue
                try:
                    shard.result()
                except NexusError as error:
                    errors.append(error)
                    continue
                self._settled[number] = os.fstat(self._descriptors[number]).st_mtime_ns
                for gate in self._gates:
                    gate.settle(number, self._settled[number])
        # What came and is wrong is worse than what did not come.
        errors.sort(key=lambda error: not isinstance(error, ContentMismatch))
        return errors[0] if errors else None

    def _fail(self, failure: NexusError) -> None:
        if isinstance(failure, ContentMismatch):
            _log.error("what was computed may be wrong: %s", failure)
        with self._telling:
            self._failure = failure
            for gate in self._gates:
                _tell(gate, failure)

    def _end(self) -> None:
        self._has_ended = True
        self._downloader.close()
        self._let_go()

    def _let_go(self) -> None:
        """Close the descriptors, when nobody will open a file by them. Whoever comes last, in any
        thread: each takes those that are left.
        """
        while self._is_closed and self._has_ended and self._descriptors:
            try:
                os.close(self._descriptors.pop())
            except IndexError:  # another thread took the last one
                return


def _tell(gate: Gate, failure: NexusError) -> None:
    if isinstance(failure, ContentMismatch):
        gate.refuse(failure)
    else:
        gate.end_arrival(failure)
