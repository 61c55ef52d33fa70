"""The disk tier: what stays, what goes, what is refused, and what is counted."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_ext.cache import DiskTier
from nexus_ext.cache.blob import BLOCK_BYTES
from nexus_ext.cache.rotation import Rotation
from nexus_ext.engine import Faults
from nexus_ext.errors import (
    ConfigError,
    CorruptCheckpoint,
    EngineClosed,
    ForkedEngine,
    ReadError,
)
from nexus_ext.owners import Owner

PAGE = 4096
# What a blob of one page of payload takes: its header is a page.
UNIT = 2 * PAGE


def page(number: int) -> torch.Tensor:
    """A page that differs from every other one."""
    return torch.full((PAGE,), number % 251, dtype=torch.uint8).index_fill_(
        0, torch.arange(8), number // 251
    )


def layer(number: int, nbytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Callable[..., DiskTier]]:
    """Opens tiers on `tmp_path / "cache"`, or on the folders named; closes them."""
    opened: list[DiskTier] = []

    def make(*folders: str, max_bytes: int | str = "1GiB", **options: Any) -> DiskTier:
        names = folders or ("cache",)
        opened.append(DiskTier([tmp_path / name for name in names], max_bytes, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def keys(tier: DiskTier) -> list[str]:
    return [entry.key for entry in tier.entries()]


def blobs_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.nx"))


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".tmp" in path.name or "new-index" in path.name]


# -- what is put is there --------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, PAGE - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3_000_000])
def test_what_is_put_is_loaded(tier: Callable[..., DiskTier], nbytes: int) -> None:
    data, one = layer(1, nbytes), tier()
    entry = one.put("model/0", [data[:1000], data[1000:]], kind="expert", about={"from": ["here"]})
    assert entry is not None
    assert (entry.key, entry.kind, entry.nbytes) == ("model/0", "expert", nbytes)
    assert entry.about == {"from": ["here"]}
    assert torch.equal(one.read(entry), data)
    assert torch.equal(one.load("model/0"), data)
    out = torch.zeros(nbytes, dtype=torch.uint8)
    assert one.load("model/0", out).data_ptr() == out.data_ptr() or nbytes == 0
    assert torch.equal(out, data)
    assert one.load("model/1") is None
    assert one.get("model/1") is None
    stats = one.stats()
    assert (stats.hits, stats.misses, stats.puts) == (2, 2, 1)
    assert stats.hit_rate == 0.5
    assert stats.payload_bytes == nbytes
    assert stats.io_mode in ("direct", "buffered")
    assert stats.reader in ("io_uring", "threads")


def test_it_is_there_when_the_folder_is_opened_again(tier: Callable[..., DiskTier]) -> None:
    one = tier()
    one.put("a", [page(1)], about={"x": 1})
    one.get("a")
    one.close()
    again = tier()
    entry = again.get("a")
    assert entry.uses == 1
    assert entry.about == {"x": 1}
    assert torch.equal(again.load("a"), page(1))
    assert again.stats().zones[0].num_rebuilds == 0


def test_the_same_bytes_are_written_once(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    one = tier()
    first = one.put("a", [page(1)])
    blob = blobs_in(tmp_path)[0]
    before = blob.stat().st_ino, blob.stat().st_mtime_ns
    for key in ("a", "b"):
        again = one.put(key, [page(1)[:7], page(1)[7:]])
        assert again.digest == first.digest
        assert again.key == key
    assert blobs_in(tmp_path) == [blob]
    assert (blob.stat().st_ino, blob.stat().st_mtime_ns) == before
    stats = one.stats()
    assert (stats.puts, stats.puts_known, stats.entries) == (1, 2, 2)
    assert stats.stored_bytes == UNIT
    assert keys(one) == ["a", "b"] or keys(one) == ["b", "a"]
    assert one.evict("a")  # they are one file
    assert one.get("b") is None


def test_other_bytes_under_a_key_take_the_place_of_the_old_ones(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier()
    one.put("a", [page(1)])
    one.put("b", [page(1)])  # another name for what goes
    one.put("a", [page(2)])
    assert len(blobs_in(tmp_path)) == 1
    assert torch.equal(one.load("a"), page(2))
    assert one.load("b") is None
    assert keys(one) == ["a"]


def test_keys_need_not_be_names_of_files(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    one = tier()
    names = [
        "",
        "../../up",
        "/etc/passwd",
        "a\x00b",
        "ü\udcff",
        "'; DROP TABLE names; --",
        "k" * 9999,
    ]
    for number, name in enumerate(names):
        assert one.put(name, [page(number)])
    for number, name in enumerate(names):
        assert torch.equal(one.load(name), page(number))
    assert sorted(keys(one)) == sorted(names)
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_two_stores_on_one_folder_see_each_other(tier: Callable[..., DiskTier]) -> None:
    one, other = tier(), tier()
    one.put("a", [page(1)])
    assert torch.equal(other.load("a"), page(1))
    other.put("b", [page(2)])
    assert other.evict("a")
    assert one.load("a") is None
    assert torch.equal(one.load("b"), page(2))


# -- what goes -------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes_first(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier(max_bytes=4 * UNIT)
    for number in range(4):
        one.put(str(number), [page(number)])
    assert one.load("0") is not None
    assert one.get("2") is not None
    one.put("4", [page(4)])
    assert keys(one) == ["3", "0", "2", "4"]
    one.put("5", [page(5)])
    assert keys(one) == ["0", "2", "4", "5"]
    stats = one.stats()
    assert stats.evictions == 2
    assert stats.stored_bytes == 4 * UNIT == sum(b.stat().st_size for b in blobs_in(tmp_path))


def test_a_random_history_is_that_of_a_list(tier: Callable[..., DiskTier]) -> None:
    """Against a model: a list, the latest at the end."""
    one, room = tier(max_bytes=10 * UNIT), 10
    order: list[int] = []
    generator = torch.Generator().manual_seed(3)
    for number in torch.randint(0, 30, (300,), generator=generator).tolist():
        if number in order:
            assert torch.equal(one.load(str(number)), page(number))
            order.remove(number)
        else:
            assert one.load(str(number)) is None
            one.put(str(number), [page(number)])
        order = [*order, number][-room:]
        assert one.stats().stored_bytes <= room * UNIT
    assert keys(one) == [str(number) for number in order]


def test_a_clock_that_is_set_back_changes_no_order(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tier(max_bytes=3 * UNIT)
    for number in range(3):
        monkeypatch.setattr(time, "time_ns", lambda n=number: (9 - n) * 10**18)
        one.put(str(number), [page(number)])
    one.put("3", [page(3)])
    assert keys(one) == ["1", "2", "3"]
    assert torch.equal(one.load("1"), page(1))


def test_a_budget_that_shrank_is_kept_from_the_start(tier: Callable[..., DiskTier]) -> None:
    one = tier()
    for number in range(5):
        one.put(str(number), [page(number)])
    one.close()
    assert keys(tier(max_bytes=2 * UNIT)) == ["3", "4"]


def test_what_is_larger_than_the_budget_is_not_kept(tier: Callable[..., DiskTier]) -> None:
    one = tier(max_bytes=2 * UNIT)
    one.put("small", [page(1)])
    assert one.put("large", [layer(1, 5 * PAGE)]) is None
    assert one.stats().refused_too_large == 1
    assert keys(one) == ["small"]


def test_clearing_removes_everything(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    one = tier("a", "b")
    for number in range(5):
        one.put(str(number), [page(number)])
    one.put("alias", [page(0)])
    assert one.clear() == 5
    assert keys(one) == []
    assert blobs_in(tmp_path) == []
    assert not one.evict("0")


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


# -- what is let in --------------------------------------------------------------------------------


def test_the_second_touch_is_written(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    one = tier(admission="second-touch")
    assert one.put("a", [page(1)]) is None
    one.close()
    one = tier(admission="second-touch")  # it is remembered
    assert one.put("b", [page(2)]) is None
    assert blobs_in(tmp_path) == []
    assert one.put("a", [page(1)]) is not None
    assert one.put("a", [page(3)]) is not None  # what is there may be replaced
    assert one.stats().refused_first_touch == 1
    assert keys(one) == ["a"]


def test_no_more_is_written_in_a_day_than_allowed(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    one = tier(write_budget_bytes_per_day=2 * UNIT)
    assert one.put("0", [page(0)])
    one.close()
    one = tier(write_budget_bytes_per_day=2 * UNIT)
    assert one.put("1", [page(1)])
    assert one.put("2", [page(2)]) is None
    assert one.put("1", [page(1)]) is not None  # costs nothing
    assert one.stats().refused_write_budget == 1
    now += 25 * 3600 * 10**9
    assert one.put("2", [page(2)])
    assert one.stats().zones[0].written_bytes == 3 * UNIT
    assert one.stats().zones[0].written_bytes_of_day == UNIT


def test_a_clock_that_was_in_the_future_does_not_stop_writing(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time_ns()
    one = tier(write_budget_bytes_per_day=UNIT)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: real + 400 * 86400 * 10**9)
        assert one.put("0", [page(0)])
    one.close()
    assert tier(write_budget_bytes_per_day=UNIT).put("1", [page(1)])


def test_what_writing_costs_is_reported(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    one = tier(max_bytes=2 * UNIT)
    for number in range(6):
        one.put(str(number), [page(number)])
    stats = one.stats()
    assert stats.written_bytes == stats.zones[0].written_bytes == 6 * UNIT
    assert stats.write_amplification == 2.0  # a page of header on every page


# -- zones -----------------------------------------------------------------------------------------


def test_folders_are_written_in_turn_and_read_as_one(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier("a", "b", max_bytes=6 * UNIT)
    for number in range(6):
        one.put(str(number), [page(number)])
    assert [zone.entries for zone in one.stats().zones] == [3, 3]
    for number in range(6):
        assert torch.equal(one.load(str(number)), page(number))
    one.put("6", [page(6)])
    assert keys(one) == ["1", "2", "3", "4", "5", "6"]
    one.close()
    assert sorted(keys(tier("b")) + keys(tier("a"))) == ["1", "2", "3", "4", "5", "6"]


def test_a_key_has_one_value_in_all_folders(tier: Callable[..., DiskTier]) -> None:
    one = tier("a", "b")
    for number in range(6):
        one.put("key", [page(number)])
        assert torch.equal(one.load("key"), page(number))
        assert keys(one).count("key") == 1
        one.put(f"other {number}", [page(100 + number)])


def test_turns_follow_the_room_there_is() -> None:
    rotation = Rotation(3)
    turns = [rotation.next([3.0, 1.0, 0.0]) for _ in range(40)]
    assert turns.count(0) == 30
    assert turns.count(1) == 10
    assert all(turns[at : at + 4].count(1) == 1 for at in range(0, 40, 4))
    assert rotation.next([0.0, 0.0, 0.0]) is None


# -- bad bytes, bad disks --------------------------------------------------------------------------


def flip(path: Path, at: int, bit: int = 1) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ bit]))


def test_what_is_corrupt_is_set_aside_and_put_again(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier()
    entry = one.put("a", [page(1)])
    one.put("alias", [page(1)])
    flip(entry.path, PAGE + 17)
    with pytest.raises(CorruptCheckpoint, match="block 0"):
        one.read(entry)
    assert not entry.path.exists()
    assert [p.name for p in (tmp_path / "cache/quarantine").iterdir()] == [entry.path.name]
    assert one.get("a") is None
    assert one.get("alias") is None
    assert one.put("a", [page(1)]) is not None
    assert torch.equal(one.load("a"), page(1))
    assert one.stats().corruptions == 1


def test_to_who_loads_corruption_is_a_miss(tier: Callable[..., DiskTier]) -> None:
    one = tier()
    entry = one.put("a", [page(1)])
    flip(entry.path, 100)
    assert one.load("a") is None
    stats = one.stats()
    assert (stats.hits, stats.misses, stats.corruptions) == (0, 1, 1)
    assert "checksum" in stats.last_error


def test_a_good_file_under_another_ones_name_is_not_believed(tier: Callable[..., DiskTier]) -> None:
    one = tier()
    first, second = one.put("a", [page(1)]), one.put("b", [page(2)])
    shutil.copy(second.path, first.path)
    assert one.load("a") is None
    assert one.stats().corruptions == 1
    assert torch.equal(one.load("b"), page(2))


def test_what_cannot_be_set_aside_is_not_served(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tier()
    entry = one.put("a", [page(1)])
    flip(entry.path, PAGE)

    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(CorruptCheckpoint):
            one.read(entry)
    assert entry.path.exists()
    assert one.get("a") is None
    assert one.put("a", [page(1)]) is not None  # written over
    assert torch.equal(one.load("a"), page(1))


def test_a_file_that_is_gone_is_a_miss(tier: Callable[..., DiskTier]) -> None:
    one = tier()
    entry = one.put("a", [page(1)])
    entry.path.unlink()
    assert one.load("a") is None
    assert one.stats().entries == 0
    assert one.put("a", [page(1)]) is not None


def test_an_error_of_the_disk_is_a_miss_and_the_entry_goes(tier: Callable[..., DiskTier]) -> None:
    tier().put("a", [layer(1, 3_000_000)])
    one = tier(faults=Faults(1, errno_ppm=1_000_000))
    assert one.load("a") is None
    stats = one.stats()
    assert (stats.read_errors, stats.misses, stats.entries) == (1, 1, 0)
    assert "Input/output error" in stats.last_error
    entry = tier().put("a", [layer(1, 3_000_000)])
    with pytest.raises(ReadError, match="Input/output error"):
        one.read(entry)


def test_too_many_open_files_cost_no_entry(tier: Callable[..., DiskTier]) -> None:
    one = tier()
    entry = one.put("a", [page(1)])
    assert one.load("a") is not None
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        num_refused = 0
        while taken:  # with one more descriptor each time, until the read succeeds
            try:
                one.read(entry)
                break
            except ReadError:
                num_refused += 1
                os.close(taken.pop())
        assert num_refused > 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)
    assert torch.equal(one.load("a"), page(1))


def test_flips_on_the_way_are_read_again(tier: Callable[..., DiskTier]) -> None:
    data = layer(1, 5_000_000)
    one = tier(faults=Faults(1, flip_ppm=1_000_000))
    one.put("a", [data])
    assert torch.equal(one.load("a"), data)
    assert one.stats().second_readings > 0


# -- full disks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_makes_room_once(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, number: int, tmp_path: Path
) -> None:
    one = tier()
    for n in range(4):
        one.put(str(n), [page(n)])
    real, refusals = os.pwritev, [1]

    def full(descriptor: int, views: list[memoryview], offset: int) -> int:
        if refusals[0]:
            refusals[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "pwritev", full)
    assert one.put("new", [page(9)]) is not None
    assert keys(one) == ["new"]  # these are small: some more of them go, for the index
    for n in range(4):
        one.put(str(n), [page(n)])
    refusals[0] = 2
    assert one.put("more", [page(10)]) is None
    stats = one.stats()
    assert stats.refused_full == 1
    assert os.strerror(number) in stats.last_error
    assert one.put("new", [page(9)]) is not None
    assert torch.equal(one.load("new"), page(9))
    assert leftovers(tmp_path) == []


def test_a_limit_on_the_size_of_files_is_survived(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier()
    one.put("small", [page(1)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        assert one.put("large", [layer(1, 3 << 20)]) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    stats = one.stats()
    assert stats.write_errors == 1
    assert "File too large" in stats.last_error
    assert stats.stored_bytes == UNIT
    assert leftovers(tmp_path) == []
    assert torch.equal(one.load("small"), page(1))
    assert one.put("large", [layer(1, 3 << 20)]) is not None


# A file system of 8 MiB, in a namespace of its own: what a full disk is.
FULL = """
import json, os, sys
import torch
from nexus_ext.cache import DiskTier

def layer(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, generator=generator)

with DiskTier(sys.argv[1], "1GiB") as tier:
    kept = [tier.put(str(n), [layer(n)]) is not None for n in range(20)]
    wrong = sum(t is not None and not torch.equal(t, layer(n))
                for n, t in ((n, tier.load(str(n))) for n in range(20)))
    stats = tier.stats()
    temporaries = [name for _, _, names in os.walk(sys.argv[1]) for name in names if "tmp" in name]
    print(json.dumps({"kept": sum(kept), "wrong": wrong, "entries": stats.entries,
                      "evictions": stats.evictions, "temporaries": temporaries}))
"""


def may_mount() -> bool:
    command = ["unshare", "-Urm", "true"]
    return (
        shutil.which("unshare") is not None and subprocess.run(command, check=False).returncode == 0
    )


def test_a_disk_that_is_really_full_keeps_the_latest(tmp_path: Path) -> None:
    if not may_mount():
        pytest.skip("user namespaces are denied here; the tests above refuse writes themselves")
    folder = tmp_path / "small"
    folder.mkdir(mode=0o700)
    script = tmp_path / "full.py"
    script.write_text(FULL)
    mount = 'mount -t tmpfs -o size=8m,mode=700 none "$1" && exec "$2" "$3" "$1"'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", str(folder), sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["wrong"] == 0
    assert said["temporaries"] == []
    assert said["kept"] == 20
    assert 4 <= said["entries"] <= 7
    assert said["evictions"] == 20 - said["entries"]


# -- folders ---------------------------------------------------------------------------------------

# Run as another user where this is root, who may write whatever the mode says.
READ_ONLY = """
import json, os, sys
import torch
from nexus_ext.cache import DiskTier

folder = sys.argv[1]
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
with DiskTier(folder, "1GiB") as tier:
    loaded = tier.load("a")
    put = tier.put("b", [torch.zeros(9, dtype=torch.uint8)])
    again = tier.put("a", [loaded])
    stats = tier.stats()
    print(json.dumps({
        "sum": int(loaded.sum()), "put": put is not None, "again": again is not None,
        "refused": stats.refused_read_only, "why": stats.zones[0].read_only,
        "evicted": tier.evict("a"), "cleared": tier.clear(), "bad": len(tier.verify().bad),
        "missing": tier.load("b") is None, "entries": stats.entries}))
"""


def as_read_only(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if os.getuid() == 0:
            os.chown(path, 65534, 65534)
        path.chmod(0o500 if path.is_dir() else 0o400)


@pytest.fixture
def open_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that another user can reach, and can be removed afterwards."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="nexus-cache-"))
    folder.chmod(0o711)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize("damage", [False, True])
def test_a_read_only_folder_is_a_read_only_cache(
    open_folder: Path, damage: bool, has_index: bool
) -> None:
    folder = open_folder / "cache"
    with DiskTier(folder, "1GiB") as one:
        one.put("a", [page(3)])
        entry = one.put("bad", [page(4)])
    if damage:
        flip(entry.path, PAGE)
    if not has_index:
        next(folder.glob("index-*")).unlink()
    as_read_only(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    command = [sys.executable, "-c", READ_ONLY, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said == {
        "sum": int(page(3).sum()),
        "put": False,
        "again": False,
        "refused": 2,
        "why": "Permission denied",
        "evicted": False,
        "cleared": 0,
        "bad": int(damage),
        "missing": True,
        "entries": 2,
    }
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_folders_and_files_are_the_users_alone(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    old = os.umask(0)
    try:
        tier("deep/cache").put("a", [page(1)])
    finally:
        os.umask(old)
    cache = tmp_path / "deep/cache"
    modes = {path: path.stat().st_mode & 0o777 for path in [cache, *cache.rglob("*")]}
    assert set(modes.values()) == {0o700, 0o600}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items())


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
@pytest.mark.parametrize("inner", ["", "blobs"])
def test_a_folder_that_others_may_write_to_is_refused(
    tier: Callable[..., DiskTier], tmp_path: Path, mode: int, inner: str
) -> None:
    tier().close()
    (tmp_path / "cache" / inner).chmod(mode)
    with pytest.raises(ConfigError, match="shared=True"):
        tier()
    one = tier(shared=True)
    one.put("a", [page(1)])
    assert torch.equal(one.load("a"), page(1))


def test_a_folder_of_another_user_is_refused(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier().close()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match="belongs to user"):
        tier()
    assert tier(shared=True).put("a", [page(1)]) is not None


def test_shared_files_follow_the_umask(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        entry = tier(shared=True).put("a", [page(1)])
    finally:
        os.umask(old)
    assert entry.path.stat().st_mode & 0o777 == 0o640
    assert entry.path.parent.stat().st_mode & 0o777 == 0o750


def test_what_is_no_folder_is_refused(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(ConfigError, match="needs a folder"):
            tier(name)


@pytest.mark.parametrize(
    "options",
    [{"admission": "never"}, {"io": "mmap"}, {"max_bytes": "much"}, {"max_bytes": -1}],
    ids=str,
)
def test_options_that_cannot_be_are_refused(
    tier: Callable[..., DiskTier], options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        tier(**options)


def test_a_tier_without_a_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="none"):
        DiskTier([], "1GiB")


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


# -- temporaries -----------------------------------------------------------------------------------


def test_temporaries_of_the_dead_go_and_those_of_the_living_stay(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    tier().close()
    cache = tmp_path / "cache"
    me = Owner.current()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    living = Owner(me.boot, me.namespace, child.pid, 0)
    for line in Path(f"/proc/{child.pid}/stat").read_text().splitlines():
        living = Owner(me.boot, me.namespace, child.pid, int(line.rpartition(")")[2].split()[19]))
    reused = Owner(me.boot, me.namespace, child.pid, living.began - 1)
    elsewhere = Owner("0" * 32, me.namespace, 1, 1)
    inner = Owner(me.boot, me.namespace + 1, me.pid, me.began)
    old = time.time() - 2 * 86400

    def leave(owner: Owner, age: float = 0) -> list[Path]:
        left = [cache / "blobs" / f".{owner}.0.tmp", cache / f"new-index.{owner}.ab.sqlite"]
        for path in left:
            path.write_bytes(b"x")
            if age:
                os.utime(path, (age, age))
        return left

    stay = leave(living) + leave(me) + leave(elsewhere) + leave(inner)
    go = leave(reused) + leave(Owner(me.boot, me.namespace, 2**22 + 5, 7))
    tier().close()
    assert [path for path in stay if not path.exists()] == []
    assert [path for path in go if path.exists()] == []
    for path in stay[4:]:
        os.utime(path, (old, old))
    child.communicate(b"\n")
    tier().close()
    assert [path for path in stay if path.exists()] == stay[2:4]


def test_verify_reads_everything_and_puts_the_index_right(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier()
    entries = [one.put(str(number), [layer(number, 100_000)]) for number in range(6)]
    flip(entries[0].path, entries[0].path.stat().st_size - 1)
    entries[1].path.unlink()
    lost = tmp_path / "lost"
    os.rename(entries[2].path, lost)
    assert one.get("2") is None
    os.rename(lost, entries[2].path)  # the index has forgotten it
    report = one.verify()
    assert report.num_blobs == 4
    assert report.nbytes == 400_000
    assert [path for path, _ in report.bad] == [entries[0].path]
    assert (report.num_adopted, report.num_missing) == (1, 1)
    assert sorted(keys(one)) == ["2", "3", "4", "5"]
    again = one.verify()
    assert (again.num_blobs, again.bad, again.num_adopted, again.num_missing) == (4, (), 0, 0)


def test_verify_brings_no_old_bytes_back(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    one = tier()
    old = one.put("a", [page(1)])
    kept = tmp_path / "kept"
    shutil.copy(old.path, kept)
    one.put("a", [page(2)])
    shutil.copy(kept, old.path)  # as a process leaves it that died before it entered it
    report = one.verify()
    assert report.num_adopted == 0
    assert not old.path.exists()
    assert torch.equal(one.load("a"), page(2))
