"""Which tensor of a model belongs to which group; checked against the checkpoint, not yet done."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from nexus_ext.blocks import find_blocks
from nexus_ext.checkpoint import Checkpoint, Entry, Group
from nexus_ext.conversion import Conversion
from nexus_ext.errors import CheckpointMismatch, StreamError
from nexus_ext.experts.find import ExpertLayer
from nexus_ext.quant.formats import PackedWeight, PackedWeights
from nexus_ext.quant.packing import DECODED_DTYPES

__all__ = ["Layout", "lay_out"]


def lay_out(
    model: nn.Module,
    checkpoint: Checkpoint,
    groups: str | Iterable[str] | None = None,
    rename: Callable[[str], str] | None = None,
    *,
    strict: bool = True,
    by_rows: str | Iterable[str] = (),
    keep: str | Iterable[str] = (),
    experts: Sequence[ExpertLayer] = (),
) -> Layout:
    """Which tensors would form which group; changes nothing. Arguments and errors as `stream`.

    What `experts` has claimed of the model belongs to no group, nor to what stays outside.
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    kept = _matching(parameters, keep, "keep must name a parameter", parameters)
    left_out = set(kept).union(*(layer.claimed for layer in experts))
    tensors = {
        name: tensor for name, tensor in _named_tensors(model).items() if name not in left_out
    }
    elsewhere = frozenset[str]().union(*(layer.sources for layer in experts))
    rename = rename or Conversion.of(model, checkpoint)
    source, packed = _match(tensors, checkpoint, rename, strict, elsewhere)
    _refuse_unfilled(model)
    blocks = find_blocks(model, groups)
    return Layout(model, blocks, checkpoint, tensors, source, packed, by_rows)


class Layout:
    """Which tensor of the model belongs to which group, checked against the checkpoint.

    Attributes:
        tensors: By every name they have.
        source: The checkpoint's name for each.
        packed: How those are packed that are not in the checkpoint as they are in the model.
        blocks, groups, grouped: Name and module, group, and names of the tensors, by block.
        by_rows: Modules whose weight is read by rows, and where that stands.
        outside: Everything else.
        sequence: Groups, then entries of projections read by rows, in the order of definition.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[tuple[str, nn.Module]],
        checkpoint: Checkpoint,
        tensors: dict[str, torch.Tensor],
        source: dict[str, str],
        packed: dict[str, PackedWeight],
        by_rows: str | Iterable[str],
    ) -> None:
        self.model = model
        self.tensors = tensors
        self.source = source
        self.packed = packed
        self.by_rows = self._read_by_rows(by_rows, checkpoint)
        self.blocks: list[tuple[str, nn.Module]] = []
        self.groups: list[Group] = []
        self.grouped: list[set[str]] = []
        for name, block in blocks:
            self._add_block(name, block, checkpoint)
        if not self.blocks and not self.by_rows:
            raise StreamError(
                f"Streaming needs blocks with weights of their own; those of {type(model).__name__}"
                " share all of theirs. Name others: stream(..., groups=['encoder.layer'])."
            )
        self.outside = checkpoint.group("outside", self._stored(self.names_outside()))

    def names_outside(self) -> list[str]:
        """Tensors of the checkpoint that are neither in a group nor read by rows."""
        inside = self._row_names().union(*self.grouped)
        return [name for name in self.source if name not in inside]

    def _stored(self, names: Iterable[str]) -> set[str]:
        """The checkpoint's names of all bytes that these tensors need."""
        found = set()
        for name in names:
            weight = self.packed.get(name)
            found |= set(weight.parts.values()) if weight else {self.source[name]}
        return found

    @property
    def projections(self) -> list[Entry]:
        """Matrices read in tiles, each once."""
        return self._entries(nn.Linear)

    @property
    def tables(self) -> list[Entry]:
        """Matrices read row by row, each once."""
        return self._entries(nn.Embedding)

    def sequence(self) -> list[int | Entry]:
        """Indices of groups and entries of projections, in the order of definition."""
        place = {name: index for index, (name, _) in enumerate(self.model.named_modules())}
        placed: list[tuple[int, int | Entry]] = [
            (place[name], index) for index, (name, _) in enumerate(self.blocks)
        ]
        names = {id(module): name for name, module in self.model.named_modules()}
        seen: set[str] = set()
        for module, entry in self.by_rows:
            if isinstance(module, nn.Linear) and entry.name not in seen:
                seen.add(entry.name)
                placed.append((place[names[id(module)]], entry))
        return [thing for _, thing in sorted(placed, key=lambda pair: pair[0])]

    def _entries(self, kind: type[nn.Module]) -> list[Entry]:
        found = {e.name: e for module, e in self.by_rows if isinstance(module, kind)}
        return list(found.values())

    def _row_names(self) -> set[str]:
        """Every name of every weight that is read by rows."""
        weights = {id(module.weight) for module, _ in self.by_rows}
        return {name for name, tensor in self.tensors.items() if id(tensor) in weights}

    def _read_by_rows(
        self, patterns: str | Iterable[str], checkpoint: Checkpoint
    ) -> list[tuple[nn.Module, Entry]]:
        modules = dict(self.model.named_modules())
        names = _matching(
            list(modules),
            patterns,
            "by_rows must name a Linear or an Embedding",
            [name for name, module in modules.items() if _has_rows(module)],
        )
        found = []
        for name in names:
            module = modules[name]
            _check_readable_by_rows(name, module)
            if f"{name}.weight" not in self.source:
                raise StreamError(
                    f"by_rows reads weights from the checkpoint; that of {name!r} is computed or "
                    "kept. Leave it out."
                )
            if f"{name}.weight" in self.packed:
                raise StreamError(
                    f"by_rows reads plain weights, and that of {name!r} is packed. Leave it out."
                )
            found.append((module, checkpoint.entries[self.source[f"{name}.weight"]]))
        self._check_tied(names)
        return found

    def _check_tied(self, names: list[str]) -> None:
        """A weight that somebody else needs whole cannot be read by rows alone."""
        modules = dict(self.model.named_modules())
        owned = {f"{name}.weight" for name in names}
        weights = {id(modules[name].weight) for name in names}
        others = [n for n, t in self.tensors.items() if id(t) in weights and n not in owned]
        if others:
            raise StreamError(
                f"All modules that share a weight must be read by rows, or none; by_rows names "
                f"{_listed(sorted(owned))} and not {_listed(others)}. Name their modules too."
            )

    def _add_block(self, name: str, block: nn.Module, checkpoint: Checkpoint) -> None:
        """Make the block a group, if it has bytes that are its alone: else nothing would move."""
        names = self._own_names(name, block)
        group = checkpoint.group(name, self._stored(names))
        if group.nbytes == 0:
            return
        self.blocks.append((name, block))
        self.groups.append(group)
        self.grouped.append(names)

    def _own_names(self, name: str, block: nn.Module) -> set[str]:
        """The block's parameters that nobody outside shares. Buffers stay: they may be written."""
        prefix = f"{name}." if name else ""
        inner = {id(parameter) for parameter in block.parameters()}
        shared = {
            id(tensor)
            for other, tensor in self.tensors.items()
            if id(tensor) in inner and not other.startswith(prefix)
        }
        own = {
            prefix + inner_name
            for inner_name, parameter in block.named_parameters(remove_duplicate=False)
            if id(parameter) not in shared
        }
        return (own & self.source.keys()) - self._row_names()


def _matching(
    names: list[str], patterns: str | Iterable[str], rule: str, sensible: list[str]
) -> list[str]:
    """The names that fit one of the patterns; each must fit one at least."""
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise StreamError(
                f"{rule}, or a pattern that fits some; got {pattern!r}, which fits none. There "
                f"are: {_listed(sensible)}."
            )
        found |= dict.fromkeys(fitting)
    return list(found)


def _has_rows(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding)


def _check_readable_by_rows(name: str, module: nn.Module) -> None:
    if not _has_rows(module):
        raise StreamError(
            f"by_rows must name a Linear or an Embedding; {name!r} is a {type(module).__name__}. "
            "Leave it out, or make it a group."
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise StreamError(
            f"An Embedding with max_norm changes its rows; {name!r} cannot be read by rows. Leave "
            "it out of by_rows."
        )


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter under every name it has, then the buffers that a state_dict holds."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                tensors[f"{path}.{leaf}" if path else leaf] = buffer
    return tensors


def _refuse_unfilled(model: nn.Module) -> None:
    """A buffer that no checkpoint holds must have its value already."""
    empty = [
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and leaf in module._non_persistent_buffers_set
    ]
    if empty:
        raise StreamError(
            f"Buffers that a checkpoint does not hold must have values; on meta are "
            f"{_listed(empty)}. Build the model with parameters alone on meta."
        )


def _match(
    tensors: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    rename: Callable[[str], str],
    strict: bool,
    elsewhere: frozenset[str],
) -> tuple[dict[str, str], dict[str, PackedWeight]]:
    """The checkpoint's name for every tensor of the model, and how it is packed there, if it is.

    A tied tensor is found under any of its names. A buffer with a value may be missing. What is
    used `elsewhere` is not unexpected.
    """
    packed_weights = PackedWeights(checkpoint)
    packed: dict[str, PackedWeight] = {}
    names_of: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    source: dict[str, str] = {}
    missing: list[str] = []
    for names in names_of.values():
        tensor = tensors[names[0]]
        found = [rename(name) for name in names if rename(name) in checkpoint.entries]
        if found:
            source |= dict.fromkeys(names, found[0])
            if not _is_same_kind(tensor, checkpoint.entries[found[0]]):
                weight = packed_weights.find(found[0])
                packed |= dict.fromkeys(names, weight) if weight else {}
        elif isinstance(tensor, nn.Parameter) or tensor.is_meta:
            missing.append(names[0])
    used = {rename(name) for name in source}.union(elsewhere, *(w.names for w in packed.values()))
    unexpected = [name for name in checkpoint.entries if name not in used] if strict else []
    _refuse_mismatch(tensors, source, packed, checkpoint, missing, unexpected)
    return source, packed


def _is_same_kind(tensor: torch.Tensor, entry: Entry) -> bool:
    return entry.shape == tuple(tensor.shape) and entry.dtype == tensor.dtype


def _refuse_mismatch(
    tensors: dict[str, torch.Tensor],
    source: dict[str, str],
    packed: dict[str, PackedWeight],
    checkpoint: Checkpoint,
    missing: list[str],
    unexpected: list[str],
) -> None:
    problems = []
    if missing:
        problems.append(f"the checkpoint lacks {_listed(missing)}")
    if unexpected:
        problems.append(f"the model lacks {_listed(unexpected)} (strict=False ignores these)")
    for name, entry_name in source.items():
        entry, tensor = checkpoint.entries[entry_name], tensors[name]
        if name in packed:
            shape = packed[name].packing.shape
            where = f"in {checkpoint.files[entry.file].path} at offset {entry.offset}"
            if shape != tuple(tensor.shape):
                sizes = f"{list(tensor.shape)} in the model and {list(shape)}, packed,"
                problems.append(f"{name} is {sizes} {where}")
            elif tensor.dtype not in DECODED_DTYPES:
                problems.append(
                    f"{name} is {_kind(tensor.dtype, shape)} in the model and packed, for float32, "
                    f"float16 or bfloat16, {where}"
                )
        elif not _is_same_kind(tensor, entry):
            problems.append(
                f"{name} is {_kind(tensor.dtype, tensor.shape)} in the model and "
                f"{_kind(entry.dtype, entry.shape)} in {checkpoint.files[entry.file].path} at "
                f"offset {entry.offset}"
            )
    if problems:
        shown = "; ".join(problems[:10]) + (
            f"; and {len(problems) - 10} more" * (len(problems) > 10)
        )
        raise CheckpointMismatch(
            f"Model and checkpoint {checkpoint.path} must agree on every tensor: {shown}. "
            "Build the model with the checkpoint's own config and dtype."
        )


def _kind(dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
