"""Reading a blob's payload: every block is compared with its digest before anybody sees a byte.

The file is reached through its descriptor (/proc/self/fd), so header and payload are of one and the
same file, and one that was unlinked meanwhile can still be read.
"""

from __future__ import annotations

import errno
import os
from dataclasses import astuple, dataclass

import torch

from nexus_ext import ops
from nexus_ext.cache.blob import Header
from nexus_ext.device import Device
from nexus_ext.engine import Faults
from nexus_ext.errors import CheckpointChanged, ConfigError, CorruptCheckpoint, ReadError
from nexus_ext.ops import native

__all__ = ["BlockMode", "ReadReport", "check_blocks", "memory_for", "read_payload"]

_NO_DEPTH = 0  # the reader's default
# Checked through so much memory, whatever a blob weighs. A multiple of every sane block.
_SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class BlockMode:
    """How blobs are read: what is asked for, not what comes of it (see `ReadReport`)."""

    io: str = "direct"
    use_uring: bool = True
    faults: Faults | None = None


@dataclass(frozen=True)
class ReadReport:
    """What a read came to.

    Attributes:
        nbytes: That were read and are right.
        is_direct: Whether the page cache was bypassed.
        is_ring: Whether by io_uring.
        bytes_staged: That could not land where they belong at once.
        num_plain: Reads that were continued plainly: short, interrupted, refused.
        num_second: Blocks that were right at the second reading only.
        num_faults: Injected.
    """

    nbytes: int
    is_direct: bool
    is_ring: bool
    bytes_staged: int
    num_plain: int
    num_second: int
    num_faults: int


def read_payload(
    descriptor: int, header: Header, name: str, mode: BlockMode, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, ReadReport]:
    """Fill `out` (uint8 [header.nbytes], contiguous, CPU; None: new memory on a page boundary).

    Blocks, without the GIL. What `out` holds after an error must not be used.

    Raises:
        CorruptCheckpoint: A block differs from its digest in two reads, or the file ends early.
        ReadError: The disk answered with an error; has its errno. Without one, the file could not
            be opened.
        ConfigError: Another `out`.
    """
    memory = memory_for(header.nbytes, out)
    return memory, _read(descriptor, header, name, mode, 0, memory)


def memory_for(nbytes: int, out: torch.Tensor | None) -> torch.Tensor:
    """`out` as it is read into, flat; new memory on a page boundary where there is none.

    Raises:
        ConfigError: `out` is not so many bytes one behind the other on the CPU.
    """
    if out is None:
        return Device.of("cpu").allocate(nbytes)
    is_bytes = out.dtype == torch.uint8 and out.device.type == "cpu" and out.is_contiguous()
    if not is_bytes or out.nbytes != nbytes:
        raise ConfigError(
            f"out must be {nbytes} contiguous bytes (uint8) on the CPU, got {out.numel()} of "
            f"{out.dtype} on {out.device}, strides {tuple(out.stride())}."
        )
    return out.detach().view(-1)


def check_blocks(descriptor: int, header: Header, name: str, mode: BlockMode) -> int:
    """Read all blocks through scratch memory; bytes read. Raises as `read_payload`."""
    step = max(header.block_bytes, _SCRATCH_BYTES // header.block_bytes * header.block_bytes)
    scratch = Device.of("cpu").allocate(min(step, header.nbytes))
    for start in range(0, header.nbytes, step):
        piece = scratch[: min(step, header.nbytes - start)]
        _read(descriptor, header, name, mode, start, piece)
    return header.nbytes


def _read(
    descriptor: int, header: Header, name: str, mode: BlockMode, start: int, out: torch.Tensor
) -> ReadReport:
    """`start` is a multiple of the block size."""
    first = start // header.block_bytes
    last = first + -(-out.numel() // header.block_bytes)
    info = os.fstat(descriptor)
    try:
        answer = ops.call(
            native.read_blocks_,
            out,
            f"/proc/self/fd/{descriptor}",
            [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns],
            header.header_nbytes + start,
            header.digests[first:last],
            header.block_bytes,
            mode.io,
            mode.use_uring,
            _NO_DEPTH,
            list(astuple(mode.faults)) if mode.faults else [],
        )
    except CheckpointChanged as error:
        raise CorruptCheckpoint(
            f"A cached file must never change; {name} was written to while it was read. It is set "
            "aside; fetch its bytes again."
        ) from error
    bad_block, error_number, is_direct, is_ring, *counts = answer.tolist()
    if bad_block < 0:
        return ReadReport(out.numel(), bool(is_direct), bool(is_ring), *counts)
    offset = header.header_nbytes + start + bad_block * header.block_bytes
    raise _failure(name, first + bad_block, offset, error_number)


def _failure(name: str, block: int, offset: int, number: int) -> CorruptCheckpoint | ReadError:
    if number == 0 or number == errno.ENODATA:
        what = "differs from its digest in two reads" if number == 0 else "ends early"
        return CorruptCheckpoint(
            f"Every block of a cached file must match its digest; block {block} of {name} (from "
            f"offset {offset}) {what}. The file is set aside; fetch its bytes again."
        )
    failed = ReadError(
        f"A read must succeed; {name} at offset {offset} failed: {os.strerror(number)} (errno "
        f"{number}). Check the disk; what was cached there must be fetched again."
    )
    failed.errno = number
    return failed
