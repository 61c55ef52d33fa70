"""What the tests of the cache share: pages that differ, stores that are closed, files to find."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nexus_ext.cache import DiskTier, RamTier, Tier, TieredStore
from nexus_ext.cache.shared_folder import default_folder

MIB = 1 << 20
PAGE = 4096
# What a blob of one page of payload takes: its header is a page.
UNIT = 2 * PAGE


def page(number: int) -> torch.Tensor:
    """A page that differs from every other one."""
    return torch.full((PAGE,), number % 251, dtype=torch.uint8).index_fill_(
        0, torch.arange(8), number // 251
    )


def layer(number: int, nbytes: int = PAGE) -> torch.Tensor:
    """Noise that differs from every other one."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def disk_tiers(tmp_path: Path) -> Iterator[Callable[..., DiskTier]]:
    """For a fixture: opens tiers on `tmp_path / "cache"`, or on the folders named; closes them."""
    opened: list[DiskTier] = []

    def make(*folders: str, max_bytes: int | str = "1GiB", **options: Any) -> DiskTier:
        names = folders or ("cache",)
        opened.append(DiskTier([tmp_path / name for name in names], max_bytes, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def keys(tier: DiskTier) -> list[str]:
    """The one used longest ago first."""
    return [entry.key for entry in tier.entries()]


def blobs_in(folder: Path) -> list[Path]:
    """All files of blobs below a folder."""
    return sorted(folder.rglob("*.nx"))


def leftovers(folder: Path) -> list[Path]:
    """What should not be there when nobody writes."""
    return [path for path in folder.rglob("*") if ".tmp" in path.name or "new-index" in path.name]


def flip(path: Path, at: int, bit: int = 1) -> None:
    """Damage one byte of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ bit]))


def tiered_stores(tmp_path: Path) -> Iterator[Callable[..., TieredStore]]:
    """For a fixture: opens stores of up to three tiers, nvme, ssd and hdd, with room for so many
    pages each.
    """
    opened: list[TieredStore] = []

    def make(*units: int, under: str = "node", **options: Any) -> TieredStore:
        names = ("nvme", "ssd", "hdd")[: len(units)]
        tiers = [
            Tier(tmp_path / under / name, number * UNIT, compress="off")
            for name, number in zip(names, units, strict=True)
        ]
        opened.append(TieredStore(tiers, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def where(store: TieredStore) -> dict[str, str]:
    """Key -> name of the folder that it lies in."""
    return {entry.key: entry.folder.name for entry in store.entries()}


def fill(store: TieredStore, number: int) -> None:
    """Put so many layers."""
    for index in range(number):
        assert store.put(f"layer/{index}", [layer(index)]) is not None


def name(number: int) -> str:
    """A digest."""
    return hashlib.sha256(b"%d" % number).hexdigest()


def some(number: int, nbytes: int = MIB) -> torch.Tensor:
    """A payload."""
    made = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=made)


def shared_folders(tmp_path: Path) -> Iterator[Path]:
    """For a fixture: in shared memory, of this test alone."""
    path = default_folder(str(tmp_path))
    yield path
    assert not path.exists(), "who leaves last leaves nothing"


def ram_tiers(folder: Path) -> Iterator[RamTier]:
    """For a fixture: a tier in `folder`."""
    made = RamTier("16MiB", folder=folder)
    yield made
    made.close()
