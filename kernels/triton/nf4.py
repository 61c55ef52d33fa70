"""Weights of 4 bits: kernels that widen them into a tensor, or multiply by them where they lie.

This file owns the format on a GPU. `q`, uint8 and flat, holds element 2i in the high nibble of
byte i and element 2i + 1 in the low one; `code` is the table of 16 values; one `absmax` belongs to
`blocksize` elements, counted over the flattened weight. An element is

    round_to(out.dtype, code[nibble] * absmax[element // blocksize])

and where `absmax` is nested, which is to say packed itself,

    absmax[i] = (nested_code[absmax_u8[i]] * nested_absmax[i // nested_blocksize]) + nested_offset

with every product and every sum rounded to float32 by itself. `dequantize*` give these bits.

Note [Words]. A lane takes eight nibbles at once, as one int32, and stores them as eight elements
side by side, so that both ends are coalesced: the shifts of the canonical order in a little-endian
word are 4, 0, 12, 8, 20, 16, 28, 24. That needs an address of q that is a multiple of 4 and a
number of elements that is a multiple of 8. Everything else goes by bytes, with the shifts 4, 0, in
the same code. A word is whichever of the two; no word crosses a block, since blocks have 32
elements or more.

Note [Interpreter]. Triton's interpreter (TRITON_INTERPRET=1, for machines without a GPU) truncates
where it converts float32 to bfloat16, loses denormals where it converts back, and multiplies the
bits of bfloat16 operands in tl.dot. There, and only there, SOFT_BF16 rounds in integers and tl.dot
gets float32. With numpy 2.4 it also refuses a range over an argument: so loops count STEPS, which
are compiled in.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

__all__ = ["dequantize", "dequantize_grouped", "dequantize_nested", "linear"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Elements of one program: four words of 4 bytes for each of 128 threads. Not yet tuned on a GPU.
TILE = 4096

# What the second axis of a CUDA grid holds.
MAX_UNITS = 65535

# Above it tl.dot, whose smallest side is 16, wastes less than the products of a GEMV cost.
MAX_GEMV_ROWS = 8


# -- rounding, for both kinds of packed weights ------------------------------------------------


@triton.jit
def bf16_bits(value):
    """The bits, uint16, of float32 `value` rounded to bfloat16, to nearest even."""
    bits = value.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding the bits of a NaN may carry them over into zero or infinity.
    return tl.where(value != value, 0x7FC0, nearest).to(tl.uint16)


@triton.jit
def rounded(value, DTYPE: tl.constexpr, SOFT_BF16: tl.constexpr):
    """Float32 `value` as `DTYPE` can hold it, in float32."""
    if SOFT_BF16:
        return (bf16_bits(value).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(DTYPE).to(tl.float32)


@triton.jit
def load_widened(pointer, offset, mask, SOFT_BF16: tl.constexpr):
    """Elements at `pointer + offset` in float32; 0 where the mask is false."""
    if SOFT_BF16:
        bits = tl.load(pointer.to(tl.pointer_type(tl.uint16)) + offset, mask=mask, other=0)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rounded(pointer, offset, value, mask, SOFT_BF16: tl.constexpr):
    """Stores float32 `value` at `pointer + offset`, rounded once to the dtype of `pointer`."""
    if SOFT_BF16:
        tl.store(pointer.to(tl.pointer_type(tl.uint16)) + offset, bf16_bits(value), mask=mask)
    else:
        tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; what was set when this file was imported."""
    return not isinstance(store_rounded, triton.JITFunction)


def soft_bf16(dtype: torch.dtype) -> bool:
    """Whether kernels must round to `dtype` in integers; see Note [Interpreter]."""
    return dtype == torch.bfloat16 and interpreted()


# -- what the kernels share --------------------------------------------------------------------


@triton.jit
def _words_of(q, NIBBLES: tl.constexpr):
    """The pointer `q`, to bytes, as one to words of `NIBBLES` nibbles."""
    if NIBBLES == 8:
        return q.to(tl.pointer_type(tl.int32))
    else:
        return q


@triton.jit
def _decode(word, absmax, code, NIBBLES: tl.constexpr):
    """[...] words and the absmax of each -> [..., NIBBLES] weights, float32, not yet rounded."""
    lane = tl.arange(0, NIBBLES)
    shift = (lane // 2) * 8 + 4 - (lane % 2) * 4
    nibble = (tl.expand_dims(word.to(tl.int32), -1) >> shift) & 15
    return tl.load(code + nibble) * tl.expand_dims(absmax, -1)


@triton.jit
def _absmax(
    block, mask, absmax, nested_absmax, nested_code, nested_offset, NESTED_SHIFT: tl.constexpr
):
    """The absmax, float32, of each of `block`; nested if there is a `nested_code`."""
    if nested_code is None:
        return tl.load(absmax + block, mask=mask)
    else:
        if mask is None:
            index = tl.load(absmax + block)
        else:
            # What is masked is looked up all the same, and must not point outside of the table.
            index = tl.load(absmax + block, mask=mask, other=0)
        scale = tl.load(nested_absmax + (block >> NESTED_SHIFT), mask=mask)
        # A launch without enable_fp_fusion=False would make one rounding of these two.
        return tl.load(nested_code + index.to(tl.int32)) * scale + tl.load(nested_offset)


@triton.jit
def _dequantize_tile(
    tile,
    q,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    code,
    out,
    n,
    BLOCK_SHIFT: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    NIBBLES: tl.constexpr,
    WORDS: tl.constexpr,
    EVEN: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    """Widens tile number `tile`, an int32, of WORDS * NIBBLES elements out of `n`."""
    at = tile.to(tl.int64) * WORDS + tl.arange(0, WORDS)
    element = at[:, None] * NIBBLES + tl.arange(0, NIBBLES)[None, :]
    if EVEN:
        has_word = None
        has_element = None
    else:
        has_word = at * NIBBLES < n
        # Words of 8 are whole, see Note [Words]; one mask for all 8 keeps their store a vector.
        has_element = has_word[:, None] if NIBBLES == 8 else element < n
    word = tl.load(_words_of(q, NIBBLES) + at, mask=has_word, eviction_policy="evict_first")
    scale = _absmax(
        (at * NIBBLES) >> BLOCK_SHIFT,
        has_word,
        absmax,
        nested_absmax,
        nested_code,
        nested_offset,
        NESTED_SHIFT,
    )
    store_rounded(out, element, _decode(word, scale, code, NIBBLES), has_element, SOFT_BF16)


# -- one weight --------------------------------------------------------------------------------


@triton.jit
def _dequantize_kernel(
    q,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    code,
    out,
    n,
    BLOCK_SHIFT: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    NIBBLES: tl.constexpr,
    WORDS: tl.constexpr,
    EVEN: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    _dequantize_tile(
        tl.program_id(0),
        q,
        absmax,
        nested_absmax,
        nested_code,
        nested_offset,
        code,
        out,
        n,
        BLOCK_SHIFT,
        NESTED_SHIFT,
        NIBBLES,
        WORDS,
        EVEN,
        SOFT_BF16,
    )


def dequantize(q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, out: Tensor) -> None:
    """Writes the n = out.numel() weights packed in `q` into `out`, each rounded once to its dtype.

    q: uint8 [ceil(n / 2)], contiguous, at any address. absmax: float32 [ceil(n / blocksize)].
    code: float32 [16]. blocksize: a power of two, 32 to 4096. out: float32, float16 or bfloat16,
    contiguous, of any shape. All are on one device; nothing waits for it. Raises ValueError.
    """
    check_result(out)
    _check_weight(q, out.numel(), code, blocksize, out.device)
    check_tensor(
        "absmax", absmax, torch.float32, (triton.cdiv(out.numel(), blocksize),), out.device
    )
    _launch(q, absmax, None, None, None, 1, code, blocksize, out)


def dequantize_nested(
    q: Tensor,
    absmax_u8: Tensor,
    nested_absmax: Tensor,
    nested_code: Tensor,
    nested_offset: Tensor,
    nested_blocksize: int,
    code: Tensor,
    blocksize: int,
    out: Tensor,
) -> None:
    """`dequantize`, where the absmax is packed too, in one launch and without a copy of it.

    absmax_u8: uint8 [nb = ceil(n / blocksize)]. nested_absmax: float32
    [ceil(nb / nested_blocksize)]. nested_code: float32 [256]. nested_offset: float32, 0-dim.
    nested_blocksize: a power of two. Raises ValueError.
    """
    check_result(out)
    _check_weight(q, out.numel(), code, blocksize, out.device)
    _check_nested(nested_code, nested_blocksize, out.device)
    num_blocks = triton.cdiv(out.numel(), blocksize)
    num_nested = triton.cdiv(num_blocks, nested_blocksize)
    check_tensor("absmax_u8", absmax_u8, torch.uint8, (num_blocks,), out.device)
    check_tensor("nested_absmax", nested_absmax, torch.float32, (num_nested,), out.device)
    check_tensor("nested_offset", nested_offset, torch.float32, (), out.device)
    _launch(
        q,
        absmax_u8,
        nested_absmax,
        nested_code,
        nested_offset,
        nested_blocksize,
        code,
        blocksize,
        out,
    )


def _launch(
    q: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    nested_blocksize: int,
    code: Tensor,
    blocksize: int,
    out: Tensor,
) -> None:
    n = out.numel()
    if n == 0:
        return
    with torch.cuda.device_of(out):
        _dequantize_kernel[(triton.cdiv(n, TILE),)](
            q,
            absmax,
            nested_absmax,
            nested_code,
            nested_offset,
            code,
            out,
            n,
            BLOCK_SHIFT=_log2(blocksize),
            NESTED_SHIFT=_log2(nested_blocksize),
            NIBBLES=_nibbles_of_a_word(q, n),
            WORDS=TILE // _nibbles_of_a_word(q, n),
            EVEN=n % TILE == 0,
            SOFT_BF16=soft_bf16(out.dtype),
            enable_fp_fusion=False,
        )


# -- many weights of one shape, out of one arena -----------------------------------------------


@triton.jit
def _dequantize_grouped_kernel(
    arena,
    offsets,
    nested_code,
    nested_offsets,
    code,
    out,
    n,
    BLOCK_SHIFT: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    tile = tl.program_id(0)
    unit = tl.program_id(1).to(tl.int64)
    if nested_code is None:
        q = arena + tl.load(offsets + unit * 2)
        absmax = (arena + tl.load(offsets + unit * 2 + 1)).to(tl.pointer_type(tl.float32))
        nested_absmax = None
        nested_offset = None
    else:
        q = arena + tl.load(offsets + unit * 3)
        absmax = arena + tl.load(offsets + unit * 3 + 1)
        nested_absmax = (arena + tl.load(offsets + unit * 3 + 2)).to(tl.pointer_type(tl.float32))
        nested_offset = nested_offsets + unit
    out += unit * n
    # Offsets are on the device, so the choice of Note [Words] is made here, by each program.
    aligned = False
    if WHOLE_WORDS:
        aligned = q.to(tl.int64) % 4 == 0
    if aligned:
        _dequantize_tile(
            tile,
            q,
            absmax,
            nested_absmax,
            nested_code,
            nested_offset,
            code,
            out,
            n,
            BLOCK_SHIFT,
            NESTED_SHIFT,
            8,
            TILE // 8,
            EVEN,
            SOFT_BF16,
        )
    else:
        _dequantize_tile(
            tile,
            q,
            absmax,
            nested_absmax,
            nested_code,
            nested_offset,
            code,
            out,
            n,
            BLOCK_SHIFT,
            NESTED_SHIFT,
            2,
            TILE // 2,
            EVEN,
            SOFT_BF16,
        )


def dequantize_grouped(
    arena: Tensor,
    offsets: Tensor,
    nested_code: Tensor | None,
    nested_offsets: Tensor | None,
    code: Tensor,
    blocksize: int,
    nested_blocksize: int,
    out: Tensor,
) -> None:
    """Widens every unit of `arena` into its row of `out`, in one launch: the experts of a layer.

    arena: uint8, flat, at an address that is a multiple of 4. offsets: int64 [num_units, 2], where
    in arena the q and the absmax of a unit begin, in bytes; or, if there is a nested_code,
    [num_units, 3]: its q, absmax_u8 and nested_absmax. Those of float32 parts are multiples of 4.
    nested_code: float32 [256] or None. nested_offsets: float32 [num_units], None if it is None.
    out: [num_units, ...], contiguous; all units have the shape of a row. The rest is as for
    `dequantize_nested`. Raises ValueError, but does not look into `offsets`, which are on the
    device: those that point outside of arena read foreign memory.
    """
    check_result(out)
    _check_blocksize(blocksize)
    _check_arena(arena, out.device)
    _check_units(offsets, nested_code, nested_offsets, out)
    check_tensor("code", code, torch.float32, (16,), out.device)
    if nested_code is not None:
        _check_nested(nested_code, nested_blocksize, out.device)
    num_units = out.shape[0]
    if out.numel() == 0:
        return
    n = out.numel() // num_units
    with torch.cuda.device_of(out):
        _dequantize_grouped_kernel[(triton.cdiv(n, TILE), num_units)](
            arena,
            offsets,
            nested_code,
            nested_offsets,
            code,
            out,
            n,
            BLOCK_SHIFT=_log2(blocksize),
            NESTED_SHIFT=_log2(nested_blocksize),
            WHOLE_WORDS=n % 8 == 0,
            TILE=TILE,
            EVEN=n % TILE == 0,
            SOFT_BF16=soft_bf16(out.dtype),
            enable_fp_fusion=False,
        )


# -- products ----------------------------------------------------------------------------------


@triton.jit
def _weights(
    feature,
    first,
    q,
    absmax,
    code,
    in_features,
    out_features,
    BLOCK_SHIFT: tl.constexpr,
    NIBBLES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Weights [FEATURES, WORDS, NIBBLES], float32, not yet rounded; 0 outside of the matrix.

    `feature`, int32 [FEATURES], are rows of the matrix; `first` is the first of its columns.
    """
    # Counted in words: words that follow from dividing elements are not seen to lie side by side.
    column = first // NIBBLES + tl.arange(0, WORDS)
    words_of_row = in_features // NIBBLES
    mask = (feature < out_features)[:, None] & (column < words_of_row)[None, :]
    at = feature.to(tl.int64)[:, None] * words_of_row + column[None, :]
    word = tl.load(_words_of(q, NIBBLES) + at, mask=mask, other=0, eviction_policy="evict_first")
    scale = tl.load(absmax + ((at * NIBBLES) >> BLOCK_SHIFT), mask=mask, other=0.0)
    return _decode(word, scale, code, NIBBLES)


@triton.jit
def _gemv_kernel(
    x,
    q,
    absmax,
    code,
    bias,
    out,
    num_rows,
    in_features,
    out_features,
    BLOCK_SHIFT: tl.constexpr,
    NIBBLES: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    row = tl.arange(0, ROWS)
    has_row = row < num_rows
    lane = tl.arange(0, WORDS)[:, None] * NIBBLES + tl.arange(0, NIBBLES)[None, :]
    # One sum per lane and a single reduction at the end: no lane waits for another in the loop.
    sums = tl.zeros([ROWS, FEATURES, WORDS, NIBBLES], tl.float32)
    for step in range(STEPS):
        first = step * (WORDS * NIBBLES)
        weight = _weights(
            feature,
            first,
            q,
            absmax,
            code,
            in_features,
            out_features,
            BLOCK_SHIFT,
            NIBBLES,
            WORDS,
        )
        weight = rounded(weight, x.dtype.element_ty, SOFT_BF16)
        column = first + lane
        value = load_widened(
            x,
            (row.to(tl.int64) * in_features)[:, None, None] + column[None, :, :],
            has_row[:, None, None] & (column < in_features)[None, :, :],
            SOFT_BF16,
        )
        sums += value[:, None, :, :] * weight[None, :, :, :]
    result = tl.sum(tl.sum(sums, 3), 2)
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
    absmax,
    code,
    bias,
    out,
    num_rows,
    in_features,
    out_features,
    BLOCK_SHIFT: tl.constexpr,
    NIBBLES: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    has_row = row < num_rows
    sums = tl.zeros([ROWS, FEATURES], tl.float32)
    for step in range(STEPS):
        first = step * (WORDS * NIBBLES)
        weight = _weights(
            feature,
            first,
            q,
            absmax,
            code,
            in_features,
            out_features,
            BLOCK_SHIFT,
            NIBBLES,
            WORDS,
        )
        weight = tl.trans(tl.reshape(weight, [FEATURES, WORDS * NIBBLES]))
        column = first + tl.arange(0, WORDS * NIBBLES)
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


def linear(
    x: Tensor,
    q: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """`torch.nn.functional.linear(x, w, bias)`, where w is what `dequantize` gives for x.dtype.

    x: float32, float16 or bfloat16 [..., K], K a multiple of blocksize. q, absmax, code and
    blocksize are those of w [out_features, K]; bias: x.dtype [out_features] or None. Returns
    x.dtype [..., out_features], contiguous. w is never stored; sums are float32, always in the
    same order. Made for up to 64 rows of x; right for more, but then `dequantize` and a
    product are faster. Raises ValueError.
    """
    _check_blocksize(blocksize)
    if x.dim() == 0 or x.shape[-1] % blocksize:
        raise ValueError(
            f"x must be [..., K] with K a multiple of blocksize {blocksize}, got "
            f"{list(x.shape)}; call dequantize, and multiply"
        )
    in_features = x.shape[-1]
    x = x.contiguous()
    check_result(x)
    _check_weight(q, out_features * in_features, code, blocksize, x.device)
    num_blocks = out_features * in_features // blocksize
    check_tensor("absmax", absmax, torch.float32, (num_blocks,), x.device)
    if bias is not None:
        check_tensor("bias", bias, x.dtype, (out_features,), x.device)
    out = x.new_empty((*x.shape[:-1], out_features))
    if out.numel() == 0:
        return out
    num_rows = out.numel() // out_features
    nibbles = _nibbles_of_a_word(q, in_features)
    shared = (x, q, absmax, code, bias, out, num_rows, in_features, out_features)
    with torch.cuda.device_of(out):
        if num_rows <= MAX_GEMV_ROWS:
            rows, features = triton.next_power_of_2(num_rows), 4
            # At most 64 of a thread's registers hold sums: 8192 in 128 threads.
            columns = min(512, 2048 // rows)
            _gemv_kernel[(triton.cdiv(out_features, features),)](
                *shared,
                BLOCK_SHIFT=_log2(blocksize),
                NIBBLES=nibbles,
                ROWS=rows,
                FEATURES=features,
                WORDS=columns // nibbles,
                STEPS=triton.cdiv(in_features, columns),
                SOFT_BF16=soft_bf16(x.dtype),
            )
        else:
            rows, features, columns = min(64, max(16, triton.next_power_of_2(num_rows))), 32, 64
            _dot_kernel[(triton.cdiv(out_features, features), triton.cdiv(num_rows, rows))](
                *shared,
                BLOCK_SHIFT=_log2(blocksize),
                NIBBLES=nibbles,
                ROWS=rows,
                FEATURES=features,
                WORDS=columns // nibbles,
                STEPS=triton.cdiv(in_features, columns),
                INTERPRETED=interpreted(),
                SOFT_BF16=soft_bf16(x.dtype),
            )
    return out


# -- what a launch asks of its arguments -------------------------------------------------------


def _log2(power: int) -> int:
    return power.bit_length() - 1


def _nibbles_of_a_word(q: Tensor, multiple: int) -> int:
    """8, or 2 where Note [Words] forbids it; words start at multiples of `multiple` elements."""
    return 8 if q.data_ptr() % 4 == 0 and multiple % 8 == 0 else 2


def check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if (
        tensor.dtype != dtype
        or tensor.shape != shape
        or tensor.device != device
        or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{name} must be {dtype} {list(shape)}, contiguous, on {device}; got {tensor.dtype} "
            f"{list(tensor.shape)} of strides {list(tensor.stride())} on {tensor.device}; "
            "see that it belongs to this weight"
        )


def _check_blocksize(blocksize: int) -> None:
    if not 32 <= blocksize <= 4096 or blocksize & (blocksize - 1):
        raise ValueError(
            f"blocksize must be a power of two, 32 to 4096, got {blocksize}; "
            "take it from the quant_state of the weight"
        )


def check_result(out: Tensor) -> None:
    if out.dtype not in DTYPES or not out.is_contiguous():
        raise ValueError(
            "the result must be float32, float16 or bfloat16, and contiguous, got "
            f"{out.dtype} of strides {list(out.stride())}; copy it afterwards"
        )


def _check_weight(q: Tensor, n: int, code: Tensor, blocksize: int, device: torch.device) -> None:
    _check_blocksize(blocksize)
    check_tensor("q", q, torch.uint8, (triton.cdiv(n, 2),), device)
    check_tensor("code", code, torch.float32, (16,), device)


def _check_nested(nested_code: Tensor, nested_blocksize: int, device: torch.device) -> None:
    check_tensor("nested_code", nested_code, torch.float32, (256,), device)
    if nested_blocksize < 1 or nested_blocksize & (nested_blocksize - 1):
        raise ValueError(
            f"nested_blocksize must be a power of two, got {nested_blocksize}; "
            "take it from the quant_state of the weight"
        )


def _check_arena(arena: Tensor, device: torch.device) -> None:
    check_tensor("arena", arena, torch.uint8, (arena.numel(),), device)
    if arena.data_ptr() % 4:
        raise ValueError(
            f"arena must start at a multiple of 4 bytes, got {arena.data_ptr():#x}; "
            "pass the whole of it, and add what was cut off to the offsets"
        )


def _check_units(
    offsets: Tensor, nested_code: Tensor | None, nested_offsets: Tensor | None, out: Tensor
) -> None:
    if out.dim() == 0 or out.shape[0] > MAX_UNITS:
        raise ValueError(
            f"out must be [num_units, ...] of at most {MAX_UNITS} units, got {list(out.shape)}; "
            "widen them in several calls"
        )
    num_parts = 2 if nested_code is None else 3
    check_tensor("offsets", offsets, torch.int64, (out.shape[0], num_parts), out.device)
    if (nested_code is None) != (nested_offsets is None):
        raise ValueError(
            "nested_code and nested_offsets must come together, got only "
            f"{'nested_offsets' if nested_code is None else 'nested_code'}; pass both or neither"
        )
    if nested_offsets is not None:
        check_tensor("nested_offsets", nested_offsets, torch.float32, (out.shape[0],), out.device)
