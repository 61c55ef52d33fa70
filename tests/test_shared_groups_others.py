"""Groups in shared memory, where processes do not ask for the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nexus_ext as nexus
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.errors import CorruptCheckpoint
from tests.test_shared_groups import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    Net,
    _folder,
    resident,
    same,
    streamed,
)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    torch.manual_seed(5)
    save_file(Net().state_dict(), tmp_path / "net.safetensors")
    yield tmp_path / "net.safetensors"
    assert not _folder(tmp_path / "net.safetensors").exists(), "who comes last takes it along"


@pytest.mark.parametrize("verify", ["first", "always"])
def test_what_nobody_verified_is_not_taken_for_verified(path: Path, verify: str) -> None:
    nexus.close(streamed(path, NUM_BLOCKS, verify="first"))  # digests are recorded
    entry, status = Checkpoint.open(path).entries["blocks.3.0.weight"], path.stat()
    with path.open("r+b") as file:
        file.seek(entry.offset + 100)
        byte = file.read(1)[0]
        file.seek(entry.offset + 100)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    careless = streamed(path, NUM_BLOCKS)
    try:
        with pytest.raises(CorruptCheckpoint):
            streamed(path, NUM_BLOCKS, verify=verify)
    finally:
        nexus.close(careless)


@pytest.mark.parametrize("few", [1, 2, 3, 4])
@pytest.mark.parametrize("many", [5, 6, 7])
def test_who_shares_less_takes_nothing_from_those_who_share_more(
    path: Path, few: int, many: int
) -> None:
    first = streamed(path, many)
    second = streamed(path, few)
    third = streamed(path, many)
    assert nexus.stats(third).ram_bytes_read == 0
    assert nexus.stats(third).ram_groups == many
    for model in (first, second, third):
        assert same(model, resident(path), passes=1)
        nexus.close(model)


def test_a_home_that_cannot_be_written_to(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "file" / "home"))
    model = streamed(path, 3)
    assert nexus.stats(model).ram_groups == 3
    assert nexus.stats(model).ram_bytes_read == 3 * BLOCK_BYTES
    nexus.close(model)
