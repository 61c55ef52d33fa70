"""Plan, checkpoint and engine joined: the right bytes stand in the right arena, in every mode."""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nexus_ext import device as device_module
from nexus_ext import mode as mode_module
from nexus_ext import streamer as streamer_module
from nexus_ext.checkpoint import ALIGNMENT, Checkpoint, Group
from nexus_ext.config import StreamConfig
from nexus_ext.device import Device
from nexus_ext.engine import Engine, Faults
from nexus_ext.errors import BudgetError, ConfigError, CorruptCheckpoint, EngineClosed
from nexus_ext.memory import default_budget
from nexus_ext.profiling import Stats
from nexus_ext.streamer import Streamer, plan_groups

NUM_GROUPS = 7
GROUP_BYTES = 3 * 16384 + 256
HOST = Device.of("cpu")
MODES = ["direct", "buffered", "mmap"]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NEXUS_PREFAULT", raising=False)


@dataclass
class Source:
    """A checkpoint of equal groups and something outside them."""

    path: Path
    tensors: dict[str, torch.Tensor]

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.path)

    def parts(self) -> tuple[Checkpoint, list[Group], Group]:
        checkpoint = self.checkpoint
        groups = [
            checkpoint.group(f"block {i}", [n for n in checkpoint.entries if n.startswith(f"{i}.")])
            for i in range(NUM_GROUPS)
        ]
        return checkpoint, groups, checkpoint.group("outside", ["outside"])

    def stream(self, *, keep: int = 0, faults: Faults | None = None, **asked: Any) -> Streamer:
        """With room for `keep` groups, the two arenas of lookahead 1, and what is outside."""
        checkpoint, groups, outside = self.parts()
        asked = {"budget": outside.nbytes + (keep + 2) * GROUP_BYTES, "lookahead": 1} | asked
        config = StreamConfig.of(**asked)
        return Streamer(checkpoint, groups, outside, config, HOST, faults=faults)

    def flip(self, tensor: str) -> None:
        """Change one byte of a tensor on disk, and pretend that nobody was there."""
        entry, status = self.checkpoint.entries[tensor], self.path.stat()
        with self.path.open("r+b") as file:
            file.seek(entry.offset + entry.nbytes // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
            file.flush()
            os.fsync(file.fileno())
        os.utime(self.path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    torch.manual_seed(0)
    tensors = {f"{i}.{name}": torch.randn(64, 64) for i in range(NUM_GROUPS) for name in "abc"}
    tensors |= {f"{i}.d": torch.randn(64) for i in range(NUM_GROUPS)}
    tensors["outside"] = torch.randn(1000)
    save_file(tensors, tmp_path / "source.safetensors")
    return Source(tmp_path / "source.safetensors", tensors)


def acquire(streamer: Streamer, group: int) -> None:
    streamer.engine.acquire(group + 1, streamer.arena(group))


def holds(arena: torch.Tensor, group: Group, tensors: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(
            arena[m.offset : m.offset + m.nbytes].view(m.dtype).view(m.shape), tensors[m.name]
        )
        for m in group.members
    )


def run_pass(streamer: Streamer, source: Source) -> None:
    for index, group in enumerate(streamer.groups):
        acquire(streamer, index)
        assert holds(streamer.arena(index), group, source.tensors)
    streamer.end_pass()


# -- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", range(NUM_GROUPS - 2))
@pytest.mark.parametrize("io", MODES)
def test_every_group_stands_in_its_arena_when_it_was_acquired(
    source: Source, io: str, keep: int
) -> None:
    streamer = source.stream(io=io, keep=keep)
    assert holds(streamer.outside_arena, streamer.outside, source.tensors)
    assert [streamer.is_resident(g) for g in range(NUM_GROUPS)].count(True) == keep
    for _ in range(3):
        run_pass(streamer, source)
    assert holds(streamer.outside_arena, streamer.outside, source.tensors)
    streamer.close()


def test_a_sweep_acquires_every_group_once(source: Source) -> None:
    streamer = source.stream(io="direct", keep=2)
    before = streamer.stats()
    for _ in range(2):
        streamer.sweep()
    after = streamer.stats()
    moved = after.num_hits + after.num_waits - before.num_hits - before.num_waits
    assert moved == 2 * (NUM_GROUPS - 2)
    assert after.num_resident_hits - before.num_resident_hits == 2 * 2
    streamer.close()


def test_a_sweep_may_come_from_another_thread(source: Source) -> None:
    streamer = source.stream(io="direct")
    streamer.sweep()
    thread = threading.Thread(target=streamer.sweep)
    thread.start()
    thread.join()
    assert streamer.stats().num_failed == 0
    streamer.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("io", MODES)
def test_nothing_may_be_outside(source: Source, io: str) -> None:
    checkpoint, groups, _ = source.parts()
    outside = checkpoint.group("outside", [])
    config = StreamConfig.of(budget=2 * GROUP_BYTES, io=io, lookahead=1)
    streamer = Streamer(checkpoint, groups, outside, config, HOST)
    run_pass(streamer, source)
    assert streamer.outside_arena.numel() == 0
    streamer.close()


def test_groups_that_share_an_arena_share_one_tensor(source: Source) -> None:
    streamer = source.stream(io="direct")
    arenas = [streamer.arena(group) for group in range(NUM_GROUPS)]
    assert len({id(arena) for arena in arenas}) == len({arena.data_ptr() for arena in arenas}) == 2
    assert all(arena.dtype == torch.uint8 and arena.dim() == 1 for arena in arenas)
    streamer.close()


@pytest.mark.parametrize("io", MODES)
def test_members_are_aligned_in_memory(source: Source, io: str) -> None:
    streamer = source.stream(io=io, keep=1)
    arenas = [streamer.outside_arena, *(streamer.arena(group) for group in range(NUM_GROUPS))]
    assert all(arena.data_ptr() % ALIGNMENT == 0 for arena in arenas)
    streamer.close()


def test_tensors_outlive_the_streamer(source: Source) -> None:
    for io in MODES:
        streamer = source.stream(io=io, keep=2)
        run_pass(streamer, source)
        outside, layout = streamer.outside_arena, streamer.outside
        last, group = streamer.arena(NUM_GROUPS - 1), streamer.groups[-1]
        streamer.close()
        del streamer
        assert holds(outside, layout, source.tensors)
        assert holds(last, group, source.tensors)


@pytest.mark.parametrize("nbytes", [1, 4096, 100_000, 2 << 20, (2 << 20) + 1])
@pytest.mark.parametrize("phase", [0, 64, 4032])
def test_an_arena_begins_at_its_phase_of_a_page(nbytes: int, phase: int) -> None:
    arena = HOST.allocate(nbytes, phase)
    assert arena.numel() == nbytes
    assert arena.data_ptr() % 4096 == phase


# -- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cached", "available", "io"),
    [
        (1.0, 100, "mmap"),
        (0.5, 100, "mmap"),
        (0.4, 100, "direct"),
        (0.0, 100, "direct"),
        (1.0, 0.5, "direct"),
    ],
)
def test_auto_maps_what_is_cached_and_fits(
    source: Source, monkeypatch: pytest.MonkeyPatch, cached: float, available: float, io: str
) -> None:
    nbytes = source.path.stat().st_size
    monkeypatch.setattr(mode_module, "cached_bytes", lambda path: math.ceil(cached * nbytes))
    monkeypatch.setattr(mode_module, "available_bytes", lambda: int(available * nbytes))
    streamer = source.stream(io="auto")
    stats = streamer.stats()
    assert stats.io_mode_requested == "auto"
    assert stats.io_reason.startswith("auto: ")
    assert "page cache" in stats.io_reason
    assert (stats.io_mode == "mmap") == (io == "mmap")
    streamer.close()


def test_a_kernel_that_cannot_tell_what_is_cached_means_direct(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mode_module, "cached_bytes", lambda path: -1)
    streamer = source.stream(io="auto")
    assert streamer.stats().io_mode != "mmap"
    streamer.close()


@pytest.mark.parametrize("io", MODES)
def test_what_was_asked_for_and_what_it_became_are_told(source: Source, io: str) -> None:
    streamer = source.stream(io=io, keep=1)
    run_pass(streamer, source)
    stats = streamer.stats()
    assert stats.io_mode_requested == io
    assert stats.io_mode == io or stats.refusal
    assert stats.io_reason == "asked for"
    assert stats.reader
    assert (stats.resident_groups, stats.streamed_groups, stats.lookahead) == (1, 6, 1)
    assert stats.device_bytes == streamer.plan.device_bytes <= stats.budget_bytes
    assert stats.bytes_read >= stats.streamed_groups * GROUP_BYTES
    assert stats.streamed_gbps > 0
    assert str(stats).startswith(f"6 groups streamed, 1 resident, {stats.io_mode}")
    streamer.close()


def test_every_figure_of_stats_is_filled(source: Source) -> None:
    streamer = source.stream(io="direct")
    stats = streamer.stats()
    for field in fields(Stats):
        if field.name == "experts":
            assert stats.experts is None  # this model has none
            continue
        kind = {"int": int, "str": str, "float": float, "bool": bool}[field.type]
        assert type(getattr(stats, field.name)) is kind, field.name
    streamer.close()


def test_without_io_uring_threads_read(source: Source) -> None:
    streamer = source.stream(io="direct", use_uring=False)
    run_pass(streamer, source)
    assert streamer.stats().reader == "threads"
    streamer.close()


def test_depth_and_chunks_are_as_asked(source: Source) -> None:
    streamer = source.stream(io="direct", depth=5, chunk_bytes=1 << 16)
    run_pass(streamer, source)
    assert streamer.stats().depth == 5
    assert streamer.stats().chunk_bytes == 1 << 16
    streamer.close()


SLOT_BYTES = (1 << 16) + 2 * 4096


@pytest.mark.parametrize(("slots", "depth"), [(3, 2), (6, 4), (24, 16), (1000, 16)])
def test_a_ram_budget_bounds_reads_in_flight(source: Source, slots: int, depth: int) -> None:
    streamer = source.stream(io="direct", ram_budget=slots * SLOT_BYTES, chunk_bytes=1 << 16)
    run_pass(streamer, source)
    assert streamer.stats().depth <= depth
    streamer.close()


@pytest.mark.parametrize("slots", [3, 6])
def test_staging_keeps_to_the_ram_budget(source: Source, slots: int) -> None:
    streamer = source.stream(io="direct", ram_budget=slots * SLOT_BYTES, chunk_bytes=1 << 16)
    staging_bytes = streamer.stats().staging_bytes
    streamer.close()
    assert 0 < staging_bytes <= slots * SLOT_BYTES


def test_the_smallest_ram_budget_is_named_and_works(source: Source) -> None:
    with pytest.raises(BudgetError, match=r"allow (\d+)") as refused:
        source.stream(ram_budget=1, chunk_bytes=1 << 16)
    allowed = int(str(refused.value).split("allow ")[1].split()[0])
    with pytest.raises(BudgetError):
        source.stream(ram_budget=allowed - 1, chunk_bytes=1 << 16)
    source.stream(ram_budget=allowed, chunk_bytes=1 << 16).close()


# -- the plan ------------------------------------------------------------------------------------


def test_a_disk_is_measured_only_when_something_streams(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(*args: Any) -> dict[str, float]:
        measured.append(args)
        return {"gbps": 2.0}

    monkeypatch.setattr(mode_module, "measure_read", measure)
    parts = source.parts()
    everything, _ = plan_groups(*parts, StreamConfig.of(budget="1GiB"), HOST)
    assert everything.streamed == ()
    assert measured == []
    tight, _ = plan_groups(*parts, StreamConfig.of(budget=5 * GROUP_BYTES, lookahead=1), HOST)
    assert len(measured) == 1
    assert tight.predicted_io_seconds == pytest.approx(tight.streamed_bytes / 2e9)


def test_an_automatic_budget_is_what_memory_allows(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    available = (1 << 30) + 5 * GROUP_BYTES
    monkeypatch.setattr(device_module, "available_bytes", lambda: available)
    plan, _ = plan_groups(*source.parts(), StreamConfig.of(lookahead=1), HOST)
    assert plan.budget_bytes == default_budget(available) == 5 * GROUP_BYTES
    assert plan.streamed


def test_a_lookahead_below_one_is_refused(source: Source) -> None:
    with pytest.raises(ConfigError, match="got 0"):
        source.stream(lookahead=0)


def test_a_budget_too_small_is_an_error_before_a_file_is_opened(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*args: Any, **options: Any) -> None:
        raise AssertionError("an engine was opened")

    monkeypatch.setattr(streamer_module, "Engine", opened)
    with pytest.raises(BudgetError):
        source.stream(budget=1)


# -- verification --------------------------------------------------------------------------------


def digests_of(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home" / "digests").glob("*"))


@pytest.mark.parametrize("io", MODES)
@pytest.mark.parametrize("keep", [0, 3])
def test_the_first_landing_of_every_group_is_verified(source: Source, io: str, keep: int) -> None:
    streamer = source.stream(io=io, keep=keep, verify="first")
    for _ in range(3):
        run_pass(streamer, source)
    stats = streamer.stats()
    assert stats.num_verified == NUM_GROUPS + 1
    assert stats.num_failed == stats.num_healed == 0
    streamer.close()


@pytest.mark.parametrize("io", MODES)
def test_every_landing_may_be_verified(source: Source, io: str) -> None:
    streamer = source.stream(io=io, verify="always")
    for _ in range(3):
        run_pass(streamer, source)
    stats = streamer.stats()
    assert stats.num_verified >= 3 * NUM_GROUPS + 1
    assert stats.num_failed == stats.num_healed == 0
    streamer.close()


def test_nothing_is_verified_or_recorded_unasked(source: Source, tmp_path: Path) -> None:
    streamer = source.stream(io="direct")
    run_pass(streamer, source)
    assert streamer.stats().num_verified == 0
    assert digests_of(tmp_path) == []
    streamer.close()


def test_digests_are_recorded_once(source: Source, tmp_path: Path) -> None:
    told: list[str] = []

    def stream() -> None:
        checkpoint, groups, outside = source.parts()
        config = StreamConfig.of(budget="1GiB", verify="first", io="direct")
        Streamer(
            checkpoint, groups, outside, config, HOST, progress=lambda what, *_: told.append(what)
        ).close()

    stream()
    (recorded,) = digests_of(tmp_path)
    before = recorded.stat().st_mtime_ns
    assert told.count("recording digests") == NUM_GROUPS + 1
    told.clear()
    stream()
    assert "recording digests" not in told
    assert recorded.stat().st_mtime_ns == before


@pytest.mark.parametrize("verify", ["first", "always"])
@pytest.mark.parametrize("io", MODES)
def test_a_byte_flipped_on_disk_is_found_when_its_group_is_acquired(
    source: Source, io: str, verify: str
) -> None:
    source.stream(io=io, verify=verify).close()
    source.flip("3.b")
    streamer = source.stream(io=io, verify=verify)
    for _ in range(2):
        for group in range(3):
            acquire(streamer, group)
        with pytest.raises(CorruptCheckpoint, match=r"group 4 of .*source\.safetensors \(from"):
            acquire(streamer, 3)
        for group in range(4, NUM_GROUPS):
            acquire(streamer, group)
            assert holds(streamer.arena(group), streamer.groups[group], source.tensors)
        streamer.end_pass()
    assert streamer.stats().num_failed >= 2
    streamer.close()


@pytest.mark.parametrize("tensor", ["outside", "3.b"])
@pytest.mark.parametrize("io", MODES)
def test_a_byte_flipped_in_a_resident_group_is_found_at_the_start(
    source: Source, monkeypatch: pytest.MonkeyPatch, io: str, tensor: str
) -> None:
    source.stream(budget="1GiB", io=io, verify="first").close()
    source.flip(tensor)
    closed = []
    close = Engine.close
    monkeypatch.setattr(Engine, "close", lambda self: (closed.append(self), close(self)))
    with pytest.raises(CorruptCheckpoint):
        source.stream(budget="1GiB", io=io, verify="first")
    assert len(closed) == 1
    with pytest.raises(EngineClosed):
        closed[0].stats()


def test_a_byte_flipped_on_disk_passes_unverified(source: Source) -> None:
    source.flip("3.b")
    streamer = source.stream(io="direct")
    acquire(streamer, 3)
    assert not holds(streamer.arena(3), streamer.groups[3], source.tensors)
    streamer.close()


def test_a_file_changed_openly_gets_new_digests(source: Source, tmp_path: Path) -> None:
    source.stream(io="direct", verify="first").close()
    source.flip("3.b")
    os.utime(source.path)
    streamer = source.stream(io="direct", verify="first")
    streamer.sweep()
    assert len(digests_of(tmp_path)) == 2
    streamer.close()


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_a_bit_that_flips_on_the_way_is_healed_by_reading_again(source: Source, io: str) -> None:
    source.stream(verify="first").close()
    faults = Faults(seed=2, flip_ppm=100_000)
    streamer = source.stream(io=io, verify="always", chunk_bytes=1 << 16, faults=faults)
    num_right = num_refused = 0
    for _ in range(30):
        for index, group in enumerate(streamer.groups):
            try:
                acquire(streamer, index)
            except CorruptCheckpoint:  # it flipped twice in a row
                num_refused += 1
                continue
            assert holds(streamer.arena(index), group, source.tensors)
            num_right += 1
    assert streamer.stats().num_healed > 0
    assert num_right > 10 * num_refused
    streamer.close()


# -- mapped files --------------------------------------------------------------------------------


def prefaulted(streamer: Streamer) -> int:
    """Bytes brought in, once the background thread is through or has had every chance."""
    waiting = threading.Event()
    for _ in range(2000):
        if nbytes := streamer.stats().prefault_bytes:
            return nbytes
        waiting.wait(0.005)
    return 0


def test_a_mapped_file_is_prefaulted_when_asked(source: Source) -> None:
    streamer = source.stream(io="mmap", prefault="on")
    assert prefaulted(streamer) == source.path.stat().st_size
    assert streamer.stats().prefault_reason.startswith("pre-fault is on as asked")
    run_pass(streamer, source)
    streamer.close()


@pytest.mark.parametrize(
    ("value", "wanted"), [("1", True), ("on", True), ("0", False), ("off", False)]
)
def test_the_environment_says_whether_to_prefault(
    source: Source, monkeypatch: pytest.MonkeyPatch, value: str, wanted: bool
) -> None:
    monkeypatch.setenv("NEXUS_PREFAULT", value)
    streamer = source.stream(io="mmap")
    assert f"pre-fault is {'on' if wanted else 'off'}" in streamer.stats().prefault_reason
    if wanted:
        assert prefaulted(streamer) == source.path.stat().st_size
    else:
        assert streamer.stats().prefault_bytes == 0
    run_pass(streamer, source)
    streamer.close()


@pytest.mark.parametrize(("available", "wanted"), [(1 << 40, True), (1 << 10, False)])
def test_auto_prefaults_what_fits_in_memory(
    source: Source, monkeypatch: pytest.MonkeyPatch, available: int, wanted: bool
) -> None:
    monkeypatch.setattr(device_module, "available_bytes", lambda: available)
    streamer = source.stream(io="mmap", prefault="auto")
    assert bool(wanted and prefaulted(streamer)) == wanted
    assert streamer.stats().prefault_reason.startswith("auto: ")
    run_pass(streamer, source)
    streamer.close()


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_only_mapped_files_are_prefaulted(source: Source, io: str) -> None:
    streamer = source.stream(io=io, prefault="on")
    run_pass(streamer, source)
    assert streamer.stats().prefault_bytes == 0
    assert streamer.stats().prefault_reason == "only mapped files are pre-faulted"
    streamer.close()


@pytest.fixture
def aligned(source: Source) -> Source:
    """The source with its data moved to a multiple of 64, so that pages are used in place."""
    raw = source.path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].rstrip() + b" " * (-(8 + len(raw[8:end].rstrip())) % 64)
    source.path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    return source


@pytest.mark.parametrize(("available", "drops"), [(1 << 40, False), (1 << 10, True)])
def test_mapped_pages_are_given_back_only_where_they_do_not_fit(
    aligned: Source, monkeypatch: pytest.MonkeyPatch, available: int, drops: bool
) -> None:
    monkeypatch.setattr(mode_module, "available_bytes", lambda: available)
    streamer = aligned.stream(io="mmap", prefault="off")
    for _ in range(4):
        run_pass(streamer, aligned)
    stats = streamer.stats()
    assert stats.num_views == NUM_GROUPS
    assert (stats.num_dropped > 0) == drops
    streamer.close()


def test_mapped_groups_are_views_of_the_file_and_residents_are_not(aligned: Source) -> None:
    streamer = aligned.stream(io="mmap", keep=3)
    run_pass(streamer, aligned)
    assert streamer.stats().num_views == NUM_GROUPS - 3
    assert len({streamer.arena(group).data_ptr() for group in range(NUM_GROUPS)}) == NUM_GROUPS
    streamer.close()


def test_a_closed_streamer_says_so(source: Source) -> None:
    streamer = source.stream(io="direct")
    streamer.close()
    streamer.close()
    for use in (streamer.sweep, streamer.stats, streamer.end_pass):
        with pytest.raises(EngineClosed):
            use()
