"""What happens: ranges in NVTX's domain "nexus". What happened: counters of a streamed model.

Counters come in one immutable snapshot and one line of words.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.compiler import is_compiling

__all__ = ["Stats", "annotate"]

_NOTHING = nullcontext()


@functools.cache
def _tool() -> Any:
    """The package nvtx if a tool wants our ranges: it is there when the process begins, or never.
    Who has no such package has no use for ranges.
    """
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx if isinstance(nvtx.get_domain("nexus"), nvtx.Domain) else None


def annotate(name: str, nbytes: int | torch.Tensor) -> AbstractContextManager[object]:
    """A range that profilers show, with the bytes it is about: a number, or those of a tensor.

    Native code has the same, csrc/common/range.h. Nothing without a tool. Nothing either in what is
    being compiled, where a range would break the graph or measure the tracing; a tensor is not
    asked for its bytes then, which may be symbols.
    """
    if is_compiling() or (nvtx := _tool()) is None:
        return _NOTHING
    payload = nbytes if isinstance(nbytes, int) else nbytes.nbytes
    return nvtx.annotate(name, domain="nexus", payload=payload)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Stats:
    """A snapshot of a streamed model. Bytes, seconds and counts since it was attached.

    `io_mode` and `reader` are what is really in use; `io_reason` says why it was chosen, `refusal`
    why something better was not. A hit is an acquire that found its group landed, a wait one that
    did not; `stall_seconds` is the time spent waiting. `busy_seconds` is the time with reads in
    flight. A misprediction is an acquire of a group that nobody had started to load. `experts` is
    the `ExpertStats` of a mixture-of-experts model, else None. `ram_mode` is where groups stay in
    RAM: "page-locked", "shared" by all processes, "private: " and why, or "off"; `ram_bytes_read`
    were read by this process for others too, beside `bytes_read`. `network_bytes` came over the
    network for this model; while `is_arriving` there is more to come.
    """

    io_mode_requested: str
    io_mode: str
    io_reason: str
    reader: str
    refusal: str
    depth: int
    chunk_bytes: int
    budget_bytes: int
    device_bytes: int
    device: str
    staging_bytes: int
    num_slots: int
    is_pinned: bool
    pin_refusal: str
    ram_bytes: int
    ram_mode: str
    ram_bytes_read: int
    resident_groups: int
    streamed_groups: int
    ram_groups: int
    lookahead: int
    num_views: int
    bytes_read: int
    bytes_direct: int
    bytes_staged: int
    num_reads: int
    num_short_reads: int
    num_retries: int
    num_stale_reads: int
    num_loads: int
    num_landed: int
    num_failed: int
    num_hits: int
    num_resident_hits: int
    num_waits: int
    num_mispredicted: int
    num_verified: int
    num_healed: int
    num_dropped: int
    num_cloned: int
    num_copies: int
    bytes_copied: int
    num_ram_loads: int
    num_blocks: int
    num_rows: int
    num_row_reads: int
    num_row_retries: int
    row_bytes_read: int
    stall_seconds: float
    busy_seconds: float
    prefault_bytes: int
    prefault_seconds: float
    prefault_reason: str
    network_bytes: int
    is_arriving: bool
    experts: Any = None

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Stats:
        """From the engine's report and the streamer's; fields this class lacks are left out."""
        return cls(**{f.name: report[f.name] for f in fields(cls)})

    @property
    def streamed_gbps(self) -> float:
        """1e9 bytes a second while reads were in flight."""
        return self.bytes_read / self.busy_seconds * 1e-9 if self.busy_seconds else 0.0

    def __str__(self) -> str:
        waited = self.num_waits / max(1, self.num_waits + self.num_hits)
        return (
            f"{self.streamed_groups} groups streamed, {self.resident_groups} resident, "
            f"{self.io_mode} ({self.reader}): {self.bytes_read / 1e9:.2f} GB read at "
            f"{self.streamed_gbps:.2f} GB/s, {waited:.0%} of acquires waited, "
            f"{self.stall_seconds:.2f} s in all"
        )
