"""Weights of more than 2^31 elements are addressed right, without the memory for them.

Zeros that nobody wrote to take none: only the last rows hold something.
"""

from __future__ import annotations

import pytest
import torch

from nexus_ext import ops
from nexus_ext.errors import ConfigError
from nexus_ext.quant import reference

OPS = torch.ops.nexus
WIDTH = 4096
NUM_ROWS = (1 << 31) // WIDTH + 3
LAST = 2  # rows that are not zero


@pytest.mark.parametrize("codec", ["avx2", "auto"])
def test_four_bits(codec: str) -> None:
    try:
        ops.call(OPS.use_codec, codec)
    except ConfigError as error:  # a machine without AVX2
        pytest.skip(str(error))
    try:
        rows = torch.randn(LAST, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
        some_q, some_absmax = OPS.quantize_nf4(rows, 64)
        q = torch.zeros(NUM_ROWS * WIDTH // 2, dtype=torch.uint8)
        absmax = torch.zeros(NUM_ROWS * WIDTH // 64)
        q[-some_q.numel() :], absmax[-some_absmax.numel() :] = some_q, some_absmax
        x = torch.ones(1, WIDTH, dtype=torch.bfloat16)
        got = OPS.nf4_linear(x, q, absmax, None, 64, NUM_ROWS)
    finally:
        OPS.use_codec("auto")
    want = reference.dequantize_nf4(some_q, some_absmax, 64, rows.shape, torch.bfloat16)
    assert torch.allclose(got[0, -LAST:].double(), want.double().sum(1), rtol=1e-2, atol=1e-2)
    assert not got[0, :-LAST].any()


def test_eight_bits() -> None:
    rows = torch.randn(LAST, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    some_q, some_scale = OPS.quantize_int8(rows)
    q = torch.zeros(NUM_ROWS, WIDTH, dtype=torch.int8)
    scale = torch.zeros(NUM_ROWS)
    q[-LAST:], scale[-LAST:] = some_q, some_scale
    x = torch.ones(1, WIDTH, dtype=torch.bfloat16)
    got = OPS.int8_linear(x, q, scale, None)
    want = reference.dequantize_int8(some_q, some_scale, torch.bfloat16)
    assert torch.allclose(got[0, -LAST:].double(), want.double().sum(1), rtol=1e-2, atol=1e-2)
    assert not got[0, :-LAST].any()
