"""The RAM tier: bytes by their digest, in memory that all processes of a user may share.

    fill(digest) ──▶ segment in /dev/shm ──private mapping──▶ load(digest), in any process
                     or in a memfd        ──private mapping──▶ load(digest), in this one

A digest names bytes that never change, so nothing here can be out of date. The budget counts the
bytes of all processes; what was used least recently goes first.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from nexus_ext.cache.blob import Part, tensors_of
from nexus_ext.cache.private_segments import PrivateSegments
from nexus_ext.cache.ram_report import RamStats
from nexus_ext.cache.seen import Seen
from nexus_ext.cache.segment import file_bytes, map_segment, memory_of, seal
from nexus_ext.cache.shared_folder import Reserved, SharedFolder, default_folder
from nexus_ext.cache.turns import Turns
from nexus_ext.errors import (
    ConfigError,
    CorruptCheckpoint,
    EngineClosed,
    ForkedEngine,
    ReadError,
)
from nexus_ext.memory import parse_bytes

__all__ = ["RamStats", "RamTier"]

_DIGEST = re.compile(r"[0-9a-f]{16,128}", re.ASCII)


class RamTier:
    """Bytes in memory, least recently used out first.

    Methods may be called by several threads. Not for use in a forked child; a process that was
    started anew shares the segments.
    """

    def __init__(
        self, max_bytes: int | str, *, folder: str | Path | None = None, shared: bool = True
    ) -> None:
        """Open the tier.

        Args:
            max_bytes: For segments of all processes; 0 turns the tier off.
            folder: On a tmpfs, of mode 0700; None is one of this user's in /dev/shm. Where it
                cannot be used, memory is private (see `effective`).
            shared: Whether other processes may see the segments.

        Raises:
            ConfigError: `max_bytes` is no size.
        """
        self.max_bytes = parse_bytes(max_bytes)
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._turns = Turns()
        self._counts: Counter[str] = Counter()
        self._holds: Counter[str] = Counter()
        self._seen = Seen()
        self._private = PrivateSegments(self._lock)
        self._folder: SharedFolder | None = None
        self._reason = "" if shared else "asked for"
        if self.max_bytes and shared:
            self._open_folder(Path(folder) if folder else default_folder("segments"))
        self._finalizer = weakref.finalize(self, _close, self._folder, self._private, self._pid)

    @property
    def effective(self) -> str:
        """ "shared", "off", or "private: " and why."""
        if not self.max_bytes:
            return "off"
        return f"private: {self._reason}" if self._reason else "shared"

    def load(self, digest: str) -> torch.Tensor | None:
        """The bytes: uint8, a mapping of the caller's own; what is written to it reaches nobody.

        Blocks for a look at every byte where this process sees a segment for the first time. A
        segment that is damaged is dropped, and counts as a miss.

        Returns:
            None where they are not in memory. The memory is held by the tensor and its views.
        """
        self._check_usable()
        found = self._find(_checked_name(digest))
        self._count("misses" if found is None else "hits")
        return found

    def fill(
        self,
        digest: str,
        nbytes: int,
        write: Callable[[torch.Tensor], None],
        *,
        phase: int = 0,
    ) -> torch.Tensor | None:
        """Take memory, let `write` fill it, and load it. Nobody sees it before it is whole.

        A second thread that asks for the same bytes meanwhile waits, and gets them.

        Args:
            digest: Names the bytes.
            nbytes: How many.
            write: Called with uint8 [nbytes], which it must not keep. What it raises is raised.
            phase: How far behind a page boundary the first byte lies.

        Returns:
            As `load`; None where there is no room (`write` was not called).
        """
        self._check_usable()
        name = _checked_name(digest)
        with self._turns.of(name):
            found = self._find(name)
            if found is not None:
                return found
            found_place = self._reserve(file_bytes(nbytes, phase))
            if found_place is None:
                self._count("refused")
                return None
            return self._write(*found_place, name, nbytes, write, phase)

    def put(self, digest: str, parts: Sequence[Part]) -> torch.Tensor | None:
        """`fill` with copies of these, one behind the other.

        Raises:
            ConfigError: A part that is neither a contiguous uint8 tensor on the CPU nor a buffer.
        """
        sources = tensors_of(parts)

        def copy(memory: torch.Tensor) -> None:
            if sources:
                torch.cat(sources, out=memory)

        return self.fill(digest, sum(source.nbytes for source in sources), copy)

    @contextmanager
    def hold(self, digest: str) -> Iterator[None]:
        """Within the block this tier does not take the segment away."""
        name = _checked_name(digest)
        with self._lock:
            self._holds[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._holds[name] -= 1
                if not self._holds[name]:
                    del self._holds[name]

    def evict(self, digest: str) -> bool:
        """Drop a segment that is not held; whether there was one. Who has loaded it keeps it."""
        self._check_usable()
        return self._evict(_checked_name(digest))

    def clear(self) -> None:
        """Drop all segments that are not held, those of other processes too."""
        for digest in self.digests():
            self.evict(digest)

    def digests(self) -> list[str]:
        """What can be loaded now, the least recently used first."""
        self._check_usable()
        shared = [] if self._folder is None else self._folder.digests()
        return [*shared, *self._private.digests()]

    def stats(self) -> RamStats:
        """Counters and sizes."""
        is_open = self._finalizer.alive
        folder = self._folder if is_open else None
        counts = self._counts
        return RamStats(
            effective=self.effective,
            max_bytes=self.max_bytes,
            nbytes=self._private.nbytes() + (folder.nbytes() if folder else 0),
            num_segments=len(self.digests()) if is_open else 0,
            hits=counts["hits"],
            misses=counts["misses"],
            fills=counts["fills"],
            evictions=counts["evictions"],
            corrupt=counts["corrupt"],
            refused=counts["refused"],
            abandoned=self._folder.num_abandoned if self._folder else 0,
        )

    def close(self) -> None:
        """Let go. The last process that does takes the shared segments along. Tensors stay."""
        self._finalizer()

    # -- finding -----------------------------------------------------------------------------

    def _find(self, name: str) -> torch.Tensor | None:
        descriptor, is_own = self._private.open(name), True
        if descriptor is None and self._folder is not None:
            descriptor, is_own = _open(self._folder, name), False
        if descriptor is None:
            self._seen.forget(name)
            return None
        try:
            return self._map(descriptor, name, check=not is_own)
        except CorruptCheckpoint:
            self._count("corrupt")
            self._remove(name)
            return None
        finally:
            os.close(descriptor)

    def _map(self, descriptor: int, name: str, *, check: bool) -> torch.Tensor:
        is_new = check and not self._seen.has(name, descriptor)
        payload = map_segment(descriptor, f"segment {name}", check=is_new)
        if is_new:
            self._seen.remember(name, descriptor)
        return payload

    # -- filling -----------------------------------------------------------------------------

    def _reserve(self, nbytes: int) -> tuple[SharedFolder | PrivateSegments, Reserved] | None:
        """Where a new segment is to be, and its file; None where there is no room."""
        if not self.max_bytes:
            return None
        folder, shared_bytes = self._folder, 0
        if folder is not None and not self._reason:
            try:
                room = self.max_bytes - self._private.nbytes()
                place = folder.reserve(nbytes, room, self._evict)
                return None if place is None else (folder, place)
            except OSError as error:
                # From now on; what is shared already stays so.
                self._reason = error.strerror or str(error)
        if folder is not None:
            shared_bytes = folder.nbytes()
        try:
            place = self._private.reserve(nbytes, self.max_bytes - shared_bytes, self._evict)
        except OSError:
            return None  # counted as refused: the tier serves on without it
        return None if place is None else (self._private, place)

    def _write(
        self,
        home: SharedFolder | PrivateSegments,
        place: Reserved,
        name: str,
        nbytes: int,
        write: Callable[[torch.Tensor], None],
        phase: int,
    ) -> torch.Tensor:
        try:
            memory = memory_of(place.descriptor, nbytes, phase)
            write(memory)
            seal(place.descriptor, memory, phase)
            payload = map_segment(place.descriptor, f"segment {name}", check=False)
            self._seen.remember(name, place.descriptor)  # what was written here is known
            home.publish(place, name)
            self._count("fills")
            return payload
        except BaseException:
            home.discard(place)
            raise
        finally:
            os.close(place.descriptor)

    # -- small things ------------------------------------------------------------------------

    def _open_folder(self, path: Path) -> None:
        try:
            self._folder = SharedFolder(path)
        except ConfigError as error:
            self._reason = str(error)

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def _evict(self, name: str) -> bool:
        with self._lock:
            if self._holds[name] > 0 or not self._remove(name):
                return False
            self._counts["evictions"] += 1
            return True

    def _remove(self, name: str) -> bool:
        self._seen.forget(name)
        was_private = self._private.remove(name)
        return (self._folder is not None and self._folder.remove(name)) or was_private

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedEngine(
                "A RAM tier serves the process that opened it; this is a forked child of it. Open "
                "one here: segments are shared."
            )
        if not self._finalizer.alive:
            raise EngineClosed("A RAM tier was closed before this use. Open another one.")


def _open(folder: SharedFolder, name: str) -> int | None:
    try:
        return folder.open(name)
    except OSError as error:
        raise ReadError(
            f"A segment must be readable; {folder.path / name} is not: {error.strerror}. Look at "
            "how many files this process has open."
        ) from error


def _checked_name(digest: str) -> str:
    """A digest becomes the name of a file."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ConfigError(
            f"a digest is 16 to 128 hexadecimal digits in lower case, got {digest!r}; use that of "
            "SHA-256."
        )
    return digest


def _close(folder: SharedFolder | None, private: PrivateSegments, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child owns nothing of it
    private.clear()
    if folder is not None:
        folder.leave()
