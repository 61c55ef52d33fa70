"""The RAM tier: budget, order, holds, damage; what processes share and what they never do."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from cache_bench import MIB, name, ram_tiers, shared_folders, some

from nexus_ext.cache.ram import RamTier
from nexus_ext.cache.segment import file_bytes
from nexus_ext.errors import ConfigError, EngineClosed, ForkedEngine
from tests.conftest import RecordCount

PATIENCE_SECONDS = 60


folder = pytest.fixture(shared_folders)
tier = pytest.fixture(ram_tiers)


# -- what goes in comes out ------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("nbytes", [0, 1, 63, 4095, 4096, MIB - 1, MIB, MIB + 1, 3 * MIB + 17])
def test_bytes_come_back(folder: Path, nbytes: int, shared: bool) -> None:
    tier = RamTier("16MiB", folder=folder, shared=shared)
    data = some(1, nbytes)
    first = tier.put(name(1), [data])
    assert first is not None
    assert torch.equal(first, data)
    loaded = tier.load(name(1))
    assert loaded is not None
    assert torch.equal(loaded, data)
    assert tier.effective == ("shared" if shared else "private: asked for")
    tier.close()
    assert torch.equal(loaded, data)  # the tensor keeps its memory


def test_parts_lie_one_behind_the_other_and_begin_on_a_page(tier: RamTier) -> None:
    parts = [some(1, 100), some(2, 0), some(3, 5000)]
    made = tier.put(name(1), parts)
    assert made is not None
    assert torch.equal(made, torch.cat(parts))
    assert made.data_ptr() % 4096 == 0


@pytest.mark.parametrize("phase", [0, 64, 4032])
def test_a_phase_moves_the_first_byte(tier: RamTier, phase: int) -> None:
    data = some(1, MIB + 5)

    def fill(out: torch.Tensor) -> None:
        out.copy_(data)

    made = tier.fill(name(1), data.numel(), fill, phase=phase)
    loaded = tier.load(name(1))
    assert made is not None
    assert loaded is not None
    assert made.data_ptr() % 4096 == loaded.data_ptr() % 4096 == phase
    assert torch.equal(made, data)
    assert torch.equal(loaded, data)


@pytest.mark.parametrize("shared", [True, False])
def test_what_a_caller_writes_reaches_nobody(folder: Path, shared: bool) -> None:
    tier = RamTier("16MiB", folder=folder, shared=shared)
    data = some(1)
    first = tier.put(name(1), [data])
    second, third = tier.load(name(1)), tier.load(name(1))
    assert first is not None
    assert second is not None
    assert third is not None
    first.zero_()
    second.fill_(7)
    assert torch.equal(third, data)
    fourth = tier.load(name(1))
    assert fourth is not None
    assert torch.equal(fourth, data)
    tier.close()


def test_nothing_is_copied(tier: RamTier) -> None:
    """A mapping of many segments costs no memory of its own until it is written to."""
    tier.put(name(1), [some(1, 8 * MIB)])
    before = _own_bytes()
    loaded = [tier.load(name(1)) for _ in range(16)]
    assert sum(int(one[::4096].sum()) for one in loaded if one is not None) > 0
    assert _own_bytes() - before < 8 * MIB


def _own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


# -- budget and order ------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_the_least_recently_used_goes_first(folder: Path, shared: bool) -> None:
    room = 3 * _pages(file_bytes(MIB))
    tier = RamTier(room, folder=folder, shared=shared)
    for number in range(3):
        tier.put(name(number), [some(number)])
    assert tier.load(name(0)) is not None
    tier.put(name(3), [some(3)])
    assert tier.digests() == [name(2), name(0), name(3)]
    assert tier.load(name(1)) is None
    stats = tier.stats()
    assert (stats.evictions, stats.hits, stats.misses, stats.fills) == (1, 1, 1, 4)
    assert stats.nbytes <= room
    tier.close()


def _pages(nbytes: int) -> int:
    return -(-nbytes // 4096) * 4096


@pytest.mark.parametrize("shared", [True, False])
def test_what_is_held_stays(folder: Path, shared: bool) -> None:
    tier = RamTier(2 * _pages(file_bytes(MIB)), folder=folder, shared=shared)
    tier.put(name(0), [some(0)])
    tier.put(name(1), [some(1)])
    with tier.hold(name(0)), tier.hold(name(0)):
        tier.put(name(2), [some(2)])
        assert tier.digests() == [name(0), name(2)]
        with tier.hold(name(2)):
            assert tier.put(name(3), [some(3)]) is None
        assert not tier.evict(name(0))
    assert tier.stats().refused == 1
    assert tier.evict(name(0))
    assert not tier.evict(name(0))
    tier.clear()
    assert tier.digests() == []
    tier.close()


def test_a_layer_larger_than_the_budget_is_refused_and_takes_nothing_away(folder: Path) -> None:
    tier = RamTier(2 * MIB, folder=folder)
    tier.put(name(0), [some(0)])
    called = []
    assert tier.fill(name(1), 2 * MIB, called.append) is None
    assert called == []
    tier.close()


def test_no_budget_is_no_tier(tmp_path: Path) -> None:
    tier = RamTier(0, folder=tmp_path / "never")
    assert tier.effective == "off"
    assert tier.put(name(0), [some(0)]) is None
    assert tier.load(name(0)) is None
    assert not (tmp_path / "never").exists()
    tier.close()


def test_evicted_bytes_stay_with_who_has_them(tier: RamTier) -> None:
    loaded = tier.put(name(0), [some(0)])
    assert tier.evict(name(0))
    assert loaded is not None
    assert torch.equal(loaded, some(0))


def test_a_filling_that_fails_leaves_nothing(tier: RamTier, folder: Path) -> None:
    def fail(out: torch.Tensor) -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        tier.fill(name(0), MIB, fail)
    assert tier.load(name(0)) is None
    assert sorted(path.name for path in folder.iterdir()) == [".lock", ".users"]
    assert tier.put(name(0), [some(0)]) is not None


def test_a_second_thread_waits_for_the_first_and_reads_nothing(tier: RamTier) -> None:
    is_filling, may_go = threading.Event(), threading.Event()
    results: list[torch.Tensor | None] = []

    def slowly(out: torch.Tensor) -> None:
        is_filling.set()
        assert may_go.wait(PATIENCE_SECONDS)
        out.copy_(some(0))

    def never(out: torch.Tensor) -> None:
        raise AssertionError("filled twice")

    first = threading.Thread(target=lambda: results.append(tier.fill(name(0), MIB, slowly)))
    first.start()
    assert is_filling.wait(PATIENCE_SECONDS)
    second = threading.Thread(target=lambda: results.append(tier.fill(name(0), MIB, never)))
    second.start()
    may_go.set()
    first.join()
    second.join()
    assert [torch.equal(one, some(0)) for one in results if one is not None] == [True, True]
    assert tier.stats().fills == 1


# -- damage ----------------------------------------------------------------------------------------


def test_every_damaged_segment_is_a_miss(folder: Path, record_count: RecordCount) -> None:
    """Of a segment that another process wrote: bytes, table, footer, length."""
    nbytes = 2 * MIB + 100
    writer = RamTier("64MiB", folder=folder)
    writer.put(name(0), [some(0, nbytes)])
    whole = (folder / name(0)).read_bytes()
    places = [*range(0, len(whole), 65521), *range(nbytes, len(whole))]
    padding = range(nbytes, -(-nbytes // 8) * 8)
    num_caught = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        num_caught += _is_caught(folder, bytes(damaged)) and place not in padding
    lengths = [0, 1, 47, 48, 4096, nbytes, len(whole) - 1]
    num_caught += sum(_is_caught(folder, whole[:length]) for length in lengths)
    num_caught += _is_caught(folder, whole + b"\0")
    num_damaged = len(places) - len(padding) + len(lengths) + 1
    record_count("damaged segments of shared memory", num_damaged, {"caught": num_caught})
    assert num_caught == num_damaged
    writer.close()


def _is_caught(folder: Path, content: bytes) -> bool:
    """A damaged segment is dropped by a tier that has not seen it."""
    temporary = folder / "damaged"
    temporary.write_bytes(content)
    os.rename(temporary, folder / name(0))
    reader = RamTier("64MiB", folder=folder)
    loaded = reader.load(name(0))
    is_gone = not (folder / name(0)).exists()
    assert loaded is None or torch.equal(loaded, some(0, loaded.numel()))
    caught = loaded is None and is_gone and reader.stats().corrupt == 1
    reader.close()
    return caught


def test_a_link_in_place_of_a_segment_is_not_followed(tier: RamTier, folder: Path) -> None:
    tier.put(name(0), [some(0)])
    os.symlink(folder / name(0), folder / name(1))
    with pytest.raises(OSError, match="must be readable"):
        tier.load(name(1))


# -- bad input, the end ----------------------------------------------------------------------------


@pytest.mark.parametrize("digest", ["", "short", "../../etc/passwd", "A" * 64, "0" * 200, None])
def test_a_digest_is_a_digest(tier: RamTier, digest: str) -> None:
    for ask in (tier.load, tier.evict):
        with pytest.raises(ConfigError, match="hexadecimal"):
            ask(digest)
    with pytest.raises(ConfigError, match="hexadecimal"):
        tier.put(digest, [some(0)])


def test_sizes_and_parts_that_cannot_be(tmp_path: Path, tier: RamTier) -> None:
    with pytest.raises(ConfigError):
        RamTier(-1, folder=tmp_path)
    with pytest.raises(ConfigError):
        tier.put(name(0), [torch.zeros(3)])


def test_a_closed_tier_says_so(folder: Path) -> None:
    tier = RamTier("16MiB", folder=folder)
    tier.close()
    tier.close()
    for ask in (tier.load, tier.evict):
        with pytest.raises(EngineClosed):
            ask(name(0))
    assert tier.stats().num_segments == 0


def test_a_forked_child_is_told(tier: RamTier) -> None:
    tier.put(name(0), [some(0)])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            tier.load(name(0))
        except ForkedEngine:
            tier.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tier.load(name(0)) is not None
