"""Rows of an expert's parameter, as bytes: cut from tensors of a checkpoint, and joined.

Note [Rows in pieces]
A parameter of one expert is a sequence of rows, and a piece is some of them: what the checkpoint
has in one tensor. Neighbours become one piece wherever the bytes of the two, one after the other,
are the bytes of both: plain rows always, NF4 where a block ends where the first ends, INT8 by its
scales. Nested scales have an offset of their own for each tensor, and stay two pieces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from nexus_ext.checkpoint import Entry
from nexus_ext.quant.packing import INT8, NF4, Packing

__all__ = ["Bytes", "ExpertPiece", "ExpertTensor", "Rows", "Source", "named"]


@dataclass(frozen=True)
class Source:
    """Contiguous bytes of a file; `file` indexes `Checkpoint.files`."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of one expert: the bytes of its sources, one after the other."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class ExpertPiece:
    """Rows of a parameter.

    Attributes:
        packing: How they are packed; None for plain ones.
        parts: From the part's word in `packing` to the name of an `ExpertTensor`; a plain one has
            one part, "".
        constants: Parts of the packing that do not move.
    """

    packing: Packing | None
    parts: Mapping[str, str]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Bytes:
    """A tensor that has no name yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[Source, ...]

    @classmethod
    def of(cls, entry: Entry) -> Bytes:
        return cls(entry.dtype, entry.shape, (Source(entry.file, entry.offset, entry.nbytes),))

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    def cut(self, part: int, of: int, shape: tuple[int, ...]) -> Bytes:
        """One of equal parts."""
        nbytes = self.nbytes // of
        sources = (Source(s.file, s.offset + part * nbytes, nbytes) for s in self.sources)
        return Bytes(self.dtype, shape, tuple(sources))

    def joined(self, other: Bytes) -> Bytes | None:
        """Both, one after the other; None where that is no tensor."""
        if self.dtype != other.dtype or not self.shape or self.shape[1:] != other.shape[1:]:
            return None
        shape = (self.shape[0] + other.shape[0], *self.shape[1:])
        return Bytes(self.dtype, shape, self.sources + other.sources)


@dataclass(frozen=True)
class Rows:
    """A piece whose tensors have no names yet, and the names of the checkpoint that it needs."""

    packing: Packing | None
    shape: tuple[int, ...]
    tensors: Mapping[str, Bytes]
    constants: Mapping[str, torch.Tensor]
    names: tuple[str, ...]

    def joined(self, other: Rows) -> Rows | None:
        """Both as one piece, if their bytes one after the other are that."""
        if not self.shape or self.shape[1:] != other.shape[1:]:
            return None
        shape = (self.shape[0] + other.shape[0], *self.shape[1:])
        if not self._packed_like(other) or not self._ends_a_block(other):
            return None
        tensors = {p: tensor.joined(other.tensors[p]) for p, tensor in self.tensors.items()}
        whole = {part: tensor for part, tensor in tensors.items() if tensor is not None}
        if len(whole) != len(tensors):
            return None
        packing = None if self.packing is None else replace(self.packing, shape=shape)
        return Rows(packing, shape, whole, self.constants, self.names + other.names)

    def _packed_like(self, other: Rows) -> bool:
        if self.packing is None or other.packing is None:
            return self.packing is other.packing
        same = replace(other.packing, shape=self.shape) == self.packing
        return (
            same
            and self.tensors.keys() == other.tensors.keys()
            and self.constants.keys() == other.constants.keys()
            and all(torch.equal(t, other.constants[p]) for p, t in self.constants.items())
        )

    def _ends_a_block(self, other: Rows) -> bool:
        """Whether the rows of the other begin a byte, a block and a scale of their own."""
        if isinstance(self.packing, NF4):
            return math.prod(self.shape) % self.packing.blocksize == 0
        if isinstance(self.packing, INT8):
            return all(rows.tensors["scale"].shape[:1] == rows.shape[:1] for rows in (self, other))
        return self.packing is None


def named(leaf: str, rows: Sequence[Rows], tensors: list[ExpertTensor]) -> tuple[ExpertPiece, ...]:
    """Give the tensors of a parameter names, and say which piece has which."""
    pieces = []
    for index, piece in enumerate(rows):
        stem = leaf if len(rows) == 1 else f"{leaf}.{index}"
        parts = {part: f"{stem}.{part}" if part else stem for part in piece.tensors}
        for part, tensor in piece.tensors.items():
            tensors.append(ExpertTensor(parts[part], tensor.dtype, tensor.shape, tensor.sources))
        pieces.append(ExpertPiece(piece.packing, parts, piece.constants))
    return tuple(pieces)
