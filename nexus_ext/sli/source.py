"""The layers of a model's own files: which bytes they are, and how they become modules.

A layer is a block of the model, as `stream` finds them. Its bytes are those of the checkpoint, read
in place: nothing of a local model is written anywhere.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_ext.blocks import find_blocks
from nexus_ext.checkpoint import ALIGNMENT, Checkpoint, Group
from nexus_ext.engine import Engine, ReadMode
from nexus_ext.errors import ConfigError, StreamError
from nexus_ext.layout import Layout, lay_out
from nexus_ext.pretrained import build_empty, renaming
from nexus_ext.quant.formats import PackedWeight
from nexus_ext.quant.gguf_file import open_checkpoint
from nexus_ext.sli.calling import CallContext
from nexus_ext.sli.skeleton import Skeleton
from nexus_ext.sli.storing import ORIGIN, About, StoredLayer, fields_of, named_tensors

__all__ = ["ModelSource", "page_memory"]

_PAGE_BYTES = 4096


@dataclass(frozen=True)
class _Layer:
    """One block: its bytes, and which of them are which tensor."""

    group: Group
    skeleton: Skeleton
    about: About
    names: dict[str, str]  # the checkpoint's name of each plain tensor
    packed: dict[str, PackedWeight]
    computed: dict[str, torch.Tensor]  # buffers that no checkpoint holds


class ModelSource:
    """A model on this machine, layer by layer. Methods may be called by several threads.

    Attributes:
        path: The folder or file.
        config_digest: Of what the model's code is made from.
    """

    def __init__(self, path: Path) -> None:
        """Read headers and config.

        Raises:
            NexusError: As `from_pretrained`; experts that are made of several tensors do not come
                layer by layer (StreamError).
        """
        self.path = path
        self._checkpoint = open_checkpoint(path)
        self._model = build_empty(path, self._checkpoint)
        rename = renaming(self._model, self._checkpoint)
        layout = lay_out(self._model, self._checkpoint, None, rename, strict=False)
        self._blocks = find_blocks(self._model, None)
        self.config_digest = _config_digest(path, self._checkpoint)
        self._context: CallContext | None = None
        if CallContext.is_needed(self._model, self._blocks[0][1]):
            self._context = CallContext(self._model)
        self._layers = [
            _layer_of(self._checkpoint, layout, name, block) for name, block in self._blocks
        ]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def block(self, index: int) -> nn.Module:
        """The block, without weights; not to be changed.

        Raises:
            ConfigError: There is no such layer.
        """
        self._layer(index)
        return self._blocks[index][1]

    def nbytes(self, index: int) -> int:
        """Of the memory that `read` fills."""
        return self._layer(index).group.nbytes

    def phase(self, index: int) -> int:
        """How far behind a page boundary that memory begins best."""
        weights: dict[int, int] = {}
        for extent in self._layer(index).group.extents:
            phase = (extent.offset - extent.group_offset) % _PAGE_BYTES
            weights[phase] = weights.get(phase, 0) + extent.nbytes
        best = max(weights, key=lambda phase: weights[phase], default=0)
        return best if best % ALIGNMENT == 0 else 0

    def digest(self, index: int) -> str:
        """Names the bytes, while the files are what they were when they were opened."""
        extents = [astuple(extent) for extent in self._layer(index).group.extents]
        text = json.dumps([str(self.path), self._checkpoint.fingerprint, extents])
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, index: int, out: torch.Tensor) -> None:
        """Read a layer from its files into `out` (uint8 [nbytes]). Blocks, without the GIL.

        Raises:
            ReadError, TruncatedCheckpoint, CheckpointChanged: The bytes cannot be had.
        """
        group = self._layer(index).group
        if not group.nbytes:
            return
        engine = Engine(self._checkpoint.files, ReadMode("direct"))
        try:
            engine.attach([out], [group], [0], [], 0)
            engine.wait(0)
        finally:
            engine.close()

    def build(self, index: int, payload: torch.Tensor) -> nn.Module:
        """A layer over the bytes that `read` gave; frozen, in eval mode.

        Called with hidden states alone, it gets what its model would give it beside them.
        """
        layer = self._layer(index)
        where = f"layer {index} of {self.path}"
        return self.called_alone(index, layer.skeleton.build(_stored(layer, payload), where))

    @torch.inference_mode(False)  # a layer outlives the mode that is on now
    def load(self, index: int) -> nn.Module:
        """`read` into memory of its own, and `build`."""
        payload = page_memory(self.nbytes(index), self.phase(index))
        self.read(index, payload)
        return self.build(index, payload)

    def called_alone(self, index: int, layer: nn.Module) -> nn.Module:
        """The layer, completed by what its model gives to this block, and by where it is from."""
        layer.__dict__[ORIGIN] = (str(self.path.resolve()), index, self.config_digest)
        if self._context is not None and index < self.num_layers:
            hook = self._context.hook(index)
            layer.register_forward_pre_hook(hook, with_kwargs=True)
        return layer

    def _layer(self, index: int) -> _Layer:
        if not 0 <= index < len(self._layers):
            raise ConfigError(
                f"layers of {self.path} are numbered from 0 to {len(self._layers) - 1}, got "
                f"{index}."
            )
        return self._layers[index]


def _config_digest(path: Path, checkpoint: Checkpoint) -> str:
    if path.suffix == ".gguf":
        return checkpoint.fingerprint
    return hashlib.sha256((path / "config.json").read_bytes()).hexdigest()


def page_memory(nbytes: int, phase: int = 0) -> torch.Tensor:
    """uint8 [nbytes] of its own, `phase` bytes behind a page boundary; hardly more is taken, since
    torch.save writes the whole of what a tensor is a view of.
    """
    pages = mmap.mmap(-1, max(1, nbytes + phase), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)[phase : phase + nbytes]


def _layer_of(checkpoint: Checkpoint, layout: Layout, name: str, block: nn.Module) -> _Layer:
    prefix = f"{name}." if name else ""
    about = About.of(block)
    tensors = {n: t for n, t in named_tensors(block) if n not in about.tied}
    packed = {n: layout.packed[prefix + n] for n in tensors if prefix + n in layout.packed}
    names = {
        n: layout.source[prefix + n]
        for n in tensors
        if n not in packed and prefix + n in layout.source
    }
    parts = {part for weight in packed.values() for part in weight.parts.values()}
    group = checkpoint.group(name, parts | set(names.values()))
    computed = {n: t for n, t in tensors.items() if n not in names and n not in packed}
    about = replace(about, trained=[], training=[], **_packed_fields(block, packed))
    return _Layer(group, Skeleton(block), about, names, packed, computed)


def _packed_fields(block: nn.Module, packed: dict[str, PackedWeight]) -> dict[str, Any]:
    """Packed weights of Linear modules stay packed; others have no module that could use them."""
    kinds: dict[str, dict[str, Any]] = {}
    part_names: dict[str, list[str]] = {}
    for name, weight in packed.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or type(block.get_submodule(path)) is not nn.Linear:
            raise StreamError(
                f"Layer by layer, only weights of nn.Linear may be packed; {name} of a "
                f"{type(block).__name__} is. Use nexus_ext.from_pretrained, which streams them."
            )
        kinds[path] = fields_of(weight.packing)
        part_names[path] = [*weight.parts, *weight.constants]
    return {"packed": kinds, "part_names": part_names}


def _stored(layer: _Layer, payload: torch.Tensor) -> StoredLayer:
    views = {
        member.name: payload[member.offset : member.offset + member.nbytes]
        .view(member.dtype)
        .view(member.shape)
        for member in layer.group.members
    }
    tensors = {name: views[source] for name, source in layer.names.items()}
    # What is small and shared by all layers is copied: a layer is its owner's.
    tensors |= {name: tensor.clone() for name, tensor in layer.computed.items()}
    for name, weight in layer.packed.items():
        prefix = name.removesuffix("weight")
        tensors |= {prefix + part: views[source] for part, source in weight.parts.items()}
        tensors |= {prefix + part: fixed.clone() for part, fixed in weight.constants.items()}
    return StoredLayer(tensors, layer.about)
