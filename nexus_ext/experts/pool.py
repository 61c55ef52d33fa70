"""transformers' own batched and grouped products, over the slots instead of over a layer's experts.

    rows [n, H], slot of each row [n] ──▶ [n, H]      one launch, whatever experts the slots hold

What the stock functions ask of an experts module, a pool answers: as many "experts" as there are
slots, with weights that lie in them. Packed ones are decoded as they are indexed, in one launch.
Nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from nexus_ext import ops
from nexus_ext.experts.find import ExpertPiece
from nexus_ext.experts.store import ExpertStore
from nexus_ext.quant.packing import NF4

__all__ = ["Pool"]

# Up to so many rows the weights are gathered, row by row; more of them share a grouped product.
_MOST_GATHERED_ROWS = 64

Weights = Mapping[str, tuple[ExpertPiece, ...]]


class Pool:
    """The slots of one class, seen as the experts of one module."""

    def __init__(self, module: Any, store: ExpertStore, slot_class: int, weights: Weights) -> None:
        """Args:
        module: Of transformers; says how its experts compute.
        store: Whose slots these are; none of its experts are mapped.
        slot_class: Which.
        weights: How any of the experts is read from its slot.
        """
        self._module = module
        self.num_experts = len(store.slots_of[slot_class])
        self.has_post_expert_norm = False
        self._is_expert_parallel = False
        self.is_packed = False
        self._first = store.slots_of[slot_class].start
        for name, pieces in weights.items():
            [piece] = pieces
            if piece.packing is None:
                setattr(self, name, store.pool(slot_class, piece.parts[""]))
            else:
                self.is_packed = True
                dtype = module._parameters[name].dtype
                setattr(self, name, _PackedSlots(store, slot_class, piece, dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @staticmethod
    def can_hold(weights: Weights) -> bool:
        """Whether products over slots know how these are packed."""
        return all(
            len(pieces) == 1 and (pieces[0].packing is None or type(pieces[0].packing) is NF4)
            for pieces in weights.values()
        )

    def can_take(self, num_rows: int) -> bool:
        """Whether so many rows go in one product; packed weights are gathered, or not at all."""
        return num_rows <= _MOST_GATHERED_ROWS or not self.is_packed

    def product(self, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """rows [n, H] through the experts in `slots` [n], numbers as the store has them."""
        from transformers.integrations import moe

        few = len(rows) <= _MOST_GATHERED_ROWS
        stock = moe.batched_mm_experts_forward if few else moe.grouped_mm_experts_forward
        chosen = (slots - self._first).unsqueeze(-1)
        ones = torch.ones_like(chosen, dtype=rows.dtype)
        result: torch.Tensor = stock(cast(Any, self), rows, chosen, ones)
        return result


class _PackedSlots:
    """A packed weight in every slot: what is indexed is decoded."""

    def __init__(
        self, store: ExpertStore, slot_class: int, piece: ExpertPiece, dtype: torch.dtype
    ) -> None:
        assert isinstance(piece.packing, NF4)
        self._packing = piece.packing
        self._code = piece.constants.get("code")
        self._memory, self._step = store.memory(slot_class)
        self._offsets = torch.tensor(
            [store.offset(slot_class, piece.parts[part]) for part in ("q", "absmax")],
            device=self._memory.device,
        )
        self._dtype = dtype

    def __getitem__(self, slots: torch.Tensor) -> torch.Tensor:
        offsets = slots.unsqueeze(-1) * self._step + self._offsets
        result: torch.Tensor = ops.native.dequantize_nf4_grouped(
            self._memory,
            offsets,
            None,
            None,
            self._packing.blocksize,
            256,
            len(slots),
            self._packing.shape,
            self._dtype,
            self._code,
        )
        return result
