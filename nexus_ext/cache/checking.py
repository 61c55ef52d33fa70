"""Reading everything: are the blobs what they say, and does the index know them?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nexus_ext.cache.report import VerifyReport
from nexus_ext.cache.zone import Zone
from nexus_ext.errors import CorruptCheckpoint, ReadError

__all__ = ["verify_zones"]


def verify_zones(zones: Sequence[Zone], report: Callable[[Exception], object]) -> VerifyReport:
    """Read every block of every blob; set aside what is bad, enter what is unknown.

    Args:
        zones: Where.
        report: Told of each blob that is bad.

    Raises:
        ReadError, WriteError: An index cannot be used.
    """
    found = [_verify(zone, report) for zone in zones]
    return VerifyReport(
        sum(one.num_blobs for one in found),
        sum(one.nbytes for one in found),
        tuple(bad for one in found for bad in one.bad),
        sum(one.num_adopted for one in found),
        sum(one.num_missing for one in found),
    )


def _verify(zone: Zone, report: Callable[[Exception], object]) -> VerifyReport:
    if zone.is_writable:
        zone.folder.remove_abandoned(everywhere=True)
    num_blobs = nbytes = num_adopted = 0
    bad: list[tuple[Path, str]] = []
    for digest, path in zone.folder.every_blob():
        try:
            inode = path.stat().st_ino
            header = zone.check(digest, path)
        except FileNotFoundError:
            continue  # evicted meanwhile
        except (CorruptCheckpoint, ReadError) as error:
            report(error)
            bad.append((path, str(error)))
            # Without a number it was not the disk that refused.
            if isinstance(error, CorruptCheckpoint) or error.errno is not None:
                zone.set_aside(digest, inode)
            continue
        num_blobs += 1
        nbytes += header.nbytes
        if zone.is_writable and not zone.index.has(digest):
            num_adopted += zone.take_in(header)
    missing = [row for row in zone.index.rows() if not zone.folder.has(row.digest)]
    for row in missing:
        zone.forget_missing(row.digest)
    return VerifyReport(num_blobs, nbytes, tuple(bad), num_adopted, len(missing))
