"""The tensors of a safetensors header: which bytes of the file they are.

Every rule of the format is checked over the grammar of header.py; nothing is read here.
"""

from __future__ import annotations

from typing import TypeGuard

import torch

from nexus_ext.errors import CheckpointFormatError, TruncatedCheckpoint
from nexus_ext.header import AGAIN, MAX_DIMS, broken, quote, tensor_fields
from nexus_ext.places import Entry, File

__all__ = ["DTYPES", "DTYPE_NAMES", "LENGTH_BYTES", "file_order", "parse_header", "truncated"]

LENGTH_BYTES = 8  # a file begins with the length of its JSON header, little-endian
_MAX_INT = 2**63 - 1  # sizes and strides in torch are int64
_FIELDS = ("dtype", "shape", "data_offsets")
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
# What safetensors calls a dtype.
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def parse_header(header: bytes, file: File, number: int = 0) -> list[Entry]:
    """The tensors a header declares, in the order of their offsets.

    Args:
        header: The JSON bytes after the length.
        file: The file they come from; its size must be what the header makes it.
        number: The position of `file` in `Checkpoint.files`.

    Raises:
        CheckpointFormatError: A rule of the format is broken.
        TruncatedCheckpoint: The tensors need more bytes than the file has.
    """
    where = f"{file.path}, header at offset {file.start + LENGTH_BYTES}"
    base = file.start + LENGTH_BYTES + len(header)
    entries = [
        _parse_entry(file, number, base, name, fields)
        for name, fields in tensor_fields(header, where)
    ]
    entries.sort(key=file_order)
    _check_cover(entries, file, base)
    return entries


def _parse_entry(file: File, number: int, base: int, name: str, fields: object) -> Entry:
    if not isinstance(fields, dict) or fields.keys() != set(_FIELDS):
        rule = "a tensor has dtype, shape and data_offsets, nothing else"
        raise _broken_tensor(file, name, rule, fields)
    dtype, shape, offsets = (fields[key] for key in _FIELDS)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        rule = f"nexus_ext reads {', '.join(DTYPES)} (safetensors knows more, such as F4)"
        raise _broken_tensor(file, name, rule, dtype)
    if not _are_integers(shape):
        raise _broken_tensor(file, name, "shape is a list of whole numbers", shape)
    if len(shape) > MAX_DIMS:
        rule = f"a shape has at most {MAX_DIMS} dimensions"
        raise _broken_tensor(file, name, rule, len(shape))
    if not _are_integers(offsets) or len(offsets) != 2:
        raise _broken_tensor(file, name, "data_offsets are two whole numbers", offsets)
    count = _num_elements(shape)
    if count is None:
        raise _broken_tensor(file, name, "the product of a shape is below 2**63", shape)
    nbytes = offsets[1] - offsets[0]
    if nbytes != count * DTYPES[dtype].itemsize:
        rule = f"{dtype} with shape {quote(shape)} takes {count * DTYPES[dtype].itemsize} bytes"
        raise _broken_tensor(file, name, rule, nbytes)
    return Entry(name, number, DTYPES[dtype], tuple(shape), base + offsets[0], nbytes)


def _broken_tensor(file: File, name: str, rule: str, got: object) -> CheckpointFormatError:
    return broken(f"{file.path}, tensor {quote(name)}", rule, got)


def _num_elements(shape: list[int]) -> int | None:
    """The product, or None if it does not stay below 2**63."""
    count = 1
    for length in shape:
        count *= length
        if count > _MAX_INT:  # even when a later 0 would hide it: the library multiplies in order
            return None
    return count


def _check_cover(entries: list[Entry], file: File, base: int) -> None:
    """Tensors follow one another from the header to the last byte: no hole, overlap or rest."""
    end = base
    for entry in entries:
        if entry.offset != end:
            rule = f"it starts at offset {end}, no hole, no overlap"
            raise _broken_tensor(file, entry.name, rule, entry.offset)
        end += entry.nbytes
        if end > file.stamp.size:
            raise truncated(file, end, f"tensor {quote(entry.name)} at offset {entry.offset}")
    if end < file.stamp.size:
        rule = f"the file ends where its last tensor does, after {end} bytes"
        raise broken(str(file.path), rule, file.stamp.size)


def _are_integers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and {type(item) for item in value} <= {int}  # bool is no int


def truncated(file: File, needed: int, what: str) -> TruncatedCheckpoint:
    """The error for a file that ends before `what` does."""
    return TruncatedCheckpoint(
        f"{file.path} must have {needed} bytes for {what}, but has {file.stamp.size}; {AGAIN}"
    )


def file_order(entry: Entry) -> tuple[int, int, int, str]:
    """A key to sort entries as they lie. Tensors without bytes share an offset with a neighbour;
    size and name settle the order.
    """
    return entry.file, entry.offset, entry.nbytes, entry.name
