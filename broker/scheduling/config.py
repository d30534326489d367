"""How the broker schedules: section [scheduling] of penstock.toml. Knows meanings, units and bounds; no rule is here."""

import math
from dataclasses import dataclass, fields
from itertools import pairwise

from penstock.broker.protocol import NUM_PRIORITIES


@dataclass(frozen=True, slots=True)
class SchedulingConfig:
    """Times are in the unit at the end of the name. All of it may be changed while the broker runs."""

    max_bins: int = 8
    """Most bins of predicted time per batch key; 1: no binning."""
    boundaries_ms: tuple[float, ...] = ()
    """Fixed boundaries between bins, ascending; empty: learned from measured times."""
    max_wait_ms: float = 0.0
    """How long an incomplete batch may be held while a worker is idle."""
    ahead_ms: float = 10.0
    """A busy worker gets its next batch when what it runs is predicted to have this left: early enough to hide the way."""
    class_budget_s: float = 0.05
    """Waiting after which a task of class 0 is overdue; class p has 2**p times as much."""
    no_limit_s: float = 60.0
    """A task without a time limit is ordered as if it had this one."""
    floor_every: int = 16
    """Of so many batches of a client, one begins with its lowest class."""
    first_batch_sizes: tuple[int, ...] = (64, 32, 16)
    """First limits for fast (< 100 ms), medium and slow (>= 500 ms) work; they adapt."""
    max_queue_device_s: float = 3600.0
    """Predicted work that may be queued, in seconds per worker."""
    wait_budget_s: tuple[float, ...] = ()
    """Longest predicted wait at which a class still takes work: ten values, or one for all; empty: the task's own limit."""
    drops_hopeless: bool = True
    """End a task at once when it cannot finish within its time limit any more."""
    memory_high: float = 0.95
    """Device memory in use above which batches shrink."""
    remediates: bool = True
    """Act on regressions by itself: smaller batches, another worker, the configuration before."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in (int, float) and f.name not in ("max_wait_ms", "ahead_ms") and not value > 0:
                raise ValueError(f"{f.name} must be above 0, not {value!r}")
        if not (self.max_wait_ms >= 0 and self.ahead_ms >= 0):
            raise ValueError("max_wait_ms and ahead_ms must not be negative")
        if self.max_bins > 64:
            raise ValueError(f"max_bins is at most 64, not {self.max_bins}")
        edges = (0.0, *self.boundaries_ms)
        if not all(a < b < math.inf for a, b in pairwise(edges)):
            raise ValueError(f"boundaries_ms must ascend from above 0, not {list(self.boundaries_ms)}")
        if len(self.wait_budget_s) not in (0, 1, NUM_PRIORITIES) or not all(b > 0 for b in self.wait_budget_s):
            raise ValueError(f"wait_budget_s has one value or {NUM_PRIORITIES}, all above 0; not {list(self.wait_budget_s)}")
        if len(self.first_batch_sizes) != 3 or not all(1 <= s <= 4096 for s in self.first_batch_sizes):
            raise ValueError("first_batch_sizes are three numbers from 1 to 4096")
        if self.memory_high > 1.0:
            raise ValueError(f"memory_high is a share of the memory, at most 1, not {self.memory_high}")

    def class_budgets_s(self) -> tuple[float, ...]:
        """After how long a task of each class is overdue."""
        return tuple(self.class_budget_s * 2**p for p in range(NUM_PRIORITIES))

    def wait_budgets_s(self) -> tuple[float, ...]:
        """The longest predicted wait at which each class takes work; inf: no more than the task's own limit."""
        given = self.wait_budget_s or (math.inf,)
        return given if len(given) == NUM_PRIORITIES else given * NUM_PRIORITIES
