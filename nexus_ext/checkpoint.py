"""Where are the bytes of a group?

This file owns the way from a path to byte ranges: it finds the files of a safetensors checkpoint,
validates their headers and the index over them, and lays the tensors of a group out. It reads
headers and never a weight byte, and it knows neither devices nor caches.

    path ──▶ index? ──▶ files ──▶ entries ──▶ Group(members, extents)

A checkpoint is untrusted input. Two judges must accept a header: `parse_header`, over the grammar
of header.py, because the safetensors library lets duplicate names and unknown fields pass, and the
library, because it defines the format. Both see the same bytes (see `_ask_safetensors`).
"""

from __future__ import annotations

import hashlib
import json
import ntpath
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

from nexus_ext.errors import (
    CheckpointChanged,
    CheckpointFormatError,
    CheckpointMismatch,
    NexusError,
    ReadError,
    TruncatedCheckpoint,
)
from nexus_ext.header import (
    AGAIN,
    MAX_DIMS,
    MAX_JSON_BYTES,
    broken,
    index_shards,
    quote,
    tensor_fields,
)

__all__ = [
    "ALIGNMENT",
    "DTYPE_NAMES",
    "Arrival",
    "Checkpoint",
    "Entry",
    "Extent",
    "File",
    "Group",
    "Lease",
    "Member",
    "Place",
    "Stamp",
    "parse_header",
]

# Bytes. Every member starts on such a boundary inside its group: BLAS may differ in the last bit
# for weights that are less aligned (torch 2.13, f32 GEMV at byte offsets 4 and 8).
ALIGNMENT = 64

_LENGTH_BYTES = 8  # a file begins with the length of its JSON header, little-endian
_MAX_INT = 2**63 - 1  # sizes and strides in torch are int64
_MAX_LISTED = 10  # names in one message
_MAX_FILE_NAME_BYTES = 255  # Linux's own limit
_FIELDS = ("dtype", "shape", "data_offsets")
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
# What safetensors calls a dtype.
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_KINDS = {"d": "a directory", "p": "a FIFO", "c": "a character device", "b": "a block device"}
_WANTED = (
    "a .safetensors file, an .index.json file, or a directory that holds model.safetensors, "
    "model.safetensors.index.json, or exactly one file with either ending"
)


@dataclass(frozen=True)
class Stamp:
    """What a file was when it was opened; a difference later is `CheckpointChanged`."""

    device: int
    inode: int
    size: int  # bytes
    mtime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> Stamp:
        """Take the stamp of an open file descriptor."""
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class File:
    """One file with weights: an absolute path without links, and what stood there.

    Attributes:
        path: How it is called.
        stamp: What it was.
        start: Where in it the checkpoint begins, which reaches to its end.
        descriptor: Of a file that may lose its name while it is in use; -1 where it keeps it.
    """

    path: Path
    stamp: Stamp
    start: int = 0
    descriptor: int = -1

    @property
    def reach(self) -> str:
        """The path to open it by."""
        return str(self.path) if self.descriptor < 0 else f"/proc/self/fd/{self.descriptor}"


@dataclass(frozen=True, slots=True)  # there may be a million
class Entry:
    """One tensor in a file; `file` indexes `Checkpoint.files`, `offset` counts from byte 0."""

    name: str
    file: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Extent:
    """Contiguous bytes in a file that go to contiguous bytes of a group; never empty."""

    file: int
    offset: int
    nbytes: int
    group_offset: int


@dataclass(frozen=True)
class Member:
    """One tensor inside a group; `offset` is in bytes and a multiple of `ALIGNMENT`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Group:
    """What moves together. `nbytes` counts padding and is a multiple of `ALIGNMENT`."""

    name: str
    members: tuple[Member, ...]
    extents: tuple[Extent, ...]
    nbytes: int

    @property
    def file_bytes(self) -> int:
        """Bytes to read from disk: `nbytes` without the padding."""
        return sum(extent.nbytes for extent in self.extents)

    @property
    def is_contiguous(self) -> bool:
        """Whether one extent, placed at the group's first byte, fills it."""
        return len(self.extents) == 1 and self.extents[0].group_offset == 0


class Gate(Protocol):
    """Whoever reads files that still arrive, and only what was announced; see `Engine`."""

    def announce(self, spans: Sequence[tuple[int, int, int]]) -> None: ...
    def settle(self, file: int, mtime_ns: int) -> None: ...
    def end_arrival(self, error: NexusError) -> None: ...
    def refuse(self, error: NexusError) -> None: ...


class Place(NamedTuple):
    """Where a shard lies: at the end of a file, from `start` on. The descriptor is of that file,
    which may lose its name, or -1.
    """

    path: Path
    start: int = 0
    descriptor: int = -1


class Lease(Protocol):
    """Keeps files open, or from being removed, while a checkpoint is in use."""

    def close(self) -> None:
        """Let go of them. May be called twice."""


class Arrival(Protocol):
    """Files of a checkpoint that are not all here yet; see `nexus_ext.arriving`."""

    @property
    def descriptors(self) -> Sequence[int]:
        """Of each file, in the order of `Checkpoint.files`, until `close`."""

    @property
    def is_arriving(self) -> bool: ...

    @property
    def bytes_received(self) -> int: ...

    def read(self, file: int, offset: int, nbytes: int) -> bytes:
        """A few bytes, when they are here. Blocks."""

    def feed(self, gate: Gate, spans: Sequence[tuple[int, int, int]]) -> None:
        """Fetch (file, offset, nbytes) in this order, then the rest, and tell the gate. Once."""

    def join(self, gate: Gate) -> None:
        """Tell another gate, too, of all that came and that comes."""

    def expect(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """These come behind what is expected so far, and before the rest. Does not block."""

    def hasten(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """Somebody waits for these: they come next. Does not block."""

    def close(self) -> None:
        """Fetch no more. Does not block."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The validated tensors of one checkpoint and where their bytes are.

    Attributes:
        path: The file or index that was opened, absolute, its links kept.
        files: The files with weights, in the order of their names.
        entries: Every tensor by name, in the order of file, then offset.
        arrival: Where the files are not all here yet: who brings them. Their paths are those they
            will have, and nothing stands there before they are whole.
        lease: Who keeps the files; closed with the model.
    """

    path: Path
    files: tuple[File, ...]
    entries: Mapping[str, Entry]
    arrival: Arrival | None = field(default=None, kw_only=True)
    lease: Lease | None = field(default=None, kw_only=True)

    @classmethod
    def open_arriving(
        cls, path: Path, shards: Mapping[str, tuple[Path, int]], arrival: Arrival
    ) -> Checkpoint:
        """Validate a checkpoint whose files still arrive; their headers are here.

        Args:
            path: Its index, whole; or, where there is none, its only file.
            shards: By name, in the order of the names: where the file will be, and an open
                descriptor of what grows.
            arrival: Who brings them.

        Raises:
            CheckpointFormatError, TruncatedCheckpoint: As `open`.
        """
        listed = _read_index(path) if path.name.endswith(".index.json") else None
        files: list[File] = []
        entries: list[Entry] = []
        for number, (name, (target, descriptor)) in enumerate(shards.items()):
            file, found = _read_followed(target, descriptor, number)
            if listed is not None:
                _check_shard(path, name, {entry.name for entry in found}, listed[name])
            files.append(file)
            entries += found
        by_name = {entry.name: entry for entry in entries}
        return cls(path, tuple(files), MappingProxyType(by_name), arrival=arrival)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, start: int = 0) -> Checkpoint:
        """Find and validate a checkpoint; reads headers only, and keeps no file open.

        Args:
            path: A .safetensors file, an .index.json file, or a directory that holds
                model.safetensors, model.safetensors.index.json, exactly one
                *.safetensors.index.json or exactly one *.safetensors (the first that is there).
            start: Where in a single file it begins; it reaches to the end.

        Raises:
            CheckpointFormatError: Missing, not a regular file, pickled, or against the format.
            TruncatedCheckpoint: A file ends before its header or its tensors do.
            CheckpointChanged: A file was modified while its header was read.
        """
        found = _locate(Path(path).absolute())
        if found.name.endswith(".index.json"):
            # Beside the index as it was named: in the hub's layout both are links to other folders.
            files, entries = _read_shards(found, lambda shard: Place(found.parent / shard))
        else:
            file, tensors = _read_file(Place(found, start), 0)
            files, entries = [file], tensors
        by_name = {entry.name: entry for entry in entries}
        return cls(found, tuple(files), MappingProxyType(by_name))

    @classmethod
    def open_within(cls, index: Path, place: Callable[[str], Place], lease: Lease) -> Checkpoint:
        """As `open`, where the shards lie at the end of other files.

        Args:
            index: An .index.json file.
            place: Where a shard lies.
            lease: Who keeps those files.

        Raises:
            As `open`, and what `place` raises.
        """
        files, entries = _read_shards(index, place)
        by_name = {entry.name: entry for entry in entries}
        return cls(index, tuple(files), MappingProxyType(by_name), lease=lease)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def fingerprint(self) -> str:
        """64 hex digits over the names and stamps of the files: equal while none changed."""
        facts = [(file.path.name, *astuple(file.stamp)) for file in self.files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def group(self, name: str, tensor_names: Iterable[str]) -> Group:
        """Lay out the tensors that move together.

        Members stand in the order of (file, offset), each on the next `ALIGNMENT` boundary.
        Neighbours that touch both in the file and in the group share an extent. A tensor without
        bytes is a member without extent. A repeated name counts once.

        Raises:
            CheckpointMismatch: A name is not in the checkpoint.
        """
        wanted = set(tensor_names)
        if unknown := wanted - self.entries.keys():
            raise CheckpointMismatch(
                f"every tensor of group {quote(name)} must be in {self.path}, which lacks "
                f"{_listed(unknown)}; compare with its names: {_sample(self.entries)}"
            )
        members: list[Member] = []
        extents: list[Extent] = []
        end = 0
        for entry in sorted((self.entries[tensor] for tensor in wanted), key=_file_order):
            start = _align(end)
            members.append(Member(entry.name, entry.dtype, entry.shape, start, entry.nbytes))
            _append(extents, Extent(entry.file, entry.offset, entry.nbytes, start))
            end = start + entry.nbytes
        return Group(name, tuple(members), tuple(extents), _align(end))


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _file_order(entry: Entry) -> tuple[int, int, int, str]:
    # Tensors without bytes share an offset with a neighbour; size and name settle the order.
    return entry.file, entry.offset, entry.nbytes, entry.name


def _append(extents: list[Extent], new: Extent) -> None:
    """Add an extent, or grow the last one when the two touch on both sides."""
    if new.nbytes == 0:
        return
    if extents:
        last = extents[-1]
        touching = (last.file, last.offset + last.nbytes, last.group_offset + last.nbytes)
        if touching == (new.file, new.offset, new.group_offset):
            extents[-1] = replace(last, nbytes=last.nbytes + new.nbytes)
            return
    extents.append(new)


def _sample(names: Iterable[str]) -> str:
    ordered = list(names)
    more = f" and {len(ordered) - _MAX_LISTED} more" if len(ordered) > _MAX_LISTED else ""
    return ", ".join(map(quote, ordered[:_MAX_LISTED])) + more


def _listed(names: set[str]) -> str:
    return f"{len(names)}: {_sample(sorted(names))}"


def _locate(path: Path) -> Path:
    if os.path.isdir(path):
        return _choose(path)
    if path.suffix in _PICKLE_SUFFIXES:
        raise _pickled(path)
    return path


def _choose(directory: Path) -> Path:
    """The file or index in a directory; `_opened` finds out whether it is one."""
    with _reaching(directory, "directory"):
        names = sorted(os.listdir(directory))
    for exact in ("model.safetensors", "model.safetensors.index.json"):
        if exact in names:
            return directory / exact
    # An index wins over a lone file: shards that did not arrive must be missed, not ignored.
    for ending in (".safetensors.index.json", ".safetensors"):
        fitting = [name for name in names if name.endswith(ending)]
        if len(fitting) == 1:
            return directory / fitting[0]
    if pickles := [name for name in names if Path(name).suffix in _PICKLE_SUFFIXES]:
        raise _pickled(directory / pickles[0])
    raise CheckpointFormatError(
        f"a checkpoint is {_WANTED}, but {directory} holds {_sample(names) or 'nothing'}; "
        "name the file to open"
    )


def _pickled(path: Path) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"only safetensors is read, because a pickle can run code while it loads, but {path} is "
        "one by its ending; convert it with safetensors.torch.save_file, or with save_pretrained "
        "of transformers"
    )


@contextmanager
def _reaching(path: Path, role: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a path that no system call can take
        raise CheckpointFormatError(
            f"the {role} {quote(str(path))} must be there and readable, but: {error}; check the "
            f"path, or download it again (a checkpoint is {_WANTED})"
        ) from error


@contextmanager
def _opened(path: Path, role: str) -> Iterator[tuple[int, File]]:
    """Open a regular file while its header is read; a FIFO or a device cannot make this wait."""
    with _reaching(path, role):
        real = os.path.realpath(path, strict=True)
        # Without O_NONBLOCK a FIFO that has no writer waits for one, for ever.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = stat.filemode(os.fstat(descriptor).st_mode)[0]
        if kind != "-":
            raise CheckpointFormatError(
                f"the {role} {path} must be a regular file, but is {_KINDS.get(kind, 'none')}; "
                "name another path"
            )
        file = File(Path(real), Stamp.of(descriptor))
        yield descriptor, file
        if Stamp.of(descriptor) != file.stamp:
            raise _changed(file)
    finally:
        os.close(descriptor)


def _read_file(place: Place, number: int, role: str = "checkpoint") -> tuple[File, list[Entry]]:
    # By its path too: what is read here has just been found there.
    with _opened(place.path, role) as (descriptor, opened):
        file = replace(opened, start=place.start, descriptor=place.descriptor)
        header = _read_header(descriptor, file)
        entries = parse_header(header, file, number)
        _ask_safetensors(header, file)
    return file, entries


def _read_followed(path: Path, descriptor: int, number: int) -> tuple[File, list[Entry]]:
    """As `_read_file`; the file is written to meanwhile, behind its header."""
    file = File(path, Stamp.of(descriptor))
    header = _read_header(descriptor, file)
    entries = parse_header(header, file, number)
    _ask_safetensors(header, file)
    return file, entries


def _read_header(descriptor: int, file: File) -> bytes:
    begin = file.start + _LENGTH_BYTES
    if file.stamp.size < begin:
        raise _truncated(file, begin, "the length of its header")
    length = int.from_bytes(_pread(descriptor, file, _LENGTH_BYTES, file.start), "little")
    if length > MAX_JSON_BYTES:
        rule = f"a safetensors file begins with a header length up to {MAX_JSON_BYTES}"
        raise broken(f"{file.path}, offset {file.start}", rule, length)
    if file.stamp.size < begin + length:
        raise _truncated(file, begin + length, "its header")
    return _pread(descriptor, file, length, begin)


def _pread(descriptor: int, file: File, nbytes: int, offset: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        try:
            chunk = os.pread(descriptor, nbytes - len(data), offset + len(data))
        except OSError as error:
            raise ReadError(
                f"{file.path} must be readable at offset {offset}, but: {error}; check the disk"
            ) from error
        if not chunk:  # it was long enough a moment ago
            raise _changed(file)
        data += chunk
    return bytes(data)


def _ask_safetensors(header: bytes, file: File) -> None:
    """Let the library judge the very bytes that were parsed, without their tensors.

    Any backend of `safe_open` maps the file to parse its header (0.8.0), so a file that shrinks
    meanwhile would kill the process with SIGBUS. It gets a copy in memory instead that nobody
    else can change: the header, then a hole as long as the tensors.
    """
    try:
        with open(os.memfd_create("nexus-header"), "wb") as copy:
            copy.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
            copy.flush()
            copy.truncate(file.stamp.size - file.start)
            with safe_open(f"/proc/self/fd/{copy.fileno()}", "pt", backend="pread"):
                pass
    except (SafetensorError, OSError) as error:
        raise CheckpointFormatError(
            f"{file.path}: the safetensors library must accept the header at offset "
            f"{file.start + _LENGTH_BYTES}, but says: {error}; {AGAIN}"
        ) from error


def parse_header(header: bytes, file: File, number: int = 0) -> list[Entry]:
    """The tensors a header declares, in the order of their offsets.

    Args:
        header: The JSON bytes after the length.
        file: The file they come from; its size must be what the header makes it.
        number: The position of `file` in `Checkpoint.files`.

    Raises:
        CheckpointFormatError: A rule of the format is broken.
        TruncatedCheckpoint: The tensors need more bytes than the file has.
    """
    where = f"{file.path}, header at offset {file.start + _LENGTH_BYTES}"
    base = file.start + _LENGTH_BYTES + len(header)
    entries = [
        _parse_entry(file, number, base, name, fields)
        for name, fields in tensor_fields(header, where)
    ]
    entries.sort(key=_file_order)
    _check_cover(entries, file, base)
    return entries


def _parse_entry(file: File, number: int, base: int, name: str, fields: object) -> Entry:
    if not isinstance(fields, dict) or fields.keys() != set(_FIELDS):
        rule = "a tensor has dtype, shape and data_offsets, nothing else"
        raise _broken_tensor(file, name, rule, fields)
    dtype, shape, offsets = (fields[key] for key in _FIELDS)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        rule = f"nexus_ext reads {', '.join(_DTYPES)} (safetensors knows more, such as F4)"
        raise _broken_tensor(file, name, rule, dtype)
    if not _are_integers(shape):
        raise _broken_tensor(file, name, "shape is a list of whole numbers", shape)
    if len(shape) > MAX_DIMS:
        rule = f"a shape has at most {MAX_DIMS} dimensions"
        raise _broken_tensor(file, name, rule, len(shape))
    if not _are_integers(offsets) or len(offsets) != 2:
        raise _broken_tensor(file, name, "data_offsets are two whole numbers", offsets)
    count = _num_elements(shape)
    if count is None:
        raise _broken_tensor(file, name, "the product of a shape is below 2**63", shape)
    nbytes = offsets[1] - offsets[0]
    if nbytes != count * _DTYPES[dtype].itemsize:
        rule = f"{dtype} with shape {quote(shape)} takes {count * _DTYPES[dtype].itemsize} bytes"
        raise _broken_tensor(file, name, rule, nbytes)
    return Entry(name, number, _DTYPES[dtype], tuple(shape), base + offsets[0], nbytes)


def _broken_tensor(file: File, name: str, rule: str, got: object) -> CheckpointFormatError:
    return broken(f"{file.path}, tensor {quote(name)}", rule, got)


def _num_elements(shape: list[int]) -> int | None:
    """The product, or None if it does not stay below 2**63."""
    count = 1
    for length in shape:
        count *= length
        if count > _MAX_INT:  # even when a later 0 would hide it: the library multiplies in order
            return None
    return count


def _check_cover(entries: list[Entry], file: File, base: int) -> None:
    """Tensors follow one another from the header to the last byte: no hole, overlap or rest."""
    end = base
    for entry in entries:
        if entry.offset != end:
            rule = f"it starts at offset {end}, no hole, no overlap"
            raise _broken_tensor(file, entry.name, rule, entry.offset)
        end += entry.nbytes
        if end > file.stamp.size:
            raise _truncated(file, end, f"tensor {quote(entry.name)} at offset {entry.offset}")
    if end < file.stamp.size:
        rule = f"the file ends where its last tensor does, after {end} bytes"
        raise broken(str(file.path), rule, file.stamp.size)


def _are_integers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and {type(item) for item in value} <= {int}  # bool is no int


def _read_shards(index: Path, place: Callable[[str], Place]) -> tuple[list[File], list[Entry]]:
    files: list[File] = []
    entries: list[Entry] = []
    shards = _read_index(index)
    for number, shard in enumerate(sorted(shards)):
        file, found = _read_file(place(shard), number, f"shard named by {index.name},")
        _check_shard(index, shard, {entry.name for entry in found}, shards[shard])
        files.append(file)
        entries += found
    return files, entries


def _read_index(index: Path) -> dict[str, set[str]]:
    """The names of the tensors in each shard, as the index tells them."""
    with _opened(index, "index") as (descriptor, file):
        if file.stamp.size > MAX_JSON_BYTES:
            rule = f"an index has at most {MAX_JSON_BYTES} bytes"
            raise broken(str(index), rule, file.stamp.size)
        raw = _pread(descriptor, file, file.stamp.size, 0)
    return parse_index(raw, index)


def parse_index(raw: bytes, index: Path) -> dict[str, set[str]]:
    """The names of the tensors in each shard; a shard is the plain name of a file.

    Args:
        raw: The JSON bytes of the index.
        index: The file they come from, for messages.

    Raises:
        CheckpointFormatError: It is no index, or it names something but files beside it.
    """
    shards: dict[str, set[str]] = defaultdict(set)
    for tensor, shard in index_shards(raw, str(index)).items():
        shards[shard].add(tensor)
    for shard in shards:
        _check_plain_name(shard, index)
    return shards


def _check_plain_name(shard: str, index: Path) -> None:
    special = shard in ("", ".", "..") or ntpath.splitdrive(shard)[0] != ""
    written = shard.isprintable() and len(shard.encode()) <= _MAX_FILE_NAME_BYTES
    if special or not written or not set(shard).isdisjoint("/\\"):
        raise broken(str(index), "a shard is the plain name of a file beside the index", shard)
    if Path(shard).suffix in _PICKLE_SUFFIXES:
        raise _pickled(index.parent / shard)


def _check_shard(index: Path, shard: str, found: set[str], listed: set[str]) -> None:
    """A shard holds the tensors its index puts there, all of them and no other."""
    for flaw, names in (
        ("lacks", listed - found),
        ("also holds, which the index puts elsewhere or nowhere,", found - listed),
    ):
        if names:
            raise CheckpointFormatError(
                f"{index}: every tensor is in the one shard that the index names, but "
                f"{quote(shard)} {flaw} {_listed(names)}; download index and shards again"
            )


def _truncated(file: File, needed: int, what: str) -> TruncatedCheckpoint:
    return TruncatedCheckpoint(
        f"{file.path} must have {needed} bytes for {what}, but has {file.stamp.size}; {AGAIN}"
    )


def _changed(file: File) -> CheckpointChanged:
    return CheckpointChanged(
        f"a file must not change while its header is read, but {file.path} did; open the "
        "checkpoint again when its writer has finished"
    )
