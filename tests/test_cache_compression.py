"""Compression: whether it pays, what it must give back, and what it must never do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from nexus_ext.cache import Tier, TieredStore
from nexus_ext.cache import compression as module
from nexus_ext.cache.compression import compress, decide, decompress_into, require_zstd
from nexus_ext.cache.level import PackedEntry
from nexus_ext.errors import CorruptCheckpoint, MissingExtra
from tests.conftest import RecordCount

MIB = 1 << 20


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def soft(nbytes: int, seed: int = 0) -> torch.Tensor:
    """What shrinks to about a half: four bits of noise a byte."""
    return noise(nbytes, seed) & 0x0F


def digest(data: torch.Tensor) -> str:
    return sha256(data.numpy().tobytes()).hexdigest()


def in_pieces(data: torch.Tensor, nbytes: int) -> Iterator[bytes]:
    raw = data.numpy().tobytes()
    yield from (raw[start : start + nbytes] for start in range(0, len(raw), nbytes))


@pytest.mark.parametrize("nbytes", [0, 1, 4095, MIB, 5 * MIB + 17])
@pytest.mark.parametrize("piece", [1000, 4 * MIB])
def test_what_is_compressed_comes_back(nbytes: int, piece: int) -> None:
    data = soft(nbytes)
    packed = compress([data[: nbytes // 3], data[nbytes // 3 :]])
    out = torch.empty(nbytes, dtype=torch.uint8)
    decompress_into(in_pieces(packed, piece), out, digest(data), "it")
    assert torch.equal(out, data)


def test_a_slow_link_is_worth_it_and_a_fast_one_is_not() -> None:
    data = [soft(4 * MIB)]
    slow, fast, unknown = decide(data, 1e3), decide(data, 1e13), decide(data, None)
    assert (slow.is_on, fast.is_on, unknown.is_on) == (True, False, True)
    assert 1.5 < slow.ratio < 2.5
    assert slow.decompress_bytes_per_second > 0
    assert "which is less" in slow.why
    assert "no less" in fast.why
    # The rule: what comes out of the compressor in a second is more than what the link gives.
    assert slow.decompress_bytes_per_second > 1e3
    noisy = decide([noise(MIB)], 1e3)
    assert (noisy.is_on, noisy.why) == (False, "the sample hardly shrinks")
    assert not decide([], 1e3).is_on


@pytest.mark.parametrize("promised", [0, 1, MIB - 1])
def test_a_bomb_makes_no_byte_more_than_was_promised(promised: int) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(256 * MIB))
    assert len(bomb) < MIB
    memory = torch.full((promised + 4096,), 7, dtype=torch.uint8)
    with pytest.raises(CorruptCheckpoint, match="more than the"):
        decompress_into([bomb], memory[:promised], digest(torch.zeros(promised)), "it")
    assert bool((memory[promised:] == 7).all())


def test_a_frame_that_wants_much_memory_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = packer.compress(b"x" * 1000) + packer.flush()
    out = torch.empty(1000, dtype=torch.uint8)
    with pytest.raises(CorruptCheckpoint, match="cannot be decompressed"):
        decompress_into([frame], out, sha256(b"x" * 1000).hexdigest(), "it")


def test_a_cut_frame_and_every_flip_are_refused(record_count: RecordCount) -> None:
    data = soft(3000)
    packed = compress([data]).numpy().tobytes()
    out = torch.empty(3000, dtype=torch.uint8)
    for end in range(0, len(packed), 7):
        with pytest.raises(CorruptCheckpoint):
            decompress_into([packed[:end]], out, digest(data), "it")
    num_refused = num_same = 0
    for position in range(len(packed)):
        changed = bytearray(packed)
        changed[position] ^= 1 << position % 8
        try:
            decompress_into([bytes(changed)], out, digest(data), "it")
        except CorruptCheckpoint:
            num_refused += 1
        else:
            num_same += 1
            assert torch.equal(out, data), "other bytes were let through"
    outcomes = {"refused": num_refused, "changed nothing": num_same}
    record_count("flips of compressed layers", len(packed), outcomes)
    assert num_refused > 0.95 * len(packed)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtra, match=r"pip install 'nexus_ext\[zstd\]'"):
        require_zstd()
    decision = decide([soft(MIB)], 1e3)
    assert not decision.is_on
    assert "pip install" in decision.why


# -- in a tier -------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder gives a kilobyte a second, as far as the tiers know: slower than any machine
    decompresses.
    """
    import nexus_ext.cache.level as level
    from nexus_ext.cache.rates import Rate

    monkeypatch.setattr(level, "rate_of", lambda *_: Rate(1e3, 0.0, "direct"))


def test_a_slow_tier_compresses_and_looks_plain(tmp_path: Path, slow_disk: None) -> None:
    data = soft(2 * MIB)
    with TieredStore([Tier(tmp_path / "hdd", "1GiB")]) as one:
        entry = one.put("layer", [data], kind="expert", about={"n": 1})
        assert isinstance(entry, PackedEntry)
        assert (entry.nbytes, entry.digest, entry.about) == (2 * MIB, digest(data), {"n": 1})
        assert entry.stored.nbytes < 0.7 * entry.nbytes
        assert torch.equal(one.read(entry), data)
        out = torch.empty(2 * MIB, dtype=torch.uint8)
        assert one.load("layer", out) is not None
        assert torch.equal(out, data)
        known = one.put("layer", [data])  # not written again
        assert known is not None
        assert (known.digest, known.path) == (entry.digest, entry.path)
        tier = one.stats().tiers[0]
        assert tier.decision is not None
        assert tier.decision.is_on
        assert (tier.disk.puts, tier.disk.puts_known) == (1, 1)
        assert tier.disk.stored_bytes < 0.7 * 2 * MIB
    with TieredStore([Tier(tmp_path / "hdd", "1GiB", compress="off")]) as again:
        loaded = again.load("layer")
        assert loaded is not None
        assert torch.equal(loaded, data)


def test_what_is_compressed_stays_so_on_its_way_down_and_not_on_its_way_up(
    tmp_path: Path, slow_disk: None
) -> None:
    tiers = [
        Tier(tmp_path / "nvme", 3 * MIB, compress="off"),
        Tier(tmp_path / "ssd", 1 * MIB + MIB // 2),
        Tier(tmp_path / "hdd", "1GiB"),
    ]
    layers = [soft(2 * MIB, seed) for seed in range(3)]
    with TieredStore(tiers) as one:
        for index, data in enumerate(layers):
            one.put(f"layer/{index}", [data])
        entries = {entry.key: entry for entry in one.entries()}
        places = [entries[f"layer/{index}"].folder.name for index in range(3)]
        assert places == ["hdd", "ssd", "nvme"]
        packed = [isinstance(entries[f"layer/{index}"], PackedEntry) for index in range(3)]
        assert packed == [True, True, False]
        one.get("layer/1")
        entry = one.get("layer/1")
        assert entry is not None
        assert (entry.folder.name, type(entry).__name__) == ("nvme", "Entry")
        for index, data in enumerate(layers):
            loaded = one.load(f"layer/{index}")
            assert loaded is not None
            assert torch.equal(loaded, data)


def test_a_compressed_entry_that_gives_other_bytes_is_a_miss(
    tmp_path: Path, slow_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is what was written, but what was written was wrong."""
    data = soft(MIB)
    with TieredStore([Tier(tmp_path / "hdd", "1GiB")]) as one:

        def other(parts: Any) -> torch.Tensor:
            return compress([soft(MIB, seed=1)])

        monkeypatch.setattr("nexus_ext.cache.level.compress", other)
        entry = one.put("layer", [data])
        assert entry is not None
        with pytest.raises(CorruptCheckpoint, match="another digest"):
            one.read(entry)
        assert one.load("layer") is None
        assert one.stats().tiers[0].disk.corruptions == 1
        assert one.entries() == []


def test_a_fast_tier_does_not_compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nexus_ext.cache.level as level
    from nexus_ext.cache.rates import Rate

    monkeypatch.setattr(level, "rate_of", lambda *_: Rate(1e13, 0.0, "direct"))
    with TieredStore([Tier(tmp_path / "nvme", "1GiB")]) as one:
        entry = one.put("layer", [soft(MIB)])
        assert not isinstance(entry, PackedEntry)
        decision = one.stats().tiers[0].decision
        assert decision is not None
        assert not decision.is_on


def test_the_sample_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = module._sample([soft(40 * MIB), soft(3), soft(8 * MIB)])
    assert 0 < len(sample) <= MIB
