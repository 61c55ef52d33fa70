"""The folders of a cache: who may write there, what is left there, what lies there unknown."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_bench import PAGE, disk_tiers, flip, keys, layer, page

from nexus_ext.cache import DiskTier
from nexus_ext.errors import (
    ConfigError,
)
from nexus_ext.owners import Owner

tier = pytest.fixture(disk_tiers)


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
