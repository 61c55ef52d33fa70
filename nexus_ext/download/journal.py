"""The journal beside a partial file: which blocks have landed, and what they hashed to.

A line is `crc32 json`. A torn or foreign line is not believed; neither is a block whose bytes do
not hash to what its line says. So nothing here needs to reach the disk in any order.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

__all__ = ["Block", "Hasher", "Head", "block_line", "head_line", "new_hasher", "parse"]

_FORMAT = 1
_MAX_NBYTES = 2**63 - 1


class Hasher(Protocol):
    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Head:
    """What a partial file is a part of.

    Attributes:
        key: Names the wanted content (by digest) or the source; holds no secret.
        nbytes: The whole size; None while a server does not say it.
        validator: The source's version: ETag, date, or fsspec's key; "" where it gives none.
    """

    key: str
    nbytes: int | None
    validator: str


@dataclass(frozen=True)
class Block:
    """Bytes that have landed, and their digest, "algorithm:hex"."""

    offset: int
    nbytes: int
    digest: str


def _xxh3() -> Callable[[], Hasher] | None:
    try:
        from xxhash import xxh3_128
    except ImportError:
        return None
    return xxh3_128


def new_hasher(algorithm: str | None = None) -> tuple[str, Hasher | None]:
    """A hasher and its name: the one that is named, or the fastest that is installed.

    The hasher is None where the named one is not there: such a block cannot be believed.
    """
    fast = _xxh3()
    if algorithm == "sha256" or (algorithm is None and fast is None):
        return "sha256", hashlib.sha256()
    if algorithm in (None, "xxh3") and fast is not None:
        return "xxh3", fast()
    return str(algorithm), None


def _line(payload: object) -> bytes:
    text = json.dumps(payload, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def head_line(head: Head) -> bytes:
    return _line({"nexus_download": _FORMAT, **asdict(head)})


def block_line(block: Block) -> bytes:
    return _line([block.offset, block.nbytes, block.digest])


def _payload(line: bytes) -> object:
    crc, _, text = line.partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NBYTES


def _as_head(payload: object) -> Head | None:
    if not isinstance(payload, dict) or payload.get("nexus_download") != _FORMAT:
        return None
    key, nbytes, validator = (payload.get(name) for name in ("key", "nbytes", "validator"))
    if not isinstance(key, str) or not isinstance(validator, str):
        return None
    return Head(key, nbytes, validator) if nbytes is None or _is_size(nbytes) else None


def _as_block(payload: object) -> Block | None:
    if not isinstance(payload, list) or len(payload) != 3:
        return None
    offset, nbytes, digest = payload
    if not _is_size(offset) or not _is_size(nbytes) or nbytes == 0 or not isinstance(digest, str):
        return None
    return Block(offset, nbytes, digest)


def parse(data: bytes) -> tuple[Head, list[Block]] | None:
    """What a journal says, as far as it can be believed; None without a whole head.

    Blocks lie inside the file. That their bytes are there has still to be seen.
    """
    lines = data.split(b"\n")[:-1]  # what follows the last line break is torn
    head = _as_head(_payload(lines[0])) if lines else None
    if head is None or head.nbytes is None:
        return None
    blocks = [block for line in lines[1:] if (block := _as_block(_payload(line)))]
    return head, [block for block in blocks if block.offset + block.nbytes <= head.nbytes]
