"""Hashes a part as it grows, and publishes it when it is whole and right."""

from __future__ import annotations

import hashlib
import hmac
import threading
from types import TracebackType

from nexus_ext.download.partial import Partial
from nexus_ext.download.patience import Trouble
from nexus_ext.download.transfer import Transfer
from nexus_ext.errors import ContentMismatch, DownloadError

__all__ = ["Follower", "start_follower"]

_READ_BYTES = 256 << 10  # stays in a core's cache until it is hashed
_WRITEBACK_BYTES = 8 << 20


class Follower(threading.Thread):
    """Reads back what has landed, in order, and computes SHA-256 of it.

    What is hashed is what stands in the file, not what came over the network.
    """

    def __init__(self, transfer: Transfer, partial: Partial) -> None:
        super().__init__(name="nexus-download-sha256", daemon=True)
        self._transfer = transfer
        self._partial = partial
        self._hasher = hashlib.sha256()
        self._at = self._written = 0
        self._buffer = memoryview(bytearray(min(_READ_BYTES, partial.nbytes or _READ_BYTES)))

    def run(self) -> None:
        with self:
            while (end := self._wait_for_more()) is not None:
                self._hash_until(end)
                if self._is_whole():
                    self._end()
                    return

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        with self._transfer.changed:
            if error is not None and self._transfer.partial is self._partial:
                self._transfer.failed(error)
        self._transfer.follower_left(self._partial)
        return error is None or isinstance(error, Exception)

    def _wait_for_more(self) -> int | None:
        """How far the bytes reach now, more than before; None when there is nothing to do."""
        transfer, partial = self._transfer, self._partial
        with transfer.changed:
            while transfer.partial is partial and not transfer.is_over:
                end = partial.landed.end_of(self._at)
                if end > self._at or end == partial.nbytes:
                    return end
                transfer.changed.wait()
        return None

    def _hash_until(self, end: int) -> None:
        buffer = self._buffer
        while self._at < end:
            got = self._partial.read_into(buffer[: end - self._at], self._at)
            if got == 0:
                raise DownloadError(
                    f"the part of {self._transfer.download.path} must hold what was written, but "
                    f"ends at {self._at}; somebody cut it: fetch again"
                )
            self._hasher.update(buffer[:got])
            self._at += got
            self._write_back()

    def _write_back(self) -> None:
        """Have the disk begin with what was hashed: at the end there is less to wait for."""
        if self._at - self._written >= _WRITEBACK_BYTES:
            self._partial.start_writeback(self._written, self._at)
            self._written = self._at

    def _is_whole(self) -> bool:
        with self._transfer.changed:
            return self._at == self._partial.nbytes

    def _end(self) -> None:
        transfer, sha256 = self._transfer, self._hasher.hexdigest()
        wanted = transfer.download.sha256
        if wanted is not None and not hmac.compare_digest(wanted.lower(), sha256):
            self._wrong(sha256)
            return
        if wanted is None and not self._recheck():
            raise transfer.changed_error()
        transfer.tell_progress()
        self._partial.publish()
        with transfer.changed:
            if not transfer.is_over:
                transfer.finish(self._partial, sha256)

    def _recheck(self) -> bool:
        """Whether the source is still the same; asks as often as a request may be tried."""
        while True:
            try:
                return self._transfer.source.recheck(self._partial.head.validator)
            except Trouble as trouble:
                self._transfer.wait_to_retry(trouble)

    def _wrong(self, sha256: str) -> None:
        transfer = self._transfer
        with transfer.changed:
            if transfer.bytes_reused and transfer.may_adopt and not transfer.is_promised:
                transfer.anew()  # an earlier call's bytes may be the wrong ones
                return
        raise ContentMismatch(
            f"{transfer.download.source} must have the SHA-256 {transfer.download.sha256}, but has "
            f"{sha256}; nothing is kept: check the revision, or the digest, and fetch again"
        )


def start_follower(transfer: Transfer, partial: Partial) -> None:
    """Start the thread of a part that has just been opened."""
    Follower(transfer, partial).start()
