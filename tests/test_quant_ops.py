"""The ops on packed weights: decoding gives the reference's bits, products are within a bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import nexus_ext  # noqa: F401
from nexus_ext.errors import ConfigError, QuantizationError
from nexus_ext.ops import call
from nexus_ext.quant import reference

OPS = torch.ops.nexus
CODECS = ["scalar", "avx2", "avx512", "avx512bf16"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKSIZES = [32, 64, 128, 256, 4096]
# One element, none, less than a block, odd, rows that cross blocks, more than a thread's share.
SHAPES = [(1,), (0,), (0, 5), (5, 0), (31,), (3, 67), (5, 96), (2, 3, 40), (3, 2745), (3, 24_001)]
SPECIAL = [
    0.0,
    -0.0,
    1e-45,
    1e-40,
    -3e-39,
    1.2e-38,
    6e-8,
    6.1e-5,
    -1.0,
    65504.0,
    65520.0,
    1e5,
    -1e5,
    3.4e38,
    math.inf,
    -math.inf,
    math.nan,
]
INTEGER = {2: torch.int16, 4: torch.int32}


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        assert call(OPS.use_codec, request.param) == request.param
    except ConfigError as error:
        pytest.skip(str(error))
    yield request.param
    OPS.use_codec("auto")


@pytest.fixture
def every_codec() -> Iterator[Callable[[], Iterator[str]]]:
    """One after another, those that the machine has."""

    def choose() -> Iterator[str]:
        for name in CODECS:
            try:
                yield call(OPS.use_codec, name)
            except ConfigError:
                continue

    yield choose
    OPS.use_codec("auto")


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Bits and not values, since 0.0 == -0.0; but any NaN is as good as another."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if not got.is_floating_point():
        assert torch.equal(got, want)
        return
    integer = INTEGER[got.element_size()]
    if torch.equal(got.view(integer), want.view(integer)):
        return
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(integer)[~nan], want.view(integer)[~nan])


class Framed:
    """Memory for a result, that tells whether anything around it was written."""

    MARGIN = 64

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, start: int = 0) -> None:
        numel = math.prod(shape)
        memory = torch.full((numel + 3 * self.MARGIN + start,), -77.0, dtype=dtype)
        phase = memory.data_ptr() % 64 // memory.element_size()
        self.first = self.MARGIN + start - phase
        self.memory = memory
        self.out = memory[self.first : self.first + numel].view(tuple(shape))

    def assert_untouched_around(self) -> None:
        end = self.first + self.out.numel()
        assert (self.memory[: self.first] == -77).all()
        assert (self.memory[end:] == -77).all()


# -- packed weights --------------------------------------------------------------------------------


@dataclass
class NF4:
    """absmax is float32, or bytes if it is nested: (absmax, code, offset, blocksize)."""

    q: Tensor
    absmax: Tensor
    blocksize: int
    shape: tuple[int, ...]
    code: Tensor | None = None
    nested: tuple[Tensor, Tensor, Tensor, int] | None = None

    @staticmethod
    def random(
        shape: Sequence[int], blocksize: int, nested: int = 0, code: Tensor | None = None
    ) -> NF4:
        """`nested` is the nested blocksize; 0 for a weight that is not nested."""
        numel = math.prod(shape)
        blocks = -(-numel // blocksize)
        q = random_bytes((numel + 1) // 2)
        if not nested:
            return NF4(q, torch.rand(blocks) + 0.1, blocksize, tuple(shape), code)
        parts = (
            torch.rand(-(-blocks // nested)),
            reference.nested_code(),
            torch.rand(()) + 0.5,
            nested,
        )
        return NF4(q, random_bytes(blocks), blocksize, tuple(shape), code, parts)

    @staticmethod
    def packed(weight: Tensor, blocksize: int, is_nested: bool = False) -> NF4:
        if not is_nested:
            return NF4(*OPS.quantize_nf4(weight, blocksize), blocksize, tuple(weight.shape))
        q, absmax, nested_absmax, offset = OPS.quantize_nf4_nested(weight, blocksize)
        nested = (nested_absmax, reference.nested_code(), offset, 256)
        return NF4(q, absmax, blocksize, tuple(weight.shape), None, nested)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.q, self.absmax, *(self.nested[:3] if self.nested else ())]

    @property
    def decoding(self) -> tuple[Any, list[Any]]:
        """The op's packet, and what it is called with but for the dtype and the code."""
        if self.nested is None:
            return OPS.dequantize_nf4, [*self.tensors, self.blocksize, self.shape]
        sizes = [self.blocksize, self.nested[3]]
        return OPS.dequantize_nf4_nested, [*self.tensors, *sizes, self.shape]

    def decode(self, dtype: torch.dtype) -> Tensor:
        op, args = self.decoding
        return op(*args, dtype, self.code)

    def decode_into(self, out: Tensor) -> None:
        op, args = self.decoding
        assert op.out(*args, out.dtype, self.code, out=out) is None

    def reference(self, dtype: torch.dtype) -> Tensor:
        absmax = self.absmax
        if self.nested is not None:
            nested_absmax, code, offset, blocksize = self.nested
            absmax = reference.dequantize_absmax(absmax, nested_absmax, code, offset, blocksize)
        return reference.dequantize_nf4(
            self.q, absmax, self.blocksize, self.shape, dtype, self.code
        )

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        nested = self.nested or ()
        return OPS.nf4_linear(
            x, self.q, self.absmax, bias, self.blocksize, self.shape[0], self.code, *nested
        )


@dataclass
class INT8:
    q: Tensor
    scale: Tensor
    divisor: float = 127.0

    @staticmethod
    def random(shape: Sequence[int], parts: int = 1, divisor: float = 127.0) -> INT8:
        scale = torch.rand(shape[0], parts) + 0.1
        return INT8(random_bytes(*shape).view(torch.int8), scale, divisor)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.q.shape)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.q, self.scale]

    def decode(self, dtype: torch.dtype) -> Tensor:
        return OPS.dequantize_int8(self.q, self.scale, dtype, self.divisor)

    def decode_into(self, out: Tensor) -> None:
        done = OPS.dequantize_int8.out(self.q, self.scale, out.dtype, self.divisor, out=out)
        assert done is None

    def reference(self, dtype: torch.dtype) -> Tensor:
        if self.q.numel() == 0:
            return torch.empty(self.shape, dtype=dtype)
        return reference.dequantize_int8(self.q, self.scale, dtype, self.divisor)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return OPS.int8_linear(x, self.q, self.scale, bias, self.divisor)


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_bits(count: int) -> Tensor:
    """float32 of any kind: denormal, infinite, NaN."""
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32).view(torch.float32)


def fp4() -> Tensor:
    return torch.tensor(reference.FP4_CODE)


def assert_decodes_as_the_reference(weight: NF4 | INT8, dtype: torch.dtype, start: int = 0) -> None:
    want = weight.reference(dtype)
    assert_same_bits(weight.decode(dtype), want)
    framed = Framed(weight.shape, dtype, start)
    weight.decode_into(framed.out)
    assert_same_bits(framed.out, want)
    framed.assert_untouched_around()


# -- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_nf4_decodes_as_the_reference(codec: str, dtype: torch.dtype, blocksize: int) -> None:
    for shape, nested in itertools.product(SHAPES, (0, 32, 256)):
        assert_decodes_as_the_reference(NF4.random(shape, blocksize, nested), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divisor", [127.0, 1.0])
def test_int8_decodes_as_the_reference(codec: str, dtype: torch.dtype, divisor: float) -> None:
    for shape, parts in [
        ((1, 1), 1),
        ((0, 5), 1),
        ((5, 0), 1),
        ((3, 7), 1),
        ((3, 7), 7),
        ((5, 96), 1),
        ((5, 96), 3),
        ((5, 96), 4),
        ((17, 2049), 1),
        ((17, 2049), 3),
        ((2, 40_000), 8),
    ]:
        weight = INT8.random(shape, parts, divisor)
        assert_decodes_as_the_reference(weight, dtype)
        if parts == 1:
            assert_same_bits(
                INT8(weight.q, weight.scale[:, 0], divisor).decode(dtype), weight.decode(dtype)
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_may_begin_at_any_byte(codec: str, dtype: torch.dtype) -> None:
    for start, nested in itertools.product(range(1, 16), (0, 256)):
        weight = NF4.random((5, 67), 64, nested)
        room = random_bytes(start + weight.q.numel() + 16)
        weight.q = room[start : start + weight.q.numel()]
        room = torch.cat([weight.absmax, weight.absmax, weight.absmax])
        weight.absmax = room[start % 7 : start % 7 + weight.absmax.numel()]
        assert weight.q.data_ptr() % 16 == start
        assert_decodes_as_the_reference(weight, dtype, start)
        bytes_ = random_bytes(start + 5 * 67).view(torch.int8)
        whole = INT8.random((5, 67))
        assert_decodes_as_the_reference(INT8(bytes_[start:].view(5, 67), whole.scale), dtype, start)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_codes_may_be_stored_as_another_dtype(storage: torch.dtype) -> None:
    for nested in (0, 256):
        weight = NF4.random((6, 96), 64, nested)
        want = weight.reference(torch.bfloat16)
        weight.q = weight.q.view(storage).view(-1, 1)
        assert_decodes_as_the_reference(weight, torch.bfloat16)
        assert_same_bits(weight.decode(torch.bfloat16), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", [None, fp4()], ids=["nf4", "fp4"])
def test_scales_of_any_kind(codec: str, dtype: torch.dtype, code: Tensor | None) -> None:
    absmax = torch.tensor(SPECIAL)
    all_codes = torch.arange(256).to(torch.uint8)
    for blocksize in (32, 512):
        numel = len(SPECIAL) * blocksize - 5
        q = all_codes.repeat(-(-numel // 512))[: (numel + 1) // 2]
        weight = NF4(q, absmax, blocksize, (numel,), code)
        assert_decodes_as_the_reference(weight, dtype)
        # Every kind of nested scale and mean, too.
        for offset in SPECIAL:
            parts = (torch.tensor(SPECIAL[-1:]), reference.nested_code(), torch.tensor(offset), 32)
            nested = NF4(q, all_codes[: len(SPECIAL)], blocksize, (numel,), code, parts)
            assert_decodes_as_the_reference(nested, dtype)
            nested.nested = (torch.tensor([offset]), parts[1], torch.tensor(0.25), 32)
            assert_decodes_as_the_reference(nested, dtype)
    rows = all_codes.view(torch.int8).repeat(len(SPECIAL), 1)
    for divisor in (127.0, 1.0):
        assert_decodes_as_the_reference(INT8(rows, absmax, divisor), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
def test_results_past_the_cache_at_any_address(every_codec: Any, kind: str, dtype: Any) -> None:
    numel = (16 << 20) // dtype.itemsize + 40_001
    weight = {
        "nf4": lambda: NF4.random((numel,), 64),
        "nested": lambda: NF4.random((numel,), 32, 256),
        "int8": lambda: INT8.random((3, numel // 3 + 1)),
    }[kind]()
    want = weight.reference(dtype)
    assert want.nbytes > 16 << 20
    for _ in every_codec():
        assert_same_bits(weight.decode(dtype), want)
        for start in (0, 1, 16):
            framed = Framed(weight.shape, dtype, start)
            assert framed.out.data_ptr() % 64 == start * dtype.itemsize % 64
            weight.decode_into(framed.out)
            assert_same_bits(framed.out, want)
            framed.assert_untouched_around()


@pytest.mark.parametrize(
    ("dtype", "slices"), [(torch.bfloat16, 16), (torch.float16, 4), (torch.float32, 2)]
)
def test_a_million_blocks_are_the_same_in_every_codec(
    every_codec: Any, dtype: torch.dtype, slices: int
) -> None:
    """Half of the scales have random bits, half are those of weights."""
    blocks = 62_500
    out, want = (torch.empty(blocks * 64, dtype=dtype) for _ in range(2))
    for _ in range(slices):
        weight = NF4.random((blocks * 64,), 64)
        weight.absmax[::2] = random_bits(blocks // 2)
        for name in every_codec():
            weight.decode_into(out)
            if name == "scalar":
                want.copy_(out)
            assert_same_bits(out, want)
    assert_same_bits(want, weight.reference(dtype))


# -- several weights in one arena ------------------------------------------------------------------


@dataclass
class Arena:
    """Weights of one shape, their parts somewhere in one piece of memory."""

    units: list[NF4]
    memory: Tensor
    offsets: Tensor

    @staticmethod
    def random(shape: Sequence[int], count: int, blocksize: int, nested: int = 0) -> Arena:
        units = [NF4.random(shape, blocksize, nested) for _ in range(count)]
        offsets = torch.zeros(count, 3 if nested else 2, dtype=torch.int64)
        pieces: list[Tensor] = []
        end = 0
        places = [(unit, part) for unit in range(count) for part in range(offsets.shape[1])]
        for place in torch.randperm(len(places)).tolist():
            unit, part = places[place]
            tensor = units[unit].tensors[part]
            # Numbers are aligned; bytes may be anywhere.
            gap = -end % 4 + 4 if tensor.dtype == torch.float32 else 3
            pieces += [random_bytes(gap), tensor.view(torch.uint8)]
            offsets[unit, part] = end + gap
            end += gap + tensor.nbytes
        return Arena(units, torch.cat(pieces), offsets)

    def decode(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        first = self.units[0]
        code = means = None
        nested_blocksize = 256
        if first.nested:
            _, code, _, nested_blocksize = first.nested
            # A code is shared, so are the sizes; every unit has a mean.
            means = torch.stack([unit.nested[2] for unit in self.units])
        sizes = (first.blocksize, nested_blocksize, len(self.units), first.shape)
        return call(
            OPS.dequantize_nf4_grouped,
            self.memory,
            self.offsets,
            code,
            means,
            *sizes,
            dtype,
            first.code,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("nested", [0, 32, 256])
def test_units_in_an_arena_decode_as_alone(
    codec: str, dtype: torch.dtype, count: int, nested: int
) -> None:
    for shape, blocksize in itertools.product(SHAPES, (32, 64, 256)):
        arena = Arena.random(shape, count, blocksize, nested)
        want = torch.stack([unit.reference(dtype) for unit in arena.units])
        assert_same_bits(arena.decode(dtype), want)
    arena = Arena.random((33, 7), count, 64, nested)
    for unit in arena.units:
        unit.code = fp4()
    assert_same_bits(
        arena.decode(dtype), torch.stack([unit.reference(dtype) for unit in arena.units])
    )


def test_no_units_are_nothing() -> None:
    got = OPS.dequantize_nf4_grouped(
        random_bytes(8), torch.zeros(0, 2).long(), None, None, 64, 256, 0, [3, 5], torch.float16
    )
    assert (got.shape, got.dtype) == ((0, 3, 5), torch.float16)


@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("where", [-1, -(2**62), "one byte too far", 2**62])
def test_parts_outside_the_arena_are_refused(nested: int, part: int, where: Any) -> None:
    arena = Arena.random((8, 64), 3, 64, nested)
    if part >= arena.offsets.shape[1]:
        return
    last = arena.memory.numel() - arena.units[1].tensors[part].nbytes
    arena.offsets[1, part] = last + 1 if where == "one byte too far" else where
    with pytest.raises(QuantizationError, match=f"Part {part} of a unit, .* must lie in the arena"):
        arena.decode()


@pytest.mark.parametrize(("nested", "part"), [(0, 1), (256, 2)])
@pytest.mark.parametrize("phase", [1, 2, 3])
def test_misaligned_parts_are_refused(nested: int, part: int, phase: int) -> None:
    arena = Arena.random((8, 64), 3, 64, nested)
    arena.offsets[2, part] = 4 + phase
    with pytest.raises(QuantizationError, match=f"Part {part} of a unit must be aligned"):
        arena.decode()


# -- packing ---------------------------------------------------------------------------------------


def at_thresholds() -> Tensor:
    """Where a code ends and the next one begins, in blocks of scale 1."""
    code = torch.tensor(reference.NF4_CODE)
    last = (code[:-1] + code[1:]) / 2
    first = last.nextafter(torch.tensor(2.0))
    return torch.cat([last, first, torch.tensor([1.0, -1.0])]).repeat(300, 2)


def weights_to_pack(dtype: torch.dtype) -> Iterator[Tensor]:
    for shape in [(1,), (0,), (33,), (64,), (3, 67), (5, 96), (2, 3, 40), (300, 333)]:
        yield torch.randn(shape).to(dtype)
        yield (torch.randn(shape) * 1e-3).to(dtype)
    whole = torch.randn(40, 64)
    whole[3] = 0
    whole[4] = -0.0
    whole[5] *= 1e-40  # denormal, but in float16 all zeros
    whole[6] = torch.randint(-3, 4, (64,)) * torch.finfo(dtype).smallest_normal / 1024
    whole[7] *= 6e-8
    whole[8, 5] = torch.finfo(dtype).max
    whole[9, 63] = torch.finfo(dtype).min
    whole[10] = 0.5
    whole[11] = torch.linspace(-1, 1, 64)
    yield at_thresholds().to(dtype)
    yield whole.to(dtype)
    yield whole.to(dtype).t()
    yield whole.to(dtype)[::2, ::3]


def test_a_number_half_way_between_two_codes_gets_the_lower_one() -> None:
    q, absmax = OPS.quantize_nf4(at_thresholds(), 64)
    codes = torch.stack([q >> 4, q & 15], dim=1).view(-1, 32)
    assert torch.equal(absmax, torch.ones(300))
    assert codes.unique(dim=0).tolist() == [[*range(15), *range(1, 16), 15, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_nf4_packs_as_the_reference(dtype: torch.dtype, blocksize: int) -> None:
    for weight in weights_to_pack(dtype):
        want = reference.quantize_nf4(weight, blocksize)
        got = OPS.quantize_nf4(weight, blocksize)
        nested = OPS.quantize_nf4_nested(weight, blocksize)
        for one, other in zip(got, want, strict=True):
            assert_same_bits(one, other)
        for one, other in zip(nested, (want[0], *reference.quantize_absmax(want[1])), strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_packs_as_the_reference(dtype: torch.dtype) -> None:
    for weight in weights_to_pack(dtype):
        if weight.dim() != 2:
            continue
        weight = weight.clamp(-60000, 60000)
        for one, other in zip(
            OPS.quantize_int8(weight), reference.quantize_int8(weight), strict=True
        ):
            assert_same_bits(one, other)
    for shape in ((0, 5), (5, 0)):
        q, scale = OPS.quantize_int8(torch.zeros(shape, dtype=dtype))
        assert (q.shape, q.dtype, scale.shape) == (shape, torch.int8, shape[:1])
        assert_same_bits(scale, torch.zeros(shape[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_code_seven(dtype: torch.dtype) -> None:
    for zero in (0.0, -0.0):
        q, absmax = OPS.quantize_nf4(torch.full((3, 64), zero, dtype=dtype), 64)
        assert (q == 0x77).all()
        assert_same_bits(absmax, torch.zeros(3))
        q, scale = OPS.quantize_int8(torch.full((3, 64), zero, dtype=dtype))
        assert not q.any()
        assert_same_bits(scale, torch.zeros(3))
    q, _ = OPS.quantize_nf4(torch.zeros(3, dtype=dtype), 64)
    assert q.tolist() == [0x77, 0x70]


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([[1.0, math.nan]]),
        torch.tensor([[1.0, math.inf]]),
        torch.tensor([[-math.inf, 1.0]]).bfloat16(),
        torch.tensor([[1.0, math.nan]]).half(),
        torch.zeros(70_000, 1).index_fill(0, torch.tensor(69_999), math.nan),
        torch.ones(2, 2, dtype=torch.int32),
        torch.ones(2, 2, dtype=torch.uint8),
        torch.ones(2, 2).to(torch.float8_e4m3fn),
        torch.ones(2, 2, dtype=torch.float64),
    ],
    ids=["nan", "inf", "-inf", "nan16", "last", "int", "bytes", "float8", "float64"],
)
@pytest.mark.parametrize("op", ["nf4", "nested", "int8", "reference"])
def test_what_cannot_be_packed_is_refused(weight: Tensor, op: str) -> None:
    pack = {
        "nf4": lambda: call(OPS.quantize_nf4, weight, 64),
        "nested": lambda: call(OPS.quantize_nf4_nested, weight, 64),
        "int8": lambda: call(OPS.quantize_int8, weight),
        "reference": lambda: reference.quantize_nf4(weight, 64),
    }[op]
    is_other = weight.dtype not in DTYPES
    rule = "are float32, float16 or bfloat16" if is_other else "must be finite"
    with pytest.raises(QuantizationError, match=f"Weights to quantise {rule}"):
        pack()


@pytest.mark.parametrize("shape", [(), (64,), (2, 3, 64)])
def test_int8_packs_matrices_only(shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantizationError, match=r"INT8 packs matrices \[out, in\], got"):
        call(OPS.quantize_int8, torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_refuses_what_float16_does_not_hold(dtype: torch.dtype) -> None:
    assert OPS.quantize_int8(torch.full((1, 2), 65280.0, dtype=dtype))[1].item() == 65280
    with pytest.raises(QuantizationError, match="must be finite"):
        call(OPS.quantize_int8, torch.full((1, 2), 65536.0, dtype=dtype))


def weights_of_all_kinds(dtype: torch.dtype) -> Iterator[Tensor]:
    yield torch.randn(300, 128).to(dtype)
    yield (torch.randn(64, 333) * 0.02).to(dtype)
    yield torch.randn(5, 7).to(dtype)
    outliers = torch.randn(128, 256)
    outliers[3, 5], outliers[9] = 1000, 0
    yield outliers.to(dtype)
    yield at_thresholds().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_is_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    for weight in weights_of_all_kinds(dtype):
        options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": False}
        want, state = bnb.quantize_4bit(weight, **options)
        q, absmax = OPS.quantize_nf4(weight, 64)
        want = want.flatten()
        if weight.numel() % 2 != 0:
            want[-1] &= 0xF0  # the last low half means nothing
        assert_same_bits(q, want)
        assert_same_bits(absmax, state.absmax)
        assert_same_bits(torch.tensor(reference.NF4_CODE), state.code)
        want, scale, _ = bnb.int8_vectorwise_quant(weight.half())
        q, ours = OPS.quantize_int8(weight)
        assert_same_bits(q, want)
        assert_same_bits(ours, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_packing_is_that_of_bitsandbytes_or_nearer(dtype: torch.dtype) -> None:
    """Its CPU kernel takes the second nearest code now and then."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    code = reference.nested_code()
    for weight in weights_of_all_kinds(dtype):
        options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
        _, state = bnb.quantize_4bit(weight, **options)
        _, absmax = OPS.quantize_nf4(weight, 64)
        _, ours, nested_absmax, offset = OPS.quantize_nf4_nested(weight, 64)
        assert_same_bits(offset, state.offset)
        assert_same_bits(nested_absmax, state.state2.absmax)
        assert_same_bits(code, state.state2.code)
        assert state.state2.blocksize == 256

        def error(
            codes: Tensor, absmax: Tensor = absmax, parts: Any = (nested_absmax, code, offset)
        ) -> Tensor:
            decoded = reference.dequantize_absmax(codes, *parts, 256)
            return (decoded.double() - absmax.double()).abs()

        assert (error(ours) <= error(state.absmax)).all()
        assert (error(ours) != error(state.absmax)).float().mean() <= 0.03


# -- properties ------------------------------------------------------------------------------------

BRIEFLY = settings(max_examples=40, deadline=None)
# No overflow, no denormals: these have tests of their own.
ORDINARY = st.floats(-100.0, 100.0, width=16, allow_subnormal=False)
NUMBERS = st.lists(ORDINARY | st.just(0.0), min_size=1, max_size=300).map(torch.tensor)
WIDEST_GAP = max(b - a for a, b in itertools.pairwise(reference.NF4_CODE))


@BRIEFLY
@given(NUMBERS, st.sampled_from([32, 64, 256]), st.sampled_from(DTYPES))
def test_nf4_errs_by_half_a_gap_at_most(
    numbers: Tensor, blocksize: int, dtype: torch.dtype
) -> None:
    weight = numbers.to(dtype)
    packed = NF4.packed(weight, blocksize)
    absmax = packed.absmax.repeat_interleave(blocksize)[: weight.numel()]
    rounding = torch.finfo(dtype).eps + 1e-6
    error = (packed.decode(dtype).double() - weight.double()).abs()
    assert (error <= (WIDEST_GAP / 2 + rounding) * absmax.double()).all()


@BRIEFLY
@given(NUMBERS, st.sampled_from([32, 64, 256]), st.sampled_from(DTYPES))
def test_what_was_packed_once_is_packed_without_loss(
    numbers: Tensor, blocksize: int, dtype: torch.dtype
) -> None:
    once = NF4.packed(numbers.to(dtype), blocksize).decode(dtype)
    again = NF4.packed(once, blocksize)
    assert_same_bits(again.decode(dtype), once)


@BRIEFLY
@given(NUMBERS, st.sampled_from(DTYPES))
def test_int8_errs_by_half_a_step_at_most(numbers: Tensor, dtype: torch.dtype) -> None:
    weight = numbers.to(dtype).half().reshape(1, -1)
    q, scale = OPS.quantize_int8(weight)
    error = (OPS.dequantize_int8(q, scale, torch.float32).double() - weight.double()).abs()
    assert (error <= scale[:, None].double() * (0.5 / 127 + 1e-6)).all()


@BRIEFLY
@given(NUMBERS, st.integers(-8, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_power_of_two_goes_through(numbers: Tensor, power: int, dtype: torch.dtype) -> None:
    weight = numbers.to(dtype)
    packed, scaled = NF4.packed(weight, 64), NF4.packed(weight * 2.0**power, 64)
    assert_same_bits(scaled.q, packed.q)
    assert_same_bits(scaled.decode(dtype), packed.decode(dtype) * 2.0**power)


# -- products --------------------------------------------------------------------------------------

# In and out features, blocksize: rows of whole pairs of blocks, of an odd number of them, rows
# that begin within a block or a byte, rows longer than what is decoded at a time.
PRODUCTS = [
    (128, 64, 32),
    (128, 17, 64),
    (128, 3, 128),
    (128, 64, 256),
    (256, 300, 64),
    (256, 1, 256),
    (512, 17, 256),
    (64, 17, 64),
    (192, 300, 32),
    (192, 3, 64),
    (320, 64, 64),
    (33, 64, 32),
    (100, 17, 64),
    (77, 300, 128),
    (1, 3, 32),
    (2176, 17, 128),
    (4160, 3, 64),
    (8192, 3, 4096),
]


def linear64(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


class Near:
    """As good as a product of the decoded weight with sums in float32 can be."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self.dtype = x.dtype
        self.want = linear64(x, weight, bias)
        norms = x.double().norm(dim=-1, keepdim=True) * weight.double().norm(dim=-1)
        sums = 2 * torch.finfo(torch.float32).eps * math.sqrt(x.shape[-1]) * norms
        self.bound = 4 * torch.finfo(x.dtype).eps * self.want.abs() + sums

    def check(self, got: Tensor, rows: Any = ...) -> None:
        assert (got.dtype, got.shape) == (self.dtype, self.want[rows].shape)
        excess = (got.double() - self.want[rows]).abs() - self.bound[rows]
        assert (excess <= 0).all(), excess.max()


def assert_near(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    Near(x, weight, bias).check(got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [0, 32])
def test_nf4_linear_is_within_its_bound(codec: str, dtype: torch.dtype, nested: int) -> None:
    for width, out_features, blocksize in PRODUCTS:
        weight = NF4.random((out_features, width), blocksize, nested)
        assert_product_is_near(weight, dtype)
    weight.code = fp4()
    assert_product_is_near(weight, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_is_within_its_bound(codec: str, dtype: torch.dtype) -> None:
    for index, (width, out_features, blocksize) in enumerate(PRODUCTS):
        parts = (1, math.gcd(width, blocksize), width)[index % 3]
        divisor = (127.0, 1.0)[index % 2]
        assert_product_is_near(INT8.random((out_features, width), parts, divisor), dtype)


def assert_product_is_near(weight: NF4 | INT8, dtype: torch.dtype) -> None:
    out_features, width = weight.shape
    x, bias = torch.randn(33, width).to(dtype), torch.randn(out_features).to(dtype)
    near = [Near(x, weight.decode(dtype), bias) for bias in (None, bias)]
    for count in (*range(1, 10), 16, 33):
        has_bias = (count + out_features) % 2 == 0
        got = weight.linear(x[:count], bias if has_bias else None)
        near[has_bias].check(got, slice(count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 16])
def test_weights_of_several_tiles(codec: str, dtype: torch.dtype, count: int) -> None:
    for width, blocksize in ((4096, 64), (4100, 64), (4100, 4096)):
        for weight in (NF4.random((300, width), blocksize, 256), INT8.random((300, width))):
            x, bias = torch.randn(count, width).to(dtype), torch.randn(300).to(dtype)
            assert_near(weight.linear(x, bias), x, weight.decode(dtype), bias)


@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("width", [65_536, 65_664])
def test_rows_of_very_many_blocks(codec: str, width: int, nested: int) -> None:
    weight = NF4.random((19, width), 64, nested)
    x = torch.randn(3, width).bfloat16()
    assert_near(weight.linear(x), x, weight.decode(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
def test_inputs_of_any_shape(codec: str, kind: str, dtype: torch.dtype) -> None:
    shape = (17, 128)
    weight: Any = {
        "nf4": lambda: NF4.random(shape, 64),
        "nested": lambda: NF4.random(shape, 64, 256),
        "int8": lambda: INT8.random(shape),
    }[kind]()
    decoded = weight.decode(dtype)
    bias = torch.randn(17).to(dtype)
    long = torch.randn(40, 300).to(dtype)
    for x in (
        long[0, :128],
        long[:1, :128],
        long[:2, :128].reshape(2, 1, 128),
        long[:, :128].reshape(5, 2, 4, 128),
        long[:3, 1:129],
        long[::13, :256:2],
        long[:, :3].repeat(4, 1)[:128].t(),
        long[:, :30].repeat(4, 1)[:128].t(),
        long[:1, :128].expand(6, 128),
        long[:12, :128].reshape(3, 4, 128).transpose(0, 1),
    ):
        assert_near(weight.linear(x), x, decoded)
        assert_near(weight.linear(x, bias), x, decoded, bias)
    for empty in ((0, 128), (2, 0, 128), (0, 2, 128)):
        got = weight.linear(torch.zeros(empty, dtype=dtype), bias)
        assert (got.shape, got.dtype) == ((*empty[:-1], 17), dtype)


@pytest.mark.parametrize("count", [1, 20])
def test_weights_without_elements(count: int) -> None:
    x, bias = torch.randn(count, 128), torch.randn(3)
    for weight in (NF4.random((0, 128), 64), INT8.random((0, 128))):
        assert weight.linear(x).shape == (count, 0)
    for weight in (NF4.random((3, 0), 64), INT8.random((3, 0))):
        assert torch.equal(weight.linear(x[:, :0], bias), bias.expand(count, 3))
        assert torch.equal(weight.linear(x[:, :0]), torch.zeros(count, 3))


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
def test_errors_are_no_larger_than_those_of_torch(codec: str, kind: str, count: int) -> None:
    numbers = torch.randn(512, 4096)
    weight: Any = {
        "nf4": lambda: NF4.packed(numbers, 64),
        "nested": lambda: NF4.packed(numbers, 64, is_nested=True),
        "int8": lambda: INT8(*OPS.quantize_int8(numbers)),
    }[kind]()
    decoded = weight.decode(torch.bfloat16)
    x = torch.randn(count, 4096).bfloat16()
    want = linear64(x, decoded, None)

    def rms(got: Tensor) -> float:
        return (got.double() - want).square().mean().sqrt().item()

    assert rms(weight.linear(x)) <= 1.05 * rms(functional.linear(x, decoded))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("count", [1, 3, 8, 16])
def test_scales_of_any_kind_go_through_a_product(
    codec: str, dtype: torch.dtype, nested: bool, count: int
) -> None:
    """A row for each: one block of it, two of them, all four; and of each sign."""
    scales = [value for value in SPECIAL if not 1e30 < abs(value) < math.inf]
    absmax = torch.rand(3, len(scales), 4) + 0.5
    for row, value in enumerate(scales):
        absmax[0, row, row % 4] = value
        absmax[1, row, [1, 2]] = value
        absmax[2, row] = value
    rows = 3 * len(scales)
    # Without code 7 an infinite block is not NaN at once: positive codes only.
    low = torch.randint(8, 16, (2, rows * 128)).to(torch.uint8)
    for q in (low[0] << 4 | low[1], random_bytes(rows * 128)):
        weight = NF4(q, absmax.flatten(), 64, (rows, 256))
        if nested:
            code = torch.cat([torch.tensor(scales), torch.rand(256 - len(scales)) + 0.5])
            which = random_bytes(3, len(scales), 4) | 128
            for row in range(len(scales)):
                which[0, row, row % 4] = row
                which[1, row, [1, 2]] = row
                which[2, row] = row
            parts = (torch.ones(-(-rows * 4 // 32)), code, torch.tensor(0.0), 32)
            weight = NF4(q, which.flatten(), 64, (rows, 256), None, parts)
        x = torch.rand(count, 256).to(dtype) + 0.5
        decoded = weight.decode(dtype)
        assert_same_bits(decoded, weight.reference(dtype))
        want = linear64(x, decoded, None)
        got = weight.linear(x)
        # Where a float16 overflows, want's rounding does.
        rounded = want.to(dtype)
        finite = rounded.isfinite()
        assert torch.equal(got.isnan(), rounded.isnan())
        assert torch.equal(got.isinf(), rounded.isinf())
        assert torch.equal(got[got.isinf()], rounded[rounded.isinf()])
        assert 0 < finite.sum() < finite.numel()
        # Denormal weights may count as nothing.
        tiny = 256 * 1.5 * torch.finfo(torch.float32).tiny + torch.finfo(dtype).smallest_normal
        norms = x.double().norm(dim=-1, keepdim=True) * decoded.double().norm(dim=-1)
        bound = (
            4 * torch.finfo(dtype).eps * want.abs() + 32 * torch.finfo(torch.float32).eps * norms
        )
        error = (got.double() - want).abs()
        assert (error <= bound + tiny)[finite].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 8, 16])
def test_inputs_of_any_kind_go_through_a_product(
    codec: str, dtype: torch.dtype, count: int
) -> None:
    for weight in (NF4.random((20, 256), 64), INT8.random((20, 256))):
        decoded = weight.decode(dtype)
        x = torch.randn(count, 256).to(dtype)
        x[0, 5] = math.nan
        x[count // 2, 100] = math.inf
        x[-1, 200] = -math.inf
        want, got = linear64(x, decoded, None).to(dtype), weight.linear(x)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
        assert torch.equal(got[got.isinf()], want[want.isinf()])


# -- gradients -------------------------------------------------------------------------------------


def make_weight(kind: str, shape: tuple[int, int] = (17, 192)) -> Any:
    makers: dict[str, Callable[[], NF4 | INT8]] = {
        "nf4": lambda: NF4.random(shape, 64),
        "fp4": lambda: NF4.random(shape, 64, 0, fp4()),
        "nested": lambda: NF4.random(shape, 64, 256),
        "int8": lambda: INT8.random(shape, 3, 1.0),
    }
    return makers[kind]()


KINDS = ["nf4", "fp4", "nested", "int8"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(192,), (1, 192), (20, 192), (2, 3, 192), (0, 192)])
def test_gradients_are_those_of_a_product_with_the_decoded_weight(
    kind: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    weight = make_weight(kind)
    for part in weight.tensors[1:]:
        part.requires_grad_(part.is_floating_point())
    x = torch.randn(shape).to(dtype).requires_grad_()
    bias = torch.randn(17).to(dtype).requires_grad_()
    grad = torch.randn(*shape[:-1], 17).to(dtype)
    weight.linear(x, bias).backward(grad)
    with torch.no_grad():
        decoded = weight.decode(dtype)
    twin, twin_bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    functional.linear(twin, decoded, twin_bias).backward(grad)
    assert_near(x.grad, grad, decoded.t())
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(bias.grad, twin_bias.grad)
    assert all(part.grad is None for part in weight.tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_one_input_only(kind: str) -> None:
    weight = make_weight(kind)
    x, bias = torch.randn(4, 192), torch.randn(17)
    alone = bias.clone().requires_grad_()
    weight.linear(x, alone).sum().backward()
    assert torch.equal(alone.grad, torch.full((17,), 4.0))
    for other in (None, bias):
        alone = x.clone().requires_grad_()
        weight.linear(alone, other).sum().backward()
        want = weight.decode(torch.float32).sum(0).expand(4, 192)
        torch.testing.assert_close(alone.grad, want)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_saves_no_decoded_weight(kind: str) -> None:
    weight, saved = make_weight(kind, (128, 192)), []
    x = torch.randn(4, 192, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weight.linear(x)
    packed = {
        part.data_ptr() for part in (*weight.tensors, *(() if kind != "fp4" else [weight.code]))
    }
    assert {tensor.data_ptr() for tensor in saved} == packed


# -- every op, as torch sees it --------------------------------------------------------------------


@dataclass
class Case:
    op: Any
    args: tuple[Any, ...]
    out: Tensor | None = None

    def run(self) -> list[Tensor]:
        return outputs_of(self.op, self.args, self.out)


def outputs_of(op: Any, args: Sequence[Any], out: Tensor | None) -> list[Tensor]:
    if out is not None:
        op(*args, out=out)
        return [out]
    done = op(*args)
    return [done] if isinstance(done, Tensor) else list(done)


def decoding_case(weight: NF4, name: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    packet, args = weight.decoding
    out = torch.zeros(weight.shape, dtype=dtype) if name == "out" else None
    return Case(getattr(packet, name), (*args, dtype, weight.code), out)


def arena_case(nested: int) -> Case:
    arena = Arena.random((5, 67), 3, 64, nested)
    _, code, _, _ = arena.units[0].nested or (None,) * 4
    means = torch.rand(3) if nested else None
    tensors = (arena.memory, arena.offsets, code, means)
    return Case(OPS.dequantize_nf4_grouped.default, (*tensors, 64, 256, 3, [5, 67], torch.float16))


def linear_case(kind: str, *shape: int, bias: bool = False) -> Case:
    weight = make_weight(kind)
    x = torch.randn(shape)
    shift = torch.randn(17) if bias else None
    if isinstance(weight, INT8):
        return Case(OPS.int8_linear.default, (x, weight.q, weight.scale, shift, weight.divisor))
    sizes = (weight.blocksize, 17)
    args = (x, weight.q, weight.absmax, shift, *sizes, weight.code, *(weight.nested or ()))
    return Case(OPS.nf4_linear.default, args)


def int8_case(name: str) -> Case:
    weight = INT8.random((5, 96), 3)
    out = torch.zeros(5, 96) if name == "out" else None
    op = getattr(OPS.dequantize_int8, name)
    return Case(op, (weight.q, weight.scale, torch.float32, 1.0), out)


CASES: dict[str, Callable[[], Case]] = {
    "nf4": lambda: decoding_case(NF4.random((5, 67), 64), "default"),
    "nf4.out": lambda: decoding_case(NF4.random((5, 67), 64, 0, fp4()), "out"),
    "nested": lambda: decoding_case(NF4.random((5, 67), 64, 256, fp4()), "default"),
    "nested.out": lambda: decoding_case(NF4.random((5, 67), 64, 256), "out"),
    "grouped": lambda: arena_case(0),
    "grouped nested": lambda: arena_case(256),
    "int8": lambda: int8_case("default"),
    "int8.out": lambda: int8_case("out"),
    "quantize_nf4": lambda: Case(OPS.quantize_nf4.default, (torch.randn(5, 67), 64)),
    "quantize_nf4_nested": lambda: Case(
        OPS.quantize_nf4_nested.default, (torch.randn(5, 67).bfloat16(), 64)
    ),
    "quantize_int8": lambda: Case(OPS.quantize_int8.default, (torch.randn(5, 67).half(),)),
    "nf4_linear": lambda: linear_case("nf4", 3, 192),
    "nf4_linear bias": lambda: linear_case("fp4", 2, 3, 192, bias=True),
    "nf4_linear nested": lambda: linear_case("nested", 20, 192, bias=True),
    "int8_linear": lambda: linear_case("int8", 3, 192),
    "int8_linear bias": lambda: linear_case("int8", 2, 9, 192, bias=True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_finds_nothing_wrong(name: str, requires_grad: bool) -> None:
    """Whatever asks for a gradient: only inputs and biases get one."""
    case = CASES[name]()
    for argument in case.args:
        if isinstance(argument, Tensor) and argument.is_floating_point():
            argument.requires_grad_(requires_grad)
    kwargs = {} if case.out is None else {"out": case.out}
    result = torch.library.opcheck(case.op, case.args, kwargs)
    assert set(result.values()) == {"SUCCESS"}
    if "linear" not in name:
        assert not any(output.requires_grad for output in case.run())


@pytest.mark.parametrize("name", CASES)
def test_fakes_tell_shape_dtype_and_layout(name: str) -> None:
    case = CASES[name]()
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in case.args]
    out = None if case.out is None else mode.from_tensor(case.out)
    with mode:
        told = outputs_of(case.op, fakes, out)
    for fake, real in zip(told, case.run(), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        assert fake.device == real.device


@pytest.mark.parametrize(
    "name", [name for name in CASES if "linear" not in name and "quantize" not in name]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.float8_e5m2])
@pytest.mark.parametrize("is_fake", [False, True], ids=["real", "fake"])
def test_decoding_to_another_dtype_is_refused(name: str, dtype: torch.dtype, is_fake: bool) -> None:
    case = CASES[name]()
    args: list[Any] = [dtype if isinstance(a, torch.dtype) else a for a in case.args]
    out = None if case.out is None else case.out.to(dtype)
    with (
        FakeTensorMode(allow_non_fake_inputs=True) if is_fake else torch.no_grad(),
        pytest.raises(
            (QuantizationError, RuntimeError), match="decode to float32, float16 or bfloat16, got"
        ),
    ):
        call(outputs_of, case.op, args, out)


@pytest.mark.parametrize("blocksize", [-64, 0, 1, 16, 48, 96, 100, 8192])
@pytest.mark.parametrize("is_fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("name", [name for name in CASES if "int8" not in name])
def test_blocksizes_are_powers_of_two_from_32_to_4096(
    name: str, blocksize: int, is_fake: bool
) -> None:
    case = CASES[name]()
    args = [blocksize if type(a) is int and a == 64 else a for a in case.args]
    with (
        FakeTensorMode(allow_non_fake_inputs=True) if is_fake else torch.no_grad(),
        pytest.raises(
            (QuantizationError, RuntimeError),
            match=f"A blocksize is a power of two from 32 to 4096, got {blocksize}",
        ),
    ):
        call(outputs_of, case.op, args, case.out)


# -- compiled --------------------------------------------------------------------------------------


@pytest.fixture
def counters() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_in_one_graph_to_the_same_bits(name: str, backend: str, counters: Any) -> None:
    case = CASES[name]()
    want = [output.clone() for output in case.run()]
    out = None if case.out is None else torch.zeros_like(case.out)

    def run(*args: Any) -> list[Tensor]:
        return outputs_of(case.op, args, out)

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for _ in range(2):
        for got, wanted in zip(compiled(*case.args), want, strict=True):
            assert_same_bits(got, wanted)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("kind", ["nested", "int8"])
def test_one_graph_serves_any_number_of_rows(kind: str, backend: str, counters: Any) -> None:
    weight = make_weight(kind)
    run = torch.compile(weight.linear, backend=backend, fullgraph=True, dynamic=True)
    for count in (2, 5, 9, 20):
        x = torch.randn(count, 192)
        assert_same_bits(run(x), weight.linear(x))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", ["nested", "int8"])
def test_gradients_survive_the_compiler(kind: str, counters: Any) -> None:
    weight = make_weight(kind)

    def gradients(linear: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        x = torch.randn(5, 192, requires_grad=True)
        bias = torch.randn(17, requires_grad=True)
        linear(x, bias).square().sum().backward()
        return [x.grad, bias.grad]

    run = torch.compile(weight.linear, fullgraph=True)
    for got, want in zip(gradients(run), gradients(weight.linear), strict=True):
        torch.testing.assert_close(got, want)


# -- what does not belong together -----------------------------------------------------------------


def test_only_codecs_that_exist_can_be_used() -> None:
    before = OPS.use_codec("auto")
    with pytest.raises(ConfigError, match='that this machine has, got "mmx"; use "auto", or one'):
        call(OPS.use_codec, "mmx")
    assert before in CODECS
    assert OPS.use_codec("auto") == before
    assert call(OPS.use_codec, "scalar") == "scalar"
    assert OPS.use_codec("auto") == before


Q, ABSMAX = torch.zeros(96, dtype=torch.uint8), torch.zeros(3)
CODE, X, ROWS = torch.zeros(16), torch.zeros(2, 64), torch.zeros(3, 64, dtype=torch.int8)
BYTES, NESTED = torch.zeros(3, dtype=torch.uint8), torch.zeros(1)
NESTED_CODE, MEAN = torch.zeros(256), torch.zeros(())


def nf4(
    q: Tensor = Q,
    absmax: Tensor = ABSMAX,
    shape: Sequence[int] = (3, 64),
    code: Tensor | None = None,
) -> Any:
    return OPS.dequantize_nf4(q, absmax, 64, shape, torch.float32, code)


def nested(
    absmax: Tensor = BYTES,
    nested_absmax: Tensor = NESTED,
    code: Tensor = NESTED_CODE,
    mean: Tensor = MEAN,
    blocksize: int = 256,
) -> Any:
    return OPS.dequantize_nf4_nested(
        Q, absmax, nested_absmax, code, mean, 64, blocksize, [3, 64], torch.float32
    )


def into(out: Tensor) -> Any:
    OPS.dequantize_nf4.out(Q, ABSMAX, 64, [3, 64], torch.float32, out=out)


def int8(q: Tensor = ROWS, scale: Tensor = ABSMAX) -> Any:
    return OPS.dequantize_int8(q, scale, torch.float32)


def nf4_linear(x: Tensor = X, bias: Tensor | None = None, *nested: Any) -> Any:
    return OPS.nf4_linear(x, Q, ABSMAX, bias, 64, 3, None, *nested)


def int8_linear(x: Tensor = X, bias: Tensor | None = None) -> Any:
    return OPS.int8_linear(x, ROWS, ABSMAX, bias)


def grouped(
    arena: Tensor = Q,
    offsets: Tensor = torch.zeros(1, 2, dtype=torch.int64),  # noqa: B008
    code: Tensor | None = None,
    means: Tensor | None = None,
    count: int = 1,
) -> Any:
    return OPS.dequantize_nf4_grouped(
        arena, offsets, code, means, 64, 256, count, [1, 64], torch.float32
    )


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "few scales": (lambda: nf4(absmax=ABSMAX[:2]), "absmax must be 3 .* got 2 elements"),
    "many scales": (lambda: nf4(absmax=CODE), "absmax must be 3 .* got 16 elements"),
    "half scales": (lambda: nf4(absmax=ABSMAX.half()), "absmax must be 3 contiguous float32"),
    "scales apart": (lambda: nf4(absmax=CODE[:6:2]), "absmax must be 3 contiguous float32"),
    "few bytes": (lambda: nf4(q=Q[:95]), "Codes of 192 elements take 96 .* bytes, got 95"),
    "many bytes": (lambda: nf4(q=ROWS), "Codes of 192 elements take 96 .* bytes, got 192"),
    "bytes apart": (lambda: nf4(q=ROWS.view(torch.uint8)[:, ::2]), "take 96 contiguous bytes"),
    "another shape": (lambda: nf4(shape=(3, 62)), "Codes of 186 elements take 93 .*, got 96"),
    "code": (lambda: nf4(code=CODE[:15]), "code must be 16 contiguous float32, got 15"),
    "double code": (lambda: nf4(code=CODE.double()), "code must be 16 contiguous float32"),
    "nested few": (lambda: nested(BYTES[:2]), "Nested absmax must be 3 contiguous uint8, got 2"),
    "nested float": (lambda: nested(ABSMAX), "Nested absmax must be 3 contiguous uint8"),
    "nested scales": (lambda: nested(nested_absmax=ABSMAX), "nested_absmax must be 1 .* got 3"),
    "nested code": (lambda: nested(code=CODE), "nested_code must be 256 .* got 16"),
    "nested mean": (lambda: nested(mean=ABSMAX), "nested_offset must be 1 .* got 3"),
    "nested blocks": (lambda: nested(blocksize=100), "A blocksize is a power .* got 100"),
    "small out": (lambda: into(torch.zeros(191)), "out must be 192 .* got 191"),
    "half out": (lambda: into(torch.zeros(3, 64).half()), "out must be .* the dtype asked for"),
    "out apart": (lambda: into(torch.zeros(64, 3).t()), "out must be 192 contiguous"),
    "int8 bytes": (lambda: int8(Q), r"Packed bytes must be contiguous int8 \[out, in\]"),
    "int8 flat": (lambda: int8(ROWS[0]), "Packed bytes must be .* got 1 dimensions"),
    "int8 apart": (lambda: int8(ROWS[:, ::2]), "Packed bytes must be contiguous"),
    "int8 few": (lambda: int8(scale=ABSMAX[:2]), r"A scale belongs .* 2 scales for \[3, 64\]"),
    "int8 many": (lambda: int8(scale=CODE[:4]), r"A scale belongs .* 4 scales for \[3, 64\]"),
    "int8 thirds": (lambda: int8(scale=CODE[:9]), r"A scale belongs .* 9 scales for \[3, 64\]"),
    "int8 none": (lambda: int8(scale=CODE[:0]), r"A scale belongs .* 0 scales for \[3, 64\]"),
    "int8 half": (lambda: int8(scale=ABSMAX.half()), "scale must be 3 contiguous float32"),
    "x": (lambda: nf4_linear(torch.zeros(2, 63)), "Codes of 189 elements take 95 .* got 96"),
    "int8 x": (lambda: int8_linear(torch.zeros(2, 63)), r"x must be \[..., 64\], .*; got 63"),
    "0-dim x": (lambda: nf4_linear(MEAN), "x must be .* got a number"),
    "int8 0-dim x": (lambda: int8_linear(MEAN), "x must be .* got a number"),
    "double x": (lambda: nf4_linear(X.double()), "decode to float32, float16 or bfloat16, got"),
    "int x": (lambda: int8_linear(X.int()), "decode to float32, float16 or bfloat16, got"),
    "bias": (lambda: nf4_linear(X, torch.zeros(4)), "bias must be 3 contiguous .* got 4"),
    "half bias": (lambda: nf4_linear(X, ABSMAX.half()), "bias must be 3 .* the dtype of x"),
    "bias apart": (lambda: nf4_linear(X, CODE[:6:2]), "bias must be 3 contiguous"),
    "int8 bias": (lambda: int8_linear(X, torch.zeros(4)), "bias must be 3 contiguous .* got 4"),
    "tall bias": (lambda: nf4_linear(X, ABSMAX[:, None]), "bias must be 3 contiguous"),
    "int8 wide bias": (lambda: int8_linear(X, ABSMAX[None]), "bias must be 3 contiguous"),
    "no mean": (lambda: nf4_linear(X, None, NESTED, NESTED_CODE), "must be given together"),
    "only mean": (lambda: nf4_linear(X, None, None, None, MEAN), "must be given together"),
    "arena": (lambda: grouped(ABSMAX), "An arena is contiguous uint8"),
    "few offsets": (lambda: grouped(count=2), r"Offsets must be .* int64 \[2, 2\], got 2"),
    "int offsets": (lambda: grouped(offsets=ABSMAX[:2].int()), "Offsets must be contiguous int64"),
    "no means": (lambda: grouped(Q, torch.zeros(1, 3).long(), NESTED_CODE), "given together"),
    "only means": (lambda: grouped(means=NESTED), "must be given together"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_do_not_belong_together_are_refused(name: str) -> None:
    attempt, message = REFUSED[name]
    with pytest.raises(QuantizationError, match=message):
        call(attempt)


def test_the_parts_of_the_refused_ones_do_belong_together() -> None:
    for decoded in (nf4(), nested(), int8(), grouped(torch.zeros(96, dtype=torch.uint8))):
        assert not decoded.any()
    into(torch.zeros(3, 64))
    for product in (nf4_linear(), int8_linear(), nf4_linear(X, ABSMAX), int8_linear(X, ABSMAX)):
        assert torch.equal(product, torch.zeros(2, 3))


def test_shapes_that_overflow_are_refused() -> None:
    for shape in ([2**32, 2**32], [2**31, 2**33], [-1, -192], [-2]):
        with pytest.raises((QuantizationError, RuntimeError)):
            call(nf4, Q[:0], ABSMAX[:0], shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_of_several_scales_the_best_is_taken(dtype: torch.dtype, blocksize: int) -> None:
    weight = torch.randn(67, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[5] = 0
    weight[6] *= 1e-42

    def error(packed: tuple[torch.Tensor, torch.Tensor]) -> float:
        decoded = reference.dequantize_nf4(*packed, blocksize, weight.shape, torch.float32)
        return (decoded - weight.float()).square().sum().item()

    best = OPS.quantize_nf4(weight, blocksize, 32)
    want = reference.quantize_nf4(weight, blocksize, 32)
    # Sums in another order may prefer another of two scales that are as good.
    assert error(best) == pytest.approx(error(want), rel=1e-5)
    assert (best[1] != want[1]).float().mean() <= 0.02
    assert error(best) < error(OPS.quantize_nf4(weight, blocksize, 8)) * 1.0001
    assert error(best) < 0.98 * error(OPS.quantize_nf4(weight, blocksize))
    nested = OPS.quantize_nf4_nested(weight, blocksize, 32)
    assert torch.equal(nested[0], best[0])
    with pytest.raises(RuntimeError, match=r"num_scales lies in 1\.\.1024, got 0"):
        OPS.quantize_nf4(weight, blocksize, 0)
