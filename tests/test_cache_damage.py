"""Bad bytes, bad disks, full ones: what is wrong is a miss, and is put again."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from cache_bench import PAGE, UNIT, disk_tiers, flip, keys, layer, leftovers, page

from nexus_ext.cache import DiskTier
from nexus_ext.engine import Faults
from nexus_ext.errors import (
    CorruptCheckpoint,
    ReadError,
)

tier = pytest.fixture(disk_tiers)


# -- bad bytes, bad disks --------------------------------------------------------------------------


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
