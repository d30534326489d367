"""Measures of consecutive runs of values, and the runs that tasks and groups make.

Knows sorting, bounds and float64 sums; does not know tables or expressions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Segments:
    """Runs of rows to measure: `lengths` int64 `[runs]`, of the rows taken in `order` (None: as they are).

    `groups`: the value of each run, `[runs]`, and how many runs each task has; None where runs are whole tasks.
    """

    lengths: torch.Tensor
    order: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    groups_per_task: tuple[int, ...] = ()

    @classmethod
    def of_tasks(cls, sizes: list[int], device: torch.device) -> "Segments":
        """One run per task, of `sizes` rows."""
        return cls(torch.tensor(sizes, dtype=torch.int64, device=_measured_on(device)))

    @classmethod
    def of_groups(cls, sizes: list[int], key: torch.Tensor) -> "Segments":
        """One run per task and distinct value of `key` `[sum(sizes)]`; rows keep their order within a run."""
        key = key.to(_measured_on(key.device)) + 0.0  # -0 becomes 0
        task = torch.arange(len(sizes), device=key.device).repeat_interleave(torch.tensor(sizes, device=key.device))
        order = key.argsort(stable=True)
        order = order[task[order].argsort(stable=True)]
        key, task = key[order], task[order]
        is_equal = (key[1:] == key[:-1]) | (key[1:].isnan() & key[:-1].isnan())
        is_start = torch.ones_like(task, dtype=torch.bool)
        is_start[1:] = ~is_equal | (task[1:] != task[:-1])
        starts = is_start.nonzero().squeeze(1)
        lengths = torch.cat([starts, starts.new_tensor([len(key)])]).diff()
        counts = torch.bincount(task[starts], minlength=len(sizes)).tolist()
        return cls(lengths, order, key[starts], tuple(counts))

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """`values` `[rows]` of any dtype as float64, run after run."""
        values = values.to(_measured_on(values.device)).double()
        return values if self.order is None else values[self.order]


def _measured_on(device: torch.device) -> torch.device:
    """Apple's devices have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _reduce(values: torch.Tensor, lengths: torch.Tensor, how: str, initial: float) -> torch.Tensor:
    return torch.segment_reduce(values, how, lengths=lengths, initial=initial, unsafe=True)


def _sum(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return _reduce(values, lengths, "sum", 0.0)


def _count(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return _sum((~values.isnan()).double(), lengths)


def _mean(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return _sum(values, lengths) / lengths


def _min(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return _reduce(values, lengths, "min", torch.inf).masked_fill(lengths == 0, torch.nan)


def _max(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return _reduce(values, lengths, "max", -torch.inf).masked_fill(lengths == 0, torch.nan)


def _var(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    deviations = values - _mean(values, lengths).repeat_interleave(lengths)
    return (_sum(deviations * deviations, lengths) / (lengths - 1)).masked_fill(lengths < 2, torch.nan)


def _std(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return _var(values, lengths).sqrt()


MEASURES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "count": _count,
    "sum": _sum,
    "mean": _mean,
    "min": _min,
    "max": _max,
    "std": _std,
    "var": _var,
}
"""name -> function of float64 values `[rows]` and int64 lengths `[runs]`, giving float64 `[runs]`."""
