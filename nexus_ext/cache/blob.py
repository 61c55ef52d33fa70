"""A blob: one immutable file that says what it holds and can prove it.

    0     magic, checksum of the header, version, lengths, SHA-256 of the payload
    80    JSON: key, kind, when it was made, what the caller says about it
          XXH3-64 of every block of the payload
    4096n the payload, one part behind the other

The name of the file is the SHA-256 of its payload, so a name never means other bytes than it did.
The payload begins at a multiple of 4096: direct reads land in place. Every byte of the header is
under its checksum, every byte of the payload under its block's. They find damage, not malice.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from nexus_ext import ops
from nexus_ext.errors import ConfigError, CorruptCheckpoint, ReadError, WriteError
from nexus_ext.ops import native

__all__ = ["BLOCK_BYTES", "Header", "Part", "open_blob", "read_header", "tensors_of", "write_blob"]

Part: TypeAlias = "torch.Tensor | bytes | bytearray | memoryview"

BLOCK_BYTES = 1 << 20
_ALIGNMENT = 4096
_MAGIC = b"\x89NXBLOB\n"
_VERSION = 1
# magic, check, version, block_bytes, header_nbytes, nbytes, sha256, json_nbytes, num_blocks
_HEAD = struct.Struct("<8sQIIQQ32sII")
_CHECKED_FROM = 16  # behind magic and checksum
_MAX_JSON_BYTES = 1 << 20
# The table of 8 TiB; a header that wants more is none.
_MAX_HEADER_BYTES = 80 << 20
# Linux takes no more buffers in one call.
_MAX_BUFFERS = 1024


@dataclass(frozen=True)
class Header:
    """What a blob says about itself.

    Attributes:
        key: Under which its bytes were first put.
        kind: What they are, in a word.
        about: What the caller added; JSON.
        created_ns: When, nanoseconds since 1970.
        nbytes: Of the payload.
        sha256: Of the payload, 32 bytes.
        digests: XXH3-64 of each block, int64.
        header_nbytes: Where the payload begins.
        block_bytes: Of each block but the last.
    """

    key: str
    kind: str
    about: Mapping[str, Any]
    created_ns: int
    nbytes: int
    sha256: bytes
    digests: torch.Tensor
    header_nbytes: int
    block_bytes: int = BLOCK_BYTES

    @property
    def file_nbytes(self) -> int:
        return self.header_nbytes + self.nbytes

    @property
    def stored_bytes(self) -> int:
        """What the file takes of a disk."""
        return _align_up(self.file_nbytes)

    @classmethod
    def of(
        cls,
        key: str,
        kind: str,
        about: Mapping[str, Any],
        created_ns: int,
        parts: Sequence[torch.Tensor],
    ) -> Header:
        """Hash the parts, twice: SHA-256 of all, XXH3-64 of each block. Blocks, without the GIL."""
        sha256 = hashlib.sha256()
        for view in map(view_of, parts):
            sha256.update(view)
        digests = ops.call(native.block_digests, list(parts) or [_no_bytes()], BLOCK_BYTES)
        text = _json_of(key, kind, about, created_ns)
        header_nbytes = _align_up(_HEAD.size + len(text) + digests.nbytes)
        nbytes = sum(part.nbytes for part in parts)
        return cls(key, kind, about, created_ns, nbytes, sha256.digest(), digests, header_nbytes)

    def encode(self) -> bytearray:
        """The first `header_nbytes` of the file."""
        text = _json_of(self.key, self.kind, self.about, self.created_ns)
        head = bytearray(self.header_nbytes)
        _HEAD.pack_into(
            head,
            0,
            _MAGIC,
            0,
            _VERSION,
            self.block_bytes,
            self.header_nbytes,
            self.nbytes,
            self.sha256,
            len(text),
            self.digests.numel(),
        )
        end = _HEAD.size + len(text)
        head[_HEAD.size : end] = text
        struct.pack_into(f"<{self.digests.numel()}q", head, end, *self.digests.tolist())
        struct.pack_into("<Q", head, len(_MAGIC), _checksum(head))
        return head

    @classmethod
    def decode(cls, head: bytearray, name: str) -> Header:
        """What `encode` wrote; `name` is for messages.

        Raises:
            CorruptCheckpoint: It did not write this.
        """
        _, check, _, block_bytes, header_nbytes, nbytes, sha256, json_nbytes, num_blocks = (
            _HEAD.unpack_from(head)
        )
        if check != _checksum(head):
            raise _corrupt(name, "its header differs from the header's checksum")
        end = _HEAD.size + json_nbytes
        if block_bytes != BLOCK_BYTES:
            raise _corrupt(name, f"it has blocks of {block_bytes} bytes")
        if num_blocks != -(-nbytes // block_bytes) or header_nbytes != _align_up(
            end + 8 * num_blocks
        ):
            raise _corrupt(name, "the lengths in its header do not fit together")
        digests = torch.tensor(struct.unpack_from(f"<{num_blocks}q", head, end), dtype=torch.int64)
        key, kind, about, created_ns = _parse_json(bytes(head[_HEAD.size : end]), name)
        return cls(
            key, kind, about, created_ns, nbytes, sha256, digests, header_nbytes, block_bytes
        )


def tensors_of(parts: Sequence[Part]) -> list[torch.Tensor]:
    """The parts as tensors (uint8, 1-D, CPU) over the same memory; only buffers that may not be
    written to are copied.

    Raises:
        ConfigError: A part that is neither a contiguous uint8 tensor on the CPU nor a buffer.
    """
    return [_tensor_of(part) for part in parts]


def _tensor_of(part: Part) -> torch.Tensor:
    if isinstance(part, torch.Tensor):
        if part.dtype != torch.uint8 or part.device.type != "cpu" or not part.is_contiguous():
            raise ConfigError(
                "what is cached is contiguous uint8 on the CPU; got a tensor of "
                f"{part.dtype} on {part.device}, strides {tuple(part.stride())}. "
                "Pass tensor.cpu().contiguous().view(torch.uint8)."
            )
        return part.detach().view(-1)
    view = memoryview(part)
    if not view.contiguous:
        raise ConfigError("what is cached is contiguous; got a buffer with gaps. Copy it first.")
    if view.nbytes == 0:
        return _no_bytes()
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)


def view_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, for as long as the tensor lives."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def write_blob(
    path: Path, temporary: Path, header: Header, parts: Sequence[torch.Tensor], mode: int
) -> None:
    """Write a blob so that `path` has all of it or does not exist, also after a power cut.

    Blocks until the disk has it. Leaves no pages in the page cache, and no temporary.

    Args:
        path: Where it will be.
        temporary: In the same folder; nobody else's.
        header: Of `parts`.
        parts: As of `tensors_of`.
        mode: Permissions.

    Raises:
        WriteError: The disk would not take it; its cause has the errno.
    """
    try:
        _make_folder(path.parent, mode | (mode & 0o444) >> 2)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, mode)
        try:
            _write_all(descriptor, [memoryview(header.encode()), *map(view_of, parts)])
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        _remove_if_possible(temporary)
        raise WriteError(
            f"A cache must be able to write; {path} ({header.file_nbytes} bytes) could not be "
            f"written: {error.strerror}. Make room, or give the cache another folder."
        ) from error
    except BaseException:
        _remove_if_possible(temporary)
        raise


def _remove_if_possible(path: Path) -> None:
    # Where nothing can be written, nothing can be removed either. Whoever opens next does it.
    with suppress(OSError):
        path.unlink()


def _write_all(descriptor: int, views: list[memoryview]) -> None:
    offset = 0
    waiting = [view for view in views if view.nbytes]
    while waiting:
        count = os.pwritev(descriptor, waiting[:_MAX_BUFFERS], offset)
        offset += count
        while waiting and count >= waiting[0].nbytes:
            count -= waiting.pop(0).nbytes
        if count:
            waiting[0] = waiting[0][count:]


def _make_folder(folder: Path, mode: int) -> None:
    with suppress(FileExistsError):
        folder.mkdir(mode=mode)
        _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_blob(path: Path) -> int:
    """A descriptor of the file, and of no link, pipe or device.

    Raises:
        FileNotFoundError: There is none.
        CorruptCheckpoint: Something else stands there.
        ReadError: It cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        if path.is_symlink():
            raise _corrupt(str(path), "a link stands in its place") from error
        raise ReadError(
            f"A cached file must be readable; cannot open {path}: {error.strerror}. Look at its "
            "permissions, and at how many files may be open."
        ) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise _corrupt(str(path), "no regular file stands in its place")


def read_header(descriptor: int, name: str) -> Header:
    """Read and check the header, and that the file is as long as it says.

    Raises:
        CorruptCheckpoint: It is not one, or the file is cut or longer.
        ReadError: The disk answered with an error; has its errno. Without one the stack is full.
    """
    size = os.fstat(descriptor).st_size
    if size < _ALIGNMENT:
        raise _corrupt(name, f"it ends inside its header, after {size} bytes")
    head = _pread(descriptor, _ALIGNMENT, 0, name)
    magic, _, version, _, header_nbytes, nbytes, *_ = _HEAD.unpack_from(head)
    if magic != _MAGIC or version != _VERSION:
        raise _corrupt(name, f"it does not begin as a blob of version {_VERSION}")
    is_sane = header_nbytes % _ALIGNMENT == 0 and _ALIGNMENT <= header_nbytes <= _MAX_HEADER_BYTES
    if not is_sane or header_nbytes + nbytes != size:
        raise _corrupt(
            name, f"it has {size} bytes, and its header promises {header_nbytes} and {nbytes}"
        )
    if header_nbytes > _ALIGNMENT:
        head += _pread(descriptor, header_nbytes - _ALIGNMENT, _ALIGNMENT, name)
    return Header.decode(head, name)


def _pread(descriptor: int, nbytes: int, offset: int, name: str) -> bytearray:
    data = bytearray()
    while len(data) < nbytes:
        try:
            got = os.pread(descriptor, nbytes - len(data), offset + len(data))
        except OSError as error:
            failed = ReadError(
                f"A read must succeed; the header of {name} failed at offset "
                f"{offset + len(data)}: {error.strerror}. Check the disk."
            )
            failed.errno = error.errno
            raise failed from error
        if not got:
            raise _corrupt(name, f"it ends inside its header, after {offset + len(data)} bytes")
        data += got
    return data


def _corrupt(name: str, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"A cached file must be what it says it is; {name} is not: {what}. It is set aside; fetch "
        "its bytes again."
    )


def _json_of(key: str, kind: str, about: Mapping[str, Any], created_ns: int) -> bytes:
    if not isinstance(key, str) or not isinstance(kind, str):
        raise ConfigError(f"key and kind of an entry are texts, got {key!r} and {kind!r}.")
    said = {"key": key, "kind": kind, "about": dict(about), "created_ns": created_ns}
    try:
        text = json.dumps(said, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"what is said about a cached entry must be JSON; {error}.") from error
    if len(text) > _MAX_JSON_BYTES:
        raise ConfigError(
            f"key and description of an entry must fit in {_MAX_JSON_BYTES} bytes of JSON, got "
            f"{len(text)}. Say less."
        )
    return text


def _parse_json(text: bytes, name: str) -> tuple[str, str, dict[str, Any], int]:
    """Under its checksum the text is ours; a stranger's may still be anything."""
    try:
        said = json.loads(text)
    except RecursionError:
        # The caller's stack may be nearly full: that says nothing about the file.
        raise ReadError(
            "What a cached file says about itself is looked at on a stack with room for it; for "
            f"{name} there was too little. Use the cache from fewer calls deep."
        ) from None
    except ValueError:
        raise _corrupt(name, "its description is no JSON") from None
    if isinstance(said, dict):
        key, kind, about, created = (said.get(k) for k in ("key", "kind", "about", "created_ns"))
        is_right = isinstance(key, str) and isinstance(kind, str) and isinstance(about, dict)
        if is_right and type(created) is int and 0 <= created < 1 << 63:
            return str(key), str(kind), dict(about or {}), created
    raise _corrupt(name, "its description lacks key, kind or date")


def _checksum(head: bytearray) -> int:
    view = torch.frombuffer(head, dtype=torch.uint8)[_CHECKED_FROM:]
    return int(native.xxh3(view)) & (1 << 64) - 1


def _no_bytes() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _align_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
