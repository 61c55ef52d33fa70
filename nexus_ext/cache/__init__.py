"""What was fetched is kept: a RAM tier that processes share, a disk tier of verified files named by
their content, several tiers of them, and a store that nodes share.
"""

from nexus_ext.cache.disk import Admission, DiskTier
from nexus_ext.cache.ram import RamStats, RamTier
from nexus_ext.cache.remote import RemoteStats, RemoteStore
from nexus_ext.cache.report import DiskStats, Entry, VerifyReport, ZoneStats
from nexus_ext.cache.tier_report import TieredStats, TierStats
from nexus_ext.cache.tiers import Tier, TieredStore

__all__ = [
    "Admission",
    "DiskStats",
    "DiskTier",
    "Entry",
    "RamStats",
    "RamTier",
    "RemoteStats",
    "RemoteStore",
    "Tier",
    "TierStats",
    "TieredStats",
    "TieredStore",
    "VerifyReport",
    "ZoneStats",
]
