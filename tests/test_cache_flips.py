"""Every bit of a header, bits of payloads, every length: whatever differs from what was written is
found before a byte of it is used.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nexus_ext.cache import DiskTier
from nexus_ext.cache.blob import BLOCK_BYTES, Header, open_blob, read_header, tensors_of, write_blob
from nexus_ext.cache.reading import BlockMode, read_payload
from nexus_ext.errors import CorruptCheckpoint
from tests.conftest import RecordCount

PAGE = 4096
# Two blocks, the second one neither whole nor whole pages.
NBYTES = BLOCK_BYTES + 5000
NUM_PAYLOAD_FLIPS = 1500
NUM_HEALED = 60
FACT = "bit flips and truncations of cache files"


@pytest.fixture(scope="module")
def payload() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (NBYTES,), dtype=torch.uint8, generator=generator)


@pytest.fixture
def blob(tmp_path: Path, payload: torch.Tensor) -> Iterator[int]:
    """A descriptor of a blob that may be written to."""
    header = Header.of("key", "layer", {"of": "flips"}, 1, tensors_of([payload]))
    path = tmp_path / "ab" / "blob.nx"
    write_blob(path, path.with_name("t"), header, [payload], 0o600)
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def flip(descriptor: int, at: int, bit: int) -> None:
    value = os.pread(descriptor, 1, at)[0]
    os.pwrite(descriptor, bytes([value ^ 1 << bit]), at)


def is_found(descriptor: int, payload: torch.Tensor) -> bool:
    """Whether a reader notices; never wrong bytes."""
    try:
        header = read_header(descriptor, "blob")
        out, _ = read_payload(descriptor, header, "blob", BlockMode("buffered"))
    except CorruptCheckpoint:
        return True
    assert torch.equal(out, payload)
    return False


def test_every_bit_of_a_header_is_guarded(
    blob: int, payload: torch.Tensor, record_count: RecordCount
) -> None:
    header_nbytes = read_header(blob, "blob").header_nbytes
    num_caught = 0
    for at in range(header_nbytes):
        for bit in range(8):
            flip(blob, at, bit)
            with pytest.raises(CorruptCheckpoint):
                read_header(blob, "blob")
            num_caught += 1
            flip(blob, at, bit)
    assert not is_found(blob, payload)
    record_count(FACT, 8 * header_nbytes, {"caught": num_caught})


def test_bits_of_a_payload_are_guarded(
    blob: int, payload: torch.Tensor, record_count: RecordCount
) -> None:
    begin = read_header(blob, "blob").header_nbytes
    draw = random.Random(0)
    edges = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + PAGE - 1, NBYTES - 1]
    places = edges + [draw.randrange(NBYTES) for _ in range(NUM_PAYLOAD_FLIPS - len(edges))]
    num_caught = 0
    for at in places:
        bit = draw.randrange(8)
        flip(blob, begin + at, bit)
        assert is_found(blob, payload), (at, bit)
        num_caught += 1
        flip(blob, begin + at, bit)
    assert not is_found(blob, payload)
    record_count(FACT, len(places), {"caught": num_caught})


def test_every_other_length_is_refused(
    tmp_path: Path, payload: torch.Tensor, record_count: RecordCount
) -> None:
    data = payload[:5000].clone()
    header = Header.of("key", "layer", {}, 1, [data])
    path = tmp_path / "ab" / "blob.nx"
    write_blob(path, path.with_name("t"), header, [data], 0o600)
    whole = path.read_bytes()
    num_cuts = 0
    with open(path, "r+b") as file:
        for nbytes in range(len(whole) + 4097):
            if nbytes == len(whole):
                continue
            # What was cut away comes back as zeros where the file grows.
            os.truncate(path, min(nbytes, len(whole)))
            os.truncate(path, nbytes)
            with pytest.raises(CorruptCheckpoint):
                read_header(file.fileno(), "blob")
            num_cuts += 1
            if nbytes < len(whole):
                continue
            os.pwrite(file.fileno(), whole, 0)
    record_count(FACT, len(whole) + 4096, {"caught": num_cuts})


def test_cut_files_that_grow_again_are_refused(
    tmp_path: Path, payload: torch.Tensor, record_count: RecordCount
) -> None:
    """As a file system leaves them that lost the last pages of a file: zeros at the end."""
    path = tmp_path / "ab" / "blob.nx"
    header = Header.of("key", "layer", {}, 1, [payload])
    write_blob(path, path.with_name("t"), header, [payload], 0o600)
    whole = path.read_bytes()
    draw = random.Random(1)
    num_tails = num_caught = 0
    for number in range(200):
        kept = draw.randrange(len(whole)) if number % 2 else draw.randrange(3 * PAGE)
        os.truncate(path, kept)
        os.truncate(path, len(whole))
        descriptor = open_blob(path)
        is_zeros = whole[kept:].strip(b"\x00") == b""
        num_tails += not is_zeros
        num_caught += (found := is_found(descriptor, payload))
        assert found or is_zeros
        os.close(descriptor)
        path.write_bytes(whole)
    record_count("cache files that lost their last pages", num_tails, {"caught": num_caught})


def test_what_is_found_is_healed(
    tmp_path: Path, payload: torch.Tensor, record_count: RecordCount
) -> None:
    """Through the whole tier: a miss, the blob set aside, and the next put serves again."""
    draw = random.Random(2)
    counts: Counter[str] = Counter()
    with DiskTier(tmp_path / "cache", "1GiB") as tier:
        for _ in range(NUM_HEALED):
            entry = tier.put("key", [payload])
            assert entry is not None
            size = entry.path.stat().st_size
            descriptor = os.open(entry.path, os.O_RDWR)
            if draw.random() < 0.2:
                os.ftruncate(descriptor, draw.randrange(size))
            else:
                flip(descriptor, draw.randrange(size), draw.randrange(8))
            os.close(descriptor)
            found = tier.load("key")
            counts["missed" if found is None else "served"] += 1
            assert found is None
        assert tier.stats().corruptions == NUM_HEALED
        assert tier.put("key", [payload]) is not None
        assert torch.equal(tier.load("key"), payload)
    record_count("damaged entries of a tier", NUM_HEALED, {"served": 0, **counts})
