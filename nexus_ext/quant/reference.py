"""What every op on packed weights computes, in plain PyTorch: slow, exact, any device.

The formats are those of bitsandbytes (NF4: Dettmers et al., "QLoRA", 2023; nested scales: the
dynamic 8-bit type of Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022; INT8:
"LLM.int8()", 2022). All arithmetic is float32, each operation is rounded, nothing is fused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from nexus_ext.errors import QuantizationError

__all__ = [
    "FP4_CODE",
    "INT8_DIVISOR",
    "NF4_CODE",
    "check_quantizable",
    "dequantize_absmax",
    "dequantize_ggml",
    "dequantize_int8",
    "dequantize_nf4",
    "nested_code",
    "quantize_absmax",
    "quantize_int8",
    "quantize_nf4",
]

# What the sixteen codes mean: quantiles of the normal distribution, scaled to [-1, 1].
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Sign, two bits of exponent, one of mantissa; divided by the largest.
_FP4_POSITIVE = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_CODE = (*(value / 12 for value in _FP4_POSITIVE), *(-value / 12 for value in _FP4_POSITIVE))

INT8_DIVISOR = 127.0
# Of a block's largest magnitude: below it no scale is tried.
SMALLEST_SHARE = 0.6
NESTED_BLOCKSIZE = 256

_EXPONENTS = 7  # of the dynamic type: powers of ten from 1e-6 to 1


def nested_code() -> torch.Tensor:
    """The signed dynamic 8-bit type: [256] float32, ascending, with 0 at 127 and 1 at 255.

    Each power of ten from 1e-6 to 1 has twice the values of the one before: the middles of equal
    parts of [0.1, 1], times the power, of either sign.
    """
    values = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        power = 10 ** (exponent - _EXPONENTS + 1)
        values += (power * middles).tolist() + (-power * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def dequantize_absmax(
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor,
    code: torch.Tensor,
    offset: torch.Tensor,
    blocksize: int,
) -> torch.Tensor:
    """Scales that were packed themselves: `code[absmax] * nested_absmax[i // blocksize] + offset`.

    Args:
        absmax: uint8 [n].
        nested_absmax: float32 [ceil(n / blocksize)].
        code: float32 [256].
        offset: float32, one element.
        blocksize: How many share a nested scale.

    Returns:
        float32 [n].
    """
    scale = nested_absmax.repeat_interleave(blocksize)[: absmax.numel()]
    return code[absmax.long()] * scale + offset.reshape(())


def dequantize_nf4(
    q: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    code: torch.Tensor | None = None,
) -> torch.Tensor:
    """`code[nibble j] * absmax[j // blocksize]`, rounded to `dtype`, in `shape`.

    Args:
        q: Bytes (of any dtype), two codes in each, the first in the high half.
        absmax: float32, one for each `blocksize` elements of the flattened weight.
        blocksize: A power of two from 32 to 4096.
        shape: Of the weight. If it has an odd number of elements, the last low half means nothing.
        dtype: float32, float16 or bfloat16.
        code: What the codes mean, float32 [16]; None is NF4.
    """
    numel = math.prod(shape)
    packed = q.reshape(-1).view(torch.uint8).int()
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:numel]
    table = q.new_tensor(NF4_CODE, dtype=torch.float32) if code is None else code
    scale = absmax.repeat_interleave(blocksize)[:numel]
    return (table[nibbles] * scale).to(dtype).reshape(tuple(shape))


def dequantize_int8(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, divisor: float = INT8_DIVISOR
) -> torch.Tensor:
    """`(q * scale) * (1 / divisor)`, rounded to `dtype`.

    Args:
        q: int8 [out, in].
        scale: float32, one for each row or for each of equal parts of the rows: [out, parts].
        dtype: float32, float16 or bfloat16.
        divisor: 127 where scales are the largest magnitudes, 1 where they are steps.
    """
    rows, width = q.shape
    scale = scale.reshape(rows, -1)
    scale = scale.repeat_interleave(width // scale.shape[1], dim=1)
    inverse = torch.tensor(1.0) / torch.tensor(divisor, dtype=torch.float32)
    return (q.float() * scale * inverse.to(q.device)).to(dtype)


def check_quantizable(weight: torch.Tensor, name: str = "a weight") -> None:
    """Raises QuantizationError for what cannot be quantised: integers, float8, NaN, infinity."""
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise QuantizationError(
            f"Weights to quantise are float32, float16 or bfloat16; {name} is {weight.dtype}. "
            "Convert it first, or leave it as it is."
        )
    if not torch.isfinite(weight).all():
        raise QuantizationError(
            f"Weights to quantise must be finite; {name} holds NaN or infinity. A block's scale "
            "would be lost: repair the checkpoint, or leave this weight as it is."
        )


def quantize_nf4(
    weight: torch.Tensor, blocksize: int, num_scales: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales: (uint8 [ceil(n / 2)], float32 [ceil(n / blocksize)]).

    A code is the number of middles between codes below `x * (1 / scale)`. A block of zeros gets
    code 7, which means 0, and scale 0.

    Args:
        weight: float32, float16 or bfloat16, of any shape.
        blocksize: A power of two from 32 to 4096.
        num_scales: Scales tried for each block, from its largest magnitude (the only one, if 1)
            down to `SMALLEST_SHARE` of it; the one with the smallest squared error is taken.

    Raises:
        QuantizationError: A weight that is not finite, or of another dtype.
    """
    check_quantizable(weight)
    flat = weight.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).reshape(-1, blocksize)
    absmax = blocks.abs().amax(1)
    scale = absmax
    smallest = torch.full_like(absmax, torch.inf)
    for number in range(num_scales if num_scales > 1 else 0):
        tried = absmax * (1 - (1 - SMALLEST_SHARE) * (number / num_scales))
        codes = _nf4_codes(blocks, tried[:, None])
        error = (flat.new_tensor(NF4_CODE)[codes] * tried[:, None] - blocks).square().sum(1)
        is_better = (error < smallest) & (1.0 / tried).isfinite()
        scale, smallest = (
            torch.where(is_better, tried, scale),
            torch.where(is_better, error, smallest),
        )
    codes = _nf4_codes(blocks, scale[:, None]).reshape(-1)[: flat.numel()].to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    return codes[::2] << 4 | codes[1::2], scale


def _nf4_codes(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    factor = 1.0 / scale
    # Where the factor overflows, the quotient is exact enough; where all is 0, so is every share.
    share = torch.where(factor.isfinite(), numbers * factor, (numbers / scale).nan_to_num(0.0))
    return torch.bucketize(share, _middles(numbers.new_tensor(NF4_CODE)))


def quantize_absmax(
    absmax: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack scales: (uint8 [n], nested scales float32 [ceil(n / 256)], their mean, 0-dim).

    What is packed is the difference to the mean, as the nearest value of `nested_code`; the lower
    one if two are equally near.
    """
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    rest = absmax - offset
    padded = torch.nn.functional.pad(rest, (0, -rest.numel() % NESTED_BLOCKSIZE))
    nested = padded.reshape(-1, NESTED_BLOCKSIZE).abs().amax(1)
    scale = nested.repeat_interleave(NESTED_BLOCKSIZE)[: rest.numel()]
    share = torch.where(scale > 0, rest / scale, torch.zeros(()))
    codes = torch.bucketize(share, _middles(_nested_code())).to(torch.uint8)
    return codes, nested, offset


def _middles(code: torch.Tensor) -> torch.Tensor:
    """Half-way between neighbours."""
    return (code[:-1] + code[1:]) / 2


@functools.cache
def _nested_code() -> torch.Tensor:
    return nested_code()


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and the largest magnitude of each row: (int8 [out, in], float32 [out]).

    The weight is rounded to float16 first, as bitsandbytes does. A row of zeros has scale 0.

    Raises:
        QuantizationError: Not a matrix, not finite in float16, or of another dtype.
    """
    if weight.dim() != 2:
        raise QuantizationError(
            f"INT8 packs matrices [out, in], got {list(weight.shape)}; leave this weight as it is."
        )
    check_quantizable(weight)
    half = weight.to(torch.float16)
    check_quantizable(half)
    scale = half.abs().amax(1).float() if half.numel() else half.new_zeros(len(half)).float()
    factor = torch.where(scale > 0, INT8_DIVISOR / scale, torch.zeros(()))
    return torch.round(half.float() * factor[:, None]).to(torch.int8), scale


def dequantize_ggml(
    blocks: torch.Tensor, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Two kinds of GGUF, blocks of 32 elements behind a float16 step, rounded to `dtype`.

    "q8_0": 32 int8, `step * q`. "q4_0": 16 bytes of codes, `step * (code - 8)`; the low halves are
    elements 0 to 15, the high ones 16 to 31.

    Args:
        blocks: Bytes: 34 a block, or 18.
        kind: "q8_0" or "q4_0".
        shape: Of the weight; its last dimension is a multiple of 32.
        dtype: float32, float16 or bfloat16.
    """
    cells = blocks.reshape(-1, {"q8_0": 34, "q4_0": 18}[kind])
    step = cells[:, :2].contiguous().view(torch.float16).float()
    rest = cells[:, 2:].contiguous()
    if kind == "q8_0":
        q = rest.view(torch.int8).float()
    else:
        q = torch.cat([rest & 15, rest >> 4], dim=1).float() - 8.0
    return (step * q).to(dtype).reshape(tuple(shape))
