"""What the broker says to those who look at it over HTTP: metrics, health and status. Decides nothing, changes nothing."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from penstock.broker import exposition
from penstock.broker.core import Core
from penstock.broker.http import Page, Pages
from penstock.broker.metrics import Gauges
from penstock.broker.scheduling.breakers import OPEN
from penstock.broker.scheduling.pull import PullPolicy


def pages_of(core: Core) -> Pages:
    """The pages of one broker."""
    return {
        "/metrics": lambda now: Page(200, core.state.metrics.render(gauges(core, now)), exposition.CONTENT_TYPE),
        "/healthz": lambda now: health(core.operators.report(now)),
        "/status": lambda now: Page(200, json.dumps(plain(core.operators.report(now))) + "\n", "application/json"),
    }


def gauges(core: Core, now: float) -> Gauges:
    """What is true now."""
    state, report = core.state, core.operators.report(now)
    workers, counters = report["workers"], report["counters"]
    scores = [row for row in state.policy.predictor.report() if row["samples"]]
    depth, oldest_s = _waiting(state.policy, now)
    return Gauges(
        uptime_s=report["uptime_s"],
        clients=report["num_clients"],
        tasks_open=report["tasks"]["open"],
        queue_depth=depth,
        queue_oldest_age_s=oldest_s,
        admission_queued_s=report["admission"]["queued_s"],
        bin_edges_s={row["kernel"]: [ms / 1000.0 for ms in row["edges_ms"]] for row in report["bins"]},
        prediction_error={(row["kernel"], row["device"]): row["mape"] for row in scores},
        prediction_coverage={(row["kernel"], row["device"]): row["coverage"] for row in scores},
        workers=[(w["name"], w["device"], w["state"]) for w in workers],
        workers_lost=counters.get("workers_lost", 0),
        memory={w["name"]: w["memory"] for w in workers},
        breakers_open=[(row["worker"], row["kernel"]) for row in report["breakers"] if row["state"] == OPEN],
        events=state.events.counts,
        shared=report["shared"],
        longest_turn_s=counters.get("longest_turn_us", 0) / 1e6,
    )


def _waiting(policy: PullPolicy, now: float) -> tuple[dict[tuple[str, str, int], int], float]:
    """Queued rows by kernel, bin and class, and the age of the oldest; of each lane only its next piece is looked at."""
    depth: Counter[tuple[str, str, int]] = Counter()
    oldest = now
    for queue in policy.queues():
        labels: dict[int, str] = {}
        for lanes in queue.lanes.values():
            for lane in lanes.values():
                first = lane.pieces[0][-1]
                oldest = min(oldest, first.run.arrived)
                if lane.cell not in labels:
                    labels[lane.cell] = policy.label(first)
                depth[queue.spec.name, labels[lane.cell], lane.priority] += lane.num_rows
    return dict(depth), now - oldest


def health(report: Mapping[str, Any]) -> Page:
    """Whether a task would be run: a broker alone runs none."""
    if report["is_draining"]:
        return Page(503, "the broker is stopping\n")
    if report["is_ready"]:
        return Page(200, "ok\n")
    states = ", ".join(f"{w['name']} is {w['state']}" for w in report["workers"])
    return Page(503, f"no worker is ready: {states or 'none has come'}\n")


def plain(value: Any) -> Any:
    """A report as JSON can say it: bytes in hexadecimal, and null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
