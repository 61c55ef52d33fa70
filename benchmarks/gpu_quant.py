"""Packed weights on the device: decoding against the copy ceiling, products against dense ones.

Kernels are timed as a CUDA graph that goes through several copies of its weights, together larger
than the cache; `call_seconds` is the same from Python. Bits are compared with the reference first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_ceilings import d2d_gbps
from gpu_place import Place, Run
from gpu_report import Report, spread
from torch.nn import functional

from nexus_ext.quant import reference

OPS = torch.ops.nexus
BF16 = torch.bfloat16
BLOCKSIZE = 64
# An H200 has 60 MB of L2.
_ROTATED_BYTES = 256 << 20
_MOST_COPIES = 32
_ROUNDS = 9
# Of bfloat16 sums in another order.
_TOLERANCE = 1e-2
ROWS = (1, 4, 8, 16, 64)

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Packed:
    """A matrix, packed: its parts, its op and the reference's; both take the parts in order."""

    kind: str
    parts: Tensors
    into: Callable[..., object]
    reference: Callable[..., torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def _pack(kind: str, weight: torch.Tensor) -> Packed:
    shape = list(weight.shape)
    if kind == "nf4":
        return Packed(
            kind,
            OPS.quantize_nf4(weight, BLOCKSIZE),
            lambda q, a, out: OPS.dequantize_nf4.out(q, a, BLOCKSIZE, shape, BF16, out=out),
            lambda q, a: reference.dequantize_nf4(q, a, BLOCKSIZE, shape, BF16),
        )
    if kind == "int8":
        return Packed(
            kind,
            OPS.quantize_int8(weight),
            lambda q, s, out: OPS.dequantize_int8.out(q, s, BF16, out=out),
            lambda q, s: reference.dequantize_int8(q, s, BF16),
        )
    q, absmax, nested, offset = OPS.quantize_nf4_nested(weight, BLOCKSIZE)
    return Packed(
        kind,
        (q, absmax, nested, reference.nested_code(), offset),
        lambda *parts, out: OPS.dequantize_nf4_nested.out(
            *parts, BLOCKSIZE, reference.NESTED_BLOCKSIZE, shape, BF16, out=out
        ),
        lambda q, *nested: reference.dequantize_nf4(
            q,
            reference.dequantize_absmax(*nested, reference.NESTED_BLOCKSIZE),
            BLOCKSIZE,
            shape,
            BF16,
        ),
    )


def measure(place: Place, folder: Path, report: Report) -> None:
    """Fill the report's `d2d_gbps`, `decode` and `linear`."""
    sizes = [(64, 256)] if place.is_simulated else [(4096, 4096), (14336, 4096)]
    report["d2d_gbps"] = d2d_gbps(place)
    lines: list[dict[str, Any]] = []
    for rows, width in sizes:
        weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(BF16)
        for kind in ("nf4", "nf4-nested", "int8"):
            with report.attempt(f"decode {kind} {rows}x{width}"):
                lines.append(_decode(place, _pack(kind, weight), weight))
                report["decode"] = lines
    if place.is_simulated:
        report.skip("fused", "simulated: the processor has one kernel for every number of rows")
    if not importlib.util.find_spec("bitsandbytes"):
        report.skip("bitsandbytes", "bitsandbytes is not installed")
    products: list[dict[str, Any]] = []
    for rows, width in sizes:
        for num_rows in ROWS:
            with report.attempt(f"linear {rows}x{width}, {num_rows} rows"):
                products.append(_linear(place, rows, width, num_rows))
                report["linear"] = products


# -- timing ----------------------------------------------------------------------------------------


def _alternate(place: Place, arms: dict[str, Sequence[Run]]) -> dict[str, list[float]]:
    """Seconds of one call of each arm, by round, without the host's part."""
    graphs = {name: place.captured(calls) for name, calls in arms.items()}
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(_ROUNDS):
        for name, run in graphs.items():
            taken[name].append(median(place.steady(run, 3)) / len(arms[name]))
    return taken


def _call_seconds(place: Place, calls: Sequence[Run]) -> float:
    def run() -> None:
        for call in calls:
            call()

    return median(place.steady(run, _ROUNDS)) / len(calls)


def _num_copies(nbytes: int) -> int:
    return min(_MOST_COPIES, max(2, -(-_ROTATED_BYTES // nbytes)))


def _on(place: Place, parts: Tensors) -> Tensors:
    return tuple(part.to(place.where, copy=True) for part in parts)


# -- decoding --------------------------------------------------------------------------------------


def _decode(place: Place, packed: Packed, weight: torch.Tensor) -> dict[str, Any]:
    nbytes = packed.nbytes + weight.nbytes
    count = 2 if place.is_simulated else _num_copies(nbytes)
    sources = [_on(place, packed.parts) for _ in range(count)]
    targets = [torch.full_like(weight, torch.nan, device=place.where) for _ in sources]
    calls = [
        partial(packed.into, *source, out=target)
        for source, target in zip(sources, targets, strict=True)
    ]
    for call in calls:
        call()
    want = packed.reference(*sources[0])
    assert all(torch.equal(target, want) for target in targets), "other bits than the reference's"
    copies = [partial(target.copy_, targets[index - 1]) for index, target in enumerate(targets)]
    arms: dict[str, Sequence[Run]] = {"nexus": calls, "copy": copies}
    if peer := _bitsandbytes_decoder(place, packed, sources):
        arms["bitsandbytes"] = peer
    seconds = _alternate(place, arms)
    copied = [2 * weight.nbytes / s / 1e9 for s in seconds["copy"]]
    rates = [nbytes / s / 1e9 for s in seconds["nexus"]]
    return {
        "what": f"dequantize_{packed.kind}",
        "shape": list(weight.shape),
        "equals_reference": True,
        "bytes": nbytes,
        "seconds": spread(seconds["nexus"]),
        "call_seconds": _call_seconds(place, calls),
        "gbps": spread(rates),
        "copy_gbps": spread(copied),
        "share_of_copy": spread([a / b for a, b in zip(rates, copied, strict=True)]),
        **_against(seconds, "bitsandbytes"),
    }


def _bitsandbytes_decoder(
    place: Place, packed: Packed, sources: Sequence[Tensors]
) -> Sequence[Run] | None:
    """Plain NF4 alone: the same bytes."""
    if packed.kind != "nf4" or not importlib.util.find_spec("bitsandbytes"):
        return None
    import bitsandbytes  # noqa: F401 - registers its ops

    op = torch.ops.bitsandbytes.dequantize_4bit
    shape = packed.reference(*sources[0]).shape
    return [partial(op, q.view(-1, 1), a, BLOCKSIZE, "nf4", shape, BF16) for q, a in sources]


def _against(seconds: dict[str, list[float]], peer: str) -> dict[str, Any]:
    if peer not in seconds:
        return {}
    pairs = zip(seconds[peer], seconds["nexus"], strict=True)
    return {f"{peer}_ratio": spread([theirs / ours for theirs, ours in pairs])}


# -- products --------------------------------------------------------------------------------------


def _linear(place: Place, out_features: int, width: int, num_rows: int) -> dict[str, Any]:
    """The op, its fused kernel by itself, a decoded weight's product, a dense weight's."""
    draw = torch.Generator(place.where).manual_seed(num_rows)
    x = torch.empty(num_rows, width, dtype=BF16, device=place.where).normal_(generator=draw)
    weight = torch.empty(out_features, width, dtype=BF16, device=place.where)
    q, absmax = _on(place, OPS.quantize_nf4(weight.normal_(generator=draw).cpu(), BLOCKSIZE))
    shape = [out_features, width]
    decoded = reference.dequantize_nf4(q, absmax, BLOCKSIZE, shape, BF16)
    count = 2 if place.is_simulated else _num_copies(q.nbytes)
    packed = [_on(place, (q, absmax)) for _ in range(count)]
    dense = [decoded.clone() for _ in range(2 if place.is_simulated else _num_copies(2 * q.nbytes))]

    def product(q: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, OPS.dequantize_nf4(q, absmax, BLOCKSIZE, shape, BF16))

    def op(q: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = OPS.nf4_linear(x, q, absmax, None, BLOCKSIZE, out_features)
        return result

    ways = {"nexus": op, "decoded": product} | _fused(place, x, out_features)
    want = functional.linear(x.double(), decoded.double())
    errors = {name: _relative_error(way(q, absmax), want) for name, way in ways.items()}
    assert all(error <= _TOLERANCE for error in errors.values()), errors
    arms: dict[str, Sequence[Run]] = {
        name: [partial(way, *parts) for parts in packed] for name, way in ways.items()
    }
    arms["dense"] = [partial(functional.linear, x, weight) for weight in dense]
    seconds = _alternate(place, arms)
    return {
        "what": f"nf4_linear, {num_rows} rows",
        "shape": shape,
        "num_rows": num_rows,
        "relative_error": errors,
        "seconds": {name: spread(taken) for name, taken in seconds.items()},
        "call_seconds": _call_seconds(place, arms["nexus"]),
        "packed_gbps": (q.nbytes + absmax.nbytes) / median(seconds["nexus"]) / 1e9,
        **_against(seconds, "dense"),
        **_against(seconds, "decoded"),
        **_against(seconds, "fused"),
    }


def _fused(place: Place, x: torch.Tensor, out_features: int) -> dict[str, Callable[..., Any]]:
    """The kernel for few rows, whatever the op would choose: where should it change?"""
    if place.is_simulated:
        return {}
    from nexus_ext.kernels import nf4

    code = torch.tensor(reference.NF4_CODE, device=place.where)
    return {"fused": lambda q, a: nf4.linear(x, q, a, code, BLOCKSIZE, out_features, None)}


def _relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()
