"""A layer as bytes: one safetensors file in memory, and what it says about the module.

    store(layer)  ──▶ header, tensor, padding, tensor, ...      parts for a cache, without a copy
    read(payload) ──▶ StoredLayer(tensors: views of the payload, about)

All parameters and buffers are there, those that a state_dict leaves out too. Every tensor begins
on a boundary of 64 bytes: padding lies between them as tensors of its own, for safetensors allows
no holes. No pickle: the module's code comes from a template (see `skeleton`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_ext.cache.blob import view_of
from nexus_ext.checkpoint import ALIGNMENT, DTYPE_NAMES, Entry, File, Stamp
from nexus_ext.errors import CheckpointFormatError, CorruptCheckpoint, StreamError
from nexus_ext.quant import PackedLinear
from nexus_ext.quant.packing import GGML, INT8, NF4, NestedNF4, Packing
from nexus_ext.safetensors_header import parse_header

__all__ = [
    "ORIGIN",
    "About",
    "StoredLayer",
    "fields_of",
    "layer_bytes",
    "named_tensors",
    "read",
    "store",
]

# The attribute in which a layer carries its origin.
ORIGIN = "_nexus_origin"

_LENGTH_BYTES = 8
_METADATA = "nexus_layer"
_VERSION = 1
_PACKINGS: dict[str, type[Packing]] = {kind.__name__: kind for kind in (NF4, NestedNF4, INT8, GGML)}


@dataclass(frozen=True)
class About:
    """What the bytes do not say of a layer.

    Attributes:
        kind: The class of the module, for messages.
        tied: Names of tensors that are another one, by its name.
        trained: Parameters that want a gradient.
        training: Modules in training mode; "" is the layer itself.
        packed: Packing of each `PackedLinear`, by its name.
        part_names: Of the parts of each `PackedLinear`.
        origin: Folder or file of the model it came from, its number there, and the digest of the
            model's config; None where it came from elsewhere. Its structure is found there again.
    """

    kind: str
    tied: dict[str, str]
    trained: list[str]
    training: list[str]
    packed: dict[str, dict[str, Any]]
    part_names: dict[str, list[str]]
    origin: tuple[str, int, str] | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> About:
        """What there is to say of a module."""
        packed = {
            name: module for name, module in layer.named_modules() if type(module) is PackedLinear
        }
        own, tied = _own_and_tied(layer)
        return cls(
            kind=f"{type(layer).__module__}.{type(layer).__qualname__}",
            tied=tied,
            trained=[name for name, tensor in own.items() if tensor.requires_grad],
            training=[name for name, module in layer.named_modules() if module.training],
            packed={name: fields_of(module.packing) for name, module in packed.items()},
            part_names={name: list(module._part_names) for name, module in packed.items()},
            origin=layer.__dict__.get(ORIGIN),
        )

    def packing(self, name: str) -> Packing:
        """How the `PackedLinear` of this name decodes."""
        fields = dict(self.packed[name])
        kind = _PACKINGS[fields.pop("packing")]
        return kind(**{**fields, "shape": tuple(fields["shape"])})


@dataclass(frozen=True)
class StoredLayer:
    """A layer that was read: tensors by name, views of its bytes; tied ones once."""

    tensors: dict[str, torch.Tensor]
    about: About


def named_tensors(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under every name it has."""
    for path, module in layer.named_modules(remove_duplicate=False):
        for owned in (module._parameters, module._buffers):
            for leaf, tensor in owned.items():
                if tensor is not None:
                    yield (f"{path}.{leaf}" if path else leaf), tensor


def store(layer: nn.Module, label: str = "") -> list[torch.Tensor]:
    """The parts of a file, uint8 on the CPU, one behind the other; tensors there are not copied.

    Args:
        layer: Any module.
        label: Written into it: layers that are alike are told apart.

    Raises:
        StreamError: A tensor without bytes (meta, streamed), of a kind that safetensors does not
            know, or state that is no tensor.
    """
    own, _ = _own_and_tied(layer)
    _refuse_extra_state(layer)
    fields: dict[str, Any] = {"__metadata__": _metadata(About.of(layer), label)}
    parts: list[torch.Tensor] = []
    end = 0
    for name, tensor in own.items():
        padding = -end % ALIGNMENT
        if padding:
            fields[_padding_name(len(parts), own)] = _field("U8", [padding], end)
            parts.append(torch.zeros(padding, dtype=torch.uint8))
            end += padding
        data = _bytes_of(name, tensor)
        fields[name] = _field(DTYPE_NAMES[tensor.dtype], list(tensor.shape), end, data.nbytes)
        parts.append(data)
        end += data.nbytes
    return [_header(fields), *parts]


def layer_bytes(layer: nn.Module) -> int:
    """Of all its tensors, tied ones once."""
    return sum(tensor.nbytes for tensor in _own_and_tied(layer)[0].values())


def read(payload: torch.Tensor, where: str) -> StoredLayer:
    """What `store` wrote. The tensors hold the payload's memory.

    Args:
        payload: uint8, 1-D, on a boundary of 64 bytes.
        where: For messages.

    Raises:
        CheckpointFormatError, TruncatedCheckpoint, CorruptCheckpoint: `store` did not write this.
    """
    header = _read_header(payload, where)
    file = File(Path(where), Stamp(0, 0, payload.nbytes, 0))
    entries = parse_header(header, file)
    about = _read_about(header, where)
    paddings = {entry.name for entry in entries if entry.name.startswith(_PADDING)}
    tensors = {entry.name: _view(payload, entry) for entry in entries if entry.name not in paddings}
    return StoredLayer(tensors, about)


# -- writing ---------------------------------------------------------------------------------------

_PADDING = "\x7fpadding."  # no attribute of a module is called so


def _own_and_tied(layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each tensor under its first name; and the other names, with the first."""
    first: dict[int, str] = {}
    own: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in named_tensors(layer):
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            own[name] = tensor
    return own, tied


def _refuse_extra_state(layer: nn.Module) -> None:
    theirs = nn.Module.get_extra_state
    extra = [n for n, m in layer.named_modules() if type(m).get_extra_state is not theirs]
    if extra:
        raise StreamError(
            f"A layer is cached as tensors; {extra[0]!r} of {type(layer).__name__} has extra state "
            "besides. Turn that into a buffer."
        )


def _bytes_of(name: str, tensor: torch.Tensor) -> torch.Tensor:
    plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
    if tensor.is_meta or not plain or tensor.layout != torch.strided or tensor.is_quantized:
        raise StreamError(
            f"A layer is cached with its bytes; {name} is a {type(tensor).__name__} on "
            f"{tensor.device} of layout {tensor.layout}. Give it plain values first."
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise StreamError(
            f"A layer is cached as safetensors, which has no {tensor.dtype}; {name} is one. "
            "Convert it."
        )
    data = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return data.reshape(-1).view(torch.uint8) if data.numel() else data.new_empty(0).byte()


def _padding_name(number: int, own: dict[str, torch.Tensor]) -> str:
    name = f"{_PADDING}{number}"
    if name in own:
        raise StreamError(f"{name!r} is a name for padding; call the tensor something else.")
    return name


def _field(dtype: str, shape: list[int], start: int, nbytes: int | None = None) -> dict[str, Any]:
    size = math.prod(shape) if nbytes is None else nbytes
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


def _metadata(about: About, label: str) -> dict[str, str]:
    said = {"version": _VERSION, **asdict(about)}
    return {"format": "pt", "label": label, _METADATA: json.dumps(said)}


def _header(fields: dict[str, Any]) -> torch.Tensor:
    """Padded with blanks, as the format says, so that tensors begin on a boundary."""
    text = json.dumps(fields).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % ALIGNMENT)
    data = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def fields_of(packing: Packing) -> dict[str, Any]:
    """A packing as JSON; `About.packing` reads it."""
    return {"packing": type(packing).__name__, **asdict(packing)}


# -- reading ---------------------------------------------------------------------------------------


def _read_header(payload: torch.Tensor, where: str) -> bytes:
    length = int.from_bytes(bytes(payload[:_LENGTH_BYTES].tolist()), "little")
    if payload.nbytes < _LENGTH_BYTES or length > payload.nbytes - _LENGTH_BYTES:
        raise CorruptCheckpoint(
            f"A cached layer begins with its header; {where} has {payload.nbytes} bytes and tells "
            f"of {length}. Cache it again."
        )
    return bytes(view_of(payload[_LENGTH_BYTES : _LENGTH_BYTES + length]))


def _read_about(header: bytes, where: str) -> About:
    said = json.loads(header).get("__metadata__", {}).get(_METADATA)
    try:
        fields = json.loads(said or "null")
        version = fields.pop("version")
        about = About(**fields)
        for name in about.packed:
            about.packing(name)
        if about.origin is not None:
            path, index, digest = about.origin
            about = replace(about, origin=(str(path), int(index), str(digest)))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointFormatError(
            f"A cached layer says what module it is; {where} does not ({error}). It was written by "
            "something else: cache the layer again."
        ) from error
    if version != _VERSION:
        raise CheckpointFormatError(
            f"A cached layer is of version {_VERSION}; {where} is of {version}. Cache it again."
        )
    return about


def _view(payload: torch.Tensor, entry: Entry) -> torch.Tensor:
    raw = payload[entry.offset : entry.offset + entry.nbytes]
    return raw.view(entry.dtype).view(entry.shape)
