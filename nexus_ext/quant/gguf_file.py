"""GGUF files: where their tensors are and how they are packed, as the `gguf` package reads them.

Blocks of Q8_0 and Q4_0, and plain tensors. Names are llama.cpp's; `rename` maps those of
transformers to them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from nexus_ext.checkpoint import Checkpoint, Entry, File, Stamp
from nexus_ext.errors import CheckpointFormatError, MissingExtra
from nexus_ext.quant.packing import GGML

__all__ = ["GGUFCheckpoint", "open_checkpoint"]

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PACKED = ("Q8_0", "Q4_0")
# Architectures whose tensors are those of transformers; only "llama" reorders some rows.
_ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, eq=False)
class GGUFCheckpoint(Checkpoint):
    """A checkpoint, and what its file says about the model.

    Attributes:
        packings: How the tensors decode that are not plain.
        architecture: llama.cpp's word for it.
        num_blocks: Of the model.
    """

    packings: Mapping[str, GGML] = field(default_factory=dict)
    architecture: str = ""
    num_blocks: int = 0

    def rename(self, name: str) -> str:
        """The file's name for a parameter of transformers."""
        gguf = _gguf()
        kind = {word: arch for arch, word in gguf.MODEL_ARCH_NAMES.items()}[self.architecture]
        names = gguf.get_tensor_name_map(kind, self.num_blocks)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        return name if found is None else str(found)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A safetensors checkpoint, or a .gguf file. Reads headers only.

    Raises:
        MissingExtra: A .gguf file, without the package gguf.
        CheckpointFormatError: Not what the format says, or a kind of block that is not read.
    """
    found = Path(path).absolute()
    return _open_gguf(found) if found.suffix == ".gguf" else Checkpoint.open(found)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtra("GGUF files need gguf: pip install 'nexus_ext[gguf]'.") from None
    return gguf


def _open_gguf(path: Path) -> GGUFCheckpoint:
    gguf = _gguf()
    try:
        with open(path, "rb") as file:
            stamp = Stamp.of(file.fileno())
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointFormatError(
            f"{path} must be a GGUF file that the gguf package reads, but: {error}; download it "
            "again."
        ) from error
    facts = _Facts(path, reader)
    entries, packings = {}, {}
    for tensor in reader.tensors:
        entry, packing = facts.describe(tensor)
        entries[entry.name] = entry
        if packing is not None:
            packings[entry.name] = packing
    return GGUFCheckpoint(
        path,
        (File(path.resolve(), stamp),),
        MappingProxyType(entries),
        packings,
        facts.architecture,
        facts.number("block_count"),
    )


class _Facts:
    """What the file says about itself."""

    def __init__(self, path: Path, reader: Any) -> None:
        self._path = path
        self._fields = reader.fields
        self.architecture = str(self._value("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            raise CheckpointFormatError(
                f"GGUF is read for {', '.join(_ARCHITECTURES)}, whose tensors are those of "
                f"transformers; {path} is of {self.architecture!r}. Use its safetensors."
            )

    def number(self, name: str) -> int:
        return int(self._value(f"{self.architecture}.{name}"))

    def describe(self, tensor: Any) -> tuple[Entry, GGML | None]:
        """One tensor as an entry: its bytes, if it is packed."""
        kind, nbytes = tensor.tensor_type.name, int(tensor.n_bytes)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        heads = self._reordered_heads(tensor.name)
        if kind in _PLAIN and heads == 0:
            return self._entry(tensor, _PLAIN[kind], shape, nbytes), None
        if kind not in _PACKED:
            raise CheckpointFormatError(
                f"GGUF tensors are read as {', '.join(_PACKED)} or plain, and reordered ones as "
                f"the former; {tensor.name} in {self._path} is {kind}. Convert the file, or use "
                "its safetensors."
            )
        entry = self._entry(tensor, torch.uint8, (nbytes,), nbytes)
        return entry, GGML(shape, kind.lower(), heads)

    def _reordered_heads(self, name: str) -> int:
        if self.architecture != "llama":
            return 0
        if name.endswith("attn_q.weight"):
            return self.number("attention.head_count")
        return self.number("attention.head_count_kv") if name.endswith("attn_k.weight") else 0

    def _value(self, name: str) -> Any:
        field = self._fields.get(name)
        if field is None:
            raise CheckpointFormatError(
                f"A GGUF file of a model must say its {name!r}; {self._path} does not. Download "
                "it again."
            )
        return field.contents()

    @staticmethod
    def _entry(tensor: Any, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> Entry:
        return Entry(tensor.name, 0, dtype, shape, int(tensor.data_offset), nbytes)
