"""A disk that refuses, a process that has run out of something: what is refused is counted, what
was there stays there, and nothing but the errors that are promised comes out.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_bench import PAGE, blobs_in, disk_tiers, flip, keys, leftovers, page

from nexus_ext.cache import DiskTier
from nexus_ext.errors import NexusError, ReadError

tier = pytest.fixture(disk_tiers)


@contextmanager
def refusing(
    patch: pytest.MonkeyPatch, names: list[str], number: int, folder: Path
) -> Iterator[None]:
    """Calls of `os` that fail, for names and descriptors below a folder."""

    def is_below(target: object) -> bool:
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        return str(target).startswith(str(folder))

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *rest: Any, **options: Any) -> Any:
            flags = rest[0] if rest else 0
            is_write = real is not real_open or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if is_write and is_below(target):
                raise OSError(number, os.strerror(number))
            return real(target, *rest, **options)

        return call

    real_open = os.open
    with patch.context() as inner:
        for name in names:
            inner.setattr(os, name, wrap(getattr(os, name)))
        yield


CALLS = ["open", "mkdir", "pwritev", "fdatasync", "rename", "fsync", "unlink"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("names", [*([name] for name in CALLS), CALLS], ids="-".join)
@pytest.mark.parametrize("num_pages", [6, 60])  # it must make room first, or need not
def test_whatever_call_is_refused_nothing_else_comes_out(
    tier: Callable[..., DiskTier],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    names: list[str],
    number: int,
    num_pages: int,
) -> None:
    one = tier(max_bytes=num_pages * PAGE)
    for n in range(3):
        assert one.put(str(n), [page(n)]) is not None
    with refusing(monkeypatch, names, number, tmp_path):
        one.put("new", [page(7)])
        one.put("2", [page(2)])
        one.evict("0")
        one.clear()
        one.verify()
        for n in range(3):
            found = one.load(str(n))
            assert found is None or torch.equal(found, page(n))
        assert one.stats().corruptions == 0
    found = one.load("new")
    assert found is None or torch.equal(found, page(7))
    assert one.put("last", [page(8)]) is not None
    assert torch.equal(one.load("last"), page(8))
    one.close()
    with tier() as again:
        assert torch.equal(again.load("last"), page(8))
        again.verify()
        assert again.stats().stored_bytes == sum(b.stat().st_size for b in blobs_in(tmp_path))


def test_a_file_where_a_folder_should_be_is_a_refusal(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier()
    entry = one.put("a", [page(1)])
    assert entry is not None
    one.evict("a")
    entry.path.parent.rmdir()
    entry.path.parent.write_text("in the way")
    assert one.put("a", [page(1)]) is None
    assert one.stats().write_errors == 1
    assert one.load("a") is None


def test_a_folder_that_was_removed_is_an_empty_cache(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier()
    one.put("a", [page(1)])
    shutil.rmtree(tmp_path / "cache")
    assert one.load("a") is None
    assert one.put("a", [page(1)]) is None
    assert one.entries() == []
    stats = one.stats()
    assert (stats.entries, stats.zones[0].free_bytes) == (0, 0)
    assert stats.index_errors > 0


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_an_index_that_breaks_and_cannot_be_put_aside_is_a_miss(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    one = tier()
    one.put("a", [page(1)])
    (path,) = (tmp_path / "cache").glob("index-*.sqlite")
    with open(path, "r+b") as file:
        file.write(b"no database any more" * 3000)
    one._zones[0].index._db._connection.execute("PRAGMA shrink_memory")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        assert one.load("a") is None
        assert one.put("b", [page(2)]) is None
    assert one.stats().index_errors > 0
    assert torch.equal(one.load("a"), page(1))  # it is made anew from the blobs


def test_an_index_that_cannot_be_looked_at_is_a_miss(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tier()
    one.put("a", [page(1)])
    real = os.stat

    def refuse(path: Any, *rest: Any, **options: Any) -> Any:
        if "index-" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        assert one.load("a") is None
        assert one.put("b", [page(2)]) is None
    assert torch.equal(one.load("a"), page(1))


# -- a process that has run out of something -------------------------------------------------------


@contextmanager
def without_descriptors() -> Iterator[list[int]]:
    """Every descriptor is taken; close some of the list to have as many."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield taken
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)


def test_verifying_with_too_many_open_files_costs_no_entry(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier()
    for n in range(4):
        one.put(str(n), [page(n)])
    num_refused = 0
    with without_descriptors() as taken:
        for _ in range(12):
            try:
                report = one.verify()
            except NexusError:
                num_refused += 1
            else:
                num_refused += len(report.bad) > 0 or report.num_blobs < 4
            os.close(taken.pop())
    assert num_refused > 0
    assert keys(one) == [str(n) for n in range(4)]
    assert one.verify().num_blobs == 4
    assert len(blobs_in(tmp_path / "cache/blobs")) == 4


def test_reading_what_is_held_with_too_many_open_files_is_an_error_of_ours(
    tier: Callable[..., DiskTier],
) -> None:
    one = tier()
    entry = one.put("a", [page(1)])
    assert entry is not None
    with one.hold("a"), without_descriptors():
        with pytest.raises(ReadError):
            one.read(entry)
        assert one.load("a") is None
    assert torch.equal(one.load("a"), page(1))


def test_a_rebuild_with_too_many_open_files_loses_no_entry(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier()
    for n in range(4):
        one.put(str(n), [page(n)])
    num_refused = 0
    with without_descriptors() as taken:
        for _ in range(12):
            os.close(taken.pop())  # for the list
            for path in (tmp_path / "cache").glob("index-*"):
                path.unlink()
            taken.append(os.open("/dev/null", os.O_RDONLY))
            num_refused += one.load("0") is None
            os.close(taken.pop())
    assert num_refused > 0
    assert sorted(keys(one)) == [str(n) for n in range(4)]


def test_a_stack_that_is_nearly_full_costs_no_entry(tier: Callable[..., DiskTier]) -> None:
    one = tier()
    assert one.put("a", [page(1)], about={"x": [[1]]}) is not None
    num_refused = 0

    def deep(levels: int) -> torch.Tensor | None:
        return deep(levels - 1) if levels else one.load("a")

    for levels in range(850, 1000):
        try:
            found = deep(levels)
        except RecursionError:
            num_refused += 1
        else:
            assert found is None or torch.equal(found, page(1))
    assert num_refused > 0
    assert one.stats().corruptions == 0
    assert torch.equal(one.load("a"), page(1))


def test_what_is_held_can_be_put_again_when_it_is_damaged(tier: Callable[..., DiskTier]) -> None:
    one = tier()
    with one.hold("a") as nothing:
        assert nothing is None
    entry = one.put("a", [page(1)])
    assert entry is not None
    with one.hold("a"):
        flip(entry.path, PAGE)
        assert one.load("a") is None
        assert one.put("a", [page(1)]) is not None
        assert torch.equal(one.load("a"), page(1))


def test_folders_that_cannot_all_be_opened_leave_none_open(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    import gc

    (tmp_path / "file").write_text("")
    gc.collect()
    gc.disable()
    try:
        before = sorted(os.listdir("/proc/self/fd"))
        with suppress(NexusError):
            tier("a", "b", "file")
        assert sorted(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
    assert leftovers(tmp_path) == []
