"""What the tests of the cache share: pages that differ, stores that are closed, files to find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nexus_ext.cache import DiskTier

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
