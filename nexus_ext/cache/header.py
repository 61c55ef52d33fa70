"""What a blob says about itself, and the bytes that say it.

Every byte of it is under its own checksum. What is under the checksum is ours, or a stranger's who
made one too: lengths are compared before they are believed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nexus_ext import ops
from nexus_ext.cache.parts import no_bytes, view_of
from nexus_ext.errors import ConfigError, CorruptCheckpoint, ReadError
from nexus_ext.ops import native

__all__ = ["ALIGNMENT", "BLOCK_BYTES", "Header", "check_beginning", "corrupt"]

BLOCK_BYTES = 1 << 20
ALIGNMENT = 4096
_MAGIC = b"\x89NXBLOB\n"
_VERSION = 1
# magic, check, version, block_bytes, header_nbytes, nbytes, sha256, json_nbytes, num_blocks
_HEAD = struct.Struct("<8sQIIQQ32sII")
_CHECKED_FROM = 16  # behind magic and checksum
_MAX_JSON_BYTES = 1 << 20
# The table of 8 TiB; a header that wants more is none.
_MAX_HEADER_BYTES = 80 << 20


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
        digests = ops.call(native.block_digests, list(parts) or [no_bytes()], BLOCK_BYTES)
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
            raise corrupt(name, "its header differs from the header's checksum")
        end = _HEAD.size + json_nbytes
        if block_bytes != BLOCK_BYTES:
            raise corrupt(name, f"it has blocks of {block_bytes} bytes")
        if num_blocks != -(-nbytes // block_bytes) or header_nbytes != _align_up(
            end + 8 * num_blocks
        ):
            raise corrupt(name, "the lengths in its header do not fit together")
        digests = torch.tensor(struct.unpack_from(f"<{num_blocks}q", head, end), dtype=torch.int64)
        key, kind, about, created_ns = _parse_json(bytes(head[_HEAD.size : end]), name)
        return cls(
            key, kind, about, created_ns, nbytes, sha256, digests, header_nbytes, block_bytes
        )


def check_beginning(head: bytearray, size: int, name: str) -> int:
    """How long the header is, of a file of `size` bytes that begins so.

    Raises:
        CorruptCheckpoint: It is none, or the file is not as long as it says.
    """
    magic, _, version, _, header_nbytes, nbytes, *_ = _HEAD.unpack_from(head)
    if magic != _MAGIC or version != _VERSION:
        raise corrupt(name, f"it does not begin as a blob of version {_VERSION}")
    is_sane = header_nbytes % ALIGNMENT == 0 and ALIGNMENT <= header_nbytes <= _MAX_HEADER_BYTES
    if not is_sane or header_nbytes + nbytes != size:
        raise corrupt(
            name, f"it has {size} bytes, and its header promises {header_nbytes} and {nbytes}"
        )
    return int(header_nbytes)


def corrupt(name: str, what: str) -> CorruptCheckpoint:
    """The error about a file that is not what it should be."""
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
        raise corrupt(name, "its description is no JSON") from None
    if isinstance(said, dict):
        key, kind, about, created = (said.get(k) for k in ("key", "kind", "about", "created_ns"))
        is_right = isinstance(key, str) and isinstance(kind, str) and isinstance(about, dict)
        if is_right and type(created) is int and 0 <= created < 1 << 63:
            return str(key), str(kind), dict(about or {}), created
    raise corrupt(name, "its description lacks key, kind or date")


def _checksum(head: bytearray) -> int:
    view = torch.frombuffer(head, dtype=torch.uint8)[_CHECKED_FROM:]
    return int(native.xxh3(view)) & (1 << 64) - 1


def _align_up(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
