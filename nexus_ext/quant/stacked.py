"""Packing the experts of a layer that are one tensor, one expert after the other.

The result is that of packing the whole, since no block has elements of two experts: it is cut by
expert again without a look at its bytes. Where that cannot be, the tensor is packed another way,
or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from nexus_ext.quant import reference
from nexus_ext.quant.config import INT8Config, NF4Config
from nexus_ext.quant.packed import Packed, pack
from nexus_ext.quant.packing import NF4, NestedNF4
from nexus_ext.quant.registration import NESTED_BLOCKSIZE

__all__ = ["config_for", "pack_stacked"]

_CUT = ("q", "absmax", "nested_absmax")  # parts that an expert has its own part of


def config_for(
    shape: Sequence[int], config: NF4Config | INT8Config | None
) -> tuple[NF4Config | None, str]:
    """How experts of one tensor, `shape` [experts, rows, columns], can be packed: like `config`,
    without nested scales, or not at all; and why not as asked.
    """
    if config is None:
        return None, ""
    if isinstance(config, INT8Config):
        return None, "INT8 packs matrices, and this is one tensor for all experts"
    numel = math.prod(shape[1:])
    if numel % config.blocksize:
        return None, f"an expert's {numel} elements end within a block of {config.blocksize}"
    together = config.blocksize * NESTED_BLOCKSIZE
    if config.nested and numel % together:
        why = f"an expert's {numel} elements end within the {together} that share a nested scale"
        return replace(config, nested=False), why
    return config, ""


def pack_stacked(
    expert: Callable[[int], torch.Tensor], shape: Sequence[int], config: NF4Config, name: str
) -> tuple[Packed, float]:
    """Pack a weight [experts, rows, columns] for which `config_for` has this config.

    Args:
        expert: The weight of one expert by its number; called twice for each, and never are two of
            them needed.
        shape: Of the whole.
        config: How to pack it.
        name: Of the weight, for messages.

    Returns:
        The whole, packed, and its error, as that of `Packed`.

    Raises:
        QuantizationError: As `pack`.
    """
    plain = replace(config, nested=False)
    numel = math.prod(shape[1:])
    q = torch.empty(shape[0], numel // 2, dtype=torch.uint8)
    absmax = torch.empty(shape[0], numel // config.blocksize)
    for number in range(shape[0]):
        made = pack(expert(number), plain, f"expert {number} of {name}")
        q[number] = made.parts["q"].reshape(-1)
        absmax[number] = made.parts["absmax"]
    parts = {"q": q.reshape(-1), "absmax": absmax.reshape(-1)}
    packing: NF4 | NestedNF4 = NF4(tuple(shape), config.blocksize)
    if config.nested:
        packing = NestedNF4(tuple(shape), config.blocksize, NESTED_BLOCKSIZE)
        parts |= _nested(parts["absmax"])
    whole = Packed(packing, parts)
    return whole, _error(whole, expert)


def _nested(absmax: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, nested, offset = reference.quantize_absmax(absmax)
    return {
        "absmax": codes,
        "nested_absmax": nested,
        "nested_code": reference.nested_code(),
        "nested_offset": offset,
    }


def _error(whole: Packed, expert: Callable[[int], torch.Tensor]) -> float:
    """As `Packed.error`, one expert after the other."""
    count = whole.packing.shape[0]
    packing = replace(whole.packing, shape=whole.packing.shape[1:])
    cut = {part: whole.parts[part].view(count, -1) for part in _CUT if part in whole.parts}
    difference = size = 0.0
    for number in range(count):
        exact = expert(number).float()
        own = {part: tensor[number] for part, tensor in cut.items()}
        decoded = packing.decode({**whole.parts, **own}, torch.float32)
        difference += (decoded - exact).norm().item() ** 2
        size += exact.norm().item() ** 2
    return math.sqrt(difference / size) if size else 0.0
