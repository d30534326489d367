"""Experts of mixture-of-experts layers that do not all fit the device.

Not a kernel of the broker: a store lives with the model that uses it, and layers are called one after the other.
"""

from penstock.kernels.experts.errors import ExpertFileError, ExpertMissing, SlotsTooFew, StoreClosed, StoreError
from penstock.kernels.experts.files import QWEN3_MOE, STACKED, ExpertNames
from penstock.kernels.experts.offload import moe_offloaded
from penstock.kernels.experts.statistics import StoreStatistics
from penstock.kernels.experts.store import ExpertStore, Lease

__all__ = [
    "QWEN3_MOE",
    "STACKED",
    "ExpertFileError",
    "ExpertMissing",
    "ExpertNames",
    "ExpertStore",
    "Lease",
    "SlotsTooFew",
    "StoreClosed",
    "StoreError",
    "StoreStatistics",
    "moe_offloaded",
]
