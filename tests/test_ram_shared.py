"""The RAM tier in shared memory: its folder, other processes, memory that is full."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cache_bench import MIB, name, ram_tiers, shared_folders, some

from nexus_ext.cache import shared_folder
from nexus_ext.cache.ram import RamTier
from nexus_ext.cache.segment import file_bytes
from nexus_ext.owners import Owner

PATIENCE_SECONDS = 60


folder = pytest.fixture(shared_folders)
tier = pytest.fixture(ram_tiers)


def _pages(nbytes: int) -> int:
    return -(-nbytes // 4096) * 4096


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_that_others_may_enter_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "open"
    path.mkdir(mode=0o755)
    tier = RamTier("16MiB", folder=path)
    assert tier.effective.startswith("private: the folder of shared segments must be")
    assert tier.put(name(0), [some(0)]) is not None
    assert tier.load(name(0)) is not None
    assert list(path.iterdir()) == []
    tier.close()


def test_a_link_in_place_of_the_folder_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o700)
    os.symlink(tmp_path / "there", tmp_path / "link")
    tier = RamTier("16MiB", folder=tmp_path / "link")
    assert tier.effective.startswith("private: ")
    tier.close()


def test_without_shared_memory_it_is_private(tmp_path: Path) -> None:
    tier = RamTier("16MiB", folder=tmp_path / "no" / "such" / "place")
    assert tier.effective.startswith("private: ")
    made = tier.put(name(0), [some(0)])
    assert made is not None
    assert torch.equal(made, some(0))
    tier.close()


def test_when_shared_memory_is_full_it_goes_on_in_private(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = RamTier("64MiB", folder=folder)
    tier.put(name(0), [some(0)])
    real = os.posix_fallocate
    room = [2 * MIB]

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        if "memfd" in os.readlink(f"/proc/self/fd/{descriptor}"):
            return real(descriptor, offset, nbytes)
        used = sum(path.stat().st_size for path in folder.iterdir() if len(path.name) == 64)
        if used + nbytes > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", full)
    # What is there makes room as long as that helps.
    assert tier.put(name(1), [some(1, 3 * MIB // 2)]) is not None
    assert tier.effective == "shared"
    assert tier.load(name(0)) is None
    made = tier.put(name(2), [some(2, 4 * MIB)])
    assert made is not None
    assert torch.equal(made, some(2, 4 * MIB))
    assert tier.effective.startswith("private: ")
    loaded = tier.load(name(2))
    assert loaded is not None
    assert torch.equal(loaded, some(2, 4 * MIB))
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []
    tier.close()


def test_what_dead_processes_did_not_finish_is_removed(folder: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    folder.mkdir(mode=0o700)
    me = Owner.current()
    gone = Owner(me.boot, me.namespace, dead.pid, 1)
    (folder / f".{gone}.0.tmp").write_bytes(b"x" * 100)
    (folder / f".{me}.77.tmp").write_bytes(b"x" * 100)
    tier = RamTier("16MiB", folder=folder)
    assert tier.stats().abandoned == 1
    assert [path.name for path in folder.glob(".*.tmp")] == [f".{me}.77.tmp"]
    tier.close()


def test_unfinished_segments_count(folder: Path) -> None:
    tier = RamTier(3 * _pages(file_bytes(MIB)), folder=folder)
    tier.put(name(0), [some(0)])

    def fill_another(out: torch.Tensor) -> None:
        assert tier.put(name(2), [some(2)]) is not None
        assert tier.put(name(3), [some(3)]) is not None
        out.copy_(some(1))

    assert tier.fill(name(1), MIB, fill_another) is not None
    assert tier.digests() == [name(2), name(3), name(1)] or tier.load(name(0)) is None
    assert tier.stats().nbytes <= tier.max_bytes
    tier.close()


# -- several processes -----------------------------------------------------------------------------

CHILD = """
import sys, torch
from nexus_ext.cache.ram import RamTier
tier = RamTier(int(sys.argv[2]), folder=sys.argv[1])
for line in sys.stdin:
    word, digest, *rest = line.split()
    if word == "load":
        loaded = tier.load(digest)
        print("none" if loaded is None else int(loaded.long().sum()), flush=True)
    elif word == "put":
        made = tier.put(digest, [torch.full((int(rest[0]),), int(rest[1]), dtype=torch.uint8)])
        print("none" if made is None else made.numel(), flush=True)
    elif word == "scribble":
        tier.load(digest).zero_()
        print("done", flush=True)
    elif word == "begin":
        tier.fill(digest, int(rest[0]), lambda out: (print("begun", flush=True), sys.stdin.read()))
tier.close()
print("closed", flush=True)
"""


class Child:
    """A process with a tier on the same folder, that does what it is told."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), str(max_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )

    def ask(self, *words: object) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        out, _ = self.process.communicate()
        assert out.strip() == "closed"
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def test_processes_share_memory_and_budget_and_nothing_else(folder: Path) -> None:
    room = 3 * _pages(file_bytes(MIB))
    tier = RamTier(room, folder=folder)
    data = torch.full((MIB,), 3, dtype=torch.uint8)
    tier.put(name(0), [data])
    first, second = Child(folder, room), Child(folder, room)
    assert first.ask("load", name(0)) == str(3 * MIB)
    assert first.ask("scribble", name(0)) == "done"
    assert second.ask("load", name(0)) == str(3 * MIB)
    loaded = tier.load(name(0))
    assert loaded is not None
    assert torch.equal(loaded, data)

    # One budget for all: the third process's bytes push out the first's.
    assert second.ask("put", name(1), MIB, 1) == str(MIB)
    assert first.ask("put", name(2), MIB, 2) == str(MIB)
    assert first.ask("load", name(1)) == str(MIB)
    assert first.ask("put", name(3), MIB, 4) == str(MIB)
    assert tier.load(name(0)) is None
    assert tier.stats().nbytes <= room
    assert torch.equal(loaded, data)
    others = tier.load(name(3))
    assert others is not None
    assert int(others.long().sum()) == 4 * MIB

    first.end()
    tier.close()
    assert folder.exists()  # the second still uses it
    assert second.ask("load", name(3)) == str(4 * MIB)
    second.end()


def test_a_killed_process_leaves_what_was_whole_and_nothing_else(folder: Path) -> None:
    room = 16 * MIB
    tier = RamTier(room, folder=folder)
    child = Child(folder, room)
    assert child.ask("put", name(0), MIB, 5) == str(MIB)
    assert child.ask("begin", name(1), MIB) == "begun"
    assert len(list(folder.glob(".*.tmp"))) == 1
    child.kill()
    loaded = tier.load(name(0))
    assert loaded is not None
    assert int(loaded.long().sum()) == 5 * MIB
    assert tier.load(name(1)) is None
    other = RamTier(room, folder=folder)
    assert list(folder.glob(".*.tmp")) == []
    assert other.stats().abandoned == 1
    other.close()
    tier.close()


def test_coming_and_going_loses_nothing(folder: Path) -> None:
    """Who joins while the last one leaves gets a folder that stays."""
    failures: list[str] = []

    def come_and_go() -> None:
        for _ in range(50):
            tier = RamTier("16MiB", folder=folder)
            made = tier.put(name(0), [some(0, 1000)])
            if tier.effective != "shared" or made is None or not torch.equal(made, some(0, 1000)):
                failures.append(tier.effective)
            tier.close()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_without_locks_it_is_still_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder.fcntl, "flock", lambda descriptor, operation: None)
    tier = RamTier("16MiB", folder=folder)
    results: list[bool] = []

    def put(number: int) -> None:
        for _ in range(20):
            made = tier.put(name(number % 2), [some(number % 2, 70000)])
            results.append(made is not None and torch.equal(made, some(number % 2, 70000)))

    threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80
    tier.close()
