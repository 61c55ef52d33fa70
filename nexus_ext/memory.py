"""Owns one question: how many bytes of host memory may this process really use?

Free memory, cgroup v1 and v2 limits and `ulimit -l`, and the arithmetic that turns them into a
budget. A leaf: it knows the kernel's files and the error tree, nothing else. Linux only.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Literal

from nexus_ext.errors import ConfigError

__all__ = [
    "available_bytes",
    "default_budget",
    "format_bytes",
    "locked_limit_bytes",
    "parse_bytes",
    "should_prefault",
]

_PREFIXES = "KMGTPE"
_SIZE = re.compile(
    rf"([0-9]{{1,20}})(\.[0-9]{{1,20}})?\s*(?:([{_PREFIXES}])(i)?)?b?", re.ASCII | re.IGNORECASE
)

# The kernel and every other process live in what the budget leaves, also on a small machine.
_SMALLEST_RESERVE = 1 << 30
_CAP_IPC_LOCK = 1 << 14
# Only the first user namespace maps every id onto itself.
_INITIAL_UID_MAP = ["0", "0", "4294967295"]


def parse_bytes(text: str | int) -> int:
    """Read a number of bytes as people write it.

    Args:
        text: An int, or "4096", "512MiB", "1.5GB", "300 MB", "2g". With an i the unit is binary
            (KiB = 1024), without it decimal (KB and K = 1000); upper and lower case are one.

    Returns:
        Whole bytes, rounded down.

    Raises:
        ConfigError: Negative, a fraction of a byte, or no size at all.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or (match[2] and not match[3]):
        raise ConfigError(
            "a size is a whole number of bytes, or a number with a unit from KB to EB or KiB to "
            f"EiB; got {text!r}; write it like '1.5GiB', '300 MB' or 4096"
        )
    whole, fraction, prefix, binary = match.groups()
    power = 1 + _PREFIXES.index(prefix.upper()) if prefix else 0
    return int(Fraction(whole + (fraction or "")) * (1024 if binary else 1000) ** power)


def format_bytes(nbytes: int) -> str:
    """Write bytes for people, in binary units with two digits: "1.23 GiB"; below 1 KiB exact."""
    if nbytes < 1024:
        return f"{nbytes} B"
    powers = range(1, len(_PREFIXES) + 1)
    power = next((p for p in powers if round(nbytes / 1024**p, 2) < 1024), len(_PREFIXES))
    return f"{nbytes / 1024**power:.2f} {_PREFIXES[power - 1]}iB"


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes this process can still allocate before the kernel starts killing or swapping.

    The smallest of MemAvailable and the room under every cgroup limit above this process, never
    negative. Page cache of files counts as room: the kernel gives it back.

    Args:
        root: The directory that holds proc/ and sys/.

    Raises:
        ConfigError: The kernel does not say (no MemAvailable in /proc/meminfo).
    """
    return min([_free_bytes(root), *_cgroup_rooms(root)])


def locked_limit_bytes(root: Path = Path("/")) -> int | None:
    """Bytes this process may lock in memory (`ulimit -l`, the soft limit).

    None when nothing limits it: no limit is set, or CAP_IPC_LOCK lifts it. The capability counts
    in the first user namespace only; a rootless container's does not.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY or _may_lock_everything(root) else soft


def default_budget(available: int) -> int:
    """Bytes to take of `available`: all but 1 GiB or 10 %, whichever is more; never below 0."""
    return max(0, available - max(_SMALLEST_RESERVE, available // 10))


def should_prefault(
    mode: Literal["auto", "on", "off"], nbytes: int, available: int
) -> tuple[bool, str]:
    """Decide whether to fault a mapped file in before its first use.

    Args:
        mode: "auto" pre-faults when the file needs less than 80 % of the available memory: a
            bigger one would push out its own first pages.
        nbytes: Size of the mapped bytes.
        available: Bytes as `available_bytes` counts them.

    Returns:
        The decision, and its reason with the numbers.

    Raises:
        ConfigError: An unknown mode.
    """
    sizes = f"{format_bytes(nbytes)} to map, {format_bytes(available)} available"
    if mode in ("on", "off"):
        return mode == "on", f"pre-fault is {mode} as asked: {sizes}"
    if mode != "auto":
        raise ConfigError(f"pre-fault is 'auto', 'on' or 'off'; got {mode!r}; choose one of them")
    fits = 10 * nbytes < 8 * available
    return fits, f"auto: {sizes}, which is {'under' if fits else 'not under'} the limit of 80 %"


def _free_bytes(root: Path) -> int:
    kibibytes = _numbers(root / "proc/meminfo").get("MemAvailable")
    if kibibytes is None:
        raise ConfigError(
            "available memory is read from MemAvailable in /proc/meminfo; "
            f"{root / 'proc/meminfo'} has none; give the budget in bytes instead of 'auto'"
        )
    return kibibytes * 1024


@dataclass(frozen=True)
class _Dialect:
    """How one cgroup version names its files."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, str]


# memory.high counts as a limit: above it the kernel slows a process down to a crawl.
_V2 = _Dialect(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_V1 = _Dialect(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """Bytes left under each limit, from this process's own cgroup up to the mount."""
    paths, mounts = _own_paths(root), _mounts(root)
    for dialect in paths.keys() & mounts.keys():
        mount_root, mount_point = mounts[dialect]
        top = root / mount_point.lstrip("/")
        directory = _own_directory(top, PurePosixPath(mount_root), PurePosixPath(paths[dialect]))
        for level in (directory, *directory.parents):
            yield from _rooms_at(level, dialect)
            if level == top:
                break


def _rooms_at(directory: Path, dialect: _Dialect) -> Iterator[int]:
    """Bytes left under the limits of one cgroup; nothing where no limit is set."""
    usage = _number(directory / dialect.usage)
    limits = [_number(directory / name) for name in dialect.limits]
    if usage is None or limits == [None] * len(limits):
        return
    stat = _numbers(directory / "memory.stat")
    held = max(0, usage - sum(stat.get(name, 0) for name in dialect.reclaimable))
    yield from (max(0, limit - held) for limit in limits if limit is not None)


def _own_paths(root: Path) -> dict[_Dialect, str]:
    """The path of this process's cgroup in the hierarchies that can limit memory."""
    paths = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths[_V2] = path
        elif "memory" in controllers.split(","):
            paths[_V1] = path
    return paths


def _mounts(root: Path) -> dict[_Dialect, tuple[str, str]]:
    """Root and mount point of the first mount of each hierarchy (man 5 proc, mountinfo)."""
    mounts: dict[_Dialect, tuple[str, str]] = {}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        kind, *_, options = filesystem.split()
        inside, point = (_unescape(field) for field in mount.split()[3:5])
        if kind == "cgroup2":
            mounts.setdefault(_V2, (inside, point))
        elif kind == "cgroup" and "memory" in options.split(","):
            mounts.setdefault(_V1, (inside, point))
    return mounts


def _own_directory(top: Path, mount_root: PurePosixPath, path: PurePosixPath) -> Path:
    """Where the cgroup `path` is found under the mount at `top`.

    A container often sees only its own part of the tree while /proc tells the host's path; then
    the top of the mount is the container's own cgroup, or the nearest one that can be seen.
    """
    inside = path.relative_to(mount_root if path.is_relative_to(mount_root) else "/")
    directory = top / inside
    return directory if ".." not in inside.parts and directory.is_dir() else top


def _may_lock_everything(root: Path) -> bool:
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", _text(root / "proc/self/status"), re.M)
    initial = _text(root / "proc/self/uid_map").split() == _INITIAL_UID_MAP
    return initial and effective is not None and bool(int(effective[1], 16) & _CAP_IPC_LOCK)


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)


def _numbers(path: Path) -> dict[str, int]:
    """`name number ...` or `name: number ...` on each line."""
    pairs = (line.split()[:2] for line in _text(path).splitlines())
    return {pair[0].rstrip(":"): int(pair[1]) for pair in pairs if pair[1:] and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    """The only number of a file; None when the file is absent or says "max"."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    """A kernel file; empty when it is absent or closed to us."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
