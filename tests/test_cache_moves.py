"""Moves between tiers at the worst moment: nothing that was acknowledged goes, and no key gets its
old bytes back. The test makes the moment, inside the call that has it.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_bench import UNIT, page

from nexus_ext.cache import Tier, TieredStore, work_locks
from nexus_ext.cache.level import Level
from nexus_ext.cache.zone import Zone
from nexus_ext.errors import NexusError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Callable[..., TieredStore]]:
    """Opens stores of two tiers with room for so many pages each."""
    opened: list[TieredStore] = []

    def make(first: int, second: int, **options: Any) -> TieredStore:
        tiers = [
            Tier(tmp_path / name, number * UNIT, compress="off")
            for name, number in (("nvme", first), ("hdd", second))
        ]
        opened.append(TieredStore(tiers, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def where(store: TieredStore) -> dict[str, str]:
    return {entry.key: entry.folder.name for entry in store.entries()}


def put_below(one: TieredStore, key: str, number: int) -> None:
    """Under a key in the second tier, with the first one full of something else."""
    one.put(key, [page(number)])
    one.put("filler", [page(200)])
    assert where(one)[key] == "hdd"


def test_what_is_put_while_the_old_bytes_move_up_counts(
    store: Callable[..., TieredStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = store(1, 4)
    put_below(one, "key", 1)
    one.get("key")
    real, calls = Level.put, [1]

    def put(self: Level, key: str, *rest: Any, **options: Any) -> Any:
        if self is one._levels.all[0] and key == "key" and calls:
            calls.pop()
            assert one.put("key", [page(2)]) is not None
        return real(self, key, *rest, **options)

    monkeypatch.setattr(Level, "put", put)
    one.get("key")  # the second use: it moves
    assert not calls
    assert torch.equal(one.load("key"), page(2))
    assert torch.equal(one.load("key"), page(2))


def test_without_locks_a_move_down_leaves_one_copy_at_least(
    store: Callable[..., TieredStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who sees both copies must not take the lower one while the upper one goes."""
    one, other = store(1, 4), store(1, 4)
    one.put("key", [page(1)])
    real, calls = Zone.evict, [1]

    def evict(self: Zone, digest: bytes) -> Any:
        if calls:
            calls.pop()
            assert torch.equal(other.load("key"), page(1))
        return real(self, digest)

    monkeypatch.setattr(work_locks, "_open", lambda path, mode=0o600: -1)
    monkeypatch.setattr(Zone, "evict", evict)
    assert one.put("more", [page(2)]) is not None
    assert not calls
    assert torch.equal(one.load("key"), page(1))
    assert torch.equal(one.load("more"), page(2))


def test_a_lock_of_a_shared_store_is_for_whoever_may_write_there(
    store: Callable[..., TieredStore], tmp_path: Path
) -> None:
    old = os.umask(0o007)
    try:
        one = store(1, 4, shared=True)
        put_below(one, "key", 1)
    finally:
        os.umask(old)
    assert (tmp_path / "hdd" / "moves.lock").stat().st_mode & 0o777 == 0o660


def test_tiers_that_cannot_all_be_opened_leave_none_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    gc.collect()
    gc.disable()
    try:
        before = sorted(os.listdir("/proc/self/fd"))
        with suppress(NexusError):
            TieredStore([Tier(tmp_path / "file", "1MiB"), Tier(tmp_path / "hdd", "1MiB")])
        assert sorted(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


def test_what_somebody_else_evicted_is_not_counted_as_dropped(
    store: Callable[..., TieredStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Level._let_go, []

    def let_go(self: Level, *rest: Any) -> Any:
        if calls:
            assert calls.pop().put("other", [page(2)]) is not None
        return real(self, *rest)

    monkeypatch.setattr(Level, "_let_go", let_go)
    one, other = store(1, 4), store(1, 4)
    one.put("key", [page(1)])
    calls.append(other)
    assert one.put("mine", [page(3)]) is not None
    assert calls == []
    assert sorted(where(one)) == ["key", "mine", "other"]
    assert one.stats().dropped == other.stats().dropped == 0


def test_a_read_only_tier_below_serves_and_keeps_what_it_has(
    store: Callable[..., TieredStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = store(1, 4)
    put_below(one, "key", 1)
    monkeypatch.setattr(one._levels.all[1]._zones[0].folder, "read_only", "Read-only file system")
    for _ in range(4):
        assert torch.equal(one.load("key"), page(1))
    assert one.stats().entries == len(where(one))


def test_threads_that_move_everything_at_once_wait_for_nobody_for_ever(
    store: Callable[..., TieredStore],
) -> None:
    """Puts hold the room of a tier and then the lock of the next; uses hold the lock first."""
    one, other = store(2, 3), store(2, 3)
    wrong: list[str] = []

    def work(mine: TieredStore, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for number in torch.randint(0, 8, (40,), generator=generator).tolist():
            found = mine.load(str(number))
            if found is None:
                mine.put(str(number), [page(number)])
            elif not torch.equal(found, page(number)):
                wrong.append(str(number))

    threads = [
        threading.Thread(target=work, args=(mine, seed), daemon=True)
        for seed, mine in enumerate((one, other, one, other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert all(tier.disk.stored_bytes <= tier.disk.max_bytes for tier in one.stats().tiers)
