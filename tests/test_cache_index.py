"""The index: lost, cut, torn, forged or from another version, it costs time and no wrong byte."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nexus_ext.cache import DiskTier, index_file
from nexus_ext.cache.blob import Header, tensors_of, write_blob
from nexus_ext.cache.index import Index, Row
from tests.conftest import RecordCount

PAGE = 4096
NUM_KEYS = 12
NUM_FLIPS = 500
NUM_CUTS = 60


def page(number: int) -> torch.Tensor:
    return torch.full((PAGE,), number, dtype=torch.uint8)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few keys, closed; not to be changed."""
    folder = tmp_path_factory.mktemp("filled") / "cache"
    with DiskTier(folder, "1GiB") as tier:
        for number in range(NUM_KEYS):
            assert tier.put(f"key-{number}", [page(number)], about={"n": number})
    return folder


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(filled, tmp_path / "cache"))


def index_of(folder: Path) -> Path:
    (found,) = folder.glob("index-*.sqlite")
    return found


def look(folder: Path) -> Counter[str]:
    """Open, load every key, write one more. Raises for a wrong byte."""
    counts: Counter[str] = Counter()
    with DiskTier(folder, "1GiB") as tier:
        for number in range(NUM_KEYS):
            entry = tier.get(f"key-{number}")
            if entry is None:
                counts["missing"] += 1
                continue
            assert entry.about == {"n": number}
            assert torch.equal(tier.read(entry), page(number))
            counts["right"] += 1
        assert tier.put("new", [page(99)]) is not None, tier.stats()
        assert torch.equal(tier.load("new"), page(99))
        stats = tier.stats()
        counts["rebuilt"] += stats.zones[0].num_rebuilds > 0
        assert stats.corruptions == stats.index_errors == stats.write_errors == 0
    with DiskTier(folder, "1GiB") as tier:
        assert torch.equal(tier.load("new"), page(99))
        assert tier.stats().zones[0].num_rebuilds == 0
    return counts


# -- lost ------------------------------------------------------------------------------------------


def test_a_folder_as_it_is_is_not_read_through(folder: Path) -> None:
    assert look(folder) == {"right": NUM_KEYS, "rebuilt": 0}


def test_an_index_that_was_deleted_is_made_again(folder: Path) -> None:
    index_of(folder).unlink()
    assert look(folder) == {"right": NUM_KEYS, "rebuilt": 1}


@pytest.mark.parametrize("version", [0, 2, 2**31 - 1])
def test_another_version_is_made_again(folder: Path, version: int) -> None:
    with sqlite3.connect(index_of(folder)) as connection:
        connection.execute(f"PRAGMA user_version={version}")
    connection.close()
    assert look(folder) == {"right": NUM_KEYS, "rebuilt": 1}


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE more (x)",
        "DROP TABLE seen",
        "DROP INDEX names_by_digest",
        "ALTER TABLE blobs ADD COLUMN x",
        "CREATE TRIGGER t AFTER INSERT ON names BEGIN DELETE FROM blobs; END",
        "CREATE VIEW v AS SELECT * FROM names",
    ],
)
def test_another_schema_is_made_again(folder: Path, statement: str) -> None:
    with sqlite3.connect(index_of(folder)) as connection:
        connection.execute(statement)
    connection.close()
    assert look(folder) == {"right": NUM_KEYS, "rebuilt": 1}


@pytest.mark.parametrize("content", [b"", b"x", b"SQLite format 3\x00", bytes(9999)], ids=len)
def test_what_is_no_database_is_made_again(folder: Path, content: bytes) -> None:
    index_of(folder).write_bytes(content)
    assert look(folder) == {"right": NUM_KEYS, "rebuilt": 1}


def test_random_bytes_are_made_again(folder: Path) -> None:
    index_of(folder).write_bytes(random.Random(1).randbytes(60_000))
    assert look(folder) == {"right": NUM_KEYS, "rebuilt": 1}


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_log_that_is_not_ours_is_not_replayed(folder: Path, suffix: str) -> None:
    path = index_of(folder)
    path.with_name(path.name + suffix).write_bytes(random.Random(1).randbytes(40_000))
    assert look(folder)["right"] == NUM_KEYS


def test_every_name_is_used_once(folder: Path) -> None:
    """The log of a lost index must not be replayed into the next one."""
    names = [index_of(folder).name]
    for _ in range(3):
        index_of(folder).write_bytes(b"no index")
        index_of(folder).with_name(names[-1] + "-wal").write_bytes(b"its log")
        look(folder)
        names.append(index_of(folder).name)
    assert names == sorted(set(names))
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [names[-1]]


def never() -> list[Row]:
    raise AssertionError("the blobs are not looked at")


def test_a_copy_in_memory_is_made_of_the_index_and_changes_nothing(folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    copy = Index(folder, 0, never, in_memory=True)
    assert [found.key for found in copy.rows()] == [f"key-{n}" for n in range(NUM_KEYS)]
    assert sorted(path.name for path in folder.iterdir()) == before
    copy.close()


@pytest.mark.parametrize("damage", ["log", "flip", "none"])
def test_a_copy_in_memory_is_made_of_the_blobs_else(folder: Path, damage: str) -> None:
    path = index_of(folder)
    if damage == "log":
        path.with_name(path.name + "-wal").write_bytes(b"what nobody may replay")
    elif damage == "flip":
        path.write_bytes(b"S" + bytes(5000))
    else:
        path.unlink()
    copy = Index(folder, 0, lambda: [row(1)], in_memory=True)
    assert copy.rows() == [row(1)]
    copy.close()


# -- cut and torn ----------------------------------------------------------------------------------


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: no power cuts here, and hundreds of rounds."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        dir=memory if os.access(memory, os.W_OK) else tmp_path
    ) as name:
        yield Path(name) / "cache"


def damaged(folder: Path, filled: Path, content: bytes) -> Counter[str]:
    """What comes of an index with this content."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(filled, folder)
    index_of(folder).write_bytes(content)
    return look(folder)


def test_no_flip_and_no_cut_of_the_index_gives_a_wrong_byte(
    quick_folder: Path, filled: Path, record_count: RecordCount
) -> None:
    content = index_of(filled).read_bytes()
    draw = random.Random(0)
    counts: Counter[str] = Counter()
    for _ in range(NUM_FLIPS):
        torn = bytearray(content)
        for _ in range(draw.choice([1, 1, 1, 8])):
            torn[draw.randrange(len(torn))] ^= 1 << draw.randrange(8)
        counts.update(damaged(quick_folder, filled, bytes(torn)))
    for _ in range(NUM_CUTS):
        counts.update(damaged(quick_folder, filled, content[: draw.randrange(len(content))]))
    record_count("flips and cuts of the cache's index", NUM_FLIPS + NUM_CUTS, counts)
    assert counts["right"] + counts["missing"] == (NUM_FLIPS + NUM_CUTS) * NUM_KEYS
    assert counts["rebuilt"] >= NUM_CUTS
    assert counts["right"] > counts["missing"]


def test_a_row_that_was_changed_is_not_believed(folder: Path) -> None:
    """What no checksum of SQLite would find: the key of another blob."""
    with sqlite3.connect(index_of(folder)) as connection:
        connection.execute(
            "UPDATE names SET key = CAST('x' AS BLOB) WHERE key = CAST('key-1' AS BLOB)"
        )
        connection.execute(
            "UPDATE names SET key = CAST('key-1' AS BLOB) WHERE key = CAST('key-2' AS BLOB)"
        )
    connection.close()
    with DiskTier(folder, "1GiB") as tier:
        for key in ("x", "key-1", "key-2"):
            assert tier.load(key) is None
        assert len(tier.entries()) == NUM_KEYS - 2
        assert tier.put("key-1", [page(1)]) is not None
        assert torch.equal(tier.load("key-1"), page(1))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("digest", "randomblob(32)"),
        ("kind", "CAST('other' AS BLOB)"),
        ("about", "CAST('{}' AS BLOB)"),
        ("nbytes", "nbytes + 1"),
        ("nbytes", "'many'"),
        ("created", "1.5"),
        ("seal", "randomblob(16)"),
    ],
)
def test_a_row_with_a_strange_value_is_a_miss(folder: Path, column: str, value: str) -> None:
    with sqlite3.connect(index_of(folder)) as connection:
        connection.execute(f"UPDATE names SET {column} = {value}")
    connection.close()
    with DiskTier(folder, "1GiB") as tier:
        assert [tier.load(f"key-{n}") for n in range(NUM_KEYS)] == [None] * NUM_KEYS
        assert tier.entries() == []


@pytest.mark.parametrize("stored", [1, 2**62, 4096])
def test_a_wrong_size_costs_entries_and_no_bytes(folder: Path, stored: int) -> None:
    with sqlite3.connect(index_of(folder)) as connection:
        connection.execute(
            "UPDATE blobs SET stored = ? WHERE used = (SELECT MAX(used) FROM blobs)", (stored,)
        )
    connection.close()
    with DiskTier(folder, "1GiB") as tier:
        for number in range(NUM_KEYS):
            found = tier.load(f"key-{number}")
            assert found is None or torch.equal(found, page(number))
        assert tier.put("new", [page(99)]) is not None


def test_a_damaged_note_about_a_temporary_removes_no_file(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    with sqlite3.connect(index_of(folder)) as connection:
        for name in ("../../precious", str(precious), "ab/../../../precious", "", "\udcff"):
            connection.execute(
                "INSERT INTO pending VALUES (?, ?, 5, 5)",
                (name.encode("utf-8", "surrogateescape"), b"d" * 32),
            )
    connection.close()
    assert look(folder)["right"] == NUM_KEYS
    assert precious.read_text() == "mine"
    with sqlite3.connect(index_of(folder)) as connection:
        assert connection.execute("SELECT COUNT(*) FROM pending").fetchone() == (0,)
    connection.close()


# -- while it is open ------------------------------------------------------------------------------


def test_an_index_that_is_deleted_under_an_open_store_is_made_again(folder: Path) -> None:
    with DiskTier(folder, "1GiB") as tier, DiskTier(folder, "1GiB") as other:
        for path in folder.glob("index-*"):
            path.unlink()
        assert tier.put("new", [page(99)]) is not None
        assert torch.equal(other.load("new"), page(99))
        for number in range(NUM_KEYS):
            assert torch.equal(other.load(f"key-{number}"), page(number))
        assert tier.stats().zones[0].num_rebuilds == 1
    with DiskTier(folder, "1GiB") as tier:
        assert len(tier.entries()) == NUM_KEYS + 1


def test_an_index_that_breaks_under_an_open_store_is_made_again(folder: Path) -> None:
    with DiskTier(folder, "1GiB") as tier:
        assert tier.load("key-1") is not None
        path = index_of(folder)
        with open(path, "r+b") as file:
            file.write(b"no database any more" * 3000)
        # What was read before may still be in SQLite's cache; a new connection sees the file.
        tier._zones[0].index._db._connection.execute("PRAGMA shrink_memory")
        for number in range(NUM_KEYS):
            found = tier.load(f"key-{number}")
            assert found is None or torch.equal(found, page(number))
        assert tier.put("new", [page(99)]) is not None
    look(folder)


def test_two_who_make_the_index_at_once_use_the_same_one(folder: Path) -> None:
    index_of(folder).unlink()
    barrier = threading.Barrier(4)
    right: list[bool] = []

    def work(number: int) -> None:
        barrier.wait()
        with DiskTier(folder, "1GiB") as tier:
            tier.put(f"new-{number}", [page(100 + number)])
            right.append(all(tier.load(f"key-{n}") is not None for n in range(NUM_KEYS)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4
    assert len(list(folder.glob("index-*.sqlite"))) == 1
    with DiskTier(folder, "1GiB") as tier:
        assert len(tier.entries()) == NUM_KEYS + 4


def test_an_index_without_room_leaves_a_cache_to_read_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_of(folder).unlink()

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "link", full)
    with DiskTier(folder, "1GiB") as tier:
        assert torch.equal(tier.load("key-3"), page(3))
        assert tier.put("new", [page(99)]) is None
        stats = tier.stats()
        assert "No space left" in stats.zones[0].read_only
        assert stats.refused_read_only == 1
    assert not list(folder.glob("new-index*"))


# -- made from blobs -------------------------------------------------------------------------------


def leave_blob(folder: Path, key: str, number: int, created: int) -> Path:
    """A whole blob that no index knows."""
    tensors = tensors_of([page(number)])
    header = Header.of(key, "layer", {}, created, tensors)
    name = header.sha256.hex()
    path = folder / "blobs" / name[:2] / f"{name}.nx"
    write_blob(path, path.with_name("t"), header, tensors, 0o600)
    return path


def test_of_two_blobs_for_one_key_the_younger_counts(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    DiskTier(folder, "1GiB").close()
    index_of(folder).unlink()
    paths = [
        leave_blob(folder, "a", number, created) for number, created in ((1, 5), (2, 9), (3, 7))
    ]
    with DiskTier(folder, "1GiB") as tier:
        assert torch.equal(tier.load("a"), page(2))
    assert [path.exists() for path in paths] == [False, True, False]


def test_what_is_no_blob_is_set_aside_or_left_alone(folder: Path) -> None:
    index_of(folder).unlink()
    blobs = sorted(folder.rglob("*.nx"))
    os.truncate(blobs[0], 5000)
    wrong_place = folder / "blobs" / "zz"
    wrong_place.mkdir()
    (wrong_place / "notes.txt").write_text("mine")
    (folder / "blobs" / "README").write_text("mine")
    counts = look(folder)
    assert (counts["right"], counts["missing"]) == (NUM_KEYS - 1, 1)
    assert (wrong_place / "notes.txt").read_text() == "mine"
    assert (folder / "blobs" / "README").read_text() == "mine"
    assert [path.name for path in (folder / "quarantine").iterdir()] == [blobs[0].name]


# -- the class -------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    made = Index(tmp_path, 0o600, list)
    yield made
    made.close()


def row(number: int, **changes: object) -> Row:
    values = {
        "key": f"key-{number}",
        "digest": bytes([number]) * 32,
        "kind": "layer",
        "about": "{}",
        "created_ns": number,
        "nbytes": 10,
        "stored": PAGE,
        "used_ns": number,
    }
    return Row(**(values | changes))  # type: ignore[arg-type]


def test_a_row_survives(index: Index) -> None:
    assert index.add(row(1), lambda: True, lambda _: None)
    assert index.find("key-1") == row(1)
    assert index.find("key-2") is None
    assert index.rows() == [row(1)]
    assert (index.num_blobs(), index.num_names(), index.stored_bytes()) == (1, 1, PAGE)


def test_a_file_that_is_not_there_is_not_entered(index: Index) -> None:
    assert not index.add(row(1), lambda: False, lambda _: None)
    assert index.rows() == []


def test_what_fails_inside_a_transaction_changes_nothing(index: Index) -> None:
    index.add(row(1), lambda: True, lambda _: None)

    def refuse(_: bytes) -> None:
        raise PermissionError("no")

    with pytest.raises(PermissionError):
        index.remove(row(1).digest, refuse)
    assert index.find("key-1") == row(1)
    index.remove(row(1).digest, lambda _: None)
    assert index.find("key-1") is None


def test_touches_come_together(index: Index) -> None:
    for number in (1, 2, 3):
        index.add(row(number), lambda: True, lambda _: None)
    index.touch({row(1).digest: (10, 4), b"unknown": (11, 1)})
    assert [found.key for found in index.rows()] == ["key-2", "key-3", "key-1"]
    assert index.find("key-1") == row(1, used_ns=10, uses=4)
    assert [digest for _, digest, _ in index.oldest(2)] == [row(2).digest, row(3).digest]


def test_keys_that_were_seen_are_forgotten_in_time(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexus_ext.cache.index._MOST_SEEN", 3)
    assert [index.was_seen(key) for key in "abcabc"] == [False] * 3 + [True] * 3
    assert not index.was_seen("d")
    assert not index.was_seen("a")
    assert index.was_seen("d")


def test_the_journal_is_a_log(index: Index) -> None:
    connection = index._db._connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == (b"wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (1,)
    assert connection.execute("PRAGMA trusted_schema").fetchone() == (0,)
    assert connection.execute("PRAGMA cell_size_check").fetchone() == (1,)


def test_an_index_without_locks_is_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look_at: Callable[[Index], None]
) -> None:
    monkeypatch.setattr(index_file, "_VFS", "&vfs=unix-none")
    made = Index(tmp_path, 0o600, list)
    look_at(made)
    made.close()


@pytest.fixture
def look_at() -> Callable[[Index], None]:
    def check(index: Index) -> None:
        index.add(row(1), lambda: True, lambda _: None)
        assert index.find("key-1") == row(1)
        # Without locks there is no log either.
        assert index._db._connection.execute("PRAGMA journal_mode").fetchone() != (b"wal",)

    return check
