"""What `status` says of a task and of the scheduling, and how a report is made to fit a message."""

from collections.abc import Iterable
from heapq import nsmallest
from itertools import islice, pairwise
from typing import Any

import msgpack

from penstock.broker.protocol import NUM_PRIORITIES
from penstock.broker.scheduling.batch import row_ms
from penstock.broker.scheduling.lanes import BatchQueue
from penstock.broker.scheduling.pull import PullPolicy
from penstock.broker.state import BrokerState
from penstock.broker.tasks import LEASED, QUEUED, Run
from penstock.broker.waiting import standing

MAX_REPORT_BYTES = 60 * 1024
MAX_TASKS = 100
MAX_LOOKED_AT = 5000
MAX_SHOWN = 50
MAX_EVENTS = 20
INF = float("inf")


def of_task(state: BrokerState, run: Run, now: float) -> dict[str, Any]:
    """Where the rows of an open run are, when their outcomes are to be expected, and why they wait."""
    queued = [p for p in run.pieces if p.state == QUEUED]
    leased = sum(p.num_rows for p in run.pieces if p.state == LEASED)
    where = standing(state, run, now)
    alone_ms = row_ms(run.alone_ms, queued[0].start if queued else 0)
    first = min((p for p in queued if p.lane is not None), key=lambda p: p.start, default=None)
    return {
        "id": run.id, "client": run.session.name, "state": "running" if leased else "queued", "kernel": run.kernel,
        "rows": run.num_rows, "leased": leased, "queued": sum(p.num_rows for p in queued),
        "done": run.num_rows - run.num_open, "ahead": where.position, "position": where.position, "eta_ms": where.eta_ms,
        "why": where.why, "age_ms": 1000.0 * (now - run.arrived), "priority": run.priority, "alone_ms": alone_ms,
        "complexity": state.policy.predictor.complexity(alone_ms),
        "bin": "" if first is None else state.policy.label(first),
        "deadline_in_ms": None if run.deadline == INF else 1000.0 * (run.deadline - now),
        "workers": sorted({p.lease.worker.name for p in run.pieces if p.lease is not None}),
        "is_waiting_for_kernel": run.queue is None,
    }  # fmt: skip


def of_tasks(state: BrokerState, runs: Iterable[Run], now: float) -> dict[str, Any]:
    """The most urgent of the first open runs, and how many runs were looked at."""
    seen = list(islice(runs, MAX_LOOKED_AT))
    chosen = nsmallest(MAX_TASKS, seen, key=lambda run: (state.policy.overdue_at(run), run.seq))
    tasks = [of_task(state, run, now) for run in chosen]
    while len(msgpack.packb(tasks)) > MAX_REPORT_BYTES:
        tasks = tasks[: len(tasks) // 2]
    return {"tasks": tasks, "num_open": len(seen)}


def of_queues(policy: PullPolicy) -> list[dict[str, Any]]:
    """Queued rows per kernel and mode."""
    rows: dict[tuple[str, str], list[int]] = {}
    for queue in policy.queues():
        seen = rows.setdefault((queue.spec.name, queue.mode), [0, 0])
        seen[0] += queue.num_rows
        seen[1] += 1
    return [{"kernel": k, "mode": m, "queued": n, "batch_keys": q} for (k, m), (n, q) in sorted(rows.items())]


def of_scheduling(state: BrokerState, now: float) -> dict[str, Any]:
    """Bins, shares, limits, admission and events."""
    policy, predictions = state.policy, state.policy.predictor.report()
    closed = [p for p in range(NUM_PRIORITIES) if state.codel.is_closed(p, now)]
    charged = sum(account.charged_ms for account in policy.accounts)
    accounts = [
        {
            "client": a.name, "queued": a.num_rows, "leased": a.num_leased, "weight": a.weight,
            "share": a.charged_ms / charged if charged > 0.0 else 0.0, "device_s": 0.001 * a.charged_ms,
        }
        for a in islice(policy.accounts, MAX_SHOWN)
    ]  # fmt: skip
    return {
        "bins": _bins(policy, predictions), "accounts": accounts, "predictions": predictions[:MAX_SHOWN],
        "limits": policy.sizes.report()[:MAX_SHOWN], "breakers": [_breaker(row, now) for row in state.breakers.report()],
        "events": [_event(row, now) for row in state.events.recent(MAX_EVENTS)],
        "admission": {"queued_s": 0.001 * policy.work_ms, "closed_classes": closed},
    }  # fmt: skip


def _event(row: dict[str, Any], now: float) -> dict[str, Any]:
    """A time of the broker's clock means nothing elsewhere."""
    return {**row, "age_s": now - row.pop("at_s")}


def _breaker(row: dict[str, Any], now: float) -> dict[str, Any]:
    retry_at_s = row.pop("retry_at_s")
    return {**row, "retry_in_s": None if retry_at_s is None else max(retry_at_s - now, 0.0)}


def _bins(policy: PullPolicy, predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per kernel: the plan of its busiest batch key, and what waits in each bin of it."""
    busiest: dict[tuple[str, str], BatchQueue] = {}
    num_keys: dict[tuple[str, str], int] = {}
    for queue in policy.known_queues():
        name = (queue.spec.name, queue.mode)
        num_keys[name] = num_keys.get(name, 0) + 1
        if queue.is_binned and (name not in busiest or queue.num_rows > busiest[name].num_rows):
            busiest[name] = queue
    scores = {row["kernel"]: row for row in predictions if row["is_reference"]}
    made = []
    for (kernel, mode), queue in sorted(busiest.items())[:MAX_SHOWN]:
        plan = queue.plan
        edges = [0, *(plan.grid.cell(ms) for ms in plan.edges_ms(plan.num_bins)), plan.grid.num_cells]
        occupancy = {plan.label(low, high): 0 for low, high in pairwise(edges)}
        for cell, num_rows in sorted(queue.cells.items()):
            label = plan.label(*plan.range(cell, plan.num_bins))
            occupancy[label] = occupancy.get(label, 0) + num_rows
        score = scores.get(kernel, {})
        made.append({
            "kernel": kernel, "mode": mode, "batch_keys": num_keys[kernel, mode], "queued": queue.num_rows,
            "num_bins": plan.num_bins, "edges_ms": plan.edges_ms(plan.num_bins),
            "occupancy": [{"bin": label, "queued": n} for label, n in occupancy.items()],
            "mape": score.get("mape"), "coverage": score.get("coverage"), "samples": score.get("samples", 0),
        })  # fmt: skip
    return made


def fitting(report: dict[str, Any]) -> dict[str, Any]:
    """The report without its longest parts, by name in `left_out`, where they do not fit a message."""
    left_out = list[str]()
    for part in ("kernels", "predictions", "limits", "accounts", "workers", "bins", "queues", "counters"):
        if len(msgpack.packb(report)) <= MAX_REPORT_BYTES:
            break
        left_out.append(part)
        report = {**report, part: type(report[part])(), "left_out": left_out}
    return report
