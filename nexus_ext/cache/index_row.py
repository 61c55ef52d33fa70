"""A row of the index: a key, what lies under it, and a seal over both."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, cast

__all__ = ["QUERY", "Row", "decode", "encode"]

QUERY = (
    "SELECT names.key, names.digest, kind, about, created, nbytes, stored, used, uses, seal "
    "FROM names JOIN blobs ON names.digest = blobs.digest"
)


@dataclass(frozen=True)
class Row:
    """A key and what lies under it.

    Attributes:
        key: Of the caller.
        digest: SHA-256 of the payload: which blob.
        kind, about: As in the blob's header; `about` is JSON.
        created_ns, used_ns: Nanoseconds since 1970.
        nbytes: Of the payload.
        stored: Bytes that the blob takes of its disk.
        uses: How often it was asked for.
    """

    key: str
    digest: bytes
    kind: str
    about: str
    created_ns: int
    nbytes: int
    stored: int
    used_ns: int
    uses: int = 0

    def seal(self) -> bytes:
        """Over what must not be mistaken; when it was used may be."""
        fields = [self.key, self.kind, self.about, str(self.created_ns), str(self.nbytes)]
        parts = [self.digest, *(encode(field) for field in fields)]
        framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return hashlib.blake2b(framed, digest_size=16).digest()

    @classmethod
    def parse(cls, values: tuple[object, ...]) -> Row | None:
        """Of `QUERY`; None for one that was not written so."""
        *fields, seal = values
        if [*map(type, fields)] != [*(bytes,) * 4, *(int,) * 5]:
            return None
        key, digest, kind, about, *numbers = cast("tuple[Any, ...]", fields)
        try:
            row = cls(decode(key), digest, decode(kind), decode(about), *numbers)
        except UnicodeDecodeError:
            return None
        if len(row.digest) != 32 or seal != row.seal():
            return None
        try:
            return row if isinstance(json.loads(row.about), dict) else None
        except (ValueError, RecursionError):
            return None  # anybody can seal what is no description


def encode(text: str) -> bytes:
    # Names of files may hold what is no UTF-8.
    return text.encode("utf-8", "surrogatepass")


def decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
