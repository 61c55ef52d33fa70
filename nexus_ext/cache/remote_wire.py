"""The bytes of an object on their way from a shared store: as many as were promised, and the right
ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from nexus_ext.cache.parts import view_of
from nexus_ext.cache.remote_object import HEAD_NBYTES, Head
from nexus_ext.errors import CorruptCheckpoint

__all__ = ["chained", "copy_into", "corrupt", "cut_to", "split"]


def split(piece: bytes, digest: str) -> tuple[Head, memoryview]:
    """The head of an object, and what of the piece lies behind it. Raises CorruptCheckpoint."""
    head = Head.decode(piece)
    if head is None:
        raise corrupt(digest, "it does not begin as one")
    return head, memoryview(piece)[HEAD_NBYTES:]


def chained(first: memoryview, pieces: Iterator[bytes]) -> Iterator[memoryview]:
    """One behind the other."""
    yield first
    for piece in pieces:
        yield memoryview(piece)


def cut_to(pieces: Iterator[memoryview], nbytes: int, digest: str) -> Iterator[memoryview]:
    """The pieces, if they have so many bytes together. Raises CorruptCheckpoint."""
    have = 0
    for piece in pieces:
        have += piece.nbytes
        if have > nbytes:
            raise corrupt(digest, f"it is longer than the {nbytes} bytes that it promised")
        yield piece
    if have < nbytes:
        raise corrupt(digest, f"it ends after {have} of {nbytes} bytes")


def copy_into(pieces: Iterator[memoryview], out: torch.Tensor, digest: str) -> None:
    """Fill `out`, and compare. Raises CorruptCheckpoint."""
    sha256, view, have = hashlib.sha256(), view_of(out), 0
    for piece in filter(None, pieces):
        sha256.update(piece)
        view[have : have + piece.nbytes] = piece
        have += piece.nbytes
    if sha256.hexdigest() != digest:
        raise corrupt(digest, "its bytes have another digest")


def corrupt(digest: str, what: str) -> CorruptCheckpoint:
    """The error about an object that is not what its name says."""
    return CorruptCheckpoint(
        f"An object in a shared store must be what its name says; {digest} is not: {what}. It "
        "counts as a miss; put its bytes again."
    )
