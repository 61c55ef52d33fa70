"""What a user may ask for, checked once; and the only reader of the environment.

NEXUS_PREFAULT  on | off | auto (1 and 0 too): overrides the default of `prefault`
NEXUS_HOME      folder for what nexus keeps: recorded digests, packed models, the demo's model, the
                cache
NEXUS_CACHE_BYTES  what the cache may take of its disk ("50GB"); without it, what the disk has
NEXUS_STORE     URL of a store that nodes share: packed models are looked for there, and put there
NEXUS_POISON    1 fills freed arenas with NaN bytes: a wrong read cannot pass unseen
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from nexus_ext.errors import ConfigError
from nexus_ext.memory import parse_bytes

__all__ = [
    "IoMode",
    "Predict",
    "Prefault",
    "StreamConfig",
    "Verify",
    "cache_bytes",
    "cache_folder",
    "home_folder",
    "store_url",
]

IoMode = Literal["auto", "direct", "buffered", "mmap", "gds"]
Verify = Literal["off", "first", "always"]
Prefault = Literal["auto", "on", "off"]
Predict = Literal["auto", "on", "off"]
ExpertDevice = Literal["auto", "cpu"]

# A read smaller than the largest alignment unit cannot be cut.
_SMALLEST_CHUNK_BYTES = 64 << 10
# The disk's own.
_NO_LIMIT_BYTES = 1 << 62


@dataclass(frozen=True)
class StreamConfig:
    """How a model is streamed.

    Attributes:
        budget: Bytes of device memory for weights ("1GiB", 2**30), or "auto": what is free, less
            a reserve.
        io: "direct" bypasses the page cache; "buffered" passes through it and leaves nothing
            behind; "mmap" lives in it; "gds" reads into a GPU's memory through kvikio; "auto" looks
            at the cache, at free memory and at what kvikio can do.
        lookahead: Groups fetched ahead of the one in use, or "auto".
        ram_budget: Bytes of host memory for staging and for groups that stay in RAM: page-locked
            where weights stream to a GPU, else shared by all processes of the user; or "auto": 24
            chunks, and on a GPU half of what is free.
        verify: Compare groups with recorded digests: "off", at the "first" landing, or "always".
        prefault: Bring mapped pages in at the start ("mmap" only); "auto" when they fit in memory.
        depth: Reads in flight; None is the reader's default.
        chunk_bytes: Most bytes of one read, or "auto": 1 MiB, on a GPU what its link likes.
        use_uring: Whether io_uring may be used where it works.
        tile_bytes: Bytes of one tile of a projection that is read by rows, about.
        trailing_drop: Whether pages that were used leave the page cache (mmap, buffered); "auto"
            keeps mapped ones that fit in memory.
        expert_budget: Bytes for the experts of a mixture-of-experts model, or a share of them all
            ("30%", 0.3); "auto" is what the dense weights leave of `budget`.
        expert_policy: Which experts stay: a name of `nexus_ext.experts.policy.POLICIES`.
        expert_device: "cpu" computes experts there, out of host memory, while a GPU does the rest;
            "auto" where the model computes.
        expert_predict: Fetch what the next layer will want: "on", "off", or "auto", while it pays.
        expert_hotness: File of `save_hotness`: the experts to begin with.
    """

    budget: int | Literal["auto"] = "auto"
    io: IoMode = "auto"
    lookahead: int | Literal["auto"] = "auto"
    ram_budget: int | Literal["auto"] = "auto"
    verify: Verify = "off"
    prefault: Prefault = "auto"
    depth: int | None = None
    chunk_bytes: int | Literal["auto"] = "auto"
    use_uring: bool = True
    tile_bytes: int = 8 << 20
    trailing_drop: bool | Literal["auto"] = "auto"
    expert_budget: int | float | Literal["auto"] = "auto"
    expert_policy: str = "reuse"
    expert_device: ExpertDevice = "auto"
    expert_predict: Predict = "auto"
    expert_hotness: Path | None = None

    @classmethod
    def of(
        cls,
        *,
        budget: str | int = "auto",
        io: str = "auto",
        lookahead: int | str = "auto",
        ram_budget: str | int = "auto",
        verify: str = "off",
        prefault: str | None = None,
        depth: int | None = None,
        chunk_bytes: str | int = "auto",
        use_uring: bool = True,
        tile_bytes: str | int = 8 << 20,
        trailing_drop: bool | str = "auto",
        expert_budget: str | int | float = "auto",
        expert_policy: str = "reuse",
        expert_device: str = "auto",
        expert_predict: str = "auto",
        expert_hotness: str | Path | None = None,
    ) -> StreamConfig:
        """Check and convert what a user wrote.

        Raises:
            ConfigError: A value that cannot be; the message lists those that can.
        """
        chunk = _bytes_or_auto(chunk_bytes)
        if chunk != "auto" and chunk < _SMALLEST_CHUNK_BYTES:
            raise ConfigError(
                f"chunk_bytes must be at least {_SMALLEST_CHUNK_BYTES}, got {chunk}; "
                "1MiB suits most disks."
            )
        if depth is not None and not 2 <= depth <= 1024:
            raise ConfigError(f"depth must lie in 2..1024 reads in flight, got {depth}.")
        return cls(
            budget=_bytes_or_auto(budget),
            io=cast(IoMode, _one_of("io", io, get_args(IoMode))),
            lookahead=_lookahead(lookahead),
            ram_budget=_bytes_or_auto(ram_budget),
            verify=cast(Verify, _one_of("verify", verify, get_args(Verify))),
            prefault=cast(Prefault, _one_of("prefault", _prefault(prefault), get_args(Prefault))),
            depth=depth,
            chunk_bytes=chunk,
            use_uring=use_uring,
            tile_bytes=parse_bytes(tile_bytes),
            trailing_drop=_bool_or_auto("trailing_drop", trailing_drop),
            expert_budget=_bytes_or_share(expert_budget),
            expert_policy=expert_policy,
            expert_device=cast(
                ExpertDevice, _one_of("expert_device", expert_device, get_args(ExpertDevice))
            ),
            expert_predict=cast(
                Predict, _one_of("expert_predict", expert_predict, get_args(Predict))
            ),
            expert_hotness=None if expert_hotness is None else Path(expert_hotness),
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")
    return value


def _bytes_or_auto(value: str | int) -> int | Literal["auto"]:
    return "auto" if value == "auto" else parse_bytes(value)


def _bool_or_auto(name: str, value: bool | str) -> bool | Literal["auto"]:
    if isinstance(value, bool):
        return value
    if value != "auto":
        raise ConfigError(f"{name} must be True, False or 'auto', got {value!r}.")
    return "auto"


def _bytes_or_share(value: str | int | float) -> int | float | Literal["auto"]:
    """Bytes, a share in (0, 1] (as 0.3 or "30%"), or "auto"."""
    share: float | None = value if isinstance(value, float) else None
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            share = float(value.strip().removesuffix("%")) / 100
        except ValueError:
            share = math.nan
    if share is None:
        return _bytes_or_auto(cast("str | int", value))
    if not 0 < share <= 1:
        raise ConfigError(
            "expert_budget must be bytes ('4GiB'), a share above 0 % and up to 100 % ('30%'), or "
            f"'auto'; got {value!r}."
        )
    return share


def _lookahead(value: int | str) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"lookahead must be a number from 1 on or 'auto', got {value!r}."
        ) from None


def _prefault(value: str | None) -> str:
    """The option, else the environment, else "auto"."""
    chosen = value if value is not None else os.environ.get("NEXUS_PREFAULT", "auto")
    return {"1": "on", "0": "off"}.get(chosen, chosen)


def poisons_freed_arenas() -> bool:
    return os.environ.get("NEXUS_POISON") == "1"


def home_folder() -> Path:
    """Where nexus keeps its files; made when something is written."""
    return Path(os.environ.get("NEXUS_HOME") or "~/.cache/nexus").expanduser()


def cache_folder() -> Path:
    """Where the cache is when nobody names another folder."""
    return home_folder() / "cache"


def cache_bytes() -> int:
    """What may be kept there."""
    asked = os.environ.get("NEXUS_CACHE_BYTES")
    return _NO_LIMIT_BYTES if not asked else parse_bytes(asked)


def store_url() -> str | None:
    """Where nodes share what they made; None where they do not."""
    return os.environ.get("NEXUS_STORE") or None
