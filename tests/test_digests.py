"""XXH3 is XXH3, a group's digest is that of its bytes in order, and what is recorded stays true."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.digests import recorded_digests
from nexus_ext.engine import Engine, ReadMode
from nexus_ext.ops import native

MIB = 1 << 20


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def reference(data: bytes) -> int:
    return signed(xxhash.xxh3_64_intdigest(data))


# -- the hash ----------------------------------------------------------------------------------

RANDOM = np.random.default_rng(11).integers(0, 256, 3 * MIB + 1, dtype=np.uint8)


def test_every_short_length_hashes_as_xxhash_does() -> None:
    """0, 1-3, 4-8, 9-16, 17-128, 129-240 and longer are seven algorithms."""
    for nbytes in range(601):
        data = RANDOM[nbytes : 2 * nbytes].copy()
        assert native.xxh3(torch.from_numpy(data)) == reference(data.tobytes()), nbytes


@pytest.mark.parametrize(
    "nbytes",
    [k * 1024 + d for k in (1, 2, 16, 64) for d in (-64, -1, 0, 1, 63, 64, 65)]
    + [100_003, MIB, 3 * MIB + 1],
)
def test_long_inputs_hash_as_xxhash_does(nbytes: int) -> None:
    data = RANDOM[:nbytes]
    assert native.xxh3(torch.from_numpy(data)) == reference(data.tobytes())


def test_the_hash_is_of_the_bytes_whatever_their_type_and_place() -> None:
    for offset in range(9):
        bytes_at = torch.from_numpy(RANDOM)[offset : offset + 4000]
        assert native.xxh3(bytes_at) == reference(RANDOM[offset : offset + 4000].tobytes())
    floats = torch.arange(1000, dtype=torch.float64)
    assert native.xxh3(floats) == reference(floats.numpy().tobytes())


# -- a group's digest --------------------------------------------------------------------------


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
@pytest.mark.parametrize("chunk_bytes", [65536, 100_000, MIB])
def test_a_groups_digest_is_that_of_its_extents_in_order(
    lab: Any, io: str, chunk_bytes: int
) -> None:
    sources = [lab.source(700_001), lab.source(5000)]
    groups = [
        lab.group((0, 0, 700_001)),
        lab.group((0, 1, 1)),
        lab.group((1, 17, 4000), (0, 4095, 300_000), (1, 0, 17), gap=100, start=3),
        lab.group(),
    ]
    engine: Engine = lab.engine(sources, ReadMode(io=io, chunk_bytes=chunk_bytes))
    arenas = [torch.empty(group.nbytes, dtype=torch.uint8) for group in groups]
    engine.attach(arenas, groups, range(4), [], 1)
    for index, group in enumerate(groups):
        data = b"".join(
            sources[extent.file].data[extent.offset :][: extent.nbytes].tobytes()
            for extent in group.extents
        )
        assert engine.digest(index) == reference(data)


def test_landings_are_compared_with_the_same_digest(lab: Any, reader: str) -> None:
    """Hashed piece by piece as they land, in whatever order they come."""
    rig = lab.rig(
        [lab.source(2 * MIB)],
        [lab.group((0, 1000 * i, 300_000), (0, 5, 100_000 + i), gap=60) for i in range(5)],
        reader,
        chunk_bytes=65536,
        verify="always",
    )
    rig.sweep(passes=3)
    stats = rig.stats
    assert stats["num_verified"] >= 15 - 2
    assert stats["num_healed"] == 0


# -- what is recorded --------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path, write_checkpoint: Callable[..., Any]) -> Checkpoint:
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, {"a": (100,), "b": (20, 3), "c": (7,)})
    return Checkpoint.open(path)


def digests_of(
    checkpoint: Checkpoint, folder: Path, names: tuple[str, ...] = ("a", "b", "c")
) -> tuple[list[int], list[int]]:
    """The digests of one group for each name, and which of them had to be taken."""
    taken: list[int] = []
    groups = [checkpoint.group(name, [name]) for name in names]

    def take(index: int) -> int:
        taken.append(index)
        extent = groups[index].extents[0]
        data = checkpoint.files[0].path.read_bytes()
        return reference(data[extent.offset : extent.offset + extent.nbytes])

    return recorded_digests(checkpoint, groups, folder, take), taken


def only_file(folder: Path) -> Path:
    [path] = folder.iterdir()
    return path


def test_digests_are_taken_once(checkpoint: Checkpoint, nexus_home: Path) -> None:
    folder = nexus_home / "digests"
    first, taken = digests_of(checkpoint, folder)
    assert taken == [0, 1, 2]
    assert digests_of(checkpoint, folder) == (first, [])
    again = Checkpoint.open(checkpoint.path)
    assert digests_of(again, folder) == (first, [])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert only_file(folder).stat().st_mode & 0o777 == 0o600


def test_digests_belong_to_bytes_not_to_positions(checkpoint: Checkpoint, nexus_home: Path) -> None:
    (a, b, c), _ = digests_of(checkpoint, nexus_home)
    assert digests_of(checkpoint, nexus_home, ("c", "a")) == ([c, a], [])
    assert digests_of(checkpoint, nexus_home, ("b",)) == ([b], [])


def test_only_missing_digests_are_taken(checkpoint: Checkpoint, nexus_home: Path) -> None:
    (b,), _ = digests_of(checkpoint, nexus_home, ("b",))
    (a, b_again, c), taken = digests_of(checkpoint, nexus_home)
    assert (b_again, taken) == (b, [0, 2])
    assert digests_of(checkpoint, nexus_home) == ([a, b, c], [])


BROKEN = [
    b"",
    b"{",
    b'{"0123": 5, "45',
    b"[]",
    b"[1, 2]",
    b"null",
    b"7",
    b'"text"',
    b"\xff\xfe\xfd\xfc",
    b"\x80abc",
    b"[" * 200_000,
    b"{}",
]


@pytest.mark.parametrize("content", BROKEN, ids=[repr(content[:12]) for content in BROKEN])
def test_a_torn_record_is_taken_again(
    checkpoint: Checkpoint, nexus_home: Path, content: bytes
) -> None:
    first, _ = digests_of(checkpoint, nexus_home)
    only_file(nexus_home).write_bytes(content)
    assert digests_of(checkpoint, nexus_home) == (first, [0, 1, 2])
    assert digests_of(checkpoint, nexus_home) == (first, [])


@pytest.mark.parametrize(
    "value", ['"text"', "null", "true", "1.5", "[]", str(2**63), str(-(2**70))]
)
def test_a_digest_that_is_no_int64_is_taken_again(
    checkpoint: Checkpoint, nexus_home: Path, value: str
) -> None:
    first, _ = digests_of(checkpoint, nexus_home)
    path = only_file(nexus_home)
    record = json.loads(path.read_bytes())
    broken = [f'"{key}": {value}' for key in record]
    path.write_text("{" + ", ".join(broken) + "}")
    assert digests_of(checkpoint, nexus_home) == (first, [0, 1, 2])


def test_a_changed_checkpoint_gets_digests_of_its_own(
    checkpoint: Checkpoint, nexus_home: Path, write_checkpoint: Callable[..., Any]
) -> None:
    first, _ = digests_of(checkpoint, nexus_home)
    write_checkpoint(checkpoint.path, {"a": (100,), "b": (20, 3), "c": (8,)})
    changed = Checkpoint.open(checkpoint.path)
    second, taken = digests_of(changed, nexus_home)
    assert taken == [0, 1, 2]
    assert second[2] != first[2]
    assert digests_of(changed, nexus_home) == (second, [])


def test_a_touched_checkpoint_gets_digests_of_its_own(
    checkpoint: Checkpoint, nexus_home: Path
) -> None:
    first, _ = digests_of(checkpoint, nexus_home)
    os.utime(checkpoint.path, ns=(1, 1))
    assert digests_of(Checkpoint.open(checkpoint.path), nexus_home) == (first, [0, 1, 2])


def test_no_temporary_file_is_left(checkpoint: Checkpoint, nexus_home: Path) -> None:
    digests_of(checkpoint, nexus_home, ("a",))
    digests_of(checkpoint, nexus_home)
    assert only_file(nexus_home).name == f"{checkpoint.fingerprint}.json"


def test_a_digest_that_cannot_be_taken_records_nothing(
    checkpoint: Checkpoint, nexus_home: Path
) -> None:
    def fails(index: int) -> int:
        raise OSError("the disk is gone")

    groups = [checkpoint.group(name, [name]) for name in ("a", "b")]
    with pytest.raises(OSError, match="the disk is gone"):
        recorded_digests(checkpoint, groups, nexus_home / "digests", fails)
    assert not (nexus_home / "digests").exists()
