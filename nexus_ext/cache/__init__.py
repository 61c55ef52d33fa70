"""What was fetched is kept: a disk tier of verified, content-addressed files, and a RAM tier that
processes share.
"""

from nexus_ext.cache.disk import Admission, DiskTier
from nexus_ext.cache.ram import RamStats, RamTier
from nexus_ext.cache.report import DiskStats, Entry, VerifyReport, ZoneStats

__all__ = [
    "Admission",
    "DiskStats",
    "DiskTier",
    "Entry",
    "RamStats",
    "RamTier",
    "VerifyReport",
    "ZoneStats",
]
