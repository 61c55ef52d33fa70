"""A store that nodes share: immutable objects named by their content, behind any fsspec URL.

No locks and no membership: an object is whole or not there, two nodes that put the same bytes put
the same object, and what comes back is compared with its name. What is wrong or cut is refused and
counted; a store that cannot be reached is a miss.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from nexus_ext.cache.compression import (
    Decision,
    check_promise,
    compress,
    decide,
    decompress_into,
    require_zstd,
)
from nexus_ext.cache.parts import Part, tensors_of, view_of
from nexus_ext.cache.reading import memory_for
from nexus_ext.cache.remote_files import PIECE_BYTES, RemoteFiles, unreachable
from nexus_ext.cache.remote_object import (
    HEAD_NBYTES,
    MOST_NOTE_BYTES,
    Head,
    Note,
    blob_path,
    check_digest,
    note_path,
)
from nexus_ext.cache.remote_report import RemoteStats
from nexus_ext.cache.remote_wire import chained, copy_into, corrupt, cut_to, split
from nexus_ext.errors import ConfigError, CorruptCheckpoint
from nexus_ext.memory import parse_bytes

__all__ = ["RemoteStats", "RemoteStore"]

Compress = Literal["auto", "on", "off"]
# Below, latency is measured and not a rate.
_TELLING_BYTES = 1 << 20


class RemoteStore:
    """Bytes by digest, and digests by key. Thread-safe as far as the driver of its URL is.

    Whoever can write to the store says what a key means; what a digest means nobody can forge.
    """

    def __init__(
        self,
        url: str,
        *,
        compress: Compress = "auto",
        max_object_bytes: int | str = "16GiB",
        link_bytes_per_second: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Name it; nothing is asked before it is used.

        Args:
            url: Of a folder: file://, memory://, s3://, gs://, or http:// (to read only).
            compress: "auto" compresses what gains by it, if zstandard is installed.
            max_object_bytes: No larger object is read, whatever it promises.
            link_bytes_per_second: Of the network, if known; else it is measured on the way.
            options: For the driver: credentials and the like. They are never shown.

        Raises:
            ConfigError: An option or a URL that cannot be.
            MissingExtra: A driver, or for compress="on" zstandard, is not installed.
        """
        if compress not in get_args(Compress):
            raise ConfigError(
                f"compress must be one of {', '.join(get_args(Compress))}; got {compress!r}."
            )
        if compress == "on":
            require_zstd()
        self._compress = compress
        self._max_object_bytes = parse_bytes(max_object_bytes)
        self._files = RemoteFiles(url, options or {})
        self._given_rate = link_bytes_per_second
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._read_seconds = 0.0
        self._bad: set[str] = set()  # they are written anew when they are put
        self._decision: Decision | None = None
        self._last_error = ""

    # -- by digest --------------------------------------------------------------------------------

    def has(self, digest: str) -> bool:
        """Whether an object is there and as long as it says; False if the store cannot be asked."""
        check_digest(digest)
        try:
            return digest not in self._bad and self._is_whole(blob_path(self._files.root, digest))
        except FileNotFoundError:
            return False
        except unreachable() as error:
            self._missed(error)
            return False

    def get(self, digest: str, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """The plain bytes, compared with their digest. Blocks for the network.

        Args:
            digest: SHA-256, hexadecimal.
            out: uint8 on the CPU, contiguous, as long as the object is. None: new memory.

        Returns:
            None where there is none, it is not what it should be, or the store cannot be reached.
            `out` then holds nothing that may be used.

        Raises:
            MissingExtra: It is compressed, and zstandard is not installed.
            ConfigError: Another `out`.
        """
        check_digest(digest)
        return self._counted(digest, None, out)

    def put(self, parts: Sequence[Part]) -> str | None:
        """Keep bytes; their digest. None where the store would not take them.

        Raises:
            ConfigError: Parts that cannot be kept.
        """
        tensors = tensors_of(parts)
        sha256 = hashlib.sha256()
        for tensor in tensors:
            sha256.update(view_of(tensor))
        digest = sha256.hexdigest()
        return digest if self._put(digest, tensors) else None

    # -- by key -----------------------------------------------------------------------------------

    def find(self, key: str) -> Note | None:
        """What a key means here; None if nothing, or nothing that can be believed or read."""
        try:
            data = self._files.beginning(note_path(self._files.root, key), MOST_NOTE_BYTES + 1)
            return Note.decode(data, key)
        except FileNotFoundError:
            return None
        except CorruptCheckpoint as error:
            self._refuse("refused_corrupt", error)
        except unreachable() as error:
            self._missed(error)
        return None

    def fetch(self, key: str, out: torch.Tensor | None = None) -> tuple[Note, torch.Tensor] | None:
        """`find` and `get`. Raises as `get`."""
        note = self.find(key)
        if note is None:
            self._count("misses")
            return None
        payload = self._counted(note.digest, note.nbytes, out)
        return None if payload is None else (note, payload)

    def publish(
        self,
        key: str,
        parts: Sequence[Part],
        *,
        kind: str = "layer",
        about: Mapping[str, Any] | None = None,
    ) -> Note | None:
        """Keep bytes and say what key they have. None where the store would not take them.

        Raises:
            ConfigError: Parts or descriptions that cannot be kept.
        """
        tensors = tensors_of(parts)
        nbytes = sum(part.nbytes for part in tensors)
        Note(key, "0" * 64, nbytes, kind, about or {}).encode()  # before anything is moved
        digest = self.put(tensors)
        if digest is None:
            return None
        note = Note(key, digest, nbytes, kind, dict(about or {}))
        try:
            # The object first: a note never points at what is not there yet.
            self._files.write(note_path(self._files.root, key), [note.encode()])
        except unreachable() as error:
            self._missed(error)
            return None
        return note

    def stats(self) -> RemoteStats:
        """Counters."""
        with self._lock:
            names = [n for n, kind in RemoteStats.__annotations__.items() if kind == "int"]
            counts: dict[str, int] = {name: self._counts[name] for name in names}
        return RemoteStats(
            url=self._files.name,
            link_bytes_per_second=self._link_rate(),
            decision=self._decision,
            last_error=self._last_error,
            **counts,
        )

    # -- inside -----------------------------------------------------------------------------------

    def _counted(
        self, digest: str, nbytes: int | None, out: torch.Tensor | None
    ) -> torch.Tensor | None:
        try:
            payload = self._get(digest, nbytes, out)
        except FileNotFoundError:
            payload = None
        except CorruptCheckpoint as error:
            self._bad.add(digest)
            self._refuse("refused_corrupt", error)
            payload = None
        except unreachable() as error:
            self._missed(error)
            payload = None
        self._count("misses" if payload is None else "hits")
        return payload

    def _get(
        self, digest: str, nbytes: int | None, out: torch.Tensor | None
    ) -> torch.Tensor | None:
        began = time.perf_counter()
        path = blob_path(self._files.root, digest)
        first = self._files.beginning(path, PIECE_BYTES)
        head, rest = split(first, digest)
        if nbytes is not None and head.nbytes != nbytes:
            raise corrupt(digest, f"it promises {head.nbytes} bytes, and its note {nbytes}")
        if max(head.nbytes, head.wire_nbytes) > self._max_object_bytes:
            self._count("refused_too_large")
            return None
        self._check_promise(head, path, len(first), digest)
        memory = memory_for(head.nbytes, out)
        pieces = self._files.pieces(path, len(first), HEAD_NBYTES + head.wire_nbytes)
        wire = cut_to(chained(rest, pieces), head.wire_nbytes, digest)
        if head.encoding == "zstd":
            decompress_into(wire, memory, digest, f"the object {digest}")
            for _ in wire:
                raise corrupt(digest, "there is more behind what was compressed")
        else:
            copy_into(wire, memory, digest)
        with self._lock:
            self._read_seconds += time.perf_counter() - began
        self._count("wire_bytes_in", HEAD_NBYTES + head.wire_nbytes)
        self._count("plain_bytes_in", head.nbytes)
        return memory

    def _check_promise(self, head: Head, path: str, have: int, digest: str) -> None:
        """No memory is taken for bytes that are not there."""
        if head.encoding == "zstd":
            check_promise(head.nbytes, head.wire_nbytes, f"the object {digest}")
        wanted = HEAD_NBYTES + head.wire_nbytes
        size = self._files.size(path) if wanted > have else None
        if size not in (None, wanted):
            raise corrupt(digest, f"it has {size} bytes and promises {wanted}")

    def _put(self, digest: str, tensors: Sequence[torch.Tensor]) -> bool:
        if not self._files.is_writable:
            self._count("refused_read_only")
            return False
        if self.has(digest):
            self._count("puts_known")
            return True
        nbytes = sum(part.nbytes for part in tensors)
        encoding, encoded = self._encode(tensors)
        wire_nbytes = sum(part.nbytes for part in encoded)
        head = Head(encoding, nbytes, wire_nbytes).encode()
        try:
            self._files.write(blob_path(self._files.root, digest), [head, *map(view_of, encoded)])
        except unreachable() as error:
            self._missed(error)
            return False
        self._bad.discard(digest)
        self._count("puts")
        self._count("plain_bytes_out", nbytes)
        self._count("wire_bytes_out", wire_nbytes + HEAD_NBYTES)
        return True

    def _encode(self, tensors: Sequence[torch.Tensor]) -> tuple[str, Sequence[torch.Tensor]]:
        if self._compress == "off":
            return "plain", tensors
        if self._compress == "auto":
            self._decision = decide(tensors, self._link_rate())
            if not self._decision.is_on:
                return "plain", tensors
        return "zstd", [compress(tensors)]

    def _is_whole(self, path: str) -> bool:
        head = Head.decode(self._files.beginning(path, HEAD_NBYTES))
        if head is None:
            return False
        return self._files.size(path) in (None, HEAD_NBYTES + head.wire_nbytes)

    def _link_rate(self) -> float | None:
        if self._given_rate is not None:
            return self._given_rate
        with self._lock:
            nbytes, seconds = self._counts["wire_bytes_in"], self._read_seconds
        return nbytes / seconds if nbytes >= _TELLING_BYTES and seconds > 0 else None

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def _refuse(self, name: str, error: CorruptCheckpoint) -> None:
        self._count(name)
        self._last_error = str(error)

    def _missed(self, error: BaseException) -> None:
        """Texts of drivers may hold signed URLs: only what kind of error it was is kept."""
        self._count("unreachable")
        number = getattr(error, "errno", None)
        self._last_error = type(error).__name__ + (f" (errno {number})" if number else "")
