"""Zstandard, where it pays: a sample of the very bytes decides, and the decision is reported.

Decompressing is believed no further than the size that was promised: not one byte more is made,
and what comes out is compared with the digest of the plain bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from nexus_ext.cache.blob import view_of
from nexus_ext.errors import CorruptCheckpoint, MissingExtra

__all__ = [
    "Decision",
    "check_promise",
    "compress",
    "decide",
    "decompress_into",
    "require_zstd",
]

LEVEL = 1  # weights are noise and exponents: higher levels cost time and gain next to nothing
_SAMPLE_BYTES = 1 << 20
_PIECE_BYTES = 4 << 20
# What a frame may ask for to be decompressed, whatever it says.
_MAX_WINDOW_BYTES = 128 << 20
# A block of 128 KiB takes four bytes at least.
_MOST_RATIO = 1 << 15
# A gain that is smaller is lost again in what is not measured.
_LEAST_RATIO = 1.02


@dataclass(frozen=True)
class Decision:
    """Whether to compress, and the figures that say so.

    Attributes:
        is_on: Compress.
        ratio: Plain bytes for one compressed byte, of the sample.
        decompress_bytes_per_second: Plain bytes that come out in a second; 0 where not measured.
        link_bytes_per_second: Of the disk or the network; None where not known.
        why: In a sentence.
    """

    is_on: bool
    ratio: float
    decompress_bytes_per_second: float
    link_bytes_per_second: float | None
    why: str


def require_zstd() -> ModuleType:
    """The package `zstandard`. Raises MissingExtra without it."""
    try:
        import zstandard
    except ImportError:
        raise MissingExtra(
            "Compressed bytes need the package zstandard, which is not installed: "
            "pip install 'nexus_ext[zstd]'."
        ) from None
    return zstandard


def decide(parts: Sequence[torch.Tensor], link_bytes_per_second: float | None) -> Decision:
    """Compress a sample, decompress it, and compare the seconds.

    It pays where reading less and decompressing takes less time than reading all. Without a rate
    of the link (a network that was not measured yet), where anything is gained at all.

    Args:
        parts: The payload: uint8 tensors on the CPU.
        link_bytes_per_second: Of what it will be read from.
    """
    try:
        zstd = require_zstd()
    except MissingExtra as error:
        return Decision(False, 1.0, 0.0, link_bytes_per_second, str(error))
    sample = _sample(parts)
    if not sample:
        return Decision(False, 1.0, 0.0, link_bytes_per_second, "there is nothing to compress")
    packed = zstd.ZstdCompressor(level=LEVEL).compress(sample)
    ratio = len(sample) / len(packed)
    if ratio < _LEAST_RATIO:
        return Decision(False, ratio, 0.0, link_bytes_per_second, "the sample hardly shrinks")
    began = time.perf_counter()
    zstd.ZstdDecompressor().decompress(packed)
    rate = len(sample) / max(time.perf_counter() - began, 1e-9)
    return _judge(ratio, rate, link_bytes_per_second)


def _judge(ratio: float, rate: float, link: float | None) -> Decision:
    if link is None:
        return Decision(True, ratio, rate, link, "the sample shrinks; the link is not measured yet")
    plain_seconds = 1 / link
    packed_seconds = plain_seconds / ratio + 1 / rate
    what = "less" if packed_seconds < plain_seconds else "no less"
    why = (
        f"reading 1 GB plainly takes {1e9 * plain_seconds:.2f} s; compressed {ratio:.2f} times and "
        f"decompressed {1e9 * packed_seconds:.2f} s, which is {what}"
    )
    return Decision(packed_seconds < plain_seconds, ratio, rate, link, why)


def _sample(parts: Sequence[torch.Tensor]) -> bytes:
    """A piece out of the middle of each of the largest parts: the beginning is often a header."""
    largest = sorted(parts, key=lambda part: part.nbytes, reverse=True)[:4]
    share = _SAMPLE_BYTES // max(1, len(largest))
    pieces = []
    for part in largest:
        start = max(0, part.nbytes - share) // 2
        pieces.append(bytes(view_of(part)[start : start + share]))
    return b"".join(pieces)


def compress(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """All parts as one frame that knows its plain size.

    Raises:
        MissingExtra: Without zstandard.
    """
    nbytes = sum(part.nbytes for part in parts)
    packer = require_zstd().ZstdCompressor(level=LEVEL, write_checksum=False).compressobj(nbytes)
    packed = bytearray()
    for part in parts:
        view = view_of(part)
        for start in range(0, view.nbytes, _PIECE_BYTES):
            packed += packer.compress(view[start : start + _PIECE_BYTES])
    packed += packer.flush()
    return torch.frombuffer(packed, dtype=torch.uint8)


def check_promise(nbytes: int, packed_nbytes: int, name: str) -> None:
    """Raises CorruptCheckpoint where no frame so long can hold so many plain bytes: then no memory
    is taken for them.
    """
    if not 0 <= nbytes <= packed_nbytes * _MOST_RATIO:
        raise _corrupt(name, f"{packed_nbytes} bytes promise {nbytes}")


def decompress_into(
    pieces: Iterable[bytes | memoryview], out: torch.Tensor, digest: str, name: str
) -> None:
    """Fill `out` with what the pieces of one frame hold, and compare.

    Args:
        pieces: Of the frame, in order.
        out: uint8 on the CPU, contiguous; as long as the plain bytes were said to be.
        digest: SHA-256 of the plain bytes, hexadecimal.
        name: For messages.

    Raises:
        CorruptCheckpoint: They hold fewer bytes, more, other ones, or no frame.
        MissingExtra: Without zstandard.
    """
    zstd = require_zstd()
    source = _Source(iter(pieces))
    sha256 = hashlib.sha256()
    view, have = view_of(out), 0
    try:
        unpacker: Any = zstd.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        reader = unpacker.stream_reader(source)
        while have < view.nbytes:
            count = reader.readinto(view[have : have + _PIECE_BYTES])
            if not count:
                raise _corrupt(name, f"it ends after {have} of {view.nbytes} bytes")
            sha256.update(view[have : have + count])
            have += count
        if reader.read(1):
            raise _corrupt(name, f"it holds more than the {view.nbytes} bytes that it promised")
    except zstd.ZstdError as error:
        raise _corrupt(name, f"it cannot be decompressed ({error})") from error
    if sha256.hexdigest() != digest:
        raise _corrupt(name, "what comes out has another digest")


class _Source:
    """What zstandard reads from: pieces, one behind the other."""

    def __init__(self, pieces: Iterator[bytes | memoryview]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def read(self, nbytes: int) -> memoryview:
        while not self._rest.nbytes:
            piece = next(self._pieces, None)
            if piece is None:
                return memoryview(b"")
            self._rest = memoryview(piece)
        taken, self._rest = self._rest[:nbytes], self._rest[nbytes:]
        return taken


def _corrupt(name: str, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"Compressed bytes must give back what was put; {name} does not: {what}. Fetch its bytes "
        "again."
    )
