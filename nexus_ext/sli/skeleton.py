"""A module without bytes, and layers made from it: code from here, tensors from elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nexus_ext.errors import CheckpointMismatch
from nexus_ext.quant import PackedLinear
from nexus_ext.quant.packed import Packed
from nexus_ext.quant.packing import Packing
from nexus_ext.sli.storing import About, StoredLayer, named_tensors

__all__ = ["Skeleton"]

_MOST_LISTED = 6


class Skeleton:
    """The structure of a layer; its tensors are on meta."""

    def __init__(self, module: nn.Module) -> None:
        """Of any module; that one is not changed, and nothing of its tensors is kept."""
        stand_ins: dict[int, Any] = {}
        for _, tensor in named_tensors(module):
            stand_ins.setdefault(id(tensor), _on_meta(tensor))
        self._module: nn.Module = copy.deepcopy(module, stand_ins)

    def build(self, stored: StoredLayer, where: str) -> nn.Module:
        """A layer of this structure whose tensors are those, not copies of them.

        Raises:
            CheckpointMismatch: The layer that was stored has another structure.
        """
        module = _with_packed(self._module, stored.about, where)
        names = {name: stored.about.tied.get(name, name) for name in _all_names(stored)}
        theirs = dict(named_tensors(module))
        _check(theirs, names, stored, where)
        made: dict[str, torch.Tensor] = {}
        memo: dict[int, Any] = {}
        for name, first in names.items():
            if first not in made:
                made[first] = _like(theirs[name], stored.tensors[first], first, stored.about)
            memo[id(theirs[name])] = made[first]
        layer: nn.Module = copy.deepcopy(module, memo)
        training = set(stored.about.training)
        for name, child in layer.named_modules():
            child.training = name in training
        return layer


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _like(stand_in: torch.Tensor, tensor: torch.Tensor, name: str, about: About) -> torch.Tensor:
    if isinstance(stand_in, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=name in about.trained)
    return tensor


def _all_names(stored: StoredLayer) -> list[str]:
    return [*stored.tensors, *stored.about.tied]


def _check(
    theirs: Mapping[str, torch.Tensor], names: Mapping[str, str], stored: StoredLayer, where: str
) -> None:
    problems = _tied_otherwise(theirs, names)
    # Sizes of parts follow from the packing, which was compared.
    parts = {
        f"{path}.{part}" if path else part
        for path, own in stored.about.part_names.items()
        for part in own
    }
    if missing := sorted(theirs.keys() - names.keys()):
        problems.append(f"the stored layer lacks {_listed(missing)}")
    if unexpected := sorted(names.keys() - theirs.keys()):
        problems.append(f"the template lacks {_listed(unexpected)}")
    for name in sorted(theirs.keys() & names.keys()):
        wanted, got = tuple(theirs[name].shape), tuple(stored.tensors[names[name]].shape)
        if wanted != got and name not in parts:
            problems.append(f"{name} is {list(wanted)} in the template and {list(got)} as stored")
    if problems:
        raise CheckpointMismatch(
            f"A template must have the structure of the layer that was cached, a "
            f"{stored.about.kind} ({where}): {'; '.join(problems[:_MOST_LISTED])}. Pass the "
            "template that fits, or cache the layer again."
        )


def _tied_otherwise(theirs: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> list[str]:
    """One tensor cannot have the values of two. (Two may have those of one: they become one.)"""
    first_of: dict[int, str] = {}
    problems = []
    for name in sorted(theirs.keys() & names.keys()):
        other = first_of.setdefault(id(theirs[name]), names[name])
        if other != names[name]:
            problems.append(f"{name} and {other} are one tensor in the template, two as stored")
    return problems


def _with_packed(module: nn.Module, about: About, where: str) -> nn.Module:
    """The same structure, with `PackedLinear` in place of the Linear modules that were packed."""
    waiting = {name: about.packing(name) for name in about.packed}
    for name, packing in list(waiting.items()):
        there = _submodule(module, name, where)
        if type(there) is PackedLinear and there.packing == packing:
            del waiting[name]
    if not waiting:
        return module
    changed: nn.Module = copy.deepcopy(module)
    for name, packing in waiting.items():
        there = _submodule(changed, name, where)
        if not isinstance(there, nn.Linear | PackedLinear) or packing.shape != (
            there.out_features,
            there.in_features,
        ):
            raise CheckpointMismatch(
                f"A packed Linear takes the place of one of its size; {name or 'the layer'} of "
                f"{where} is {packing}, and the template has {there}. Pass the template that fits."
            )
        made = _packed(packing, about.part_names[name], there.bias)
        if not name:
            return made
        path, _, leaf = name.rpartition(".")
        setattr(changed.get_submodule(path), leaf, made)
    return changed


def _submodule(module: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise CheckpointMismatch(
            f"A template must have the structure of the layer that was cached; {where} has "
            f"{name!r}, and the template, a {type(module).__name__}, has not. Pass the one that "
            "fits."
        ) from error


def _packed(packing: Packing, names: list[str], bias: torch.Tensor | None) -> PackedLinear:
    # Shapes of parts are the stored ones'; nobody asks these for theirs.
    parts = {name: torch.empty(0, dtype=torch.uint8, device="meta") for name in names}
    made = PackedLinear(Packed(packing, parts), None)
    made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return made


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
