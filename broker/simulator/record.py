"""What happened in a run, as columns, and the numbers that sum it up.

Knows finished runs only. Does not know policies. Times are seconds of the virtual clock, lengths milliseconds.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.broker.simulator.clients import Client, Task
from penstock.broker.simulator.engine import DEADLINE, DONE, LATE, REFUSED, Batch

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Record:
    """A run. Columns of tasks are in order of arrival, [num_tasks]; those of batches in order of forming, [num_batches].

    `group` is the server of a batch: with slots, of all slots of one server. `batch` is -1 for a task that never ran.
    """

    client: Ints
    arrived: Floats
    finished: Floats
    service_ms: Floats
    deadline: Floats
    batch: Ints
    retry_s: Floats
    is_done: Flags
    is_late: Flags
    is_refused: Flags
    outcomes: Counter[str]
    formed: Floats
    began: Floats
    ended: Floats
    group: Ints
    size: Ints
    sum_ms: Floats
    max_ms: Floats
    is_spoiled: Flags
    bins: list[str]
    num_slots: int

    def batch_service_s(self) -> Floats:
        """Of each task the part of its batch's time on the server that its length makes up; [num_tasks]."""
        ran = self.batch >= 0
        of = self.batch[ran]
        service = np.zeros(len(self.batch))
        with np.errstate(invalid="ignore"):
            part = np.where(self.sum_ms[of] > 0, self.service_ms[ran] / self.sum_ms[of], 1.0 / np.maximum(self.size[of], 1))
        service[ran] = part * (self.ended - self.began)[of]
        return service

    def busy_s(self) -> float:
        """How long servers were busy, all together; a server is busy while one of its slots is."""
        total = 0.0
        for group in np.unique(self.group):
            of_it = np.flatnonzero(self.group == group)
            order = of_it[np.argsort(self.began[of_it], kind="stable")]
            began, ended = self.began[order], np.maximum.accumulate(self.ended[order])
            gaps = np.maximum(began[1:] - ended[:-1], 0.0)
            total += float(ended[-1] - began[0] - gaps.sum())
        return total


def make(tasks: Sequence[Task], batches: Sequence[Batch], num_slots: int = 1) -> Record:
    """The columns of a finished run. `num_slots`: so many servers in a row are slots of one."""
    outcome = np.array([t.outcome for t in tasks], dtype=object)
    return Record(
        client=np.array([t.client for t in tasks], dtype=np.int64),
        arrived=np.array([t.arrived for t in tasks]),
        finished=np.array([t.finished for t in tasks]),
        service_ms=np.array([t.service_ms for t in tasks]),
        deadline=np.array([t.deadline for t in tasks]),
        batch=np.array([t.batch for t in tasks], dtype=np.int64),
        retry_s=np.array([t.retry_s for t in tasks]),
        is_done=(outcome == DONE) | (outcome == LATE),
        is_late=outcome == LATE,
        is_refused=outcome == REFUSED,
        outcomes=Counter(t.outcome for t in tasks),
        formed=np.array([b.formed for b in batches]),
        began=np.array([b.started for b in batches]),
        ended=np.array([b.finished for b in batches]),
        group=np.array([b.server // num_slots for b in batches], dtype=np.int64),
        size=np.array([len(b.tasks) for b in batches], dtype=np.int64),
        sum_ms=np.array([sum(t.service_ms for t in b.tasks) for b in batches]),
        max_ms=np.array([max(t.service_ms for t in b.tasks) for b in batches]),
        is_spoiled=np.array([any(t.service_ms >= b.spoils_ms for t in b.tasks) for b in batches], dtype=np.bool_),
        bins=[b.bin for b in batches],
        num_slots=num_slots,
    )


def summarise(
    record: Record, clients: Sequence[Client], unit_s: float, num_servers: int, num_warmup: int = 0
) -> dict[str, Any]:
    """The numbers of a run. Durations are in units of `unit_s` seconds, throughput in tasks per unit.

    Args:
        num_warmup: so many tasks that arrive first have no part in latencies; the throughput is measured from the moment
            when as many have ended.
    """
    is_counted = np.arange(len(record.client)) >= num_warmup
    ends = np.sort(record.finished[record.is_done])
    began = float(ends[min(num_warmup, len(ends)) - 1]) if num_warmup and len(ends) else 0.0
    num_done = max(len(ends) - num_warmup, 0)
    elapsed = float(ends[-1]) - began if len(ends) else 0.0
    in_time = record.is_done & ~record.is_late
    num_good = int(np.count_nonzero(record.finished[in_time] > began)) if num_warmup else int(np.count_nonzero(in_time))
    busy = record.busy_s()
    rate = unit_s / elapsed if elapsed > 0 else 0.0
    return {
        "tasks": len(record.client),
        "finished": len(ends),
        "elapsed": elapsed / unit_s,
        "throughput": num_done * rate,
        "throughput_per_s": num_done * rate / unit_s,
        "goodput": num_good * rate,
        "latency": latencies(record, is_counted, unit_s),
        "mean_batch_size": _mean_batch_size(record, busy),
        "useful_work_ratio": _useful_work(record, busy),
        "utilization": busy / (num_servers * float(ends[-1])) if len(ends) and ends[-1] > 0 else 0.0,
        "batches": len(record.size),
        "per_bin": _bins(record, unit_s),
        "clients": _clients(record, clients, is_counted, unit_s),
        "drops": {reason: record.outcomes[reason] for reason in (DEADLINE, REFUSED)},
        "late": record.outcomes[LATE],
    }  # fmt: skip


def latencies(record: Record, of: Flags, unit_s: float) -> dict[str, float | None]:
    """Mean, median, p95 and p99 from arrival to end, of the finished among some tasks; None if there are none."""
    which = of & record.is_done
    if not which.any():
        return dict.fromkeys(("mean", "p50", "p95", "p99"))
    taken = (record.finished - record.arrived)[which] / unit_s
    p50, p95, p99 = np.percentile(taken, (50, 95, 99)).tolist()
    return {"mean": float(taken.mean()), "p50": p50, "p95": p95, "p99": p99}


def _mean_batch_size(record: Record, busy_s: float) -> float:
    """With slots the mean number of those in use while any is."""
    if not len(record.size):
        return 0.0
    if record.num_slots > 1:
        return float((record.ended - record.began).sum()) / busy_s if busy_s else 0.0
    return float(record.size.mean())


def _useful_work(record: Record, busy_s: float) -> float:
    """sum(l) / (b * max l), batches weighted by what stands below the line; with slots, used slot time / all slot time."""
    if record.num_slots > 1:
        return float((record.ended - record.began).sum()) / (record.num_slots * busy_s) if busy_s else 0.0
    room = float((record.size * record.max_ms).sum())
    return float(record.sum_ms.sum()) / room if room else 0.0


def _bins(record: Record, unit_s: float) -> dict[str, dict[str, float]]:
    """Per bin: batches, their mean size and time, and the share that a task from another bin has spoiled."""
    if record.num_slots > 1:
        return {}
    labels = np.array(record.bins, dtype=object)
    taken = (record.ended - record.began) / unit_s
    found: dict[str, dict[str, float]] = {}
    for label in dict.fromkeys(record.bins):
        of = labels == label
        found[label] = {
            "batches": int(np.count_nonzero(of)), "mean_size": float(record.size[of].mean()),
            "mean_time": float(taken[of].mean()), "spoiled": float(record.is_spoiled[of].mean()),
        }  # fmt: skip
    return dict(sorted(found.items(), key=lambda item: item[1]["mean_time"]))


def _clients(record: Record, clients: Sequence[Client], is_counted: Flags, unit_s: float) -> dict[str, dict[str, Any]]:
    """Per client: tasks, outcomes, the time of the servers that it got, and its latencies."""
    service = record.batch_service_s()
    total = float(service.sum())
    found = {}
    for index, client in enumerate(clients):
        of = record.client == index
        got = float(service[of].sum())
        found[client.name] = {
            "weight": client.weight, "tasks": int(np.count_nonzero(of)),
            "finished": int(np.count_nonzero(of & record.is_done)), "service": got / unit_s,
            "share": got / total if total else 0.0, "latency": latencies(record, of & is_counted, unit_s),
        }  # fmt: skip
    return found


def service_gap_s(record: Record, first: int, second: int) -> Floats:
    """The service of one client less that of another after each batch, charged when it starts; [num_batches]."""
    service = record.batch_service_s()
    gap = np.zeros(len(record.size))
    for client, sign in ((first, 1.0), (second, -1.0)):
        of = (record.client == client) & (record.batch >= 0)
        np.add.at(gap, record.batch[of], sign * service[of])
    return np.cumsum(gap)
