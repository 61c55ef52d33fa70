"""A segment: bytes in memory as a file, which every process maps and nobody can change.

    0        nothing, `phase` bytes
    phase    the payload
             XXH3-64 of every block of the payload
             footer: magic, block size, phase, lengths, checksum of table and footer

The file lies in tmpfs or is a memfd. It is filled once through a shared mapping, and then handed
out as private mappings: what a caller writes stays the caller's own.
"""

from __future__ import annotations

import os
import struct

import torch

from nexus_ext import ops
from nexus_ext.errors import CorruptCheckpoint, ReadError
from nexus_ext.ops import native

__all__ = ["file_bytes", "map_segment", "memory_of", "seal"]

_BLOCK_BYTES = 1 << 20
_MAGIC = b"\x89NXRAM1\n"
# magic, block_bytes, phase, nbytes, num_blocks, check
_FOOTER = struct.Struct("<8sQQQQQ")
_CHECK_BYTES = 8


def _table_offset(nbytes: int, phase: int) -> int:
    return -(-(phase + nbytes) // 8) * 8


def _num_blocks(nbytes: int) -> int:
    return -(-nbytes // _BLOCK_BYTES)


def file_bytes(nbytes: int, phase: int = 0) -> int:
    """What a segment with so long a payload takes."""
    return _table_offset(nbytes, phase) + 8 * _num_blocks(nbytes) + _FOOTER.size


def memory_of(descriptor: int, nbytes: int, phase: int = 0) -> torch.Tensor:
    """The payload of a new segment, to be filled: uint8 [nbytes].

    The file has its length, and memory behind every page of it.
    """
    return _map(descriptor, file_bytes(nbytes, phase), shared=True)[phase : phase + nbytes]


def seal(descriptor: int, payload: torch.Tensor, phase: int = 0) -> None:
    """Write table and footer behind a payload that is whole now."""
    digests = _digests(payload)
    table = struct.pack(f"<{digests.numel()}q", *digests.tolist())
    fields = (_MAGIC, _BLOCK_BYTES, phase, payload.nbytes, digests.numel())
    head = _FOOTER.pack(*fields, 0)[:-_CHECK_BYTES]
    text = table + head + struct.pack("<Q", _checksum(table + head))
    view = memoryview(text)
    offset = _table_offset(payload.nbytes, phase)
    while view:
        count = os.pwrite(descriptor, view, offset)
        offset, view = offset + count, view[count:]


def map_segment(descriptor: int, name: str, *, check: bool) -> torch.Tensor:
    """The payload: uint8, a private mapping of its own that lives as long as its views do.

    Args:
        descriptor: Of the file; may be closed afterwards.
        name: For messages.
        check: Compare every block with its digest first.

    Raises:
        CorruptCheckpoint: It is no whole segment, or a block differs.
        ReadError: It cannot be mapped.
    """
    size = os.fstat(descriptor).st_size
    if size < _FOOTER.size:
        raise _corrupt(name, f"it has {size} bytes")
    pages = _map(descriptor, size, shared=False)
    footer = bytes(pages[-_FOOTER.size :].tolist())
    magic, block_bytes, phase, nbytes, num_blocks, check_sum = _FOOTER.unpack(footer)
    if (magic, block_bytes, num_blocks) != (_MAGIC, _BLOCK_BYTES, _num_blocks(nbytes)):
        raise _corrupt(name, "it does not end as a segment does")
    if phase > size or size != file_bytes(nbytes, phase):
        raise _corrupt(name, f"it has {size} bytes, and its footer tells of {nbytes}")
    table = pages[_table_offset(nbytes, phase) : size - _FOOTER.size]
    if check_sum != _checksum(bytes(table.tolist()) + footer[:-_CHECK_BYTES]):
        raise _corrupt(name, "its footer differs from the footer's checksum")
    payload = pages[phase : phase + nbytes]
    if check:
        _check_blocks(payload, table, name)
    return payload


def _check_blocks(payload: torch.Tensor, table: torch.Tensor, name: str) -> None:
    digests = _digests(payload)
    wanted = torch.tensor(struct.unpack(f"<{digests.numel()}q", bytes(table.tolist())))
    wrong = (digests != wanted.to(torch.int64)).nonzero().flatten().tolist()
    if wrong:
        raise _corrupt(name, f"block {wrong[0]} differs from its digest")


def _digests(payload: torch.Tensor) -> torch.Tensor:
    """XXH3-64 of each block, int64. Without the GIL."""
    digests: torch.Tensor = ops.call(native.block_digests, [payload], _BLOCK_BYTES)
    return digests


def _checksum(text: bytes) -> int:
    view = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return int(ops.call(native.xxh3, view)) & (1 << 64) - 1


def _map(descriptor: int, nbytes: int, *, shared: bool) -> torch.Tensor:
    # By the descriptor: a path may name another file by now. It may be closed afterwards.
    path = f"/proc/self/fd/{descriptor}"
    try:
        return torch.from_file(path, shared=shared, size=nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise ReadError(
            f"A segment in memory must be mappable; {nbytes} bytes could not be mapped: "
            f"{str(error).splitlines()[0]} Free memory, or give the RAM tier less."
        ) from error


def _corrupt(name: str, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"A segment in memory must be what it says it is; {name} is not: {what}. It is dropped; "
        "fetch its bytes again."
    )
