"""Where every single expert is: which bytes of which files are its weights.

    find_experts(model, checkpoint) ──▶ ExpertLayer ──▶ Expert ──▶ ExpertTensor ──▶ Source

A model has the experts of a layer in parameters of one module, [experts, rows, columns]. A
checkpoint has them so too, or each by itself, gate and up apart: an expert is cut from the one,
gathered from the other. Owns byte ranges; not a byte of a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
from torch import nn

from nexus_ext.checkpoint import Checkpoint, Entry
from nexus_ext.conversion import Conversion
from nexus_ext.errors import CheckpointFormatError, CheckpointMismatch
from nexus_ext.experts.gather import Cut, Gathering, fused, listed, refuse
from nexus_ext.experts.pieces import Bytes, ExpertPiece, ExpertTensor, Rows, Source, named
from nexus_ext.quant.formats import PackedWeights
from nexus_ext.quant.packing import DECODED_DTYPES, NF4, NestedNF4, Packing

__all__ = ["Expert", "ExpertLayer", "ExpertPiece", "ExpertTensor", "Source", "find_experts"]


@dataclass(frozen=True)
class Expert:
    """One expert.

    Attributes:
        tensors: What moves, together.
        weights: From the module's parameter to its pieces, in the order of rows.
        names: From the module's parameter to names of the checkpoint, in the order of rows.
    """

    tensors: tuple[ExpertTensor, ...]
    weights: Mapping[str, tuple[ExpertPiece, ...]]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one module. All have the same tensors and pieces, except for constants.

    Attributes:
        path: Of the module in the model.
        experts: In the order of their numbers.
        parameters: Names of the module's parameters that experts cover.
        claimed: Full names of these in the model, all they have.
        sources: Names of the checkpoint that are used up, those that describe a packing too.
    """

    path: str
    experts: tuple[Expert, ...]
    parameters: tuple[str, ...]
    claimed: frozenset[str]
    sources: frozenset[str]


def find_experts(
    model: nn.Module, checkpoint: Checkpoint, rename: Callable[[str], str] | None = None
) -> list[ExpertLayer]:
    """Find the experts of a model, on meta or not, in its checkpoint.

    Experts modules are those of transformers' experts interface, and any other module with
    `num_experts`, `has_bias`, `is_transposed`, and parameters `down_proj` and `gate_up_proj` or
    `up_proj` of three dimensions, the first of them the expert's number.

    Args:
        model: The module whose names are those of the checkpoint.
        checkpoint: Plain, or packed in a format of `nexus_ext.quant.formats`.
        rename: From a name in the model to the name in the checkpoint; best a `Conversion`, which
            None makes.

    Returns:
        Layers in the order of definition; [] if the model has no experts module.

    Raises:
        CheckpointMismatch: An expert is missing, has another dtype or shape, or is unlike others.
        CheckpointFormatError: A packed weight breaks its format, or cannot be cut by expert.
        StreamError: The model's tensors are made from the checkpoint's by more than joining them.
    """
    modules = {path: module for path, module in model.named_modules() if _has_experts(module)}
    if not modules:
        return []
    conversion = rename if isinstance(rename, Conversion) else Conversion.of(model, checkpoint)
    finder = _Finder(model, checkpoint, conversion, rename or conversion)
    return [finder.layer(path, module) for path, module in modules.items()]


def _has_experts(module: nn.Module) -> bool:
    if not all(hasattr(module, name) for name in ("num_experts", "has_bias", "is_transposed")):
        return False
    covered = _covered(module)
    up = covered.get("gate_up_proj", covered.get("up_proj"))
    down = covered.get("down_proj")
    return up is not None and down is not None and up.dim() == down.dim() == 3


def _covered(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have a part for each expert."""
    return {
        leaf: parameter
        for leaf, parameter in module._parameters.items()
        if parameter is not None
        and parameter.dim() >= 2
        and parameter.shape[0] == module.num_experts
    }


class _Finder:
    """Finds layer after layer; knows model and checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        conversion: Conversion,
        rename: Callable[[str], str],
    ) -> None:
        self.checkpoint = checkpoint
        self.conversion = conversion
        self.packed = PackedWeights(checkpoint)
        self._rename = rename
        self._names_of: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names_of.setdefault(id(parameter), []).append(name)

    def layer(self, path: str, module: nn.Module) -> ExpertLayer:
        covered = _covered(module)
        found = {
            leaf: _Parameter(self, f"{path}.{leaf}" if path else leaf, parameter)
            for leaf, parameter in covered.items()
        }
        cuts = {leaf: parameter.cuts() for leaf, parameter in found.items()}
        experts, used = [], set[str]()
        for number in range(len(next(iter(cuts.values())))):
            tensors: list[ExpertTensor] = []
            weights, names = {}, {}
            for leaf, parameter in found.items():
                rows = parameter.rows(number, cuts[leaf][number])
                used |= {name for piece in rows for name in piece.names}
                names[leaf] = tuple(cut.entry.name for cut in cuts[leaf][number])
                weights[leaf] = named(leaf, rows, tensors)
            experts.append(Expert(tuple(tensors), weights, names))
        self._refuse_unlike(path, experts)
        claimed = [name for parameter in covered.values() for name in self.names_of(parameter)]
        return ExpertLayer(
            path, tuple(experts), tuple(covered), frozenset(claimed), frozenset(used)
        )

    def names_of(self, parameter: nn.Parameter) -> list[str]:
        """Every name it has in the model."""
        return self._names_of[id(parameter)]

    def entry(self, name: str) -> Entry | None:
        """The tensor of the checkpoint that is this tensor of the model, as it is."""
        if self.conversion.converted(name) is not None:
            return None
        return self.checkpoint.entries.get(self._rename(name))

    def where(self, entry: Entry) -> str:
        return f"{self.checkpoint.files[entry.file].path} at offset {entry.offset}"

    def _refuse_unlike(self, path: str, experts: Sequence[Expert]) -> None:
        kinds = [_kind_of(expert) for expert in experts]
        for number, expert in enumerate(experts):
            if kinds[number] != kinds[0]:
                raise CheckpointMismatch(
                    f"All experts of {path} must have the same tensors, packed in the same way; in "
                    f"{self.checkpoint.path} expert {number} has {_tensors_of(expert)}, and expert "
                    f"0 {_tensors_of(experts[0])}. Convert the whole model in one way."
                )


class _Parameter:
    """One parameter of an experts module."""

    def __init__(self, finder: _Finder, name: str, parameter: nn.Parameter) -> None:
        self._finder = finder
        self._name = name
        self._names = dict.fromkeys([name, *finder.names_of(parameter)])
        self._dtype = parameter.dtype
        self._count = parameter.shape[0]
        self._shape = tuple(parameter.shape[1:])
        self._stacked: dict[str, Rows] = {}  # described once for all experts

    def cuts(self) -> list[list[Cut]]:
        """For each expert what its rows are made of, in order."""
        for name in self._names:
            entry = self._finder.entry(name)
            if entry is not None:
                return fused(entry, self._count)
            made = self._finder.conversion.converted(name)
            if made is not None:
                return Gathering(name, self._count, made, self._finder.checkpoint).cuts()
        self._refuse_missing()

    def rows(self, number: int, cuts: Sequence[Cut]) -> list[Rows]:
        """The pieces of one expert; see Note [Rows in pieces]."""
        pieces: list[Rows] = []
        for cut in cuts:
            new = self._whole(cut.entry) if cut.of == 1 else self._part(cut)
            joined = pieces[-1].joined(new) if pieces else None
            if joined is None:
                pieces.append(new)
            else:
                pieces[-1] = joined
        self._check_rows(number, cuts, pieces)
        return pieces

    def _whole(self, entry: Entry) -> Rows:
        """Rows that are a tensor of the checkpoint, or a packed weight."""
        is_plain = entry.dtype == self._dtype and entry.shape[1:] == self._shape[1:]
        weight = None if is_plain else self._finder.packed.find(entry.name)
        if weight is None:
            return Rows(None, entry.shape, {"": Bytes.of(entry)}, {}, (entry.name,))
        entries = self._finder.checkpoint.entries
        tensors = {part: Bytes.of(entries[name]) for part, name in weight.parts.items()}
        names = tuple(weight.names)
        return Rows(weight.packing, weight.packing.shape, tensors, weight.constants, names)

    def _part(self, cut: Cut) -> Rows:
        """Rows that are one of equal parts."""
        entry = cut.entry
        if entry.dtype == self._dtype and entry.shape[:1] == (cut.of,):
            shape = entry.shape[1:]
            tensors = {"": Bytes.of(entry).cut(cut.part, cut.of, shape)}
            return Rows(None, shape, tensors, {}, (entry.name,))
        if entry.name not in self._stacked:
            self._stacked[entry.name] = self._whole(entry)
        whole = self._stacked[entry.name]
        if whole.packing is None:
            return replace(whole, shape=())  # refused when the rows are counted
        packing = self._cut_packing(cut, whole.packing)
        tensors = {part: self._cut_part(cut, part, b) for part, b in whole.tensors.items()}
        return Rows(packing, packing.shape, tensors, whole.constants, whole.names)

    def _cut_packing(self, cut: Cut, packing: Packing) -> Packing:
        """Of one expert, from that of all: blocks, and blocks of blocks, must end with it."""
        if packing.shape[:1] != (cut.of,):
            refuse(
                f"{self._name} is {[self._count, *self._shape]} in the model and "
                f"{list(packing.shape)}, packed, in {self._finder.where(cut.entry)}"
            )
        if not isinstance(packing, NF4 | NestedNF4):
            self._refuse_cut(cut, "must be packed in 4 bits", type(packing).__name__)
        shape = packing.shape[1:]
        block = packing.blocksize
        if isinstance(packing, NestedNF4):
            block *= packing.nested_blocksize
        if math.prod(shape) % block:
            rule = f"must have a multiple of the {block} elements that share a scale"
            self._refuse_cut(cut, rule, f"{math.prod(shape)} of {list(shape)}")
        return replace(packing, shape=shape)

    def _cut_part(self, cut: Cut, part: str, whole: Bytes) -> Bytes:
        if whole.nbytes % (cut.of * whole.dtype.itemsize):
            rule = f"must have whole elements of {part!r}, {whole.dtype}"
            self._refuse_cut(cut, rule, f"{whole.nbytes} bytes for {cut.of} experts")
        count = whole.nbytes // cut.of // whole.dtype.itemsize
        return whole.cut(cut.part, cut.of, (count, *(1 for _ in whole.shape[1:])))

    def _check_rows(self, number: int, cuts: Sequence[Cut], pieces: Sequence[Rows]) -> None:
        """The pieces must be the expert's parameter."""
        num_rows = sum(piece.shape[0] for piece in pieces if piece.shape)
        if num_rows == self._shape[0] and all(map(self._is_right, pieces)):
            return
        got = [
            f"{cut.entry.name} {_kind(cut.entry.dtype, cut.entry.shape)} in "
            f"{self._finder.where(cut.entry)}"
            for cut in cuts
        ]
        packed = [f"{list(p.shape)}, packed" for p in pieces if p.packing is not None]
        refuse(
            f"expert {number} of {self._name} is {_kind(self._dtype, self._shape)}, got "
            f"{listed(got)}" + (f" ({listed(packed)})" if packed else "")
        )

    def _is_right(self, piece: Rows) -> bool:
        if len(piece.shape) != len(self._shape) or piece.shape[1:] != self._shape[1:]:
            return False
        if piece.packing is None:
            return piece.tensors[""].dtype == self._dtype
        return self._dtype in DECODED_DTYPES

    def _refuse_missing(self) -> NoReturn:
        folder = self._name.rpartition(".")[0]
        patterns = self._finder.conversion.patterns(self._name)
        first = [pattern.replace("\\", "").replace("*", "0", 1) for pattern in patterns]
        asked = f" or, for expert 0, {' and '.join(first)}" if first else ""
        entries = self._finder.checkpoint.entries
        like = [name for name in entries if folder and name.startswith(folder)]
        there = f"; it has {listed(like)}" if like else ""
        refuse(
            f"the experts of {folder or 'the model'} need {self._name}{asked}, and "
            f"{self._finder.checkpoint.path} has none{there}"
        )

    def _refuse_cut(self, cut: Cut, rule: str, got: str) -> NoReturn:
        raise CheckpointFormatError(
            f"An expert that is cut from one packed tensor {rule}; got {got}, for "
            f"{cut.entry.name} in {self._finder.where(cut.entry)}. Convert the original model with "
            "weights='nf4', or use one with a tensor for each expert."
        )


def _kind_of(expert: Expert) -> object:
    """What must be the same for all experts of a layer."""
    return [(t.name, t.dtype, t.shape) for t in expert.tensors], {
        leaf: [(piece.packing, piece.constants.keys()) for piece in pieces]
        for leaf, pieces in expert.weights.items()
    }


def _tensors_of(expert: Expert) -> str:
    return listed([f"{t.name} {_kind(t.dtype, t.shape)}" for t in expert.tensors])


def _kind(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
