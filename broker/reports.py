"""What `status` says of a task, and how a report is made to fit a message."""

from typing import Any

import msgpack

from penstock.broker.policy import PullPolicy
from penstock.broker.tasks import LEASED, QUEUED, Run

MAX_REPORT_BYTES = 60 * 1024


def of_task(policy: PullPolicy, run: Run, now: float) -> dict[str, Any]:
    """Where the rows of an open run are."""
    queued = [p for p in run.pieces if p.state == QUEUED]
    leased = sum(p.num_rows for p in run.pieces if p.state == LEASED)
    ahead = policy.position(min(queued, key=lambda p: p.start)) if queued else 0
    return {
        "state": "running" if leased else "queued", "kernel": run.kernel, "rows": run.num_rows, "leased": leased,
        "queued": sum(p.num_rows for p in queued), "done": run.num_rows - run.num_open, "ahead": ahead,
        "age_ms": 1000.0 * (now - run.arrived), "priority": run.priority,
        "workers": sorted({p.lease.worker.name for p in run.pieces if p.lease is not None}),
        "is_waiting_for_kernel": run.queue is None,
    }  # fmt: skip


def fitting(report: dict[str, Any]) -> dict[str, Any]:
    """The report without its longest parts, by name in `left_out`, where they do not fit a message."""
    left_out = list[str]()
    for part in ("kernels", "workers", "queues", "counters"):
        if len(msgpack.packb(report)) <= MAX_REPORT_BYTES:
            break
        left_out.append(part)
        report = {**report, part: type(report[part])(), "left_out": left_out}
    return report
