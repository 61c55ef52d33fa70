"""The Triton kernels give the bits that plain PyTorch gives, and products within their bound.

With a GPU they run on it. Without one they run in Triton's interpreter, which has to be asked for
before triton is imported; there too, the code that a GPU would run is compiled for an H200.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: pip install 'nexus_ext[triton]'", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from nexus_ext.kernels import int8, nf4  # noqa: E402

if DEVICE == "cpu" and not nf4.interpreted():
    pytest.skip(
        "no GPU, and the kernels were imported before TRITON_INTERPRET=1 was set; "
        "run this file by itself",
        allow_module_level=True,
    )

# Infinite or huge weights overflow on purpose; numpy, which interprets, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKSIZES = [32, 64, 128, 256, 4096]
# One element, less than a block, odd, rows that cross blocks, three dimensions, more than a tile.
SHAPES = [(1,), (31,), (3, 67), (5, 96), (2, 3, 40), (3, 2744)]
NESTED_BLOCKSIZE = 4


# -- the reference -----------------------------------------------------------------------------


def decode(q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, n: int) -> Tensor:
    nibbles = torch.stack([q >> 4, q & 15], 1).flatten()[:n].long()
    return code[nibbles] * absmax[torch.arange(n, device=q.device) // blocksize]


def denest(absmax_u8: Tensor, nested: Nested) -> Tensor:
    blocks = torch.arange(absmax_u8.numel(), device=DEVICE) // nested.blocksize
    return nested.code[absmax_u8.long()] * nested.absmax[blocks] + nested.offset


def decode_int8(q: Tensor, scale: Tensor, divisor: float) -> Tensor:
    inverse = torch.tensor(1.0 / divisor, dtype=torch.float32)
    return (q.float() * scale.repeat_interleave(q.shape[1] // scale.shape[1], 1)) * inverse


def assert_same_bits(got: Tensor, wanted: Tensor) -> None:
    """Bits and not values, since 0.0 == -0.0; but any NaN is as good as another."""
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    integer = {2: torch.int16, 4: torch.int32}[got.element_size()]
    nan = wanted.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(integer)[~nan], wanted.view(integer)[~nan])


# -- what is packed ----------------------------------------------------------------------------


@dataclass
class Nested:
    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int


@dataclass
class Packed:
    """A random weight: absmax is float32, or uint8 if it is nested."""

    q: Tensor
    absmax: Tensor
    nested: Nested | None
    code: Tensor
    blocksize: int
    n: int

    def weights(self) -> Tensor:
        absmax = self.absmax if self.nested is None else denest(self.absmax, self.nested)
        return decode(self.q, absmax, self.code, self.blocksize, self.n)

    def dequantize(self, out: Tensor) -> Tensor:
        if self.nested is None:
            nf4.dequantize(self.q, self.absmax, self.code, self.blocksize, out)
        else:
            nested = self.nested
            nf4.dequantize_nested(
                self.q,
                self.absmax,
                nested.absmax,
                nested.code,
                nested.offset,
                nested.blocksize,
                self.code,
                self.blocksize,
                out,
            )
        return out


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)


def random_code() -> Tensor:
    return torch.linspace(-1, 1, 16, device=DEVICE) * torch.rand(16, device=DEVICE)


def pack(n: int, blocksize: int, nested: int = 0) -> Packed:
    """`nested` is the nested blocksize; 0 for a weight that is not nested."""
    num_blocks = -(-n // blocksize)
    q = random_bytes(-(-n // 2))
    if not nested:
        absmax = torch.rand(num_blocks, device=DEVICE)
        return Packed(q, absmax, None, random_code(), blocksize, n)
    part = Nested(
        torch.rand(-(-num_blocks // nested), device=DEVICE),
        torch.randn(256, device=DEVICE),
        torch.rand((), device=DEVICE),
        nested,
    )
    return Packed(q, random_bytes(num_blocks), part, random_code(), blocksize, n)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Full of NaN, so that an element nobody wrote is seen, with room behind for too many."""
    n = torch.Size(shape).numel()
    room = torch.full((n + 2 * nf4.TILE,), torch.nan, dtype=dtype, device=DEVICE)
    return room[:n].view(shape)


def assert_written(out: Tensor, wanted: Tensor) -> None:
    """`out`, which is from `empty`, has these bits, and nothing was written behind it."""
    assert_same_bits(out, wanted)
    room = out._base
    assert room is not None
    assert room[out.numel() :].isnan().all()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- 4 bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [0, NESTED_BLOCKSIZE])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_have_the_bits_of_the_reference(
    dtype: torch.dtype, blocksize: int, nested: int
) -> None:
    for shape in SHAPES:
        packed = pack(torch.Size(shape).numel(), blocksize, nested)
        out = packed.dequantize(empty(*shape, dtype=dtype))
        assert_written(out, packed.weights().to(dtype).view(shape))


@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_tiles_need_no_mask(dtype: torch.dtype, nested: int) -> None:
    packed = pack(16 * nf4.TILE, 32, nested)
    assert_written(packed.dequantize(empty(packed.n, dtype=dtype)), packed.weights().to(dtype))


@pytest.mark.parametrize("n", [4096, 4093])
@pytest.mark.parametrize("nested", [0, NESTED_BLOCKSIZE])
def test_packed_weights_may_lie_at_any_address(nested: int, n: int) -> None:
    packed = pack(n, 64, nested)
    room = random_bytes(packed.q.numel() + 16)
    for offset in range(1, 16):
        moved = room[offset : offset + packed.q.numel()]
        moved.copy_(packed.q)
        out = Packed(
            moved, packed.absmax, packed.nested, packed.code, packed.blocksize, n
        ).dequantize(empty(n, dtype=torch.bfloat16))
        assert_written(out, packed.weights().bfloat16())


@pytest.mark.parametrize("n", [512, 511, 510, 509])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_may_lie_at_any_address(dtype: torch.dtype, n: int) -> None:
    packed = pack(n, 64)
    room = torch.ones(n + 2 * nf4.TILE, dtype=dtype, device=DEVICE)
    packed.dequantize(room[7 : 7 + n])
    wanted = torch.ones_like(room)
    wanted[7 : 7 + n] = packed.weights().to(dtype)
    assert_same_bits(room, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_at_every_kind_of_absmax(dtype: torch.dtype) -> None:
    tiny = torch.finfo(torch.float32).tiny
    kinds = [0.0, -0.0, 1e-45, tiny / 3, tiny, 1e-7, 6e-5, 1.0, 65504.0, 70000.0, 3.4e38]
    absmax = torch.tensor([*kinds, torch.inf, -torch.inf, torch.nan, -1.0, 2.0], device=DEVICE)
    q = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(absmax.numel())
    code = random_code()
    code[7] = 0.0
    packed = Packed(q, absmax, None, code, 512, 512 * absmax.numel())
    assert_written(packed.dequantize(empty(packed.n, dtype=dtype)), packed.weights().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_rounded_to_even_and_nan_stays_nan(dtype: torch.dtype) -> None:
    """The code is 1, so the bits of absmax are what is rounded: ties, carries, odd NaNs."""
    bits = [0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3FFFFFFF, 0x7F7FFFFF, 0x7F800001, 0x7FFFFFFF]
    bits += [0xFF800001, 0xFFFFFFFF, 0x00008000, 0x00018000, 0x00007FFF, 0x3F801000, 0x3F803000]
    absmax = torch.tensor(bits, dtype=torch.uint32, device=DEVICE).view(torch.float32)
    n = 32 * absmax.numel()
    packed = Packed(random_bytes(n // 2), absmax, None, torch.ones(16, device=DEVICE), 32, n)
    assert_written(packed.dequantize(empty(n, dtype=dtype)), packed.weights().to(dtype))


def test_an_empty_weight_is_written_without_a_launch() -> None:
    packed = pack(0, 64)
    assert packed.dequantize(empty(0, 7, dtype=torch.float16)).shape == (0, 7)


# -- 4 bits, many units ------------------------------------------------------------------------


def fill_arena(units: list[Packed], align: int) -> tuple[Tensor, Tensor]:
    """Parts of all units one after another, absmax first; q starts wherever `align` lets it."""
    parts: list[Tensor] = []
    offsets: list[list[int]] = []
    end = 0

    def append(part: Tensor, multiple: int, beyond: int = 0) -> int:
        nonlocal end
        data = part.flatten().view(torch.uint8)
        padding = -end % multiple + beyond
        parts.extend([random_bytes(padding), data])
        end += padding + data.numel()
        return end - data.numel()

    for number, unit in enumerate(units):
        row = [append(unit.absmax, 1 if unit.nested else 4)]
        if unit.nested is not None:
            row.append(append(unit.nested.absmax, 4))
        q = append(unit.q, 4, 0 if align == 4 else 1 + number % 3)
        offsets.append([q, *row])
    return torch.cat(parts), torch.tensor(offsets, device=DEVICE)


@pytest.mark.parametrize("align", [4, 1])
@pytest.mark.parametrize("shape", [(4, 1024), (3, 67), (5, 2744), (1,)])
@pytest.mark.parametrize("nested", [0, NESTED_BLOCKSIZE])
@pytest.mark.parametrize("num_units", [1, 5])
def test_units_of_an_arena_have_the_bits_of_the_reference(
    num_units: int, nested: int, shape: tuple[int, ...], align: int
) -> None:
    units = [pack(torch.Size(shape).numel(), 64, nested) for _ in range(num_units)]
    for unit in units[1:]:
        unit.code = units[0].code
        if unit.nested is not None and units[0].nested is not None:
            unit.nested.code = units[0].nested.code
    arena, offsets = fill_arena(units, align)
    nested_parts = [unit.nested for unit in units if unit.nested is not None]
    for dtype in DTYPES:
        out = empty(num_units, *shape, dtype=dtype)
        nf4.dequantize_grouped(
            arena,
            offsets,
            nested_parts[0].code if nested else None,
            torch.stack([part.offset for part in nested_parts]) if nested else None,
            units[0].code,
            64,
            NESTED_BLOCKSIZE,
            out,
        )
        wanted = torch.stack([unit.weights() for unit in units]).to(dtype)
        assert_written(out, wanted.view_as(out))


# -- 8 bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("divisor", [127.0, 1.0])
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((1, 1), 1),
        ((3, 67), 1),
        ((5, 96), 3),
        ((7, 130), 26),
        ((4, 4096), 1),
        ((8, 1024), 8),
        ((2, 5000), 2),
        ((3, 9000), 1),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_weights_have_the_bits_of_the_reference(
    dtype: torch.dtype, shape: tuple[int, int], num_groups: int, divisor: float
) -> None:
    q = random_bytes(*shape).view(torch.int8)
    scale = torch.rand(shape[0], num_groups, device=DEVICE)
    out = empty(*shape, dtype=dtype)
    int8.dequantize(q, scale, divisor, out)
    assert_written(out, decode_int8(q, scale, divisor).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_int8_at_every_kind_of_scale_and_address(dtype: torch.dtype) -> None:
    tiny = torch.finfo(torch.float32).tiny
    kinds = [0.0, -0.0, 1e-45, tiny, 6e-5, 1.0, 70000.0, 3.4e38, torch.inf, torch.nan, -2.0]
    scale = torch.tensor(kinds, device=DEVICE)[:, None]
    q = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(scale.numel(), 1)
    for offset in range(16):
        room = random_bytes(q.numel() + 16)
        moved = room[offset : offset + q.numel()].view(torch.int8).view_as(q)
        moved.copy_(q.view(torch.int8))
        out = empty(*q.shape, dtype=dtype)
        int8.dequantize(moved, scale, 127.0, out)
        assert_written(out, decode_int8(moved, scale, 127.0).to(dtype))


# -- addresses above 2**31 elements ------------------------------------------------------------

FAR = 2**31
Sparse = Callable[[int, torch.dtype], Tensor]


@triton.jit
def one_nf4_tile(tile, q, absmax, code, out, n, NIBBLES: tl.constexpr, WORDS: tl.constexpr):
    nf4._dequantize_tile(
        tile, q, absmax, None, None, None, code, out, n, 12, 0, NIBBLES, WORDS, False, False
    )


@triton.jit
def one_int8_tile(row_tile, q, scale, out, num_runs, COLUMNS: tl.constexpr):
    int8._dequantize_tile(
        row_tile, 0 * row_tile, q, scale, 0.5, out, num_runs, COLUMNS, 1, COLUMNS, False, False
    )


@triton.jit
def four_features(feature, q, absmax, code, out, in_features, out_features):
    rows = feature + tl.arange(0, 4)
    weight = nf4._weights(rows, 0, q, absmax, code, in_features, out_features, 12, 8, 4)
    at = tl.arange(0, 4)[:, None, None] * 32 + tl.arange(0, 4)[None, :, None] * 8
    tl.store(out + at + tl.arange(0, 8)[None, None, :], weight)


@pytest.fixture
def sparse(tmp_path: Path) -> Sparse:
    """Zeros of which only the pages that are touched take memory, with as much room before them.

    In that room an index would land that went through an int32. On a GPU it is all allocated.
    """

    def make(num_elements: int, dtype: torch.dtype) -> Tensor:
        if DEVICE == "cuda":
            return torch.zeros(2 * num_elements, dtype=dtype, device=DEVICE)[num_elements:]
        path = tmp_path / f"{dtype}-{num_elements}"
        return torch.from_file(str(path), True, 2 * num_elements, dtype=dtype)[num_elements:]

    return make


@pytest.mark.parametrize("nibbles", [8, 2])
def test_a_weight_may_have_more_than_2_to_the_31_elements(nibbles: int, sparse: Sparse) -> None:
    packed = pack(4096 - 8, 4096)
    q, absmax = sparse(FAR // 2 + 4096, torch.uint8), sparse(FAR // 4096 + 1, torch.float32)
    out = sparse(FAR + 4096, torch.float16)
    q[FAR // 2 :][: packed.q.numel()] = packed.q
    absmax[FAR // 4096 :] = packed.absmax
    one_nf4_tile[(1,)](
        FAR // 4096, q, absmax, packed.code, out, FAR + packed.n, nibbles, 4096 // nibbles
    )
    wanted = torch.zeros(4096, dtype=torch.float16, device=DEVICE)
    wanted[: packed.n] = packed.weights().half()
    assert_same_bits(out[FAR:], wanted)


def test_an_int8_weight_may_have_more_than_2_to_the_31_elements(
    sparse: Sparse,
) -> None:
    columns = 4096
    num_rows = FAR // columns + 1
    q, scale = sparse(num_rows * columns, torch.int8), sparse(num_rows, torch.float32)
    out = sparse(num_rows * columns, torch.float16)
    q[FAR:] = random_bytes(columns).view(torch.int8)
    scale[-1] = 0.37
    one_int8_tile[(1,)](FAR // columns, q, scale, out, num_rows, columns)
    assert_same_bits(out[FAR:], decode_int8(q[None, FAR:], scale[None, -1:], 2.0).half()[0])


def test_a_product_may_read_more_than_2_to_the_31_weights(
    sparse: Sparse,
) -> None:
    columns = 4096
    packed = pack(4 * columns, 4096)
    q, absmax = sparse(FAR // 2 + 2 * columns, torch.uint8), sparse(FAR // 4096 + 4, torch.float32)
    q[FAR // 2 :], absmax[FAR // 4096 :] = packed.q, packed.absmax
    out = torch.zeros(4, 32, device=DEVICE)
    first = FAR // columns
    four_features[(1,)](first, q, absmax, packed.code, out, columns, first + 4)
    assert_same_bits(out, packed.weights().view(4, columns)[:, :32].contiguous())


# -- products ----------------------------------------------------------------------------------


def assert_within_bound(got: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    """4 steps of the result, and what sums of float32 may lose: against float64 of the same w."""
    x64, w64 = x.double(), w.double()
    wanted = x64 @ w64.T + (0 if bias is None else bias.double())
    norms = x64.norm(dim=-1)[..., None] * w64.norm(dim=1)
    eps = 2 * torch.finfo(torch.float32).eps * x.shape[-1] ** 0.5
    bound = 4 * torch.finfo(x.dtype).eps * wanted.abs() + eps * norms
    assert (got.dtype, got.shape) == (x.dtype, wanted.shape)
    assert ((got.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_within_their_bound(dtype: torch.dtype, num_rows: int) -> None:
    # Features that do not fill a program; columns less than one step, more, and not a multiple.
    for out_features, in_features, offset in [(37, 608, 0), (5, 32, 0), (6, 96, 1)]:
        packed = pack(out_features * in_features, 32)
        packed.q = torch.cat([random_bytes(offset), packed.q])[offset:]
        w = packed.weights().to(dtype).view(out_features, in_features)
        x = torch.randn(num_rows, in_features, device=DEVICE).to(dtype)
        for bias in (None, torch.randn(out_features, device=DEVICE).to(dtype)):
            y = nf4.linear(x, packed.q, packed.absmax, packed.code, 32, out_features, bias)
            assert_within_bound(y, x, w, bias)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_products_are_within_their_bound(dtype: torch.dtype, num_rows: int) -> None:
    for out_features, in_features, num_groups in [(37, 600, 1), (5, 33, 1), (6, 96, 3)]:
        q = random_bytes(out_features, in_features).view(torch.int8)
        scale = torch.rand(out_features, num_groups, device=DEVICE)
        w = decode_int8(q, scale, 127.0).to(dtype)
        x = torch.randn(num_rows, in_features, device=DEVICE).to(dtype)
        for bias in (None, torch.randn(out_features, device=DEVICE).to(dtype)):
            assert_within_bound(int8.linear(x, q, scale, 127.0, bias), x, w, bias)


@pytest.mark.parametrize("num_rows", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_round_weights_as_dequantize_does(dtype: torch.dtype, num_rows: int) -> None:
    """Rows that are 3 in one column and 0 elsewhere have no sums: one bit off would be seen."""
    out_features, in_features = 9, 64
    x = 3 * torch.eye(in_features, dtype=dtype, device=DEVICE)[:num_rows]
    packed = pack(out_features * in_features, 32)
    w = packed.weights().to(dtype).view(out_features, in_features)
    y = nf4.linear(x, packed.q, packed.absmax, packed.code, 32, out_features, None)
    assert_same_bits(y, (3 * w.float()).to(dtype).T[:num_rows].contiguous())

    q = random_bytes(out_features, in_features).view(torch.int8)
    scale = torch.rand(out_features, 2, device=DEVICE)
    w = decode_int8(q, scale, 127.0).to(dtype)
    y = int8.linear(x, q, scale, 127.0, None)
    assert_same_bits(y, (3 * w.float()).to(dtype).T[:num_rows].contiguous())


@pytest.mark.parametrize("num_rows", [3, 20])
def test_a_weight_that_is_not_finite_stays_in_its_feature(num_rows: int) -> None:
    """Columns beyond the last are masked, and 0 * inf would be NaN."""
    q = torch.ones(3, 40, dtype=torch.int8, device=DEVICE)
    scale = torch.tensor([[1.0], [torch.inf], [1.0]], device=DEVICE)
    y = int8.linear(torch.ones(num_rows, 40, device=DEVICE), q, scale, 1.0, None)
    assert_same_bits(y, torch.tensor([[40.0, torch.inf, 40.0]] * num_rows, device=DEVICE))


def test_products_take_any_shape_and_stride_of_x() -> None:
    packed = pack(8 * 64, 64)
    w = packed.weights().view(8, 64)
    for x in (
        torch.randn(64, device=DEVICE),
        torch.randn(2, 3, 64, device=DEVICE),
        torch.randn(64, 3, device=DEVICE).T,
        torch.randn(0, 64, device=DEVICE),
        torch.randn(70, 64, device=DEVICE),
    ):
        y = nf4.linear(x, packed.q, packed.absmax, packed.code, 64, 8, None)
        assert_within_bound(y, x, w, None)


# -- what is refused ---------------------------------------------------------------------------


def dequantize_with(**changed: object) -> None:
    packed = pack(512, 64)
    given = {
        "q": packed.q,
        "absmax": packed.absmax,
        "code": packed.code,
        "blocksize": 64,
        "out": empty(512, dtype=torch.float32),
    }
    nf4.dequantize(**{**given, **changed})  # type: ignore[arg-type]


def zeros(size: int, dtype: torch.dtype = torch.float32, step: int = 1) -> Tensor:
    return torch.zeros(size * step, dtype=dtype, device=DEVICE)[::step]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": zeros(255, torch.uint8)}, r"q must be torch.uint8 \[256\].*; got.*\[255\].*; see"),
        ({"q": zeros(256, torch.uint8, 2)}, r"q must be.*contiguous.*strides \[2\]"),
        ({"q": zeros(256, torch.int8)}, r"q must be torch.uint8.*got torch.int8"),
        ({"absmax": zeros(7)}, r"absmax must be torch.float32 \[8\].*got.*\[7\]"),
        ({"absmax": zeros(8, torch.float16)}, r"absmax must be torch.float32.*got torch.float16"),
        ({"code": zeros(256)}, r"code must be torch.float32 \[16\].*got.*\[256\]"),
        ({"blocksize": 48}, r"blocksize must be a power of two, 32 to 4096, got 48; take"),
        ({"blocksize": 16}, r"blocksize must be a power of two, 32 to 4096, got 16; take"),
        ({"blocksize": 8192}, r"blocksize must be a power of two, 32 to 4096, got 8192; take"),
        ({"blocksize": 0}, r"blocksize must be a power of two, 32 to 4096, got 0; take"),
        ({"out": zeros(512, torch.float64)}, r"result must be float32.*got torch.float64.*; copy"),
        ({"out": zeros(512, step=2)}, r"result must be.*contiguous.*strides \[2\]"),
    ],
)
def test_a_weight_whose_parts_disagree_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize_with(**changed)


def test_a_nested_weight_whose_parts_disagree_is_refused() -> None:
    out = empty(4096, dtype=torch.float32)
    for name, value, message in [
        ("absmax", torch.zeros(3, device=DEVICE), r"nested_absmax must be.*\[4\].*got.*\[3\]"),
        ("code", torch.zeros(16, device=DEVICE), r"nested_code must be.*\[256\].*got.*\[16\]"),
        ("offset", torch.zeros(1, device=DEVICE), r"nested_offset must be.*\[\].*got.*\[1\]"),
        ("blocksize", 3, "nested_blocksize must be a power of two, got 3; take"),
    ]:
        packed = pack(4096, 256, NESTED_BLOCKSIZE)
        setattr(packed.nested, name, value)
        with pytest.raises(ValueError, match=message):
            packed.dequantize(out)
    packed = pack(4096, 256, NESTED_BLOCKSIZE)
    packed.absmax = packed.absmax[1:]
    with pytest.raises(ValueError, match=r"absmax_u8 must be torch.uint8 \[16\].*got.*\[15\]"):
        packed.dequantize(out)


def test_an_arena_that_cannot_hold_units_is_refused() -> None:
    units = [pack(64, 64)]
    arena, offsets = fill_arena(units, 4)
    code, nested = torch.zeros(256, device=DEVICE), torch.zeros(1, device=DEVICE)
    three = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)

    def refuse(message: str, arena: Tensor, offsets: Tensor, *nested: Tensor | None) -> None:
        out = empty(1, 64, dtype=torch.float32)
        with pytest.raises(ValueError, match=message):
            nf4.dequantize_grouped(arena, offsets, *nested, units[0].code, 64, 4, out)

    refuse(r"offsets must be torch.int64 \[1, 2\].*got.*\[1, 3\]", arena, three, None, None)
    refuse(r"offsets must be torch.int64 \[1, 3\].*got.*\[1, 2\]", arena, offsets, code, nested)
    refuse("offsets must be torch.int64.*got torch.int32", arena, offsets.int(), None, None)
    refuse("arena must start at a multiple of 4 bytes, got.*; pass", arena[1:], offsets, None, None)
    refuse("come together, got only nested_code; pass", arena, three, code, None)
    refuse("come together, got only nested_offsets; pass", arena, offsets, None, nested)
    many = torch.empty(65536, 0, device=DEVICE)
    with pytest.raises(ValueError, match=r"at most 65535 units, got \[65536, 0\]; widen"):
        nf4.dequantize_grouped(arena, offsets, None, None, units[0].code, 64, 4, many)


def test_a_product_of_wrong_sizes_is_refused() -> None:
    packed = pack(8 * 64, 64)
    parts = (packed.q, packed.absmax, packed.code)
    x = torch.zeros(2, 64, device=DEVICE)
    with pytest.raises(ValueError, match=r"multiple of blocksize 128, got \[2, 64\]; call"):
        nf4.linear(x, *parts, 128, 8, None)
    with pytest.raises(ValueError, match=r"q must be torch.uint8 \[288\].*got.*\[256\]"):
        nf4.linear(x, *parts, 64, 9, None)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \[8\].*got.*\[7\]"):
        nf4.linear(x, *parts, 64, 8, torch.zeros(7, device=DEVICE))
    with pytest.raises(ValueError, match=r"bias must be torch.float32.*got torch.float16"):
        nf4.linear(x, *parts, 64, 8, torch.zeros(8, device=DEVICE).half())
    with pytest.raises(ValueError, match=r"result must be float32.*got torch.float64"):
        nf4.linear(x.double(), *parts, 64, 8, None)


def test_int8_weights_of_wrong_sizes_are_refused() -> None:
    q = torch.zeros(4, 6, dtype=torch.int8, device=DEVICE)
    out = empty(4, 6, dtype=torch.float32)
    one = torch.zeros(4, 1, device=DEVICE)
    for scale in (torch.zeros(4, 4, device=DEVICE), torch.zeros(4, device=DEVICE)):
        with pytest.raises(ValueError, match=r"G a divisor of K, got \[4, 6\] and \[4.*; a scale"):
            int8.dequantize(q, scale, 1.0, out)
    with pytest.raises(ValueError, match=r"scale must be torch.float32 \[4, 1\].*got.*\[3, 1\]"):
        int8.dequantize(q, one[1:], 1.0, out)
    with pytest.raises(ValueError, match=r"q must be torch.int8.*got torch.uint8"):
        int8.dequantize(q.view(torch.uint8), one, 1.0, out)
    with pytest.raises(ValueError, match=r"out must be.*\[4, 6\].*got.*\[6, 4\]"):
        int8.dequantize(q, one, 1.0, empty(6, 4, dtype=torch.float32))
    with pytest.raises(ValueError, match="divisor must not be 0"):
        int8.dequantize(q, one, 0.0, out)
    with pytest.raises(ValueError, match=r"x must be \[..., 6\].*got \[2, 5\]; see"):
        int8.linear(torch.zeros(2, 5, device=DEVICE), q, one, 1.0, None)


# -- what a GPU would run ----------------------------------------------------------------------

# Launches compile instead of running, with the arguments they were given, for an H200.
COMPILE = """
import re, torch, triton
from nexus_ext.kernels import int8, nf4
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.uint8: "*u8", torch.int8: "*i8", torch.int64: "*i64", torch.float32: "*fp32",
         torch.float16: "*fp16", torch.bfloat16: "*bf16", int: "i32", float: "fp32"}
compiled = []

class Compiler:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return self.compile
    def compile(self, *args, **kwargs):
        options = {k: kwargs.pop(k) for k in ["enable_fp_fusion"] if k in kwargs}
        given = {**dict(zip(self.kernel.arg_names, args)), **kwargs}
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = TYPES[value.dtype if tensor else type(value)]
            address = value.data_ptr() if tensor else value
            if not isinstance(address, float) and address % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        target = GPUTarget("cuda", 90, 32)
        compiled.append(triton.compile(source, target=target, options=options).asm["ptx"])

for file in (nf4, int8):
    for name in dir(file):
        if name.endswith("_kernel"):
            setattr(file, name, Compiler(getattr(file, name)))

def ptx():
    return compiled.pop()

assert not nf4.interpreted()
n, code = 8192, torch.ones(16)
room = torch.zeros(n + 64, dtype=torch.uint8)
q = room[-room.data_ptr() % 16 :][: n // 2]
absmax, table = torch.ones(n // 64), torch.ones(256)
out = torch.empty(n, dtype=torch.bfloat16)
nested = absmax.byte(), torch.ones(1), table, torch.ones(()), 256, code, 64

# 16 bytes from every lane; nothing fused, and no denormal flushed to 0.
def check_bits(text, vectors=True):
    assert "fma" not in text and ".ftz" not in text
    assert vectors == ("st.global.v4" in text)
    assert "cvt.rn.bf16" in text

# The processor of a GPU-less machine reads words at any address; a GPU does not.
def check_both_ways(text):
    check_bits(text)
    assert re.search(r"evict_first\\S*b8 ", text) and re.search(r"evict_first\\S*b32 ", text)

nf4.dequantize(q, absmax, code, 64, out)
check_bits(ptx())
nf4.dequantize(room[1 : 1 + n // 2], absmax, code, 64, out)
check_bits(ptx(), vectors=False)
nf4.dequantize(q[: n // 2 - 1], absmax, code, 64, out[: n - 3])
check_bits(ptx(), vectors=False)
nf4.dequantize_nested(q, *nested, out)
check_bits(ptx())
nf4.dequantize_nested(q[: n // 2 - 4], *nested, out[: n - 8])
check_bits(ptx())
two, three = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
nf4.dequantize_grouped(q, two, None, None, code, 64, 256, out.view(2, -1))
check_both_ways(ptx())
nf4.dequantize_grouped(q, three, table, torch.ones(2), code, 64, 256, out.view(2, -1))
check_both_ways(ptx())
int8.dequantize(q.view(torch.int8).view(4, -1), torch.ones(4, 1), 127.0, out[: n // 2].view(4, -1))
check_bits(ptx())
int8.dequantize(q[:600].view(torch.int8).view(3, -1), torch.ones(3, 4), 127.0,
                out[:600].view(3, -1))
check_bits(ptx(), vectors=False)

for dtype in (torch.float32, torch.bfloat16):
    for num_rows in (1, 8, 33):
        x, bias = torch.ones(num_rows, 256, dtype=dtype), torch.ones(32, dtype=dtype)
        nf4.linear(x, q, absmax, code, 64, 32, bias)
        int8.linear(x, torch.zeros(32, 256, dtype=torch.int8), torch.ones(32, 2), 127.0, None)
        products = ptx(), ptx()
        for text in products:
            assert ".ftz" not in text and "tf32" not in text
            assert ("mma" in text) == (num_rows > 8 and dtype != torch.float32), num_rows
nf4.linear(x, room[1 : 1 + n // 2], absmax, code, 64, 32, None)
"""


def test_kernels_compile_for_an_h200_and_fuse_nothing(tmp_path: Path) -> None:
    """Triton brings the compiler; the interpreter accepts code that it refuses."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
