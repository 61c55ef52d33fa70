"""Where the shards of a conversion go, and which of them are done.

`FolderShards` makes files of them, and keeps a journal (`JOURNAL`): which are done, and for which
source and configuration. Other places: `nexus_ext.packed_store`.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeGuard

import torch

from nexus_ext.checkpoint import ALIGNMENT, DTYPE_NAMES, Checkpoint
from nexus_ext.errors import ConfigError
from nexus_ext.quant.packed import describes_weight

__all__ = [
    "JOURNAL",
    "FolderShards",
    "Report",
    "Shards",
    "is_report",
    "safetensors_parts",
    "write_safetensors",
]

JOURNAL = "nexus-conversion.jsonl"

# What was packed into a shard: lines of `PackedModule`, as JSON.
Report: TypeAlias = "list[dict[str, Any]]"

_FIELDS = {"name": str, "weights": str, "error": float, "bytes_before": int, "bytes_after": int}
_PAGE_BYTES = 4096


def is_report(value: object) -> TypeGuard[Report]:
    """Whether it is what `Shards.write` was given once; a stranger may have written it since."""
    return isinstance(value, list) and all(
        isinstance(line, dict) and {name: type(said) for name, said in line.items()} == _FIELDS
        for line in value
    )


class Shards(Protocol):
    """A place for shards. A shard is there as a whole, or not at all."""

    def begin(self, identity: Mapping[str, Any], names: Sequence[str]) -> dict[str, Report]:
        """Which of these are done, of this very conversion, and what was packed into them."""

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], report: Report) -> None:
        """Keep a shard. Blocks until it is on disk."""

    def tensor_names(self, name: str) -> tuple[list[str], int]:
        """What a shard holds, and the bytes of it."""

    def end(self) -> None:
        """All are there, and what describes them."""


class FolderShards:
    """Shards as files in a folder of the user's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, identity: Mapping[str, Any], names: Sequence[str]) -> dict[str, Report]:
        """Open the journal, or make one.

        Raises:
            ConfigError: The folder holds something else.
        """
        journal = self._folder / JOURNAL
        if not journal.exists():
            if self._folder.exists() and any(self._folder.iterdir()):
                raise ConfigError(
                    f"A destination must be new or an interrupted conversion; {self._folder} holds "
                    "something else. Name another folder, or remove it."
                )
            self._folder.mkdir(parents=True, exist_ok=True)
            self._note(identity)
            return {}
        lines, end = _whole_lines(journal)
        if not lines or lines[0] != identity:
            raise ConfigError(
                f"{self._folder} holds the conversion of another source or configuration. Name "
                "another folder, or remove it."
            )
        os.truncate(journal, end)  # the next line begins where a line begins
        done = [line for line in lines[1:] if isinstance(line, dict)]
        reports = {str(line.get("shard")): line.get("packed") for line in done}
        return {shard: report for shard, report in reports.items() if is_report(report)}

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], report: Report) -> None:
        write_safetensors(self._folder / name, tensors)
        self._note({"shard": name, "packed": report})

    def tensor_names(self, name: str) -> tuple[list[str], int]:
        made = Checkpoint.open(self._folder / name)
        return list(made.entries), made.nbytes

    def end(self) -> None:
        (self._folder / JOURNAL).unlink()

    def _note(self, line: Mapping[str, Any]) -> None:
        with open(self._folder / JOURNAL, "a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fdatasync(journal.fileno())


def _whole_lines(journal: Path) -> tuple[list[Any], int]:
    """The lines that were written to their end, and where that is: power may fail in the middle."""
    lines, end = [], 0
    for line in journal.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            lines.append(json.loads(line.decode()))
        except ValueError:
            break
        end += len(line)
    return lines, end


# -- one file --------------------------------------------------------------------------------------


def safetensors_parts(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """A safetensors file whose data begins on a page, as uint8 tensors one behind the other; those
    with data are views of the tensors, as far as these are contiguous.

    What moves stands in front, and in front of that whatever is a multiple of `ALIGNMENT`, so that
    it lies in the file as it will lie in a group.
    """
    ordered = sorted(
        tensors.items(),
        key=lambda item: (describes_weight(item[0]), item[1].nbytes % ALIGNMENT != 0),
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _PAGE_BYTES)
    head = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    data = [t.contiguous().view(-1).view(torch.uint8) for _, t in ordered if t.nbytes]
    return [head, *data]


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one file, as `safetensors_parts` lays it out; whole, or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            for part in safetensors_parts(tensors):
                file.write((ctypes.c_char * part.nbytes).from_address(part.data_ptr()))
            file.flush()
            os.fdatasync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
