"""From a path to the tensors of its files: finds them, opens them safely, reads their headers.

    path ──▶ index? ──▶ files ──▶ entries

Two judges must accept a header: `parse_header`, because the safetensors library lets duplicate
names and unknown fields pass, and the library, because it defines the format. Both see the same
bytes (see `_ask_safetensors`).
"""

from __future__ import annotations

import ntpath
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nexus_ext.errors import CheckpointChanged, CheckpointFormatError, ReadError
from nexus_ext.header import AGAIN, MAX_JSON_BYTES, broken, index_shards, quote
from nexus_ext.places import Entry, File, Place, Stamp
from nexus_ext.safetensors_header import LENGTH_BYTES, parse_header, truncated

__all__ = [
    "check_shard",
    "listed",
    "locate",
    "parse_index",
    "read_file",
    "read_followed",
    "read_index",
    "read_shards",
    "sample",
]

_MAX_LISTED = 10  # names in one message
_MAX_FILE_NAME_BYTES = 255  # Linux's own limit
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_KINDS = {"d": "a directory", "p": "a FIFO", "c": "a character device", "b": "a block device"}
_WANTED = (
    "a .safetensors file, an .index.json file, or a directory that holds model.safetensors, "
    "model.safetensors.index.json, or exactly one file with either ending"
)


def locate(path: Path) -> Path:
    """The file or index that is meant by a path. Raises as `Checkpoint.open`."""
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
        f"a checkpoint is {_WANTED}, but {directory} holds {sample(names) or 'nothing'}; "
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
def _opened(path: Path, role: str, held: int = -1) -> Iterator[tuple[int, File]]:
    """Open a regular file while its header is read; a FIFO or a device cannot make this wait. One
    that is held open may have lost its name.
    """
    with _reaching(path, role):
        real = os.path.realpath(path, strict=held < 0)
        # Without O_NONBLOCK a FIFO that has no writer waits for one, for ever.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(real, flags) if held < 0 else os.dup(held)
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
            raise changed(file)
    finally:
        os.close(descriptor)


def read_file(place: Place, number: int, role: str = "checkpoint") -> tuple[File, list[Entry]]:
    """One file with weights and its tensors; `number` is its place among the checkpoint's files."""
    with _opened(place.path, role, place.descriptor) as (descriptor, opened):
        file = replace(opened, start=place.start, descriptor=place.descriptor)
        header = _read_header(descriptor, file)
        entries = parse_header(header, file, number)
        _ask_safetensors(header, file)
    return file, entries


def read_followed(path: Path, descriptor: int, number: int) -> tuple[File, list[Entry]]:
    """As `read_file`; the file is written to meanwhile, behind its header."""
    file = File(path, Stamp.of(descriptor))
    header = _read_header(descriptor, file)
    entries = parse_header(header, file, number)
    _ask_safetensors(header, file)
    return file, entries


def _read_header(descriptor: int, file: File) -> bytes:
    begin = file.start + LENGTH_BYTES
    if file.stamp.size < begin:
        raise truncated(file, begin, "the length of its header")
    length = int.from_bytes(_pread(descriptor, file, LENGTH_BYTES, file.start), "little")
    if length > MAX_JSON_BYTES:
        rule = f"a safetensors file begins with a header length up to {MAX_JSON_BYTES}"
        raise broken(f"{file.path}, offset {file.start}", rule, length)
    if file.stamp.size < begin + length:
        raise truncated(file, begin + length, "its header")
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
            raise changed(file)
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
            copy.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
            copy.flush()
            copy.truncate(file.stamp.size - file.start)
            with safe_open(f"/proc/self/fd/{copy.fileno()}", "pt", backend="pread"):
                pass
    except (SafetensorError, OSError) as error:
        raise CheckpointFormatError(
            f"{file.path}: the safetensors library must accept the header at offset "
            f"{file.start + LENGTH_BYTES}, but says: {error}; {AGAIN}"
        ) from error


def read_shards(index: Path, place: Callable[[str], Place]) -> tuple[list[File], list[Entry]]:
    """All that an index names, in the order of the names; `place` says where a shard lies."""
    files: list[File] = []
    entries: list[Entry] = []
    shards = read_index(index)
    for number, shard in enumerate(sorted(shards)):
        file, found = read_file(place(shard), number, f"shard named by {index.name},")
        check_shard(index, shard, {entry.name for entry in found}, shards[shard])
        files.append(file)
        entries += found
    return files, entries


def read_index(index: Path) -> dict[str, set[str]]:
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


def check_shard(index: Path, shard: str, found: set[str], expected: set[str]) -> None:
    """A shard holds the tensors its index puts there, all of them and no other."""
    for flaw, names in (
        ("lacks", expected - found),
        ("also holds, which the index puts elsewhere or nowhere,", found - expected),
    ):
        if names:
            raise CheckpointFormatError(
                f"{index}: every tensor is in the one shard that the index names, but "
                f"{quote(shard)} {flaw} {listed(names)}; download index and shards again"
            )


def changed(file: File) -> CheckpointChanged:
    return CheckpointChanged(
        f"a file must not change while its header is read, but {file.path} did; open the "
        "checkpoint again when its writer has finished"
    )


def sample(names: Iterable[str]) -> str:
    """Some names, for a message."""
    ordered = list(names)
    more = f" and {len(ordered) - _MAX_LISTED} more" if len(ordered) > _MAX_LISTED else ""
    return ", ".join(map(quote, ordered[:_MAX_LISTED])) + more


def listed(names: set[str]) -> str:
    """How many names, and some of them."""
    return f"{len(names)}: {sample(sorted(names))}"
