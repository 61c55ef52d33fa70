"""The RAM tier where it is used hardest: full memory, names that are used again, users that come
and go, counters that must not grow.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_bench import layer

from nexus_ext.cache.ram import RamTier
from nexus_ext.cache.shared_folder import default_folder
from nexus_ext.errors import ReadError

NBYTES = 100_000


def name(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In shared memory, of this test alone."""
    path = default_folder(str(tmp_path))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def tier(folder: Path) -> Iterator[RamTier]:
    made = RamTier("16MiB", folder=folder)
    yield made
    made.close()


def test_a_file_that_was_seen_under_another_name_is_looked_at_again(
    tier: RamTier, folder: Path
) -> None:
    """Numbers of files are used again, and then the file is another one."""
    tier.put(name(1), [layer(1, NBYTES)])
    assert tier.load(name(1)) is not None
    os.rename(folder / name(1), folder / name(2))
    with open(folder / name(2), "r+b") as file:
        file.write(b"other bytes")
    assert tier.load(name(2)) is None
    assert tier.stats().corrupt == 1


def test_what_is_remembered_of_segments_is_bounded(tier: RamTier) -> None:
    for number in range(40):
        with tier.hold(name(number)):
            tier.put(name(number), [layer(number, 100)])
        assert tier.evict(name(number))
    assert len(tier._holds) == 0
    assert len(tier._seen) <= 1


def test_who_leaves_while_somebody_joins_says_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = RamTier("16MiB", folder=folder)
    real = Path.rmdir

    def join_first(path: Path) -> None:
        (path / ".users").touch(0o600)
        real(path)

    monkeypatch.setattr(Path, "rmdir", join_first)
    tier.close()
    monkeypatch.undo()
    assert folder.exists()


def test_a_segment_that_cannot_be_marked_as_used_leaves_nothing_open(
    tier: RamTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier.put(name(1), [layer(1, NBYTES)])

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    before = sorted(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        with pytest.raises(ReadError):
            tier.load(name(1))
    assert sorted(os.listdir("/proc/self/fd")) == before


FULL = """
import json, os, sys
import torch
from nexus_ext.cache import RamTier

def data(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, generator=generator)

tier = RamTier("1GiB", folder=sys.argv[1] + "/segments")
kept = [tier.put(f"{n:064x}", [data(n)]) is not None for n in range(12)]
found = [tier.load(f"{n:064x}") for n in range(12)]
wrong = sum(one is not None and not torch.equal(one, data(n)) for n, one in enumerate(found))
large = tier.put("f" * 64, [data(99).repeat(6)])
print(json.dumps({
    "kept": sum(kept), "there": sum(one is not None for one in found), "wrong": wrong,
    "large": large is not None and torch.equal(large, data(99).repeat(6)),
    "effective": tier.effective, "evictions": tier.stats().evictions,
}))
tier.close()
print(os.listdir(sys.argv[1]))
"""


def may_mount() -> bool:
    command = ["unshare", "-Urm", "true"]
    return (
        shutil.which("unshare") is not None and subprocess.run(command, check=False).returncode == 0
    )


def test_memory_that_is_really_full_kills_nobody(tmp_path: Path) -> None:
    """4 MiB of it, in a namespace of its own."""
    if not may_mount():
        pytest.skip("user namespaces are denied here; test_ram_tier.py refuses memory itself")
    small = tmp_path / "small"
    small.mkdir(mode=0o700)
    mount = 'mount -t tmpfs -o size=4m,mode=700 none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", str(small), sys.executable, FULL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said, left = done.stdout.splitlines()
    counts: dict[str, Any] = json.loads(said)
    assert counts["kept"] == 12
    assert counts["wrong"] == 0
    assert 2 <= counts["there"] <= 3
    assert counts["evictions"] >= 9
    # Six megabytes have no room there: they are this process's own.
    assert counts["large"] is True
    assert counts["effective"].startswith("private: ")
    assert left == "[]"


def test_a_mapped_segment_outlives_its_file(tier: RamTier) -> None:
    loaded = tier.put(name(1), [layer(1, NBYTES)])
    tier.clear()
    for number in range(2, 40):
        tier.put(name(number), [layer(number, NBYTES)])
    assert loaded is not None
    assert torch.equal(loaded, layer(1, NBYTES))
