"""What was fetched is kept: a disk tier of verified, content-addressed files; several tiers of
them; and a store that nodes share.
"""

from nexus_ext.cache.disk import Admission, DiskTier
from nexus_ext.cache.remote import RemoteStats, RemoteStore
from nexus_ext.cache.report import DiskStats, Entry, VerifyReport, ZoneStats
from nexus_ext.cache.tier_report import TieredStats, TierStats
from nexus_ext.cache.tiers import Tier, TieredStore

__all__ = [
    "Admission",
    "DiskStats",
    "DiskTier",
    "Entry",
    "RemoteStats",
    "RemoteStore",
    "Tier",
    "TierStats",
    "TieredStats",
    "TieredStore",
    "VerifyReport",
    "ZoneStats",
]
