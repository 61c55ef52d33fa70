"""A store that nodes share: what comes back is what was put, or nothing comes back."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import zstandard
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from nexus_ext.cache import RemoteStore, Tier, TieredStore
from nexus_ext.cache.remote_files import PIECE_BYTES, shown
from nexus_ext.cache.remote_object import HEAD_NBYTES, Head, Note
from nexus_ext.errors import ConfigError, CorruptCheckpoint, MissingExtra
from tests.conftest import RecordCount

MIB = 1 << 20
# By protocol; the package hides its module of that name behind a read-only view.
DRIVERS = sys.modules["fsspec.registry"]._registry


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def digest(data: torch.Tensor) -> str:
    return sha256(data.numpy().tobytes()).hexdigest()


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of an empty store, on a disk and in memory."""
    if request.param == "file":
        yield f"file://{tmp_path}/shared"
        return
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield "memory://shared"
    MemoryFileSystem.store.clear()


def raw(url: str, path: str) -> tuple[Any, str]:
    """The driver, and the only file below a folder of the store."""
    fs, root = fsspec.core.url_to_fs(url)
    (found,) = fs.find(f"{root}/{path}")
    return fs, found


# -- what is put comes back ------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, MIB, PIECE_BYTES - HEAD_NBYTES, PIECE_BYTES + 1])
@pytest.mark.parametrize("compress", ["off", "on"])
def test_what_is_put_comes_back(url: str, nbytes: int, compress: str) -> None:
    data = noise(nbytes)
    store = RemoteStore(url, compress=compress)  # type: ignore[arg-type]
    name = store.put([data[: nbytes // 2], data[nbytes // 2 :]])
    assert name == digest(data)
    assert store.has(name)
    found = RemoteStore(url).get(name)
    assert found is not None
    assert torch.equal(found, data)
    assert store.put([data]) == name
    assert (store.stats().puts, store.stats().puts_known) == (1, 1)


def test_a_key_leads_to_its_bytes(url: str) -> None:
    store = RemoteStore(url)
    assert store.find("layer/0") is None
    assert store.fetch("layer/0") is None
    note = store.publish("layer/0", [noise(100)], kind="expert", about={"n": [1]})
    assert note == Note("layer/0", digest(noise(100)), 100, "expert", {"n": [1]})
    out = torch.empty(100, dtype=torch.uint8)
    fetched = RemoteStore(url).fetch("layer/0", out)
    assert fetched is not None
    assert fetched[0] == note
    assert torch.equal(out, noise(100))
    store.publish("layer/0", [noise(100, seed=1)])
    again = store.fetch("layer/0")
    assert again is not None
    assert torch.equal(again[1], noise(100, seed=1))
    assert store.get("0" * 64) is None
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.unreachable, stats.last_error) == (1, 2, 0, "")


def test_what_shrinks_is_sent_compressed_and_what_does_not_is_not(url: str) -> None:
    store = RemoteStore(url)
    small, large = noise(2 * MIB) & 0x0F, noise(2 * MIB)
    store.put([small])
    halved = store.stats().wire_bytes_out
    assert halved < 0.7 * 2 * MIB
    store.put([large])
    stats = store.stats()
    assert stats.wire_bytes_out - halved == 2 * MIB + HEAD_NBYTES
    assert stats.plain_bytes_out == 4 * MIB
    assert stats.decision is not None
    assert stats.decision.why == "the sample hardly shrinks"
    other = RemoteStore(url)
    for data in (small, large):
        found = other.get(digest(data))
        assert found is not None
        assert torch.equal(found, data)
    assert other.stats().wire_bytes_in == stats.wire_bytes_out
    assert other.stats().plain_bytes_in == 4 * MIB
    assert (other.stats().link_bytes_per_second or 0) > 0


def test_a_link_that_is_faster_than_the_compressor_gets_plain_bytes(url: str) -> None:
    store = RemoteStore(url, link_bytes_per_second=1e13)
    store.put([noise(MIB) & 0x0F])
    assert store.stats().wire_bytes_out == MIB + HEAD_NBYTES


# -- what is wrong is refused ----------------------------------------------------------------------


@pytest.mark.parametrize("compress", ["off", "on"])
def test_a_flip_or_a_cut_anywhere_is_refused_and_counted(
    url: str, compress: str, record_count: RecordCount
) -> None:
    data = noise(500) & 0x0F
    writer = RemoteStore(url, compress=compress)  # type: ignore[arg-type]
    assert writer.publish("key", [data]) is not None
    fs, path = raw(url, "blobs")
    good = fs.cat_file(path)
    changed = [good[:end] for end in range(0, len(good), 9)]
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        changed.append(bytes(flipped))
    store = RemoteStore(url, max_object_bytes="1MiB")
    num_refused = 0
    for one in changed:
        fs.pipe_file(path, one)
        found = store.get(digest(data))
        num_refused += found is None
        assert found is None or torch.equal(found, data)
        fetched = store.fetch("key")
        assert fetched is None or torch.equal(fetched[1], data)
    stats = store.stats()
    outcomes = {"refused": num_refused, "changed nothing": len(changed) - num_refused}
    record_count("flips and cuts of objects in a shared store", len(changed), outcomes)
    assert num_refused > 0.95 * len(changed)
    assert stats.refused_corrupt + stats.refused_too_large + stats.hits == 2 * len(changed)
    fs.pipe_file(path, good)
    assert store.get(digest(data)) is not None


def test_every_flip_and_cut_of_a_note_is_a_miss(url: str) -> None:
    writer = RemoteStore(url)
    note = writer.publish("key", [noise(10)], about={"a": 1})
    fs, path = raw(url, "keys")
    good = fs.cat_file(path)
    store = RemoteStore(url)
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        for one in (bytes(flipped), good[:position]):
            fs.pipe_file(path, one)
            # The name of a letter may be written in two ways: then it is the same note.
            assert store.find("key") in (None, note)
    assert store.stats().refused_corrupt > 1.9 * len(good)
    other = json.loads(good) | {"key": "other"}
    fs.pipe_file(path, json.dumps(other).encode())
    assert store.find("key") is None
    with pytest.raises(CorruptCheckpoint, match="of another key"):
        Note.decode(good, "other")


def test_a_wrong_object_is_put_anew_by_who_found_out(url: str, tmp_path: Path) -> None:
    data = noise(1000)
    RemoteStore(url).publish("key", [data])
    fs, path = raw(url, "blobs")
    damaged = bytearray(fs.cat_file(path))
    damaged[-1] ^= 1
    fs.pipe_file(path, bytes(damaged))
    with TieredStore(
        [Tier(tmp_path / "node", "1MiB")], remote=RemoteStore(url), publish=True
    ) as one:
        assert one.load("key") is None
        assert one.put("key", [data]) is not None
        remote = one.stats().remote
    assert remote is not None
    assert (remote.refused_corrupt, remote.puts) == (1, 1)
    found = RemoteStore(url).get(digest(data))
    assert found is not None
    assert torch.equal(found, data)


def test_a_cut_object_counts_as_not_there(url: str) -> None:
    data = noise(1000)
    store = RemoteStore(url, compress="off")
    name = store.put([data])
    assert name is not None
    fs, path = raw(url, "blobs")
    fs.pipe_file(path, fs.cat_file(path)[:500])
    assert not store.has(name)
    assert store.put([data]) == name
    assert store.get(name) is not None


def test_bombs_are_refused_before_they_grow(url: str) -> None:
    data = bytes(64 * MIB)
    name = sha256(data).hexdigest()
    bomb = zstandard.ZstdCompressor().compress(data)
    store = RemoteStore(url, max_object_bytes="32MiB")
    fs, root = fsspec.core.url_to_fs(url)
    path = f"{root}/blobs/{name[:2]}/{name}"
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    # One that says how large it is, one that says less, one that says what cannot be.
    for nbytes, counter in [
        (64 * MIB, "refused_too_large"),
        (1000, "refused_corrupt"),
        (1 << 60, "refused_too_large"),
    ]:
        before = getattr(store.stats(), counter)
        fs.pipe_file(path, Head("zstd", nbytes, len(bomb)).encode() + bomb)
        assert store.get(name) is None
        assert getattr(store.stats(), counter) == before + 1


def test_an_object_and_its_note_must_agree(url: str) -> None:
    store = RemoteStore(url, compress="off")
    store.publish("key", [noise(100)])
    fs, path = raw(url, "keys")
    fs.pipe_file(path, Note("key", digest(noise(100)), 99, "layer", {}).encode())
    assert store.fetch("key") is None
    assert store.stats().refused_corrupt == 1


# -- what cannot be reached ------------------------------------------------------------------------


class Broken(LocalFileSystem):  # type: ignore[misc]
    """A store behind a cable that is out."""

    protocol = "broken"
    cachable = False

    def _fail(self, *_: object, **__: object) -> Any:
        raise ConnectionResetError(104, "https://user:secret@host/?token=secret went away")

    cat_file = info = open = pipe_file = makedirs = _fail


def test_a_store_that_cannot_be_reached_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DRIVERS, "broken", Broken)
    store = RemoteStore(f"broken://user:secret@{tmp_path}/shared?token=secret")
    name = digest(noise(10))
    assert store.get(name) is None
    assert store.fetch("key") is None
    assert store.put([noise(10)]) is None
    assert store.publish("key", [noise(10)]) is None
    assert not store.has(name)
    stats = store.stats()
    assert stats.last_error == "ConnectionResetError (errno 104)"
    assert stats.unreachable >= 5
    assert "secret" not in str(stats)
    with TieredStore([Tier(tmp_path / "node", "1MiB")], remote=store, publish=True) as one:
        assert one.load("key") is None
        assert one.put("key", [noise(10)]) is not None
        assert one.load("key") is not None
        assert (one.stats().published, one.stats().hits, one.stats().misses) == (0, 1, 1)


class ReadOnly(LocalFileSystem):  # type: ignore[misc]
    """What http is: to be read."""

    protocol = ("http", "https")
    cachable = False

    def _no(self, *_: object, **__: object) -> Any:
        raise AssertionError("written to")

    pipe_file = makedirs = mv = _no

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.split("://", 1)[-1]


def test_a_store_to_be_read_only_is_never_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RemoteStore(f"file://{tmp_path}/shared").publish("key", [noise(10)])
    monkeypatch.setitem(DRIVERS, "http", ReadOnly)
    store = RemoteStore(f"http://{tmp_path}/shared")
    fetched = store.fetch("key")
    assert fetched is not None
    assert torch.equal(fetched[1], noise(10))
    assert store.publish("other", [noise(11)]) is None
    assert store.stats().refused_read_only == 1


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "mv", fail)
    store = RemoteStore(f"file://{tmp_path}/shared")
    assert store.put([noise(1000)]) is None
    assert [path for path in (tmp_path / "shared").rglob("*") if path.is_file()] == []
    assert store.stats().last_error == "OSError (errno 28)"


# -- what is missing, what cannot be ---------------------------------------------------------------


def test_missing_packages_are_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(MIB) & 0x0F
    RemoteStore(url, compress="on").publish("packed", [data])
    with pytest.raises(MissingExtra, match="pip install s3fs"):
        RemoteStore("s3://bucket/models")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtra, match=r"nexus_ext\[zstd\]"):
        RemoteStore(url, compress="on")
    store = RemoteStore(url)
    with pytest.raises(MissingExtra, match=r"nexus_ext\[zstd\]"):
        store.fetch("packed")
    assert store.put([noise(MIB, 1) & 0x0F]) is not None
    assert store.stats().wire_bytes_out == MIB + HEAD_NBYTES
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingExtra, match="pip install fsspec"):
        RemoteStore(url)


def test_what_cannot_be_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="compress must be one of auto, on, off"):
        RemoteStore(url, compress="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"got nosuch://host/a\.") as caught:
        RemoteStore("nosuch://me:secret@host/a?token=secret")
    assert "secret" not in str(caught.value)
    store = RemoteStore(url)
    for name in ("", "../../etc/passwd", "A" * 64, "0" * 63):
        with pytest.raises(ConfigError, match="64 hexadecimal digits"):
            store.get(name)
    with pytest.raises(ConfigError, match="must be JSON"):
        store.publish("key", [noise(1)], about={"x": object()})
    store.publish("key", [noise(10)])
    with pytest.raises(ConfigError, match="out must be 10"):
        store.fetch("key", torch.empty(9, dtype=torch.uint8))


def test_urls_are_shown_without_secrets() -> None:
    assert shown("s3://key:secret@bucket/a?token=x#y") == "s3://bucket/a"
    assert shown("simplecache::https://u:p@h:81/a?b=c") == "simplecache::https://h:81/a"
    assert shown("memory://a") == "memory://a"
    assert shown("http://[bad") == "(not a URL)"
