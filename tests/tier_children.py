"""Children that use one store of tiers, and one that dies in the middle of a move.

Run by test_cache_tiers.py.

    python tier_children.py die-down | die-up FOLDER
    python tier_children.py load FOLDER URL
    python tier_children.py together FOLDER SEED
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import torch

from nexus_ext.cache import RemoteStore, Tier, TieredStore
from nexus_ext.cache.levels import Levels
from nexus_ext.cache.zone import Zone

PAGE = 4096
UNIT = 2 * PAGE
CRASHED = 41
NUM_LAYERS = 6


def layer(number: int) -> torch.Tensor:
    """As in the test."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (PAGE,), dtype=torch.uint8, generator=generator)


def die(*_: object, **__: object) -> None:
    """As a kill would: nothing is closed, nothing written down."""
    os._exit(CRASHED)


def die_in_a_move(folder: Path, is_down: bool) -> None:
    """The copy is there, and this is where the original would go."""
    tiers = [
        Tier(folder / "nvme", UNIT, compress="off"),
        Tier(folder / "ssd", 8 * UNIT, compress="off"),
    ]
    one = TieredStore(tiers)
    if is_down:
        Zone.evict = die  # type: ignore[method-assign, assignment]
        one.put("layer/1", [layer(1)])
    else:
        Levels._end_original = die  # type: ignore[method-assign, assignment]
        one.get("layer/0")


def load(folder: Path, url: str) -> None:
    """Load every layer, and say what that took."""
    with TieredStore([Tier(folder, "1MiB")], remote=RemoteStore(url)) as one:
        loaded = [one.load(f"layer/{index}") for index in range(NUM_LAYERS)]
        stats = one.stats()
    right = [
        payload is not None and torch.equal(payload, layer(index))
        for index, payload in enumerate(loaded)
    ]
    assert stats.remote is not None
    said = {"right": sum(right), "fetched": stats.fetched}
    print(json.dumps(said | {"plain_bytes_in": stats.remote.plain_bytes_in}))


def together(folder: Path, seed: int) -> None:
    """Use keys that others use too, in tiers with little room; say how many bytes were wrong."""
    draw = random.Random(seed)
    tiers = [Tier(folder / name, 3 * UNIT, compress="off") for name in ("nvme", "ssd", "hdd")]
    wrong = found = 0
    with TieredStore(tiers) as one:
        for _ in range(60):
            index = draw.randrange(10)
            loaded = one.load(f"layer/{index}")
            if loaded is None:
                one.put(f"layer/{index}", [layer(index)])
                continue
            found += 1
            wrong += not torch.equal(loaded, layer(index))
        corruptions = sum(tier.disk.corruptions for tier in one.stats().tiers)
    print(json.dumps({"found": found, "wrong": wrong, "corruptions": corruptions}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, *rest = sys.argv[1:]
    if what == "load":
        load(Path(folder), *rest)
    elif what == "together":
        together(Path(folder), int(rest[0]))
    else:
        die_in_a_move(Path(folder), what == "die-down")
