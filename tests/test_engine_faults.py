"""Disks that err and files that change: right bytes or a typed error, and never a hang.

Faults are injected between the engine and its reader, seeded; see csrc/io/fault.h.
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext.engine import Faults
from nexus_ext.errors import (
    CheckpointChanged,
    CheckpointError,
    CorruptCheckpoint,
    NexusError,
    ReadError,
    TruncatedCheckpoint,
)
from tests.conftest import RecordCount

KIB = 1 << 10
MIB = 1 << 20
READERS = ["direct io_uring", "direct threads", "buffered threads", "mmap copied", "mmap in place"]
# Those that may find the file shorter at any moment without a SIGBUS.
UNMAPPED = READERS[:3]

# -- disks that err ----------------------------------------------------------------------------

STORM = Faults(
    errno_ppm=5_000,
    again_ppm=150_000,
    short_ppm=150_000,
    delay_ppm=50_000,
    flip_ppm=20_000,
    delay_us=1_000,
)
FAULTS_PER_READER = 4_000


def scattered_groups(lab: Any, reader: str) -> list[Any]:
    """Groups that need many reads: of many extents, or of many chunks where it must be one."""
    if reader == "mmap in place":
        return [lab.group((0, 500_001 * index, 499_999)) for index in range(8)]
    random = np.random.default_rng(5)
    return [
        lab.group(
            *(
                (0, int(random.integers(4_000_000)), int(random.integers(1, 9_000)))
                for _ in range(20)
            ),
            start=int(random.integers(4096)),
            gap=int(random.integers(100)),
        )
        for _ in range(8)
    ]


def check_message(error: NexusError, rig: Any, group: int) -> None:
    """A read error names the file and an offset that the group has."""
    message = str(error)
    assert str(rig.sources[0].path) in message
    if isinstance(error, ReadError):
        offset = int(re.search(r"at offset (\d+) \(\d+ bytes\) failed", message)[1])
        assert any(
            extent.offset <= offset < extent.offset + extent.nbytes
            for extent in rig.groups[group].extents
        )
        assert "Input/output error (errno 5)" in message


def acquire_in_a_storm(rig: Any, group: int, seen: collections.Counter[str]) -> None:
    """Ask until it succeeds; whatever fails meanwhile must be typed and say where."""
    for _ in range(100):
        try:
            rig.acquire(group)
        except (ReadError, CorruptCheckpoint) as error:
            check_message(error, rig, group)
            seen[type(error).__name__] += 1
            continue
        seen["acquired"] += 1
        seen["wrong bytes"] += rig.num_wrong(group)
        return
    raise AssertionError("a hundred errors in a row")


def num_injected(stats: dict[str, Any]) -> collections.Counter[str]:
    return collections.Counter(
        {name: count for name, count in stats.items() if name.startswith("num_injected")}
    )


@pytest.mark.timeout(200)
def test_ten_thousand_faults_give_right_bytes_or_typed_errors(
    lab: Any, record_count: RecordCount
) -> None:
    seen: collections.Counter[str] = collections.Counter()
    injected: collections.Counter[str] = collections.Counter()
    source = lab.source(4_100_000)
    for seed, reader in enumerate(READERS):
        faults = Faults(**{**STORM.__dict__, "seed": seed})
        rig = lab.rig(
            [source],
            scattered_groups(lab, reader),
            reader,
            chunk_bytes=64 * KIB,
            verify="always",
            poison=True,
            faults=faults,
        )
        while num_injected(rig.stats).total() < FAULTS_PER_READER:
            for group in range(8):
                acquire_in_a_storm(rig, group, seen)
        injected += num_injected(rig.stats)
        stats = rig.stats
        assert stats["num_retries"] > 0
        assert stats["num_short_reads"] > 0
        assert stats["num_healed"] > 0
    outcomes = {"wrong bytes": 0, **seen}
    record_count("faults of the disk under the engine", injected.total(), outcomes)
    assert injected.total() >= 10_000
    assert all(
        injected[f"num_injected_{kind}"] > 0
        for kind in ("errors", "retries", "shorts", "delays", "flips")
    )
    assert seen["wrong bytes"] == 0
    assert seen["ReadError"] > 0
    assert seen["CorruptCheckpoint"] > 0


def small_rig(lab: Any, reader: str, faults: Faults, **options: Any) -> Any:
    return lab.rig(
        [lab.source(6 * 200_000)],
        lab.slices(200_000, 6),
        reader,
        chunk_bytes=64 * KIB,
        faults=faults,
        **options,
    )


def test_short_reads_are_continued(lab: Any, reader: str) -> None:
    rig = small_rig(lab, reader, Faults(short_ppm=600_000), poison=True)
    rig.sweep(passes=5)
    stats = rig.stats
    assert stats["num_short_reads"] > 50
    assert stats["num_failed"] == 0


def test_short_reads_beyond_a_full_queue_are_continued(lab: Any) -> None:
    """A read that goes on needs its place in the ring, also when every place was in use."""
    for depth in (1, 2, 3):
        rig = small_rig(
            lab, "direct io_uring", Faults(seed=depth, short_ppm=500_000), depth=depth, phase=1
        )
        rig.sweep(passes=10)
        assert rig.stats["num_failed"] == 0


@pytest.mark.parametrize("reader", ["buffered threads", "mmap copied", "mmap in place"])
def test_only_short_reads_still_get_there(lab: Any, reader: str) -> None:
    """Where no alignment throws progress away, every read brings at least a byte."""
    rig = small_rig(lab, reader, Faults(short_ppm=1_000_000), poison=True)
    rig.sweep(passes=2)


def test_interrupted_reads_are_asked_again(lab: Any, reader: str) -> None:
    rig = small_rig(lab, reader, Faults(again_ppm=500_000), poison=True)
    rig.sweep(passes=5)
    rig.settle()
    stats = rig.stats
    assert stats["num_retries"] == stats["num_injected_retries"] > 50
    assert stats["num_failed"] == 0


def test_a_read_is_not_asked_again_for_ever(lab: Any, reader: str) -> None:
    rig = small_rig(lab, reader, Faults(again_ppm=1_000_000))
    for _ in range(2):
        with pytest.raises(ReadError, match=r"failed: .*\(errno (4|11)\)"):
            rig.acquire(0)


def test_a_disk_that_is_gone_is_an_error_each_time(lab: Any, reader: str) -> None:
    rig = small_rig(lab, reader, Faults(errno_ppm=1_000_000), num_resident=1)
    for group in (0, 1, 2, 1, 5):
        with pytest.raises(ReadError, match=r"weights1.bin at offset \d+ .*errno 5") as caught:
            rig.acquire(group)
        check_message(caught.value, rig, group)
    with pytest.raises(ReadError):
        rig.engine.wait(0)
    rig.settle()
    # What was loaded ahead failed as well, and was not tried over and over.
    assert rig.stats["num_failed"] <= 6 + 4 * 2


def test_a_failed_prefetch_is_read_again_when_it_is_needed(lab: Any, reader: str) -> None:
    rig = small_rig(lab, reader, Faults(seed=2, errno_ppm=60_000))
    seen: collections.Counter[str] = collections.Counter()
    for _ in range(20):
        for group in range(6):
            acquire_in_a_storm(rig, group, seen)
    assert seen["wrong bytes"] == 0
    # Far fewer reached the caller than happened: most hit groups that were only expected.
    assert 0 < seen["ReadError"] < rig.stats["num_failed"]


def test_a_flipped_bit_is_healed_by_reading_again(lab: Any, reader: str) -> None:
    rig = small_rig(lab, reader, Faults(seed=1, flip_ppm=30_000), verify="always", poison=True)
    seen: collections.Counter[str] = collections.Counter()
    for _ in range(20):
        for group in range(6):
            acquire_in_a_storm(rig, group, seen)
    stats = rig.stats
    assert seen["wrong bytes"] == 0
    assert stats["num_healed"] > 0
    assert stats["num_injected_flips"] > 10


def test_a_bit_that_flips_every_time_is_corruption(lab: Any, reader: str) -> None:
    rig = small_rig(lab, reader, Faults(flip_ppm=1_000_000), verify="always", num_resident=1)
    with pytest.raises(CorruptCheckpoint, match=r"group 0 of .*weights1.bin \(from offset 0\)"):
        rig.engine.wait(0)
    for group in range(6):
        with pytest.raises(CorruptCheckpoint, match=f"group {group} of .*in two reads"):
            rig.acquire(group)


# -- files that change -------------------------------------------------------------------------

GROUP = 256 * KIB


def file_rig(lab: Any, reader: str, **options: Any) -> Any:
    """Eight groups of which at most three are loaded; all reads are through."""
    rig = lab.rig(
        [lab.source(8 * GROUP + 100)],
        lab.slices(GROUP, 8),
        reader,
        chunk_bytes=64 * KIB,
        **options,
    )
    rig.acquire(0)
    rig.settle()
    return rig


def outcomes(rig: Any, passes: int = 2) -> list[str]:
    """What each acquire came to; an acquire that succeeds must be right."""
    seen = []
    for _ in range(passes):
        for group in range(8):
            try:
                rig.acquire(group)
            except CheckpointError as error:
                seen.append(type(error).__name__)
            else:
                assert rig.num_wrong(group) == 0
                seen.append("right")
    return seen


def test_a_file_replaced_by_rename_is_an_error(lab: Any, reader: str) -> None:
    rig = file_rig(lab, reader)
    path = rig.sources[0].path
    other = path.with_suffix(".new")
    other.write_bytes(bytes(8 * GROUP + 100))
    os.replace(other, path)
    seen = outcomes(rig)
    # What had landed before is still what it was; everything after is refused.
    assert set(seen) == {"right", "CheckpointChanged"}
    assert seen[4:] == ["CheckpointChanged"] * 12
    with pytest.raises(CheckpointChanged, match="another file stands at its path"):
        rig.acquire(5)


def test_a_file_written_in_place_is_an_error(lab: Any, reader: str) -> None:
    rig = file_rig(lab, reader)
    path = rig.sources[0].path
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(4 * GROUP)
        file.write(b"other bytes")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    for group in (4, 5, 4, 7):
        with pytest.raises(CheckpointChanged, match="it was written to"):
            rig.acquire(group)


@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_file_written_in_secret_is_corrupt(lab: Any, reader: str, verify: str) -> None:
    """Size, inode and time are as before: only the digest can tell."""
    rig = file_rig(lab, reader, verify=verify)
    path = rig.sources[0].path
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(5 * GROUP + 7)
        byte = rig.sources[0].data[5 * GROUP + 7]
        file.write(bytes([byte ^ 0x10]))
        file.flush()
        os.fsync(file.fileno())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(CorruptCheckpoint, match="group 5 of"):
            rig.acquire(5)
        rig.acquire(6)
        assert rig.num_wrong(6) == 0


def test_a_file_that_was_deleted_is_an_error(lab: Any, reader: str) -> None:
    rig = file_rig(lab, reader)
    rig.sources[0].path.unlink()
    for group in (5, 6, 5):
        with pytest.raises(CheckpointChanged, match="cannot be looked at any more: No such file"):
            rig.acquire(group)


@pytest.mark.parametrize("reader", [*UNMAPPED, "mmap copied"])
@pytest.mark.parametrize(
    "nbytes",
    [0, 1, 3 * GROUP, 3 * GROUP + 1, 3 * GROUP + 100, 3 * GROUP + 64 * KIB + 513, 8 * GROUP],
)
def test_a_file_cut_while_it_streams_is_an_error(lab: Any, reader: str, nbytes: int) -> None:
    """At any byte: also between two boundaries of O_DIRECT, where a read goes on for ever."""
    rig = file_rig(lab, reader)
    os.truncate(rig.sources[0].path, nbytes)
    for group in (7, 4, 7, 6):
        whole = (group + 1) * GROUP <= nbytes
        with pytest.raises(CheckpointChanged if whole else TruncatedCheckpoint) as caught:
            rig.acquire(group)
        if not whole:
            assert f"{rig.sources[0].path} ends at offset" in str(caught.value)
    rig.engine.close()


@pytest.mark.parametrize("reader", UNMAPPED)
def test_a_file_may_be_cut_under_reads_in_flight(lab: Any, reader: str) -> None:
    faults = Faults(delay_ppm=700_000, delay_us=5_000)
    for cut in range(0, 8 * GROUP, 300_007):
        rig = lab.rig(
            [lab.source(8 * GROUP)],
            lab.slices(GROUP, 8),
            reader,
            chunk_bytes=64 * KIB,
            faults=faults,
        )
        rig.acquire(0)
        os.truncate(rig.sources[0].path, cut)
        seen = outcomes(rig, passes=1)
        assert set(seen[4:]) <= {"CheckpointChanged", "TruncatedCheckpoint"}
        rig.engine.close()


@pytest.mark.parametrize("reader", [*UNMAPPED, "mmap copied"])
def test_extents_past_the_files_end_are_truncation(lab: Any, reader: str) -> None:
    """A caller whose header promised more than the file has; views are refused when made."""
    source = lab.source(100_000)
    groups = [lab.group((0, 0, 1000)), lab.group((0, 99_000, 1001)), lab.group((0, 200_000, 10))]
    rig = lab.rig([source], groups, reader)
    for group in (1, 2, 1):
        with pytest.raises(TruncatedCheckpoint, match="ends at offset"):
            rig.acquire(group)
    rig.acquire(0)
    assert rig.num_wrong(0) == 0


def test_a_digest_cannot_be_taken_past_the_files_end(lab: Any) -> None:
    rig = lab.rig([lab.source(100)], [lab.group((0, 50, 100))])
    with pytest.raises(TruncatedCheckpoint, match="at offset 100 for its digest"):
        rig.engine.digest(0)


PERMISSION = """
import os, sys
from pathlib import Path
from nexus_ext.checkpoint import File, Stamp
from nexus_ext.engine import Engine, ReadMode
from nexus_ext.errors import ReadError

path = Path(sys.argv[1])
with open(path, "rb") as file:
    stamp = Stamp.of(file.fileno())
os.chmod(path, 0)
if os.getuid() == 0:
    os.setuid(65534)
try:
    Engine([File(path, stamp)], ReadMode())
except ReadError as error:
    print(error)
"""


def test_a_file_that_may_not_be_read_is_a_read_error(
    lab: Any, run_python: Callable[..., str]
) -> None:
    source = lab.source(100)
    said = run_python(PERMISSION, source.path)
    assert said.endswith("Permission denied.\n")
    assert str(source.path) in said


def test_a_folder_in_the_files_place_is_refused(lab: Any, tmp_path: Path) -> None:
    rig = file_rig(lab, "direct io_uring")
    path = rig.sources[0].path
    os.rename(path, tmp_path / "elsewhere")
    path.mkdir()
    with pytest.raises(CheckpointChanged, match="another file stands at its path"):
        rig.acquire(6)
