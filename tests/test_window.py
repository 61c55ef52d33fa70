"""Extents are cut into reads at aligned offsets: at any offset and length the bytes are right.

The oracle is the file's content in memory. Counters tell how the bytes came: straight to their
place, or through a staging slot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nexus_ext.engine import ReadMode, measure_read

KIB = 1 << 10
FILE_BYTES = 3 * (1 << 20) + 1234
CHUNKS = [64 * KIB, 100_000, 1 << 20]
# Where off-by-one errors live: sectors, pages and chunks, and one byte around them.
EDGES = [unit * k + d for unit in (512, 4096, 64 * KIB) for k in (0, 1, 2) for d in (-1, 0, 1)]


def random_places(random: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """(offset, length) pairs inside the file: edges, small and large ones, and the file's end."""
    places = []
    for _ in range(count):
        kind = random.integers(5)
        if kind == 0:
            offset, nbytes = (max(0, int(random.choice(EDGES))) for _ in range(2))
        elif kind == 1:
            offset, nbytes = int(random.integers(FILE_BYTES)), int(random.integers(1, 5000))
        elif kind == 2:
            offset, nbytes = int(random.integers(FILE_BYTES)), int(random.integers(1, 200_000))
        elif kind == 3:
            offset, nbytes = 512 * int(random.integers(FILE_BYTES // 512)), 512
        else:
            nbytes = int(random.integers(1, 70_000))
            offset = FILE_BYTES - nbytes
        offset = min(offset, FILE_BYTES - 1)
        places.append((offset, max(1, min(nbytes, FILE_BYTES - offset))))
    return places


def random_groups(lab: Any, random: np.random.Generator, reader: str, count: int) -> list[Any]:
    """Groups of up to 40 extents at random places; one each where a group must be one view."""
    places = random_places(random, count)
    if reader == "mmap in place":
        return [lab.group((0, *place)) for place in places]
    groups = []
    while places:
        size = int(random.integers(1, 41))
        taken, places = places[:size], places[size:]
        # Some groups line up with the file's sectors, most do not.
        start = taken[0][0] % 4096 if random.integers(3) == 0 else int(random.integers(5000))
        gap = int(random.integers(700))
        groups.append(lab.group(*((0, *place) for place in taken), gap=gap, start=start))
    return groups


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_2000_random_extents_hold_the_files_bytes(lab: Any, reader: str, chunk_bytes: int) -> None:
    random = np.random.default_rng(chunk_bytes)
    source = lab.source(FILE_BYTES)
    groups = random_groups(lab, random, reader, 2000)
    rig = lab.rig([source], groups, reader, chunk_bytes=chunk_bytes, poison=True)
    rig.sweep()
    stats = rig.stats
    io_mode, name = lab.expects(reader)
    assert (stats["io_mode"], stats["reader"][: len(name)]) == (io_mode, name)
    wanted = sum(extent.nbytes for group in groups for extent in group.extents)
    delivered = stats["bytes_direct"] + stats["bytes_staged"]
    # The engine reads on past the end of the pass: the first groups of the next one.
    assert delivered >= wanted
    assert stats["num_failed"] == stats["num_injected_errors"] == 0
    assert stats["num_views"] == (len(groups) if reader == "mmap in place" else 0)


def offset_alignment(source: Any) -> int:
    alignment = measure_read(str(source.path), ReadMode(), 1)["offset_alignment"]
    return int(alignment)


def sweep_alone(lab: Any, source: Any, place: tuple[int, int], start: int, **mode: Any) -> Any:
    """Read one resident group: nothing is loaded ahead, so counters are exact."""
    group = lab.group((0, *place), start=start)
    rig = lab.rig([source], [group], num_resident=1, **mode)
    rig.engine.wait(0)
    assert rig.num_wrong(0) == 0
    return rig.stats


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, 8192), (4096, 300_000), (12_288, 4096), (100, 200_000), (4095, 4098), (4097, 8191)],
)
def test_congruent_bytes_come_straight_to_their_place(lab: Any, offset: int, nbytes: int) -> None:
    source = lab.source(FILE_BYTES)
    unit = offset_alignment(source)
    stats = sweep_alone(lab, source, (offset, nbytes), start=offset % 4096)
    begin, end = -(-offset // unit) * unit, (offset + nbytes) // unit * unit
    assert stats["bytes_direct"] == end - begin
    assert stats["bytes_staged"] == nbytes - (end - begin)


def test_bytes_that_line_up_nowhere_are_staged(lab: Any) -> None:
    source = lab.source(FILE_BYTES)
    if offset_alignment(source) == 1:
        pytest.skip("reads in this folder need no alignment: nothing is ever staged")
    stats = sweep_alone(lab, source, (4096, 300_000), start=1)
    assert (stats["bytes_direct"], stats["bytes_staged"]) == (0, 300_000)
    # Never more than two units around what was wanted.
    assert 300_000 <= stats["bytes_read"] <= 300_000 + 2 * offset_alignment(source) * 8


@pytest.mark.parametrize("reader", ["buffered threads", "mmap copied"])
def test_the_page_cache_needs_no_staging(lab: Any, reader: str) -> None:
    stats = sweep_alone(lab, lab.source(FILE_BYTES), (4097, 300_001), start=3, reader=reader)
    assert (stats["bytes_direct"], stats["bytes_staged"]) == (300_001, 0)
    assert stats["staging_bytes"] == 0


@pytest.mark.parametrize(
    ("chunk_bytes", "num_reads"), [(64 * KIB, 16), (128 * KIB, 8), (1 << 20, 1)]
)
def test_a_read_is_at_most_a_chunk(lab: Any, chunk_bytes: int, num_reads: int) -> None:
    source = lab.source(FILE_BYTES)
    stats = sweep_alone(lab, source, (0, 1 << 20), start=0, chunk_bytes=chunk_bytes)
    assert stats["num_reads"] == num_reads
    assert stats["bytes_read"] == 1 << 20


@pytest.mark.parametrize("nbytes", [1, 2, 511, 512, 513, 4095, 4096, 4097])
def test_a_whole_tiny_file_is_read(lab: Any, reader: str, nbytes: int) -> None:
    source = lab.source(nbytes)
    rig = lab.rig([source], [lab.group((0, 0, nbytes))], reader, num_arenas=1)
    rig.sweep(passes=3)


@pytest.mark.parametrize("nbytes", [1, 100, 512, 4096, 5000])
def test_the_files_last_bytes_are_read(lab: Any, reader: str, nbytes: int) -> None:
    source = lab.source(FILE_BYTES)
    groups = [lab.group((0, FILE_BYTES - nbytes, nbytes)), lab.group((0, FILE_BYTES - 1, 1))]
    lab.rig([source], groups, reader, num_arenas=2).sweep(passes=2)


def test_a_group_may_come_from_several_files(lab: Any, reader: str) -> None:
    sources = [lab.source(nbytes) for nbytes in (100_000, 7, 1 << 20)]
    groups = [
        lab.group((0, 17, 70_000), (1, 0, 7), (2, 999, 500_000)),
        lab.group((2, 0, 1 << 20), (0, 99_999, 1), gap=33),
        lab.group((1, 3, 2)),
        lab.group((0, 0, 100_000), (1, 6, 1), (2, 4096, 8192), gap=64),
    ]
    lab.rig(sources, groups, reader, num_arenas=3, chunk_bytes=64 * KIB).sweep(passes=3)


def test_bytes_between_extents_are_left_alone(lab: Any, reader: str) -> None:
    source = lab.source(FILE_BYTES)
    places = [(0, 5000 * index + 11, 4000) for index in range(20)]
    group = lab.group(*places, gap=96, start=5)
    rig = lab.rig([source], [group], reader, num_arenas=1)
    rig.sweep()
    covered = np.zeros(group.nbytes, bool)
    for extent in group.extents:
        covered[extent.group_offset : extent.group_offset + extent.nbytes] = True
    padding = rig.arena(0).numpy()[~covered]
    assert padding.size == 5 + 20 * 96
    assert np.array_equal(padding, np.full_like(padding, 0xFF))
