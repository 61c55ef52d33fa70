"""Several stores at the same moment, interrupts, forks: what was acknowledged stays, and budgets
hold. Where a moment matters the test makes it, inside the call that has it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_bench import UNIT, disk_tiers, keys, page

from nexus_ext.cache import DiskTier, Entry
from nexus_ext.cache.index_file import IndexFile
from nexus_ext.cache.zone import Zone
from nexus_ext.errors import EngineClosed

tier = pytest.fixture(disk_tiers)


def once(action: Callable[[], object]) -> Callable[[], None]:
    """At the first call alone."""
    calls = [action]

    def act() -> None:
        if calls:
            calls.pop()()

    return act


def before(patch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], object]) -> None:
    """Do something when a function is called for the first time, before it begins."""
    real, act = getattr(owner, name), once(action)

    def call(*arguments: Any, **options: Any) -> Any:
        act()
        return real(*arguments, **options)

    patch.setattr(owner, name, call)


# -- closing, interrupting -------------------------------------------------------------------------


def test_a_tier_that_is_closed_while_somebody_puts_keeps_its_index(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = tier()
    one.put("a", [page(1)])
    before(monkeypatch, os, "fdatasync", one.close)
    with pytest.raises(EngineClosed):
        one.put("b", [page(2)])
    (path,) = (tmp_path / "cache").glob("index-*.sqlite")
    assert path.name == "index-000001.sqlite"
    again = tier()
    assert again.stats().zones[0].num_rebuilds == 0
    assert torch.equal(again.load("a"), page(1))


def test_an_interrupt_at_the_begin_of_a_transaction_ends_it(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    """As Ctrl-C does that is pressed while another process has the index: it is seen when the
    statement is through.
    """
    one = tier()
    index = one._zones[0].index
    real = index._db._connection

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def execute(self, statement: str, *rest: Any) -> sqlite3.Cursor:
            done = real.execute(statement, *rest)
            if statement == "BEGIN IMMEDIATE":
                raise KeyboardInterrupt
            return done

    index._db._connection = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        one.put("a", [page(1)])
    index._db._connection = real
    assert not real.in_transaction
    assert one.put("a", [page(1)]) is not None
    assert one.stats().zones[0].num_rebuilds == 0


# -- two stores ------------------------------------------------------------------------------------


def test_two_who_come_at_once_get_no_more_room_than_there_is(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two processes: each looks, and then both write."""
    one, other = tier(max_bytes=2 * UNIT), tier(max_bytes=2 * UNIT)
    one.put("old", [page(0)])
    one.put("older", [page(1)])
    before(monkeypatch, one._zones[0], "announce", lambda: other.put("other", [page(2)]))
    assert one.put("mine", [page(3)]) is not None
    assert one.stats().stored_bytes <= 2 * UNIT
    assert torch.equal(one.load("mine"), page(3))


def test_two_who_come_at_once_write_no_more_than_is_allowed(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tier(write_budget_bytes_per_day=2 * UNIT)
    other = tier(write_budget_bytes_per_day=2 * UNIT)
    assert one.put("0", [page(0)]) is not None
    before(monkeypatch, os, "pwritev", lambda: other.put("1", [page(1)]))
    one.put("2", [page(2)])
    assert one.stats().zones[0].written_bytes_of_day <= 2 * UNIT
    assert one.stats().refused_write_budget + other.stats().refused_write_budget == 1


def test_two_who_evict_the_same_entry_count_it_once(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tier(max_bytes=2 * UNIT), tier(max_bytes=2 * UNIT)
    for number in range(2):
        one.put(str(number), [page(number)])
    before(monkeypatch, one._zones[0], "evict", lambda: other.put("other", [page(8)]))
    assert one.put("mine", [page(9)]) is not None
    assert sorted(keys(one)) == ["mine", "other"]
    assert one.stats().evictions + other.stats().evictions == 2


def test_who_finds_the_index_broken_does_not_replace_the_one_made_meanwhile(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else what is put between its look at the blobs and its own index would be in neither."""
    tier().close()
    (path,) = (tmp_path / "cache").glob("index-*.sqlite")
    path.write_bytes(b"no database" * 1000)
    opened: list[DiskTier] = []
    acknowledged: list[Entry | None] = []
    real_make, real_scan = IndexFile._make, Zone._scan
    is_mine = [True]

    def make(self: IndexFile, fill: Any) -> bool:
        if is_mine and is_mine.pop():
            opened.append(tier())  # somebody else is quicker
        return real_make(self, fill)

    def scan(self: Zone) -> Any:
        rows = list(real_scan(self))
        if opened:
            acknowledged.append(opened[0].put("a", [page(1)]))
        return iter(rows)

    monkeypatch.setattr(IndexFile, "_make", make)
    monkeypatch.setattr(Zone, "_scan", scan)
    one = tier()
    if not acknowledged:  # nobody looked at the blobs again
        acknowledged.append(opened[0].put("a", [page(1)]))
    assert acknowledged[0] is not None
    assert torch.equal(one.load("a"), page(1))
    assert keys(one) == ["a"]


# -- forks -----------------------------------------------------------------------------------------

FORKS = """
import os, signal, sys, threading
import torch
from nexus_ext.cache import DiskTier, holds

def data(number):
    return torch.full((4096,), number, dtype=torch.uint8)

def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def parent_closes_first(folder):
    mine = DiskTier(folder, "1GiB")
    mine.put("0", [data(0)])
    is_there, may_go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        tier = DiskTier(folder, "1GiB")
        assert tier.put("1", [data(1)]) is not None
        os.write(is_there[1], b"x")
        os.read(may_go[0], 1)
        assert tier.put("2", [data(2)]) is not None
        os.kill(os.getpid(), signal.SIGKILL)
    os.read(is_there[0], 1)
    mine.close()
    other = DiskTier(folder, "1GiB")
    assert other.put("3", [data(3)]) is not None
    os.write(may_go[1], b"x")
    assert code_of(child) == -signal.SIGKILL
    with DiskTier(folder, "1GiB") as tier:
        missing = [key for key in "0123" if tier.load(key) is None]
    seen = "".join(entry.key for entry in other.entries())
    other.close()
    return missing, seen

def parent_holds(folder):
    with DiskTier(folder, "1GiB") as mine:
        mine.put("a", [data(1)])
        with mine.hold("a"):
            child = os.fork()
            if child == 0:
                with DiskTier(folder, "1GiB") as tier:
                    os._exit(0 if tier.evict("a") else 3)
            return code_of(child), mine.get("a")

def child_leaves_the_block(folder):
    with DiskTier(folder, "1GiB") as mine:
        mine.put("a", [data(1)])
        with mine.hold("a"):
            child = os.fork()
        if child == 0:
            os._exit(0)
        return code_of(child)

def thread_evicts(folder):
    has_it, may_go = threading.Event(), threading.Event()

    def evict():  # as who evicts does
        with holds.lock():
            has_it.set()
            may_go.wait()

    evictor = threading.Thread(target=evict)
    evictor.start()
    has_it.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends it should it wait for a thread that it has not
        with DiskTier(folder, "1GiB") as tier:
            tier.put("b", [data(2)])
            os._exit(0 if tier.evict("b") else 3)
    code = code_of(child)
    may_go.set()
    evictor.join()
    return code

for number, test in enumerate([
    parent_closes_first, parent_holds, child_leaves_the_block, thread_evicts
]):
    print(test(f"{sys.argv[1]}/{number}"))
"""


def test_a_forked_child_has_an_index_and_holds_of_its_own(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    """What it puts is there though its parent closed first; what its parent held it may evict, and
    it waits for no thread that it has not.
    """
    said = run_python(FORKS, tmp_path).splitlines()
    assert said == ["([], '0123')", "(0, None)", "0", "0"]
