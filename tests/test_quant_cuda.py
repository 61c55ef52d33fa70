"""What a GPU would be asked to compute is what the CPU computes; see test_triton_kernels.py.

Without a GPU the functions behind the ops are called themselves, and their kernels interpreted.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from nexus_ext.quant import cuda, reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: pip install 'nexus_ext[triton]'", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

OPS = torch.ops.nexus
SHAPE = [24, 128]
PACKED = ("nexus::dequantize", "nexus::quantize", "nexus::nf4", "nexus::int8")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def on(device: str, values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        return values.to(device)
    return tuple(on(device, v) for v in values) if isinstance(values, tuple) else values


def both(op: str, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of the function for GPUs, and that of the op on the CPU."""
    packet, _, overload = op.partition(".")
    native = getattr(getattr(OPS, packet), overload or "default")
    return cuda.KERNELS[op](*on(DEVICE, args)).cpu(), native(*args)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_gives_the_same_bits(weight: torch.Tensor, dtype: torch.dtype) -> None:
    q, absmax = OPS.quantize_nf4(weight, 64)
    fp4 = torch.tensor(reference.FP4_CODE)
    for code in (None, fp4):
        got, want = both("dequantize_nf4", q, absmax, 64, SHAPE, dtype, code)
        assert torch.equal(got, want)
    q, absmax, nested, offset = OPS.quantize_nf4_nested(weight, 64)
    rest = nested, reference.nested_code(), offset, 64, 256, SHAPE, dtype
    got, want = both("dequantize_nf4_nested", q, absmax, *rest)
    assert torch.equal(got, want)
    q, scale = OPS.quantize_int8(weight)
    got, want = both("dequantize_int8", q, scale, dtype, 127.0)
    assert torch.equal(got, want)


def test_decoding_into_a_tensor_gives_the_same_bits(weight: torch.Tensor) -> None:
    out = torch.empty(SHAPE, device=DEVICE)
    q, absmax = on(DEVICE, OPS.quantize_nf4(weight, 64))
    cuda.KERNELS["dequantize_nf4.out"](q, absmax, 64, SHAPE, torch.float32, out=out)
    assert torch.equal(out, cuda.KERNELS["dequantize_nf4"](q, absmax, 64, SHAPE, torch.float32))
    q, scale = on(DEVICE, OPS.quantize_int8(weight))
    cuda.KERNELS["dequantize_int8.out"](q, scale, torch.float32, out=out)
    assert torch.equal(out, cuda.KERNELS["dequantize_int8"](q, scale, torch.float32))
    q, absmax, nested, offset = on(DEVICE, OPS.quantize_nf4_nested(weight, 64))
    code = reference.nested_code().to(DEVICE)
    rest = (q, absmax, nested, code, offset, 64, 256, SHAPE, torch.float32)
    cuda.KERNELS["dequantize_nf4_nested.out"](*rest, out=out)
    assert torch.equal(out, cuda.KERNELS["dequantize_nf4_nested"](*rest))


def test_units_of_an_arena_too(weight: torch.Tensor) -> None:
    packed = [OPS.quantize_nf4(weight * factor, 64) for factor in (1.0, -2.0, 3.0)]
    parts = [part.view(torch.uint8) for unit in packed for part in unit]
    ends = torch.tensor([part.numel() for part in parts]).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]]).reshape(3, 2)
    args = (torch.cat(parts), offsets, None, None, 64, 256, 3, SHAPE, torch.bfloat16)
    got, want = both("dequantize_nf4_grouped", *args)
    assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [1, 5, 12])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_agree(weight: torch.Tensor, rows: int, has_bias: bool) -> None:
    x = torch.randn(rows, SHAPE[1])
    bias = torch.randn(SHAPE[0]) if has_bias else None
    q, absmax = OPS.quantize_nf4(weight, 64)
    got, want = both("nf4_linear", x, q, absmax, bias, 64, SHAPE[0])
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    q, absmax, nested, offset = OPS.quantize_nf4_nested(weight, 64)
    rest = (None, nested, reference.nested_code(), offset)
    got, want = both("nf4_linear", x, q, absmax, bias, 64, SHAPE[0], *rest)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    q, scale = OPS.quantize_int8(weight)
    got, want = both("int8_linear", x, q, scale, bias)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_every_op_has_a_kernel_on_gpus() -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith(PACKED)]
    assert len(ops) == 13
    for op in ops:
        assert has_kernel(op, "CUDA") or has_kernel(op, "CompositeExplicitAutograd"), op
