"""One tier and several users: what is held, threads, forked children, the end of it."""

from __future__ import annotations

import os
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cache_bench import UNIT, disk_tiers, keys, page

from nexus_ext.cache import DiskTier
from nexus_ext.errors import ConfigError, EngineClosed, ForkedEngine, ReadError

tier = pytest.fixture(disk_tiers)


# -- what is held ----------------------------------------------------------------------------------


def test_what_is_held_does_not_go(tier: Callable[..., DiskTier]) -> None:
    one, other = tier(max_bytes=3 * UNIT), tier(max_bytes=3 * UNIT)
    for number in range(3):
        one.put(str(number), [page(number)])
    with one.hold("0") as entry, one.hold("0"):
        for store in (one, other):
            store.put("3", [page(3)])
            assert not store.evict("0")
        assert torch.equal(one.read(entry), page(0))
    assert keys(one) == ["0", "2", "3"]
    assert one.evict("0")
    with one.hold("0") as nothing:
        assert nothing is None


def test_there_is_no_room_while_everything_is_held(tier: Callable[..., DiskTier]) -> None:
    one = tier(max_bytes=2 * UNIT)
    for number in range(2):
        one.put(str(number), [page(number)])
    with one.hold("0"), one.hold("1"):
        assert one.put("2", [page(2)]) is None
        assert one.clear() == 0
    assert one.stats().refused_full == 1
    assert one.put("2", [page(2)]) is not None


def test_what_another_process_evicts_can_be_read_while_it_is_held(
    tier: Callable[..., DiskTier], run_python: Callable[..., str], tmp_path: Path
) -> None:
    one = tier()
    one.put("a", [page(1)])
    evict = "import sys; from nexus_ext.cache import DiskTier\n" + (
        "with DiskTier(sys.argv[1], '1GiB') as t: print(t.evict('a'))"
    )
    with one.hold("a") as entry:
        assert run_python(evict, tmp_path / "cache").strip() == "True"
        assert torch.equal(one.read(entry), page(1))
        assert one.get("a") is None
    with pytest.raises(ReadError, match="evicted"):
        one.read(entry)
    assert one.put("a", [page(1)]) is not None


def test_nothing_stays_open(tier: Callable[..., DiskTier]) -> None:
    one = tier()
    one.put("a", [page(1)])
    one.load("a")
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with one.hold("a") as entry:
            one.read(entry)
        one.verify()
    assert sorted(os.listdir("/proc/self/fd")) == before


# -- threads, forks, closing -----------------------------------------------------------------------


def test_threads_share_a_tier(tier: Callable[..., DiskTier]) -> None:
    one = tier(max_bytes=12 * UNIT)
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for number in torch.randint(0, 20, (60,), generator=generator).tolist():
            found = one.load(str(number))
            if found is None:
                one.put(str(number), [page(number)])
            elif not torch.equal(found, page(number)):
                wrong.append(str(number))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = one.stats()
    assert wrong == []
    assert stats.hits + stats.misses == 240
    assert stats.stored_bytes <= 12 * UNIT
    assert stats.corruptions == 0
    assert one.verify().bad == ()


def test_a_closed_tier_says_so(tier: Callable[..., DiskTier]) -> None:
    one = tier()
    entry = one.put("a", [page(1)])
    one.close()
    one.close()
    for use in (lambda: one.get("a"), lambda: one.read(entry), one.stats, one.clear):
        with pytest.raises(EngineClosed):
            use()


def test_a_forked_child_is_told_to_open_its_own(
    tier: Callable[..., DiskTier], run_python: Callable[..., str], tmp_path: Path
) -> None:
    script = textwrap.dedent("""
        import os, sys
        from nexus_ext.cache import DiskTier
        from nexus_ext.errors import ForkedEngine
        tier = DiskTier(sys.argv[1], "1GiB")
        tier.put("a", [b"x"])
        child = os.fork()
        if child == 0:
            try:
                tier.get("a")
            except ForkedEngine:
                tier.close()
                with DiskTier(sys.argv[1], "1GiB") as mine:
                    os._exit(0 if mine.load("a") is not None else 2)
            os._exit(3)
        assert os.waitpid(child, 0)[1] == 0
        print(tier.load("a").tolist())
    """)
    assert run_python(script, tmp_path / "cache").strip() == "[120]"
    assert issubclass(ForkedEngine, Exception)


def test_an_entry_of_another_tier_is_refused(tier: Callable[..., DiskTier]) -> None:
    entry = tier("a").put("x", [page(1)])
    with pytest.raises(ConfigError, match="none of"):
        tier("b").read(entry)
