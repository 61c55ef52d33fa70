"""Files that are small to keep and large to read; a child measures what reading them takes.

`python bombs.py FOLDER` makes every bomb in turn and opens it in a process of its own (forked, so
that importing torch is paid once). A line of JSON for each tells its bytes, its tensors, the answer
of `Checkpoint.open`, and by how many bytes the peak of memory grew; or the signal that ended it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.errors import CheckpointError

MB = 1_000_000


def _repeated(front: bytes, piece: bytes, count: int, back: bytes) -> Iterator[bytes]:
    """A text of any length that never stands in memory."""
    yield front
    per_block = max(1, MB // len(piece))
    for done in range(0, count, per_block):
        yield piece * min(per_block, count - done)
    yield back


def _tensors(count: int) -> Iterator[bytes]:
    text = ',"t%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    yield b"{" + (text % 0).encode()[1:]
    for number in range(1, count):
        yield (text % number).encode()
    yield b"}"


def _metadata(count: int) -> Iterator[bytes]:
    yield b'{"__metadata__":{"":""'
    for number in range(count):
        yield b',"%d":""' % number
    yield b"}}"


def _weight_map(count: int) -> Iterator[bytes]:
    yield b'{"weight_map":{"":"x.safetensors"'
    for number in range(count):
        yield b',"%d":"x.safetensors"' % number
    yield b"}}"


HEADERS: dict[str, Callable[[], Iterator[bytes]]] = {
    "900,000 tensors": lambda: _tensors(900_000),
    "more than a million tensors": lambda: _tensors(1_000_001),
    "white space": lambda: _repeated(b"{", b" ", 99 * MB, b"}"),
    "100,000 dimensions": lambda: _repeated(b'{"a":{"shape":[', b"1,", 100_000, b"1]}}"),
    "lists": lambda: _repeated(b'{"a":[', b"[],", 33 * MB, b"[]]}"),
    "objects": lambda: _repeated(b'{"a":[', b"{},", 33 * MB, b"{}]}"),
    "numbers": lambda: _repeated(b'{"a":{"shape":[', b"300,", 24 * MB, b"1]}}"),
    "digits": lambda: _repeated(b'{"a":{"shape":[', b"9", 99 * MB, b"]}}"),
    "nesting": lambda: _repeated(b'{"a":', b"[", 99 * MB, b""),
    "nested objects": lambda: _repeated(b"", b'{"":', 24 * MB, b""),
    "metadata": lambda: _metadata(7 * MB),
    "a long metadata": lambda: _repeated(
        b'{"__metadata__":{"":"', b"x", 99 * MB, b'\xf0\x9f\x98\x80"}}'
    ),
    "a long name": lambda: _repeated(b'{"', b"\\u0061", 16 * MB, b'":1}'),
    "an open string of quotes": lambda: _repeated(b'{"', b'\\"', 49 * MB, b""),
}
INDEXES: dict[str, Callable[[], Iterator[bytes]]] = {
    "index: lists": lambda: _repeated(b'{"x":[', b"[],", 33 * MB, b"[]]}"),
    "index: nesting": lambda: _repeated(b'{"x":', b"[", 99 * MB, b""),
    "index: an open string of quotes": lambda: _repeated(b'{"x":"', b'\\"', 49 * MB, b""),
    "index: digits": lambda: _repeated(b'{"x":', b"9", 99 * MB, b"}"),
    "index: a long shard name": lambda: _repeated(b'{"weight_map":{"a":"', b"x", 99 * MB, b'"}}'),
    "index: more than a million tensors": lambda: _weight_map(3 * MB),
}


def make(folder: Path, name: str) -> Path:
    """Write one bomb."""
    if name in INDEXES:
        path = folder / "model.safetensors.index.json"
        with open(path, "wb") as file:
            file.writelines(INDEXES[name]())
        return path
    path = folder / "model.safetensors"
    with open(path, "wb") as file:
        file.write(bytes(8))
        file.writelines(HEADERS[name]())
        length = file.tell() - 8
        file.seek(0)
        file.write(length.to_bytes(8, "little"))
    return path


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(path: Path) -> dict[str, object]:
    """Open a bomb in this process."""
    before = _peak_bytes()
    try:
        num_tensors = len(Checkpoint.open(path).entries)
        answer = "opened"
    except CheckpointError as error:
        answer, num_tensors = f"{type(error).__name__}: {error}", 0
    grown = _peak_bytes() - before
    nbytes = os.path.getsize(path)
    return {"answer": answer, "nbytes": nbytes, "num_tensors": num_tensors, "grown_bytes": grown}


def measure_in_a_fork(name: str, path: Path) -> None:
    """Print what `measure` tells, or how the process ended."""
    child = os.fork()
    if child == 0:
        # With the default limit Python stops a deep nesting; users do raise it.
        sys.setrecursionlimit(10**6)
        print(json.dumps({"name": name, **measure(path)}), flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status != 0:
        print(json.dumps({"name": name, "answer": f"ended with status {status}"}), flush=True)


def main(folder: Path) -> None:
    for name in (*HEADERS, *INDEXES):
        path = make(folder, name)
        measure_in_a_fork(name, path)
        path.unlink()  # up to 100 MB


if __name__ == "__main__":
    main(Path(sys.argv[1]))
