"""Which tensors of a checkpoint are one packed weight, and how they decode.

    PackedWeights(checkpoint).find(name) ──▶ PackedWeight(packing, parts)

Reads what bitsandbytes and compressed-tensors write, and GGUF, as it is. Bytes of weights are not
touched; the little that describes them (a JSON text, tables of codes) is read here, once, and
compared with what it must be.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch

from nexus_ext.checkpoint import Checkpoint, Entry
from nexus_ext.errors import CheckpointFormatError
from nexus_ext.quant import reference
from nexus_ext.quant.gguf_file import GGUFCheckpoint
from nexus_ext.quant.packing import INT8, NF4, NestedNF4, Packing

__all__ = ["PackedWeight", "PackedWeights", "descriptions"]

_STATE = ".quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
_MOST_JSON_BYTES = 1 << 16
_ROWWISE = 0  # bitsandbytes' only layout of INT8 today


@dataclass(frozen=True)
class PackedWeight:
    """One weight of a model, as the tensors of a checkpoint.

    Attributes:
        packing: How its parts decode.
        parts: From the part's word in `packing` to the checkpoint's name; they move together.
        constants: Parts that are small and known already.
        read: Names that were read for this, and need not be read again.
    """

    packing: Packing
    parts: Mapping[str, str]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    read: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """Every tensor of the checkpoint that belongs to this weight."""
        return {*self.parts.values(), *self.read}

    def on(self, device: torch.device) -> PackedWeight:
        """The same with its constants there."""
        return replace(
            self, constants={part: tensor.to(device) for part, tensor in self.constants.items()}
        )


class PackedWeights:
    """The packed weights of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._states = {
            name[: name.index(_STATE)]: name for name in checkpoint.entries if _STATE in name
        }

    def names(self) -> set[str]:
        """Every name that belongs to a packed weight."""
        found = set()
        for name, entry in self._checkpoint.entries.items():
            is_weight = name.endswith("weight") and not entry.dtype.is_floating_point
            packed = self.find(name) if is_weight or name in self._states else None
            if packed is not None:
                found |= packed.names
        return found

    def find(self, weight: str) -> PackedWeight | None:
        """The weight of this name, if it is packed.

        Raises:
            CheckpointFormatError: Parts are missing, of the wrong size, or of an unknown kind.
        """
        entries = self._checkpoint.entries
        if isinstance(self._checkpoint, GGUFCheckpoint):
            packing = self._checkpoint.packings.get(weight)
            return None if packing is None else PackedWeight(packing, {"q": weight})
        if weight in self._states:
            # Constants outlive an inference_mode that is on now, and backward may need them.
            with torch.inference_mode(False):
                return _Nibbles(self._checkpoint, weight, self._states[weight]).read()
        row_scale = weight.removesuffix("weight") + "SCB"
        if weight.endswith("weight") and row_scale in entries:
            return _int8(self._checkpoint, weight, row_scale)
        if f"{weight}_scale" in entries:
            return _compressed(self._checkpoint, weight, f"{weight}_scale")
        return None


def descriptions(checkpoint: Checkpoint) -> list[Entry]:
    """What `PackedWeights` reads itself: a few bytes for each weight of some formats."""
    names: list[str] = []
    for name in checkpoint.entries:
        if _STATE in name:
            weight = name[: name.index(_STATE)]
            names += (name, f"{weight}.quant_map", f"{weight}.nested_quant_map")
        elif name.endswith("SCB"):
            names.append(f"{name.removesuffix('SCB')}weight_format")
    found = (checkpoint.entries[name] for name in names if name in checkpoint.entries)
    # Larger ones are no descriptions, and are refused when they are looked at.
    return [entry for entry in found if entry.nbytes <= _MOST_JSON_BYTES]


def _fail(
    checkpoint: Checkpoint, entry: Entry, rule: str, got: object, advice: str = ""
) -> NoReturn:
    file = checkpoint.files[entry.file].path
    raise CheckpointFormatError(
        f"{rule}, got {got}; {entry.name} in {file} at offset {entry.offset}. "
        + (advice or "Quantise the model again, or download the file again.")
    )


def _bytes_of(checkpoint: Checkpoint, entry: Entry) -> bytes:
    """The few bytes of a description; waits for those of a file that still arrives."""
    if checkpoint.arrival is not None:
        data = checkpoint.arrival.read(entry.file, entry.offset, entry.nbytes)
    else:
        with open(checkpoint.files[entry.file].reach, "rb") as file:
            data = os.pread(file.fileno(), entry.nbytes, entry.offset)
    if len(data) != entry.nbytes:
        _fail(checkpoint, entry, f"A file must hold the {entry.nbytes} bytes of it", len(data))
    return data


def _tensor_of(checkpoint: Checkpoint, entry: Entry) -> torch.Tensor:
    data = bytearray(_bytes_of(checkpoint, entry))
    return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


# -- bitsandbytes, 4 bits --------------------------------------------------------------------------


class _Nibbles:
    """Reads one weight of bitsandbytes' 4-bit formats."""

    def __init__(self, checkpoint: Checkpoint, weight: str, state: str) -> None:
        self._checkpoint = checkpoint
        self._weight = weight
        self._state = checkpoint.entries[state]
        self._fields = self._read_fields()

    def read(self) -> PackedWeight:
        self._check_type()
        shape = self._shape()
        blocksize = self._blocksize("blocksize")
        packed = self._entry(self._weight)
        absmax = self._part("absmax")
        numel = math.prod(shape)
        num_blocks = -(-numel // blocksize)
        self._check_bytes(packed, -(-numel // 2), "codes")
        code = self._code()
        constants = {} if self._is_nf4(code) else {"code": code}
        parts = {"q": self._weight, "absmax": absmax.name}
        read = [self._state.name, self._part("quant_map").name]
        if "nested_offset" not in self._fields:
            self._check_kind(absmax, torch.float32, num_blocks)
            return PackedWeight(NF4(shape, blocksize), parts, constants, tuple(read))
        self._check_kind(absmax, torch.uint8, num_blocks)
        nested_blocksize = self._blocksize("nested_blocksize")
        nested, table = self._part("nested_absmax"), self._part("nested_quant_map")
        self._check_kind(nested, torch.float32, -(-num_blocks // nested_blocksize))
        self._check_kind(table, torch.float32, 256)
        constants["nested_code"] = _shared(self._table(table))
        constants["nested_offset"] = torch.tensor(self._number("nested_offset"))
        return PackedWeight(
            NestedNF4(shape, blocksize, nested_blocksize),
            parts | {"nested_absmax": nested.name},
            constants,
            (*read, table.name),
        )

    def _read_fields(self) -> dict[str, Any]:
        if self._state.nbytes > _MOST_JSON_BYTES:
            self._refuse(f"A quant_state is at most {_MOST_JSON_BYTES} bytes", self._state.nbytes)
        data = _bytes_of(self._checkpoint, self._state)
        try:
            fields = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            self._refuse("A quant_state must be JSON", f"{data[:60]!r} ({error})")
        if not isinstance(fields, dict):
            self._refuse("A quant_state must be a JSON object", repr(fields)[:60])
        return fields

    def _check_type(self) -> None:
        in_name = self._state.name.partition(_STATE)[2]
        kind = self._fields.get("quant_type")
        if kind not in _TYPES or kind != in_name:
            self._refuse(
                f"A quant_type must be one of {', '.join(_TYPES)}, and that of its name",
                f"{kind!r} in {in_name!r}",
            )

    def _shape(self) -> tuple[int, ...]:
        shape = self._fields.get("shape")
        if not (isinstance(shape, list) and shape and all(_is_size(size) for size in shape)):
            self._refuse("A shape must be a list of sizes", shape)
        return tuple(shape)

    def _blocksize(self, name: str) -> int:
        value: Any = self._fields.get(name)
        if not (_is_size(value) and 32 <= value <= 4096 and value & (value - 1) == 0):
            self._refuse(f"A {name} is a power of two from 32 to 4096", value)
        return int(value)

    def _number(self, name: str) -> float:
        value: Any = self._fields.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= torch.finfo(torch.float32).max:
            self._refuse(f"A {name} must be a number that float32 holds", repr(value)[:60])
        return float(value)

    def _entry(self, name: str) -> Entry:
        entry = self._checkpoint.entries.get(name)
        if entry is None:
            self._refuse(f"A packed weight needs {name!r} beside its quant_state", "none")
        return entry

    def _part(self, name: str) -> Entry:
        return self._entry(f"{self._weight}.{name}")

    def _code(self) -> torch.Tensor:
        entry = self._part("quant_map")
        self._check_kind(entry, torch.float32, 16)
        return self._table(entry)

    def _table(self, entry: Entry) -> torch.Tensor:
        values = _tensor_of(self._checkpoint, entry)
        if not torch.isfinite(values).all():
            _fail(self._checkpoint, entry, "A table of codes must be finite", values.tolist()[:16])
        return values

    @staticmethod
    def _is_nf4(code: torch.Tensor) -> bool:
        return torch.equal(code.reshape(-1), torch.tensor(reference.NF4_CODE))

    def _check_bytes(self, entry: Entry, nbytes: int, what: str) -> None:
        if entry.nbytes != nbytes:
            _fail(
                self._checkpoint,
                entry,
                f"A weight of shape {list(self._shape())} has {nbytes} bytes of {what}",
                entry.nbytes,
            )

    def _check_kind(self, entry: Entry, dtype: torch.dtype, numel: int) -> None:
        if entry.dtype != dtype or math.prod(entry.shape) != numel:
            _fail(
                self._checkpoint,
                entry,
                f"It must hold {numel} elements of {dtype}",
                f"{list(entry.shape)} of {entry.dtype}",
            )

    def _refuse(self, rule: str, got: object) -> NoReturn:
        _fail(self._checkpoint, self._state, rule, got)


def _shared(code: torch.Tensor) -> torch.Tensor:
    """One tensor for all weights, if it is the usual table."""
    usual = _usual_nested_code()
    return usual if torch.equal(code.reshape(-1), usual) else code.reshape(-1)


@functools.cache
def _usual_nested_code() -> torch.Tensor:
    return reference.nested_code()


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# -- one byte an element ---------------------------------------------------------------------------


def _int8(checkpoint: Checkpoint, weight: str, scale: str) -> PackedWeight:
    """bitsandbytes' LLM.int8(): `weight` int8 [out, in], `SCB` float32 [out], `weight_format`."""
    entries = checkpoint.entries
    packed = _int8_matrix(checkpoint, weight, entries[scale])
    entry = entries[scale]
    if entry.dtype != torch.float32 or math.prod(entry.shape) != packed.shape[0]:
        got = f"{list(entry.shape)} of {entry.dtype}"
        _fail(checkpoint, entry, f"SCB must hold {packed.shape[0]} float32, one for each row", got)
    format_name = f"{weight}_format"
    read = (format_name,) if format_name in entries else ()
    for name in read:
        layout = int.from_bytes(_bytes_of(checkpoint, entries[name]), "little")
        if layout != _ROWWISE:
            _fail(checkpoint, entries[name], "INT8 weights must lie row by row (0)", layout)
    return PackedWeight(INT8(packed.shape), {"q": weight, "scale": scale}, {}, read)


def _int8_matrix(checkpoint: Checkpoint, weight: str, scale: Entry) -> Entry:
    packed = checkpoint.entries.get(weight)
    if packed is None or packed.dtype != torch.int8 or len(packed.shape) != 2:
        got = "none" if packed is None else f"{list(packed.shape)} of {packed.dtype}"
        _fail(checkpoint, scale, f"Scales belong to an int8 matrix {weight!r}", got)
    return packed


def _compressed(checkpoint: Checkpoint, weight: str, scale: str) -> PackedWeight:
    """compressed-tensors' int8: `weight` int8 [out, in], `weight_scale` for the whole, for each row
    or for groups of a row. float8 and 4-bit formats share the name of the scale; they are refused.
    """
    entry = checkpoint.entries[scale]
    packed = _int8_matrix(checkpoint, weight, entry)
    zero = checkpoint.entries.get(f"{weight}_zero_point")
    if zero is not None:
        _fail(checkpoint, zero, "Only symmetric int8 is read", "zero points", "Quantise again.")
    numel = math.prod(entry.shape)
    rows, width = packed.shape
    by_row = (len(entry.shape) == 2 and entry.shape[0] == rows) or entry.shape == (rows,)
    is_shared = numel == 1 or (by_row and numel > 0 and width % (numel // rows) == 0)
    if not entry.dtype.is_floating_point or not is_shared:
        _fail(
            checkpoint,
            entry,
            "A scale belongs to the matrix, a row, or one of equal parts of a row",
            f"{list(entry.shape)} of {entry.dtype} for {list(packed.shape)}",
        )
    return PackedWeight(INT8(packed.shape, divisor=1.0), {"q": weight, "scale": scale})
