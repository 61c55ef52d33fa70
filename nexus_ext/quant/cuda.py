"""The ops on packed weights on a GPU: outputs are made here, Triton kernels fill them.

Triton is imported when the first op needs it. What has no kernel of its own (packing, which happens
once; GGUF) is the reference's PyTorch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from nexus_ext.errors import MissingExtra
from nexus_ext.profiling import annotate
from nexus_ext.quant import reference

__all__ = ["FUSED_ROWS", "KERNELS"]

# Rows of x up to which a fused product beats decoding and a matrix library; a start value (not
# measured on a GPU).
FUSED_ROWS = 8


@functools.cache
def _kernels() -> Any:
    try:
        from nexus_ext.kernels import int8, nf4
    except ImportError:
        raise MissingExtra(
            "Packed weights on a GPU need triton: pip install 'nexus_ext[triton]'."
        ) from None
    return nf4, int8


@functools.cache
def _nf4_code(device: torch.device) -> torch.Tensor:
    return torch.tensor(reference.NF4_CODE, device=device)


def _code(q: torch.Tensor, code: torch.Tensor | None) -> torch.Tensor:
    return _nf4_code(q.device) if code is None else code


def _bytes(q: torch.Tensor) -> torch.Tensor:
    return q.reshape(-1).view(torch.uint8)


def dequantize_nf4_out(
    q: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
    code: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
) -> None:
    nf4, _ = _kernels()
    with annotate("dequantize", q):
        nf4.dequantize(_bytes(q), absmax, _code(q, code), blocksize, out)


def dequantize_nf4(
    q: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
    code: torch.Tensor | None = None,
) -> torch.Tensor:
    out = q.new_empty(shape, dtype=dtype)
    dequantize_nf4_out(q, absmax, blocksize, shape, dtype, code, out=out)
    return out


def dequantize_nf4_nested_out(
    q: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_code: torch.Tensor,
    nested_offset: torch.Tensor,
    blocksize: int,
    nested_blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
    code: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
) -> None:
    nf4, _ = _kernels()
    with annotate("dequantize", q):
        nf4.dequantize_nested(
            _bytes(q),
            absmax,
            nested_absmax,
            nested_code,
            nested_offset,
            nested_blocksize,
            _code(q, code),
            blocksize,
            out,
        )


def dequantize_nf4_nested(
    q: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_code: torch.Tensor,
    nested_offset: torch.Tensor,
    blocksize: int,
    nested_blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
    code: torch.Tensor | None = None,
) -> torch.Tensor:
    out = q.new_empty(shape, dtype=dtype)
    dequantize_nf4_nested_out(
        q,
        absmax,
        nested_absmax,
        nested_code,
        nested_offset,
        blocksize,
        nested_blocksize,
        shape,
        dtype,
        code,
        out=out,
    )
    return out


def dequantize_nf4_grouped(
    arena: torch.Tensor,
    offsets: torch.Tensor,
    nested_code: torch.Tensor | None,
    nested_offsets: torch.Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    num_units: int,
    unit_shape: list[int],
    dtype: torch.dtype,
    code: torch.Tensor | None = None,
) -> torch.Tensor:
    nf4, _ = _kernels()
    out = arena.new_empty([num_units, *unit_shape], dtype=dtype)
    with annotate("dequantize", num_units * ((math.prod(unit_shape) + 1) // 2)):
        nf4.dequantize_grouped(
            arena,
            offsets,
            nested_code,
            nested_offsets,
            _code(arena, code),
            blocksize,
            nested_blocksize,
            out,
        )
    return out


def dequantize_int8_out(
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    divisor: float = reference.INT8_DIVISOR,
    *,
    out: torch.Tensor,
) -> None:
    _, int8 = _kernels()
    with annotate("dequantize", q):
        int8.dequantize(q, scale.reshape(len(q), -1), divisor, out)


def dequantize_int8(
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    divisor: float = reference.INT8_DIVISOR,
) -> torch.Tensor:
    out = q.new_empty(q.shape, dtype=dtype)
    dequantize_int8_out(q, scale, dtype, divisor, out=out)
    return out


def nf4_linear(
    x: torch.Tensor,
    q: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    blocksize: int,
    out_features: int,
    code: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_code: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    nested_blocksize: int = reference.NESTED_BLOCKSIZE,
) -> torch.Tensor:
    nf4, _ = _kernels()
    shape = [out_features, x.shape[-1]]
    if _is_fused(x, blocksize):
        if nested_absmax is not None:
            assert nested_code is not None
            assert nested_offset is not None
            absmax = reference.dequantize_absmax(
                absmax, nested_absmax, nested_code, nested_offset, nested_blocksize
            )
        fused: torch.Tensor = nf4.linear(
            x, _bytes(q), absmax, _code(q, code), blocksize, out_features, bias
        )
        return fused
    if nested_absmax is None:
        weight = dequantize_nf4(q, absmax, blocksize, shape, x.dtype, code)
    else:
        assert nested_code is not None
        assert nested_offset is not None
        weight = dequantize_nf4_nested(
            q,
            absmax,
            nested_absmax,
            nested_code,
            nested_offset,
            blocksize,
            nested_blocksize,
            shape,
            x.dtype,
            code,
        )
    return functional.linear(x, weight, bias)


def int8_linear(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    divisor: float = reference.INT8_DIVISOR,
) -> torch.Tensor:
    _, int8 = _kernels()
    scale = scale.reshape(len(q), -1)
    if _is_fused(x, x.shape[-1] // scale.shape[1]):
        fused: torch.Tensor = int8.linear(x, q, scale, divisor, bias)
        return fused
    return functional.linear(x, dequantize_int8(q, scale, x.dtype, divisor), bias)


def _is_fused(x: torch.Tensor, run: int) -> bool:
    """Few rows, which begin where a scale does."""
    width = x.shape[-1]
    return 0 < x.numel() <= FUSED_ROWS * width and width % run == 0


# By the op's name and overload.
KERNELS: dict[str, Callable[..., Any]] = {
    "dequantize_nf4": dequantize_nf4,
    "dequantize_nf4.out": dequantize_nf4_out,
    "dequantize_nf4_nested": dequantize_nf4_nested,
    "dequantize_nf4_nested.out": dequantize_nf4_nested_out,
    "dequantize_nf4_grouped": dequantize_nf4_grouped,
    "dequantize_int8": dequantize_int8,
    "dequantize_int8.out": dequantize_int8_out,
    "nf4_linear": nf4_linear,
    "int8_linear": int8_linear,
    "dequantize_ggml": reference.dequantize_ggml,
    "quantize_nf4": reference.quantize_nf4,
}
