"""What lies in a store that nodes share: objects named by their content, and notes about keys.

blobs/ab/<sha256 of the plain bytes>    a head of 32 bytes, then the bytes, plain or compressed
keys/ab/<sha256 of the key>.json        key, digest, size, kind, and a digest of the note itself
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nexus_ext.errors import ConfigError, CorruptCheckpoint

__all__ = [
    "HEAD_NBYTES",
    "MOST_NOTE_BYTES",
    "Head",
    "Note",
    "blob_path",
    "check_digest",
    "note_path",
]

_MAGIC = b"\x89NXREM\n\x01"
_HEAD = struct.Struct("<8sQQQ")  # magic, encoding, plain bytes, bytes behind the head
HEAD_NBYTES = _HEAD.size
MOST_NOTE_BYTES = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ENCODINGS = ("plain", "zstd")


@dataclass(frozen=True)
class Head:
    """The beginning of an object.

    Attributes:
        encoding: "plain" or "zstd".
        nbytes: Of the plain bytes.
        wire_nbytes: Behind the head.
    """

    encoding: str
    nbytes: int
    wire_nbytes: int

    def encode(self) -> bytes:
        """Its bytes."""
        number = _ENCODINGS.index(self.encoding)
        return _HEAD.pack(_MAGIC, number, self.nbytes, self.wire_nbytes)

    @classmethod
    def decode(cls, data: bytes) -> Head | None:
        """None for what is no head."""
        if len(data) < HEAD_NBYTES:
            return None
        magic, number, nbytes, wire_nbytes = _HEAD.unpack_from(data)
        if magic != _MAGIC or number >= len(_ENCODINGS):
            return None
        head = cls(_ENCODINGS[number], nbytes, wire_nbytes)
        return None if head.encoding == "plain" and nbytes != wire_nbytes else head


@dataclass(frozen=True)
class Note:
    """What a key means. It is believed as far as the store is: only the bytes prove themselves.

    Attributes:
        key: Of the caller.
        digest: SHA-256 of the plain bytes, hexadecimal.
        nbytes: Of the plain bytes.
        kind: What they are, in a word.
        about: What the caller said; JSON.
    """

    key: str
    digest: str
    nbytes: int
    kind: str
    about: Mapping[str, Any]

    def encode(self) -> bytes:
        """Its bytes. Raises ConfigError for what is no JSON, or too long."""
        said = asdict(self)
        try:
            text = json.dumps(said | {"check": _check(said)}, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"what is said about an entry must be JSON; {error}.") from error
        if len(text) > MOST_NOTE_BYTES:
            raise ConfigError(
                f"key and description of an entry must fit in {MOST_NOTE_BYTES} bytes, got "
                f"{len(text)}. Say less."
            )
        return text

    @classmethod
    def decode(cls, data: bytes, key: str) -> Note:
        """The note of `key`.

        Raises:
            CorruptCheckpoint: It is cut, damaged, or of another key.
        """
        try:
            said = json.loads(data, parse_constant=_refuse)
            is_right = isinstance(said, dict) and said.pop("check", None) == _check(said)
        except (ValueError, RecursionError):
            raise _bad(key, "it is no JSON") from None
        if not is_right:
            raise _bad(key, "it differs from its own digest")
        try:
            note = cls(**said)
        except TypeError:
            raise _bad(key, "it has other fields") from None
        kinds = [type(value) for value in vars(note).values()]
        if kinds != [str, str, int, str, dict] or not _DIGEST.fullmatch(note.digest):
            raise _bad(key, "its fields are not what they should be")
        if note.key != key or note.nbytes < 0:
            raise _bad(key, "it is of another key")
        return note


def check_digest(digest: str) -> None:
    """Raises ConfigError unless it is a SHA-256 in hexadecimal: it becomes a name in the store."""
    if not _DIGEST.fullmatch(digest):
        raise ConfigError(f"A digest is 64 hexadecimal digits in lower case, got {digest!r}.")


def blob_path(root: str, digest: str) -> str:
    """Where the object of a digest lies."""
    return f"{root}/blobs/{digest[:2]}/{digest}"


def note_path(root: str, key: str) -> str:
    """Where the note of a key lies."""
    name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{root}/keys/{name[:2]}/{name}.json"


def _check(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def _bad(key: str, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"A note in a shared store must be what was written; that of {key!r} is not: {what}. It "
        "counts as a miss."
    )
