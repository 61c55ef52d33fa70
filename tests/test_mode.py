"""How files are read and in which pieces: every decision, with rates and caches made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nexus_ext import gds, mode
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.config import StreamConfig
from nexus_ext.device import Device
from nexus_ext.errors import BudgetError
from nexus_ext.mode import DEFAULT_DEPTH, Choice, choose

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HOST = Device("cpu", torch.device("cpu"))
GPU = Device("cuda:0", torch.device("cpu"))


@dataclass
class Machine:
    """What the machine answers, and what it was asked."""

    cached: float = 0.0  # of the checkpoint
    available: int = 64 * GIB
    disk_gbps: float = 2.0
    link_gbps: Callable[[int], float] = lambda chunk: 20.0
    has_gds: bool = False
    reads: list[Any] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)

    def cached_bytes(self, path: str) -> int:
        return int(self.cached * Path(path).stat().st_size)

    def measure_read(self, path: str, asked: Any, max_bytes: int) -> dict[str, Any]:
        self.reads.append((path, asked))
        return {"gbps": self.disk_gbps}

    def measure_copy(
        self, arena: torch.Tensor, device: str, chunk_bytes: int, max_bytes: int
    ) -> dict[str, Any]:
        assert device == "cuda:0"
        assert chunk_bytes <= len(arena)
        self.copies.append(chunk_bytes)
        return {"gbps": self.link_gbps(chunk_bytes)}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    for name in ("cached_bytes", "measure_read", "measure_copy"):
        monkeypatch.setattr(mode, name, getattr(made, name))
    monkeypatch.setattr(mode, "available_bytes", lambda: made.available)
    monkeypatch.setattr(gds, "available", lambda: (made.has_gds, "so it was said"))
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file({"small": torch.zeros(100)}, folder / "a.safetensors")
    save_file({"big": torch.zeros(50_000)}, folder / "b.safetensors")
    index = '{"weight_map": {"small": "a.safetensors", "big": "b.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    return Checkpoint.open(folder)


Chooser = Callable[..., Choice]


@pytest.fixture
def chosen(machine: Machine, checkpoint: Checkpoint) -> Chooser:
    def decide(device: Device = GPU, streams: bool = True, **options: Any) -> Choice:
        return choose(checkpoint, StreamConfig.of(**options), device, streams=streams)

    return decide


# -- how files are read ----------------------------------------------------------------------------


@pytest.mark.parametrize("device", [HOST, GPU], ids=["host", "gpu"])
@pytest.mark.parametrize(
    ("cached", "available", "io"),
    [
        (1.0, 64 * GIB, "mmap"),
        (0.5, 64 * GIB, "mmap"),
        (0.4, 64 * GIB, "direct"),
        (0.0, 64 * GIB, "direct"),
        (1.0, 200_000, "direct"),  # it would push itself out
    ],
)
def test_auto_trusts_a_warm_cache_with_room(
    machine: Machine, chosen: Chooser, device: Device, cached: float, available: int, io: str
) -> None:
    machine.cached, machine.available = cached, available
    choice = chosen(device)
    assert choice.mode.io == io
    assert choice.reason.startswith("auto: ")
    assert "in the page cache" in choice.reason


def test_auto_goes_past_host_memory_where_it_can(machine: Machine, chosen: Chooser) -> None:
    assert chosen().mode.io == "direct"
    assert "no GPUDirect Storage: so it was said" in chosen().reason
    machine.has_gds = True
    assert chosen().mode.io == "gds"
    assert chosen(HOST).mode.io == "direct"
    machine.cached = 1.0
    assert chosen().mode.io == "mmap"


def test_a_kernel_that_tells_nothing_about_its_cache_is_a_cold_one(
    machine: Machine, chosen: Chooser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mode, "cached_bytes", lambda path: -1)
    choice = chosen()
    assert choice.mode.io == "direct"
    assert choice.reason.startswith("auto: 0 B of ")


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_what_is_asked_for_is_kept(machine: Machine, chosen: Chooser, io: str) -> None:
    machine.cached = 1.0
    choice = chosen(io=io, use_uring=False, depth=7, chunk_bytes="256KiB")
    assert (choice.mode.io, choice.reason) == (io, "asked for")
    assert not choice.mode.use_uring
    assert choice.mode.depth == 7
    assert choice.mode.chunk_bytes == 256 * KIB


def test_mapped_pages_stay_where_they_fit(machine: Machine, chosen: Chooser) -> None:
    assert not chosen(io="mmap").mode.trailing_drop
    assert chosen(io="direct").mode.trailing_drop
    machine.available = 200_000
    assert chosen(io="mmap").mode.trailing_drop


# -- rates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [HOST, GPU], ids=["host", "gpu"])
def test_nothing_is_measured_where_nothing_streams(
    machine: Machine, chosen: Chooser, device: Device
) -> None:
    choice = chosen(device, streams=False)
    assert not machine.reads
    assert not machine.copies
    assert choice.rates.disk_bytes_per_second is None
    assert choice.rates.link_bytes_per_second is None
    assert choice.ram_bytes == 0


def test_a_host_has_a_disk_and_no_link(machine: Machine, chosen: Chooser) -> None:
    choice = chosen(HOST)
    assert choice.rates.disk_bytes_per_second == pytest.approx(2e9)
    assert choice.rates.link_bytes_per_second is None
    assert not machine.copies
    assert choice.ram_bytes == 0
    assert choice.mode.num_slots is None
    assert choice.mode.chunk_bytes == MIB


def test_a_gpu_has_both(machine: Machine, chosen: Chooser) -> None:
    rates = chosen().rates
    assert rates.disk_bytes_per_second == pytest.approx(2e9)
    assert rates.link_bytes_per_second == pytest.approx(20e9)


def test_the_disk_is_measured_as_it_will_be_read_and_on_the_largest_file(
    machine: Machine, chosen: Chooser
) -> None:
    choice = chosen(io="buffered", depth=5)
    (path, asked), *others = machine.reads
    assert not others
    assert path.endswith("b.safetensors")
    assert (asked.io, asked.depth) == ("buffered", 5)
    assert asked.chunk_bytes == choice.mode.chunk_bytes


# -- pieces ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gbps", "chunk"),
    [
        ({1: 20, 2: 20, 4: 20, 8: 20}, 1),
        ({1: 18, 2: 19.1, 4: 20, 8: 20}, 2),
        ({1: 10, 2: 15, 4: 18.9, 8: 20}, 8),
        ({1: 10, 2: 15, 4: 19, 8: 20}, 4),
        ({1: 20, 2: 5, 4: 5, 8: 5}, 1),
    ],
)
def test_a_chunk_is_the_smallest_that_nearly_fills_the_link(
    machine: Machine, chosen: Chooser, gbps: dict[int, float], chunk: int
) -> None:
    machine.link_gbps = lambda nbytes: gbps[nbytes // MIB]
    choice = chosen()
    assert machine.copies == [MIB, 2 * MIB, 4 * MIB, 8 * MIB]
    assert choice.mode.chunk_bytes == chunk * MIB
    assert choice.rates.link_bytes_per_second == pytest.approx(max(gbps.values()) * 1e9)


def test_a_chunk_that_is_asked_for_is_the_one_that_is_measured(
    machine: Machine, chosen: Chooser
) -> None:
    assert chosen(chunk_bytes="192KiB").mode.chunk_bytes == 192 * KIB
    assert machine.copies == [192 * KIB]
    # More than what is measured with makes no difference to a link.
    assert chosen(chunk_bytes="64MiB").mode.chunk_bytes == 64 * MIB
    assert machine.copies[1:] == [8 * MIB]


def test_chunks_are_measured_as_far_as_the_ring_has_room(machine: Machine, chosen: Chooser) -> None:
    chosen(ram_budget=100 * MIB)
    assert machine.copies == [MIB, 2 * MIB, 4 * MIB]
    machine.copies.clear()
    chosen(ram_budget=4 * MIB)
    assert machine.copies == [MIB]


# -- the ring and what is left of `ram_budget` -----------------------------------------------------


def slot(choice: Choice) -> int:
    return choice.mode.chunk_bytes + 8 * KIB


@pytest.mark.parametrize(
    ("disk_gbps", "num_slots"), [(0.001, 16 + 1 + 2), (10, 16 + 8 + 2), (20, 34), (500, 34)]
)
def test_a_ring_has_a_slot_for_every_read_and_every_copy_in_flight(
    machine: Machine, chosen: Chooser, disk_gbps: float, num_slots: int
) -> None:
    machine.disk_gbps = disk_gbps
    assert chosen().mode.num_slots == num_slots


def test_a_ring_follows_the_depth(chosen: Chooser) -> None:
    assert chosen(depth=2).mode.num_slots == 2 + 1 + 2
    assert chosen(depth=100).mode.num_slots == 100 + 10 + 2


def test_half_of_free_memory_is_left_to_others(machine: Machine, chosen: Chooser) -> None:
    machine.available = 64 * GIB
    choice = chosen()
    ring = choice.mode.num_slots * slot(choice)
    assert choice.ram_bytes == int(64 * GIB * 0.9) // 2 - ring
    machine.available = GIB
    assert chosen().ram_bytes == 0


@pytest.mark.parametrize("device", [HOST, GPU], ids=["host", "gpu"])
@pytest.mark.parametrize("streams", [True, False])
def test_too_little_for_any_ring_names_what_works(
    chosen: Chooser, device: Device, streams: bool
) -> None:
    smallest = 3 * (64 * KIB + 8 * KIB)
    with pytest.raises(BudgetError, match=f"got {smallest - 1}; allow {smallest} or lower"):
        chosen(device, streams, ram_budget=smallest - 1, chunk_bytes="64KiB")
    choice = chosen(device, streams, ram_budget=smallest, chunk_bytes="64KiB")
    assert choice.mode.depth == 2
    assert choice.ram_bytes == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    ram_budget=st.integers(3 * 72 * KIB, GIB),
    chunk=st.sampled_from([64 * KIB, 100_000, MIB]),
    depth=st.one_of(st.none(), st.integers(2, 200)),
    disk_gbps=st.floats(0.001, 100),
)
def test_ring_and_ram_fill_their_budget_and_no_more(
    machine: Machine, chosen: Chooser, ram_budget: int, chunk: int, depth: Any, disk_gbps: float
) -> None:
    machine.disk_gbps = disk_gbps
    try:
        choice = chosen(ram_budget=ram_budget, chunk_bytes=chunk, depth=depth)
    except BudgetError:
        assert ram_budget < 3 * (chunk + 8 * KIB)
        return
    num_slots = choice.mode.num_slots
    assert num_slots is not None
    assert num_slots >= 3
    assert num_slots * slot(choice) + choice.ram_bytes == ram_budget
    assert 2 <= (choice.mode.depth or 0) <= (depth or DEFAULT_DEPTH)
    # What is read into is never all there is.
    assert num_slots > (choice.mode.depth or 0)
