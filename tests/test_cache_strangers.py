"""What somebody else left in the folder of a cache, or in a shared store: links, pipes, rows, notes
and sizes that nobody here wrote. They cost a miss, and nothing outside the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from cache_bench import PAGE, UNIT, disk_tiers, flip, keys, layer, leftovers, page

from nexus_ext.cache import DiskTier, RemoteStore, Tier, TieredStore
from nexus_ext.cache.blob import Header
from nexus_ext.cache.level import ENCODED
from nexus_ext.cache.remote_object import Head, blob_path, note_path
from nexus_ext.errors import ConfigError
from nexus_ext.owners import Owner

tier = pytest.fixture(disk_tiers)


def write_rows(folder: Path, statement: str, values: tuple[object, ...] = ()) -> None:
    (path,) = folder.glob("index-*.sqlite")
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


# -- links and pipes -------------------------------------------------------------------------------


def test_a_quarantine_that_leads_elsewhere_removes_nothing_there(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").write_text("mine")
    one = tier()
    entry = one.put("a", [page(1)])
    assert entry is not None
    (tmp_path / "cache" / "quarantine").symlink_to(home)
    flip(entry.path, PAGE)
    assert one.load("a") is None
    assert [path.name for path in home.iterdir()] == ["precious"]
    assert one.put("a", [page(1)]) is not None
    assert torch.equal(one.load("a"), page(1))


def test_what_else_lies_in_the_quarantine_stays(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier()
    kept = tmp_path / "cache" / "quarantine"
    (kept / "notes").mkdir(parents=True)
    (kept / "why.txt").write_text("it was the cable")
    for number in range(2):
        entry = one.put("a", [page(number)])
        assert entry is not None
        flip(entry.path, PAGE)
        assert one.load("a") is None
    assert sorted(path.name for path in kept.iterdir()) == [entry.path.name, "notes", "why.txt"]


PIPES = """
import os, sys
from nexus_ext.cache import DiskTier, Tier, TieredStore

folder = sys.argv[1]
with TieredStore([Tier(folder, "1MiB")]) as one:
    one.put("a", [b"bytes"])
for name in sys.argv[2:]:
    for path in [p for p in os.listdir(folder) if p.startswith(name)]:
        os.unlink(f"{folder}/{path}")
    os.mkfifo(f"{folder}/{name}")
with TieredStore([Tier(folder, "1MiB")]) as one:
    print(bytes(one.load("a").tolist()), one.stats().tiers[0].rate is not None)
"""


def test_pipes_in_place_of_files_stop_nobody(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    names = ("rate.json", "index-000001.sqlite", "moves.lock", "fetch.lock")
    assert run_python(PIPES, tmp_path / "cache", *names).strip() == "b'bytes' True"


# -- rows and headers ------------------------------------------------------------------------------


@pytest.mark.parametrize("about", ["no JSON", "3", "[" * 100_000, "null", '{"a": NaN'])
def test_a_row_whose_description_is_none_is_a_miss(
    tier: Callable[..., DiskTier], tmp_path: Path, about: str
) -> None:
    with tier() as one:
        one.put("a", [page(1)])
        one.put("b", [page(2)])
        row = one._zones[0].index.find("a")
    assert row is not None
    forged = replace(row, about=about)
    write_rows(
        tmp_path / "cache",
        "UPDATE names SET about = ?, seal = ? WHERE digest = ?",
        (about.encode(), forged.seal(), row.digest),
    )
    one = tier()
    assert one.load("a") is None
    assert keys(one) == ["b"]
    assert one.put("a", [page(1)]) is not None
    assert torch.equal(one.load("a"), page(1))


@pytest.mark.parametrize("stored", [1e300, 8192.5])
def test_a_size_that_is_no_whole_number_frees_nobody_from_the_budget(
    tier: Callable[..., DiskTier], tmp_path: Path, stored: float
) -> None:
    with tier(max_bytes=4 * UNIT) as one:
        one.put("a", [page(1)])
    write_rows(tmp_path / "cache", "UPDATE blobs SET stored = ?", (stored,))
    one = tier(max_bytes=4 * UNIT)
    for number in range(8):
        assert one.put(str(number), [page(10 + number)]) is not None
    assert one.stats().stored_bytes == 4 * UNIT
    assert keys(one) == ["4", "5", "6", "7"]


def blob_of_blocks(path: Path, block_bytes: int, data: torch.Tensor) -> None:
    """A blob whose checksums are all right, in blocks that nobody here writes."""
    whole = Header.of("a", "layer", {}, 1, [data])
    digests = torch.zeros(-(-data.numel() // block_bytes), dtype=torch.int64)
    size = 80 + 60 + 8 * digests.numel()
    header = replace(
        whole,
        block_bytes=block_bytes,
        digests=digests,
        header_nbytes=-(-size // PAGE) * PAGE,
    )
    path.write_bytes(bytes(header.encode()) + bytes(data.tolist()))


@pytest.mark.parametrize("block_bytes", [1, 4096, (1 << 32) - 1])
def test_a_blob_in_other_blocks_is_none(tier: Callable[..., DiskTier], block_bytes: int) -> None:
    """It could want as much memory as it likes: a slot is as large as a block."""
    one = tier()
    entry = one.put("a", [page(1)])
    assert entry is not None
    blob_of_blocks(entry.path, block_bytes, page(1))
    assert one.load("a") is None
    assert one.stats().corruptions == 1
    assert "blocks of" in one.stats().last_error


# -- what is read into -----------------------------------------------------------------------------


def strided(nbytes: int) -> list[torch.Tensor]:
    """Tensors of so many elements that are not so many bytes one behind the other."""
    return [
        torch.zeros(2 * nbytes, dtype=torch.uint8)[::2],
        torch.zeros(1, dtype=torch.uint8).expand(nbytes),
        torch.zeros(2, nbytes, dtype=torch.uint8).t()[: nbytes // 2],
    ]


@pytest.mark.parametrize("which", range(3))
def test_memory_with_gaps_is_refused_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    data = layer(1) & 0x0F
    out = strided(PAGE)[which]
    remote = RemoteStore(f"file://{tmp_path}/shared")
    note = remote.publish("a", [data])
    assert note is not None
    with (
        DiskTier(tmp_path / "disk", "1MiB") as disk,
        TieredStore([Tier(tmp_path / "plain", "1MiB")], remote=remote) as store,
    ):
        entry = disk.put("a", [data])
        assert entry is not None
        for read in (
            lambda: disk.load("a", out),
            lambda: disk.read(entry, out),
            lambda: remote.get(note.digest, out),
            lambda: remote.fetch("a", out),
            lambda: store.load("a", out),
        ):
            with pytest.raises(ConfigError, match="contiguous"):
                read()
        assert not out.any()
        assert torch.equal(disk.load("a"), data)  # it was not the file's fault
        level = store._levels.all[0]
        assert level.rate is not None
        monkeypatch.setattr(level, "rate", replace(level.rate, bytes_per_second=1e6))
        store.put("packed", [data])
        assert level.decision is not None
        assert level.decision.is_on
        with pytest.raises(ConfigError, match="contiguous"):
            store.load("packed", out)
        assert not out.any()
        assert torch.equal(store.load("packed"), data)


# -- tiers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"bytes_per_second": "fast", "measured_seconds": 1.0, "io_mode": "direct"},
        {"bytes_per_second": 0.0, "measured_seconds": 1e12, "io_mode": "direct"},
        {"bytes_per_second": float("nan"), "measured_seconds": 2e9, "io_mode": "direct"},
        {"bytes_per_second": 1e9, "measured_seconds": None, "io_mode": "direct"},
    ],
)
def test_a_rate_that_cannot_be_is_measured_anew(tmp_path: Path, said: dict[str, Any]) -> None:
    """Its check is right: anybody can make one."""
    with TieredStore([Tier(tmp_path, "1MiB")]):
        pass
    check = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    (tmp_path / "rate.json").write_text(json.dumps(said | {"check": check}))
    with TieredStore([Tier(tmp_path, "1MiB")], max_rate_age_seconds=1e13) as one:
        one.put("a", [layer(1, 100_000) & 1])
        rate = one.stats().tiers[0].rate
    assert rate is not None
    assert rate.bytes_per_second > 0
    assert rate.io_mode in ("direct", "buffered")
    assert json.loads((tmp_path / "rate.json").read_text())["measured_seconds"] > 1e9


def test_what_a_measurement_left_that_was_killed_is_removed(tmp_path: Path) -> None:
    """Nobody announced it in an index."""
    before: set[Path] = set()
    real = os.fdatasync

    def look(descriptor: int) -> None:
        before.update(leftovers(tmp_path))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", look)
        TieredStore([Tier(tmp_path, "1MiB")]).close()
    assert before
    me = Owner.current()
    dead = Owner(me.boot, me.namespace, 2**22 + 5, 7)
    for path in before:
        path.with_name(path.name.replace(str(me), str(dead))).write_bytes(b"x")
    TieredStore([Tier(tmp_path, "1MiB")]).close()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("nbytes", [1 << 60, 1 << 44, -1])
def test_an_entry_that_promises_what_no_frame_can_hold_is_a_miss(
    tmp_path: Path, nbytes: int
) -> None:
    said = {ENCODED: {"nbytes": nbytes, "sha256": "0" * 64}}
    with DiskTier(tmp_path / "a", "1MiB") as disk:
        disk.put("a", [layer(1)], about=said)
    with TieredStore([Tier(tmp_path / "a", "1MiB")]) as one:
        assert one.load("a") is None
        assert one.stats().tiers[0].disk.corruptions == 1


# -- a shared store --------------------------------------------------------------------------------


def forged(key: str, data: torch.Tensor, about: str) -> bytes:
    """A note with its own right check, and any text for its description."""
    said = {
        "key": key,
        "digest": hashlib.sha256(bytes(data.tolist())).hexdigest(),
        "nbytes": data.numel(),
        "kind": "layer",
    }
    text = json.dumps(said | {"about": "HERE"}, sort_keys=True)
    check = hashlib.sha256(text.replace('"HERE"', about).encode()).hexdigest()
    return json.dumps(said | {"about": "HERE", "check": check}).replace('"HERE"', about).encode()


def test_a_note_says_nothing_that_a_tier_says_itself(tmp_path: Path) -> None:
    """Else what was fetched would be other bytes when it is read the second time."""
    other = bytes(layer(2).tolist())
    packed = torch.frombuffer(
        bytearray(zstandard.ZstdCompressor().compress(other)), dtype=torch.uint8
    )
    said = {ENCODED: {"nbytes": len(other), "sha256": hashlib.sha256(other).hexdigest()}}
    remote = RemoteStore(f"file://{tmp_path}/shared", compress="off")
    assert remote.publish("a", [packed], about=said) is not None
    with TieredStore([Tier(tmp_path / "node", "1MiB")], remote=remote) as one:
        first, second = one.load("a"), one.load("a")
    assert first is not None
    assert torch.equal(first, packed)
    assert second is not None
    assert torch.equal(second, packed)


def test_a_note_with_what_is_no_number_is_a_miss(tmp_path: Path) -> None:
    remote = RemoteStore(f"file://{tmp_path}/shared")
    remote.publish("a", [page(1)])
    Path(note_path(f"{tmp_path}/shared", "a")).write_bytes(forged("a", page(1), '{"x": NaN}'))
    with TieredStore([Tier(tmp_path / "node", "1MiB")], remote=remote) as one:
        assert one.load("a") is None
    assert remote.stats().refused_corrupt == 1


def test_a_note_of_any_depth_is_a_note_or_a_miss(tmp_path: Path) -> None:
    remote = RemoteStore(f"file://{tmp_path}/shared")
    remote.publish("a", [page(1)])
    path = Path(note_path(f"{tmp_path}/shared", "a"))
    with TieredStore([Tier(tmp_path / "node", "1MiB")], remote=remote) as one:
        for depth in [*range(850, 1000), 100_000]:
            about = '{"x": ' + "[" * depth + "]" * depth + "}"
            path.write_bytes(forged("a", page(1), about))
            found = one.load("a")
            assert found is None or torch.equal(found, page(1))
            one.clear()
    assert remote.stats().refused_corrupt > 0


PROMISES = """
import resource, sys
import torch
from nexus_ext.cache import RemoteStore

store = RemoteStore(sys.argv[1])
store.get("0" * 64)
limit = 2 << 30
with open("/proc/self/status") as status:
    taken = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (taken + limit, taken + limit))
print([store.get(digest) for digest in sys.argv[2:]], store.stats().refused_corrupt)
"""


def test_an_object_that_promises_much_takes_no_memory_for_it(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    digests = []
    for number, encoding in ((1, "plain"), (2, "zstd")):
        digest = f"{number:064x}"
        path = Path(blob_path(f"{tmp_path}/shared", digest))
        path.parent.mkdir(parents=True, exist_ok=True)
        huge = 12 << 30
        path.write_bytes(
            Head(encoding, huge, huge if encoding == "plain" else 100).encode() + b"x" * 100
        )
        digests.append(digest)
    said = run_python(PROMISES, f"file://{tmp_path}/shared", *digests)
    assert said.strip() == "[None, None] 2"
