"""What was fetched is kept: a disk tier of verified, content-addressed files."""

from nexus_ext.cache.disk import Admission, DiskTier
from nexus_ext.cache.report import DiskStats, Entry, VerifyReport, ZoneStats

__all__ = ["Admission", "DiskStats", "DiskTier", "Entry", "VerifyReport", "ZoneStats"]
