"""Weights of 8 bits: kernels that widen them into a tensor, or multiply by them where they lie.

This file owns the format on a GPU. `q`, int8 [N, K], holds the weights of a matrix; `scale`,
float32 [N, G], the scales of its rows, each of them for K // G elements side by side. An element is

    round_to(out.dtype, (float32(q[n, k]) * scale[n, k // (K // G)]) * float32(1 / divisor))

with every product rounded to float32 by itself. The divisor is 127 where the scale is the largest
absolute value of a row (bitsandbytes), and 1 where it is the step itself. `dequantize` gives these
bits.

A byte is an element here, so no lane takes words apart as in nf4.py: side by side, elements are
loaded and stored as vectors wherever addresses and sizes allow it, and Triton sees to that.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from nexus_ext.kernels.nf4 import (
    MAX_GEMV_ROWS,
    TILE,
    check_result,
    check_tensor,
    interpreted,
    load_widened,
    rounded,
    soft_bf16,
    store_rounded,
)

__all__ = ["dequantize", "linear"]


# -- one weight --------------------------------------------------------------------------------


@triton.jit
def _dequantize_tile(
    row_tile,
    column_tile,
    q,
    scale,
    inverse,
    out,
    num_runs,
    run,
    RUNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    """Widens RUNS * COLUMNS elements of [num_runs, run]; tile numbers are int32."""
    row = row_tile.to(tl.int64) * RUNS + tl.arange(0, RUNS)
    column = column_tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    element = row[:, None] * run + column[None, :]
    if EVEN:
        has_row = None
        has_element = None
    else:
        has_row = row < num_runs
        has_element = has_row[:, None] & (column < run)[None, :]
    weight = tl.load(q + element, mask=has_element, eviction_policy="evict_first").to(tl.float32)
    weight = (weight * tl.load(scale + row, mask=has_row)[:, None]) * inverse
    store_rounded(out, element, weight, has_element, SOFT_BF16)


@triton.jit
def _dequantize_kernel(
    q,
    scale,
    inverse,
    out,
    num_runs,
    run,
    RUNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    _dequantize_tile(
        tl.program_id(0),
        tl.program_id(1),
        q,
        scale,
        inverse,
        out,
        num_runs,
        run,
        RUNS,
        COLUMNS,
        EVEN,
        SOFT_BF16,
    )


def dequantize(q: Tensor, scale: Tensor, divisor: float, out: Tensor) -> None:
    """Writes the weights packed in `q` into `out`, each rounded once to its dtype.

    q: int8 [N, K], contiguous, at any address. scale: float32 [N, G], G a divisor of K.
    out: float32, float16 or bfloat16 [N, K], contiguous. All are on one device; nothing waits for
    it. Raises ValueError.
    """
    check_result(out)
    _check_weight(q, scale, divisor, out.device)
    check_tensor("out", out, out.dtype, tuple(q.shape), q.device)
    if q.numel() == 0:
        return
    # Elements of one scale lie side by side, so [N, K] is as well [N * G, K // G].
    num_runs, run = scale.numel(), q.numel() // scale.numel()
    columns = min(TILE, triton.next_power_of_2(run))
    runs = TILE // columns
    with torch.cuda.device_of(out):
        _dequantize_kernel[(triton.cdiv(num_runs, runs), triton.cdiv(run, columns))](
            q,
            scale,
            1.0 / divisor,
            out,
            num_runs,
            run,
            RUNS=runs,
            COLUMNS=columns,
            EVEN=num_runs % runs == 0 and run % columns == 0,
            SOFT_BF16=soft_bf16(out.dtype),
            enable_fp_fusion=False,
        )


# -- products ----------------------------------------------------------------------------------


@triton.jit
def _weights(
    feature,
    column,
    q,
    scale,
    inverse,
    in_features,
    out_features,
    num_groups,
    GROUPED: tl.constexpr,
):
    """Weights [FEATURES, COLUMNS], float32, not yet rounded; 0 outside of the matrix.

    `feature` and `column`, int32 [FEATURES] and [COLUMNS], are rows and columns of the matrix.
    """
    row = feature.to(tl.int64)[:, None]
    has_row = (feature < out_features)[:, None]
    mask = has_row & (column < in_features)[None, :]
    weight = tl.load(
        q + row * in_features + column[None, :], mask=mask, other=0, eviction_policy="evict_first"
    ).to(tl.float32)
    if GROUPED:
        group = column // (in_features // num_groups)
        step = tl.load(scale + row * num_groups + group[None, :], mask=mask, other=0.0)
    else:
        step = tl.load(scale + row, mask=has_row, other=0.0)
    # Elements outside are 0, but a scale that is not finite would make them NaN.
    return tl.where(mask, (weight * step) * inverse, 0.0)


@triton.jit
def _gemv_kernel(
    x,
    q,
    scale,
    inverse,
    bias,
    out,
    num_rows,
    in_features,
    out_features,
    num_groups,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    row = tl.arange(0, ROWS)
    has_row = row < num_rows
    # One sum per lane and a single reduction at the end: no lane waits for another in the loop.
    sums = tl.zeros([ROWS, FEATURES, COLUMNS], tl.float32)
    for step in range(STEPS):
        column = step * COLUMNS + tl.arange(0, COLUMNS)
        weight = _weights(
            feature, column, q, scale, inverse, in_features, out_features, num_groups, GROUPED
        )
        weight = rounded(weight, x.dtype.element_ty, SOFT_BF16)
        value = load_widened(
            x,
            (row.to(tl.int64) * in_features)[:, None] + column[None, :],
            has_row[:, None] & (column < in_features)[None, :],
            SOFT_BF16,
        )
        sums += value[:, None, :] * weight[None, :, :]
    result = tl.sum(sums, 2)
    if bias is not None:
        result += load_widened(bias, feature, feature < out_features, SOFT_BF16)[None, :]
    store_rounded(
        out,
        row.to(tl.int64)[:, None] * out_features + feature[None, :],
        result,
        has_row[:, None] & (feature < out_features)[None, :],
        SOFT_BF16,
    )


@triton.jit
def _dot_kernel(
    x,
    q,
    scale,
    inverse,
    bias,
    out,
    num_rows,
    in_features,
    out_features,
    num_groups,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    has_row = row < num_rows
    sums = tl.zeros([ROWS, FEATURES], tl.float32)
    for step in range(STEPS):
        column = step * COLUMNS + tl.arange(0, COLUMNS)
        weight = _weights(
            feature, column, q, scale, inverse, in_features, out_features, num_groups, GROUPED
        )
        weight = tl.trans(weight)
        at = row.to(tl.int64)[:, None] * in_features + column[None, :]
        mask = has_row[:, None] & (column < in_features)[None, :]
        if INTERPRETED:
            weight = rounded(weight, x.dtype.element_ty, SOFT_BF16)
            value = load_widened(x, at, mask, SOFT_BF16)
        else:
            weight = weight.to(x.dtype.element_ty)
            value = tl.load(x + at, mask=mask, other=0.0)
        # Not tf32, whose 10 bits of mantissa would break the bound of float32.
        sums = tl.dot(value, weight, sums, input_precision="ieee")
    if bias is not None:
        sums += load_widened(bias, feature, feature < out_features, SOFT_BF16)[None, :]
    store_rounded(
        out,
        row.to(tl.int64)[:, None] * out_features + feature[None, :],
        sums,
        has_row[:, None] & (feature < out_features)[None, :],
        SOFT_BF16,
    )


def linear(x: Tensor, q: Tensor, scale: Tensor, divisor: float, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear(x, w, bias)`, where w is what `dequantize` gives for x.dtype.

    x: float32, float16 or bfloat16 [..., K]. q, scale and divisor are those of w [N, K]; bias:
    x.dtype [N] or None. Returns x.dtype [..., N], contiguous. w is never stored; sums are float32,
    always in the same order. Made for up to 64 rows of x; right for more, but then `dequantize`
    and a product are faster. Raises ValueError.
    """
    _check_weight(q, scale, divisor, x.device)
    out_features, in_features = q.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"x must be [..., {in_features}], as long as the rows of q, got {list(x.shape)}; "
            "see that q belongs to this layer"
        )
    x = x.contiguous()
    check_result(x)
    if bias is not None:
        check_tensor("bias", bias, x.dtype, (out_features,), x.device)
    out = x.new_empty((*x.shape[:-1], out_features))
    if out.numel() == 0:
        return out
    num_rows, num_groups = out.numel() // out_features, scale.shape[1]
    shared = (x, q, scale, 1.0 / divisor, bias, out, num_rows, in_features, out_features)
    with torch.cuda.device_of(out):
        if num_rows <= MAX_GEMV_ROWS:
            rows, features = triton.next_power_of_2(num_rows), 4
            # At most 64 of a thread's registers hold sums: 8192 in 128 threads.
            columns = min(512, 2048 // rows)
            _gemv_kernel[(triton.cdiv(out_features, features),)](
                *shared,
                num_groups,
                GROUPED=num_groups != 1,
                ROWS=rows,
                FEATURES=features,
                COLUMNS=columns,
                STEPS=triton.cdiv(in_features, columns),
                SOFT_BF16=soft_bf16(x.dtype),
            )
        else:
            rows, features, columns = min(64, max(16, triton.next_power_of_2(num_rows))), 32, 64
            _dot_kernel[(triton.cdiv(out_features, features), triton.cdiv(num_rows, rows))](
                *shared,
                num_groups,
                GROUPED=num_groups != 1,
                ROWS=rows,
                FEATURES=features,
                COLUMNS=columns,
                STEPS=triton.cdiv(in_features, columns),
                INTERPRETED=interpreted(),
                SOFT_BF16=soft_bf16(x.dtype),
            )
    return out


# -- what a launch asks of its arguments -------------------------------------------------------


def _check_weight(q: Tensor, scale: Tensor, divisor: float, device: torch.device) -> None:
    if q.dim() != 2 or scale.dim() != 2 or scale.shape[1] == 0 or q.shape[1] % scale.shape[1]:
        raise ValueError(
            "q must be [N, K] and scale [N, G] with G a divisor of K, got "
            f"{list(q.shape)} and {list(scale.shape)}; a scale for each row is [N, 1]"
        )
    check_tensor("q", q, torch.int8, tuple(q.shape), device)
    check_tensor("scale", scale, torch.float32, (q.shape[0], scale.shape[1]), device)
    if divisor == 0.0:
        raise ValueError("divisor must not be 0, got 0; pass 1 if the scale is the step itself")
