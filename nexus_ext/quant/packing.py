"""How the parts of a packed weight become a weight, or a product with one.

A packing is the same for all weights of one shape and format, and knows no bytes: it is given the
parts, which may lie in an arena and be there for a moment only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from nexus_ext import ops
from nexus_ext.quant import reference
from nexus_ext.quant.registration import NESTED_BLOCKSIZE

__all__ = ["DECODED_DTYPES", "GGML", "INT8", "NF4", "NestedNF4", "Packing"]

Parts = Mapping[str, torch.Tensor]
# What a weight may decode to.
DECODED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Packing(ABC):
    """Attributes:
    shape: Of the weight, decoded.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """The weight, a new tensor of `shape`."""

    def rows(self, ids: torch.Tensor, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """The rows that `ids` name: [*ids.shape, width]."""
        return functional.embedding(ids, self.decode(parts, dtype))

    def linear(
        self, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`F.linear(x, weight, bias)`: the weight is rounded to the dtype of x."""
        return functional.linear(x, self.decode(parts, x.dtype), bias)


@dataclass(frozen=True)
class NF4(Packing):
    """Parts: q, absmax; and code, if it is not NF4's own (FP4 is packed the same way)."""

    blocksize: int

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        result: torch.Tensor = ops.native.dequantize_nf4(
            parts["q"], parts["absmax"], self.blocksize, self.shape, dtype, parts.get("code")
        )
        return result

    def linear(
        self, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        result: torch.Tensor = ops.native.nf4_linear(
            x,
            parts["q"],
            parts["absmax"],
            bias,
            self.blocksize,
            self.shape[0],
            parts.get("code"),
        )
        return result


@dataclass(frozen=True)
class NestedNF4(Packing):
    """Parts: q, absmax (bytes), nested_absmax, nested_code, nested_offset; code as in `NF4`."""

    blocksize: int
    nested_blocksize: int = NESTED_BLOCKSIZE

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        result: torch.Tensor = ops.native.dequantize_nf4_nested(
            parts["q"],
            parts["absmax"],
            parts["nested_absmax"],
            parts["nested_code"],
            parts["nested_offset"],
            self.blocksize,
            self.nested_blocksize,
            self.shape,
            dtype,
            parts.get("code"),
        )
        return result

    def linear(
        self, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        result: torch.Tensor = ops.native.nf4_linear(
            x,
            parts["q"],
            parts["absmax"],
            bias,
            self.blocksize,
            self.shape[0],
            parts.get("code"),
            parts["nested_absmax"],
            parts["nested_code"],
            parts["nested_offset"],
            self.nested_blocksize,
        )
        return result


@dataclass(frozen=True)
class INT8(Packing):
    """Parts: q, scale."""

    divisor: float = reference.INT8_DIVISOR

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        result: torch.Tensor = ops.native.dequantize_int8(
            parts["q"], self._scale(parts), dtype, self.divisor
        )
        return result

    def linear(
        self, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        result: torch.Tensor = ops.native.int8_linear(
            x, parts["q"], self._scale(parts), bias, self.divisor
        )
        return result

    def _scale(self, parts: Parts) -> torch.Tensor:
        scale = parts["scale"].float()
        return scale.reshape(1).repeat(self.shape[0]) if scale.numel() == 1 else scale


@dataclass(frozen=True)
class GGML(Packing):
    """Parts: q, blocks of GGUF's `kind`, "q8_0" or "q4_0".

    `heads` is above 0 where the file has each head's rows in pairs (i, i + half) side by side, as
    llama.cpp wants them for its rotary embedding: transformers wants the halves apart.
    """

    kind: str
    heads: int = 0

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        weight: torch.Tensor = ops.native.dequantize_ggml(parts["q"], self.kind, self.shape, dtype)
        if self.heads == 0:
            return weight
        rows, width = self.shape
        pairs = weight.view(self.heads, rows // self.heads // 2, 2, width)
        return pairs.transpose(1, 2).reshape(rows, width)

    def rows(self, ids: torch.Tensor, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """The rows that `ids` name: [*ids.shape, width]."""
        table = parts["q"].view(self.shape[0], -1)
        chosen = table[ids.reshape(-1)]
        decoded: torch.Tensor = ops.native.dequantize_ggml(
            chosen, self.kind, [len(chosen), self.shape[1]], dtype
        )
        return decoded.view(*ids.shape, self.shape[1])
