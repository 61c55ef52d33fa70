"""Fakes, gradients and Python kernels of the ops on packed weights; the CPU's are native.

Weights are frozen: only inputs and biases have gradients. Backward decodes the weight once more and
saves none of it decoded. On devices without kernels of their own, the reference computes.
"""

from __future__ import annotations

from typing import Any

import torch

from nexus_ext import ops
from nexus_ext.quant import cuda, reference

__all__ = ["NESTED_BLOCKSIZE"]

NESTED_BLOCKSIZE = reference.NESTED_BLOCKSIZE

_check: Any = torch._check  # untyped
_fake: Any = torch.library.register_fake
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check_blocksize(blocksize: int) -> None:
    _check(
        32 <= blocksize <= 4096 and blocksize & (blocksize - 1) == 0,
        lambda: f"A blocksize is a power of two from 32 to 4096, got {blocksize}.",
    )


def _check_dtype(dtype: torch.dtype) -> None:
    _check(
        dtype in _FLOATS,
        lambda: f"Weights decode to float32, float16 or bfloat16, got {dtype}; convert the result.",
    )


# -- fakes -----------------------------------------------------------------------------------------


@_fake("nexus::dequantize_nf4")  # type: ignore[untyped-decorator]
def _nf4_fake(
    q: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
    code: torch.Tensor | None = None,
) -> torch.Tensor:
    _check_blocksize(blocksize)
    _check_dtype(dtype)
    return q.new_empty(shape, dtype=dtype)


@_fake("nexus::dequantize_nf4.out")  # type: ignore[untyped-decorator]
def _nf4_out_fake(
    q: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
    code: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
) -> None:
    _check_blocksize(blocksize)
    _check_dtype(dtype)


@_fake("nexus::dequantize_nf4_nested")  # type: ignore[untyped-decorator]
def _nested_fake(
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
    _check_blocksize(blocksize)
    _check_dtype(dtype)
    return q.new_empty(shape, dtype=dtype)


@_fake("nexus::dequantize_nf4_nested.out")  # type: ignore[untyped-decorator]
def _nested_out_fake(
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
    _check_blocksize(blocksize)
    _check_dtype(dtype)


@_fake("nexus::dequantize_nf4_grouped")  # type: ignore[untyped-decorator]
def _grouped_fake(
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
    _check_blocksize(blocksize)
    _check_dtype(dtype)
    return arena.new_empty([num_units, *unit_shape], dtype=dtype)


@_fake("nexus::dequantize_int8")  # type: ignore[untyped-decorator]
def _int8_fake(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, divisor: float = 127.0
) -> torch.Tensor:
    _check_dtype(dtype)
    return q.new_empty(q.shape, dtype=dtype)


@_fake("nexus::dequantize_int8.out")  # type: ignore[untyped-decorator]
def _int8_out_fake(
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    divisor: float = 127.0,
    *,
    out: torch.Tensor,
) -> None:
    _check_dtype(dtype)


@_fake("nexus::dequantize_ggml")  # type: ignore[untyped-decorator]
def _ggml_fake(
    blocks: torch.Tensor, kind: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    _check_dtype(dtype)
    return blocks.new_empty(shape, dtype=dtype)


@_fake("nexus::quantize_nf4")  # type: ignore[untyped-decorator]
def _quantize_nf4_fake(
    weight: torch.Tensor, blocksize: int, num_scales: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_blocksize(blocksize)
    numel = weight.numel()
    return (
        weight.new_empty((numel + 1) // 2, dtype=torch.uint8),
        weight.new_empty((numel + blocksize - 1) // blocksize, dtype=torch.float32),
    )


@_fake("nexus::quantize_nf4_nested")  # type: ignore[untyped-decorator]
def _quantize_nested_fake(
    weight: torch.Tensor, blocksize: int, num_scales: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, absmax = _quantize_nf4_fake(weight, blocksize)
    num_nested = (absmax.shape[0] + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE
    return (
        q,
        absmax.new_empty(absmax.shape, dtype=torch.uint8),
        absmax.new_empty(num_nested),
        absmax.new_empty(()),
    )


@_fake("nexus::quantize_int8")  # type: ignore[untyped-decorator]
def _quantize_int8_fake(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        weight.new_empty(weight.shape, dtype=torch.int8),
        weight.new_empty(weight.shape[:1], dtype=torch.float32),
    )


@_fake("nexus::nf4_linear")  # type: ignore[untyped-decorator]
def _nf4_linear_fake(
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
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> torch.Tensor:
    _check_blocksize(blocksize)
    _check_dtype(x.dtype)
    return x.new_empty(*x.shape[:-1], out_features)


@_fake("nexus::int8_linear")  # type: ignore[untyped-decorator]
def _int8_linear_fake(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    divisor: float = 127.0,
) -> torch.Tensor:
    _check_dtype(x.dtype)
    return x.new_empty(*x.shape[:-1], q.shape[0])


# -- kernels in Python -----------------------------------------------------------------------------


@torch.library.impl("nexus::quantize_nf4_nested", "CompositeExplicitAutograd")
def _quantize_nested(
    weight: torch.Tensor, blocksize: int, num_scales: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, absmax = ops.native.quantize_nf4(weight, blocksize, num_scales)
    return (q, *reference.quantize_absmax(absmax))


@torch.library.impl("nexus::quantize_int8", "CompositeExplicitAutograd")
def _quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.quantize_int8(weight.detach())


for _op, _kernel in cuda.KERNELS.items():
    torch.library.impl(f"nexus::{_op}", "CUDA")(_kernel)


# -- gradients -------------------------------------------------------------------------------------


# Neither decoding nor packing has a gradient: results begin no graph.
for _op in (
    "dequantize_nf4",
    "dequantize_nf4.out",
    "dequantize_nf4_nested",
    "dequantize_nf4_nested.out",
    "dequantize_nf4_grouped",
    "dequantize_int8",
    "dequantize_int8.out",
    "dequantize_ggml",
    "quantize_nf4",
    "quantize_nf4_nested",
    "quantize_int8",
):
    torch.library.impl(f"nexus::{_op}", "Autograd")(torch.library.fallthrough_kernel)


def _sum_to_bias(grad: torch.Tensor) -> torch.Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


def _nf4_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, q, absmax, _, blocksize, out_features, *nested = inputs
    *tensors, ctx.nested_blocksize = nested
    ctx.blocksize, ctx.shape = blocksize, [out_features, x.shape[-1]]
    ctx.save_for_backward(q, absmax, *tensors)


def _nf4_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, absmax, code, nested_absmax, nested_code, offset = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        if nested_absmax is None:
            weight = ops.native.dequantize_nf4(
                q, absmax, ctx.blocksize, ctx.shape, grad.dtype, code
            )
        else:
            weight = ops.native.dequantize_nf4_nested(
                q,
                absmax,
                nested_absmax,
                nested_code,
                offset,
                ctx.blocksize,
                ctx.nested_blocksize,
                ctx.shape,
                grad.dtype,
                code,
            )
        grad_x = grad @ weight
    grad_bias = _sum_to_bias(grad) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias, *[None] * 7


def _int8_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, q, scale, _, ctx.divisor = inputs
    ctx.save_for_backward(q, scale)


def _int8_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        q, scale = ctx.saved_tensors
        grad_x = grad @ ops.native.dequantize_int8(q, scale, grad.dtype, ctx.divisor)
    grad_bias = _sum_to_bias(grad) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias, None


_register: Any = torch.library.register_autograd
_register("nexus::nf4_linear", _nf4_backward, setup_context=_nf4_setup)
_register("nexus::int8_linear", _int8_backward, setup_context=_int8_setup)
