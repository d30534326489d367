"""Measures of runs of values, and the runs that tasks and groups make.

Knows sorting, bounds and float64 sums; does not know columns' names or expressions. Groups are found by hashing and summed
where they lie on a CPU; elsewhere rows are sorted, because adding to one place from many threads has no order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from penstock.kernels.table import true_rows

PIECE = 4096
"""Rows that one block of a GPU's threads sums up."""

LONG = 1024
"""Rows from which a run is worth a call of its own on a CPU. By its length alone, so that company changes no bit."""

_INITIAL = {"sum": 0.0, "amin": torch.inf, "amax": -torch.inf}
_SEGMENT = {"sum": "sum", "amin": "min", "amax": "max"}


@dataclass(frozen=True, slots=True)
class Segments:
    """Runs of rows to measure: `lengths` int64 `[runs]`.

    Their rows are consecutive, or so when taken in `order`, or `place` says the run of each row. `groups`: the value of each
    run, `[runs]`, and how many runs each task has; None where runs are whole tasks.
    """

    lengths: torch.Tensor
    order: torch.Tensor | None = None
    place: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    groups_per_task: tuple[int, ...] = ()

    @classmethod
    def of_tasks(cls, offsets: torch.Tensor) -> "Segments":
        """One run per task, by the bounds of its rows."""
        return cls(offsets.to(_measured_on(offsets.device)).diff())

    @classmethod
    def of_groups(cls, offsets: torch.Tensor, key: torch.Tensor) -> "Segments":
        """One run per task and distinct value of `key` `[total]`; NaN is one value, the last, and -0 is 0.

        Waits for a device once, for the number of groups.
        """
        device = _measured_on(key.device)
        offsets, key = offsets.to(device), key.to(device) + 0.0  # -0 becomes 0
        return cls._by_hashing(offsets, key) if device.type == "cpu" else cls._by_sorting(offsets, key)

    @classmethod
    def _by_hashing(cls, offsets: torch.Tensor, key: torch.Tensor) -> "Segments":
        places, groups = [], []
        num_groups = 0
        for part in torch.split_with_sizes(_ordered_bits(key), offsets.diff().tolist()):
            group, place = torch.unique(part, return_inverse=True)
            places.append(place + num_groups)
            groups.append(_of_ordered_bits(group, key.dtype))
            num_groups += len(group)
        place = torch.cat(places)
        lengths = torch.bincount(place, minlength=num_groups)
        return cls(lengths, place=place, groups=torch.cat(groups), groups_per_task=tuple(map(len, groups)))

    @classmethod
    def _by_sorting(cls, offsets: torch.Tensor, key: torch.Tensor) -> "Segments":
        """Rows keep their order within a run."""
        num_tasks = len(offsets) - 1
        task = torch.arange(num_tasks, device=key.device).repeat_interleave(offsets.diff(), output_size=len(key))
        order = key.argsort(stable=True)
        if num_tasks > 1:
            order = order[task[order].argsort(stable=True)]
        key, task = key[order], task[order]
        is_equal = (key[1:] == key[:-1]) | (key[1:].isnan() & key[:-1].isnan())
        is_start = torch.ones_like(task, dtype=torch.bool)
        is_start[1:] = ~is_equal | (task[1:] != task[:-1])
        starts, _, counts = true_rows(is_start, offsets)
        lengths = torch.cat([starts, offsets[-1:]]).diff()
        return cls(lengths, order=order, groups=key[starts], groups_per_task=tuple(counts))

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """`values` `[rows]` of any dtype as float64, in the order that `reduce` and `spread` have."""
        values = values.to(_measured_on(values.device)).double()
        return values if self.order is None else values[self.order]

    def reduce(self, values: torch.Tensor, how: str) -> torch.Tensor:
        """sum, amin or amax of every run, float64 `[runs]`; NaN if it has one; 0, inf or -inf if it has no rows."""
        if self.place is None:
            reduce = _reduced_in_pieces if values.device.type == "cuda" else _reduced
            return reduce(values, self.lengths, how)
        if how == "sum":
            return torch.bincount(self.place, weights=values, minlength=len(self.lengths)).double()  # of no rows: integers
        initial = values.new_full((len(self.lengths),), _INITIAL[how])
        return initial.scatter_reduce_(0, self.place, values, how)

    def spread(self, of_runs: torch.Tensor, num_rows: int) -> torch.Tensor:
        """A value per run `[runs]` for each of its rows, `[rows]`."""
        if self.place is not None:
            return of_runs[self.place]
        return of_runs.repeat_interleave(self.lengths, output_size=num_rows)


def _measured_on(device: torch.device) -> torch.device:
    """Apple's devices have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _ordered_bits(key: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the values, equal where they are; all NaN are one, the largest."""
    bits = key.masked_fill(key.isnan(), torch.nan).view(torch.int32 if key.dtype == torch.float32 else torch.int64)
    return bits ^ ((bits >> (8 * bits.itemsize - 1)) & torch.iinfo(bits.dtype).max)


def _of_ordered_bits(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (bits ^ ((bits >> (8 * bits.itemsize - 1)) & torch.iinfo(bits.dtype).max)).view(dtype)


def _reduced(values: torch.Tensor, lengths: torch.Tensor, how: str) -> torch.Tensor:
    """Of consecutive runs: long ones by a call each, the others by one together."""
    is_long = lengths >= LONG
    if not bool(is_long.any()):
        return _by_segments(values, lengths, how)
    out = values.new_empty(len(lengths))
    parts = torch.split_with_sizes(values, lengths.tolist())
    is_whole = is_long.tolist()
    for i, part in enumerate(parts):
        if is_whole[i]:
            out[i] = getattr(torch, how)(part)
    short = [part for part, whole in zip(parts, is_whole, strict=True) if not whole]
    if short:
        out[~is_long] = _by_segments(torch.cat(short), lengths[~is_long], how)
    return out


def _reduced_in_pieces(values: torch.Tensor, lengths: torch.Tensor, how: str) -> torch.Tensor:
    """The same in two steps, because a run is one block of threads: pieces of a run, counted from its beginning, then runs.

    The number of pieces is only bounded, so that no device is waited for: the rest are empty.
    """
    per_run = (lengths + PIECE - 1) // PIECE
    ends = per_run.cumsum(0)
    piece = torch.arange(len(values) // PIECE + len(lengths), device=values.device)
    run = torch.searchsorted(ends, piece, right=True).clamp_max_(len(lengths) - 1)
    rows_before = (piece - ends[run] + per_run[run]) * PIECE
    sizes = (lengths[run] - rows_before).clamp_(0, PIECE).masked_fill_(piece >= ends[-1], 0)
    return _by_segments(_by_segments(values, sizes, how), per_run, how)


def _by_segments(values: torch.Tensor, lengths: torch.Tensor, how: str) -> torch.Tensor:
    return torch.segment_reduce(values, _SEGMENT[how], lengths=lengths, initial=_INITIAL[how], unsafe=True)


def _sum(values: torch.Tensor, runs: Segments) -> torch.Tensor:
    return runs.reduce(values, "sum")


def _count(values: torch.Tensor, runs: Segments) -> torch.Tensor:
    return runs.reduce((~values.isnan()).double(), "sum")


def _mean(values: torch.Tensor, runs: Segments) -> torch.Tensor:
    return runs.reduce(values, "sum") / runs.lengths


def _min(values: torch.Tensor, runs: Segments) -> torch.Tensor:
    return runs.reduce(values, "amin").masked_fill(runs.lengths == 0, torch.nan)


def _max(values: torch.Tensor, runs: Segments) -> torch.Tensor:
    return runs.reduce(values, "amax").masked_fill(runs.lengths == 0, torch.nan)


def _var(values: torch.Tensor, runs: Segments) -> torch.Tensor:
    deviations = values - runs.spread(_mean(values, runs), len(values))
    return (runs.reduce(deviations * deviations, "sum") / (runs.lengths - 1)).masked_fill(runs.lengths < 2, torch.nan)


def _std(values: torch.Tensor, runs: Segments) -> torch.Tensor:
    return _var(values, runs).sqrt()


MEASURES: dict[str, Callable[[torch.Tensor, Segments], torch.Tensor]] = {
    "count": _count,
    "sum": _sum,
    "mean": _mean,
    "min": _min,
    "max": _max,
    "std": _std,
    "var": _var,
}
"""name -> function of float64 values `[rows]`, as `arrange` gives them, and their runs, giving float64 `[runs]`."""
