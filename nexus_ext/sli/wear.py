"""`SSDWearLeveling`: writes spread over folders, the one with the fewest bytes first."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from nexus_ext.errors import ConfigError, WriteError
from nexus_ext.sli.limits import check_number

__all__ = ["SSDWearLeveling"]

_LEDGER = ".written.json"
_MOST_ZONES = 1024


class SSDWearLeveling:
    """Hands out folders to write to.

    An SSD levels its wear by itself: its controller maps every write to another cell, whatever the
    folder. What wears it out is the number of bytes written. So zones help where they lie on
    different devices, and for counting; to write less, use `LayerCache(admission="second-touch")`
    or `write_budget_gb_per_day`. Local models are never copied to begin with.
    """

    def __init__(self, cache_dir: str | Path | Sequence[str | Path], num_zones: int = 4) -> None:
        """Make the folders.

        Args:
            cache_dir: A folder, in which `num_zones` folders are made; or the zones themselves.
            num_zones: Not looked at if the zones are given.

        Raises:
            ConfigError: A number that cannot be, or a folder that cannot be made.
        """
        if isinstance(cache_dir, str | Path):
            check_number("num_zones", num_zones, 1, _MOST_ZONES)
            base = Path(cache_dir).expanduser()
            self.zones = [base / f"zone_{number}" for number in range(num_zones)]
        else:
            self.zones = [Path(zone).expanduser() for zone in cache_dir]
        if not self.zones:
            raise ConfigError("wear leveling needs a zone, got none.")
        for zone in self.zones:
            _make(zone)
        self._lock = threading.Lock()
        self._handed: dict[Path, int] = dict.fromkeys(self.zones, 0)

    def get_write_zone(self) -> Path:
        """The folder to which the fewest bytes were written so far; of equal ones, that which was
        handed out least often.

        Raises:
            WriteError: What was counted cannot be written down.
        """
        with self._lock:
            written = {zone: _count(zone) for zone in self.zones}
            chosen = min(self.zones, key=lambda zone: (written[zone], self._handed[zone]))
            self._handed[chosen] += 1
            return chosen

    def written_bytes(self) -> dict[Path, int]:
        """Bytes written to each zone, of files that were seen there, also if they are gone."""
        with self._lock:
            return {zone: _count(zone) for zone in self.zones}


def _make(zone: Path) -> None:
    try:
        zone.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"a zone is a folder; {zone} cannot be made: {error.strerror}. Name another one."
        ) from error


def _count(zone: Path) -> int:
    """All bytes ever seen there: a file that is new, or has changed, was written once more."""
    total, known = _load(zone / _LEDGER)
    found = _files(zone)
    new = sum(facts[0] for name, facts in found.items() if known.get(name) != facts)
    if found != known:
        _store(zone / _LEDGER, total + new, found)
    return total + new


def _files(zone: Path) -> dict[str, list[int]]:
    """Size, inode and time of each file."""
    found = {}
    for entry in os.scandir(zone):
        if entry.name.startswith(_LEDGER) or not entry.is_file(follow_symlinks=False):
            continue
        try:
            info = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        found[entry.name] = [info.st_size, info.st_ino, info.st_mtime_ns]
    return found


def _load(path: Path) -> tuple[int, dict[str, list[int]]]:
    """What was counted; nothing, where that is lost: then it is counted from what is there."""
    try:
        said = json.loads(path.read_bytes())
        return int(said["total"]), dict(said["files"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return 0, {}


def _store(path: Path, total: int, files: dict[str, list[int]]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"total": total, "files": files}))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(
            f"a zone must take what is counted of it; {path} could not be written: "
            f"{error.strerror}. Make room, or name another folder."
        ) from error
