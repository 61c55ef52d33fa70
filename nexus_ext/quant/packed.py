"""Packing one weight: its parts, their names in a checkpoint, and how far they are from it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from nexus_ext import ops
from nexus_ext.errors import QuantizationError
from nexus_ext.quant import reference
from nexus_ext.quant.config import INT8Config, NF4Config
from nexus_ext.quant.packing import INT8, NF4, NestedNF4, Packing
from nexus_ext.quant.registration import NESTED_BLOCKSIZE

__all__ = ["Packed", "describes_weight", "pack"]

# Endings of what only says how a weight is packed.
_DESCRIPTIONS = (".quant_map", ".nested_quant_map", ".quant_state.bitsandbytes__nf4", "_format")


@dataclass(frozen=True)
class Packed:
    """A weight, packed.

    Attributes:
        packing: How the parts decode.
        parts: By the part's word in `packing`.
    """

    packing: Packing
    parts: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in self.parts.values())

    def error(self, weight: torch.Tensor) -> float:
        """The root of the mean squared error, relative to that of the weight itself."""
        exact = weight.float()
        difference = self.packing.decode(self.parts, torch.float32) - exact
        size = exact.norm().item()
        return difference.norm().item() / size if size else 0.0

    def stored(self, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors that bitsandbytes would write for the weight `name`, by their names.

        Args:
            name: Of the weight, ending in "weight".
            dtype: Of the weight before it was packed.
        """
        if isinstance(self.packing, INT8):
            return {
                name: self.parts["q"],
                name.removesuffix("weight") + "SCB": self.parts["scale"],
                f"{name}_format": torch.zeros((), dtype=torch.uint8),
            }
        assert isinstance(self.packing, NF4 | NestedNF4)
        state: dict[str, object] = {
            "quant_type": "nf4",
            "blocksize": self.packing.blocksize,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(self.packing.shape),
        }
        tensors = {
            name: self.parts["q"].reshape(-1, 1),
            f"{name}.absmax": self.parts["absmax"],
            f"{name}.quant_map": torch.tensor(reference.NF4_CODE),
        }
        if isinstance(self.packing, NestedNF4):
            state |= {
                "nested_blocksize": self.packing.nested_blocksize,
                "nested_dtype": "float32",
                "nested_offset": self.parts["nested_offset"].item(),
            }
            tensors |= {
                f"{name}.nested_absmax": self.parts["nested_absmax"],
                f"{name}.nested_quant_map": self.parts["nested_code"],
            }
        text = json.dumps(state).encode()
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(
            list(text), dtype=torch.uint8
        )
        return tensors


def describes_weight(name: str) -> bool:
    """Whether a stored tensor is read once, when the checkpoint is opened, and does not move."""
    return name.endswith(_DESCRIPTIONS)


def pack(weight: torch.Tensor, config: NF4Config | INT8Config, name: str = "a weight") -> Packed:
    """Pack a weight [out, in], or of any shape for NF4.

    Raises:
        QuantizationError: Not finite, of integers or float8, or of a shape that cannot be packed.
    """
    reference.check_quantizable(weight, name)
    shape = tuple(weight.shape)
    if isinstance(config, INT8Config):
        try:
            q, scale = reference.quantize_int8(weight)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from None
        return Packed(INT8(shape), {"q": q, "scale": scale})
    if not config.nested:
        q, absmax = ops.native.quantize_nf4(weight, config.blocksize, config.num_scales)
        return Packed(NF4(shape, config.blocksize), {"q": q, "absmax": absmax})
    q, absmax, nested, offset = ops.native.quantize_nf4_nested(
        weight, config.blocksize, config.num_scales
    )
    parts = {
        "q": q,
        "absmax": absmax,
        "nested_absmax": nested,
        "nested_code": reference.nested_code(),
        "nested_offset": offset,
    }
    return Packed(NestedNF4(shape, config.blocksize, NESTED_BLOCKSIZE), parts)
