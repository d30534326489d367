"""What deciding costs: the scheduling policy alone, in one process, without sockets, ledger or messages.

Per task: estimate, cut and push; its share of the batch that takes it out of the queue; its share of what a batch teaches.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from penstock.broker.scheduling.batch import Batch, Offer
from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.scheduling.pull import PullPolicy
from penstock.broker.spec import Cost, parse
from penstock.broker.tasks import Run

SPEC = {
    "name": "nap", "version": "1", "digest": b"nap-cost",
    "inputs": [["seconds", "row", {"default": None, "min": 0.0, "max": None}]],
    "modes": ["batch"], "combine": "max", "idempotent": True, "scoped": False, "resident": False, "max_batch_size": 32,
    "max_batch_cost_ms": None, "cost": {"base_ms": 1.0, "per": {"seconds": 1000.0}},
}  # fmt: skip
DEFAULT_GOAL_US, FULL_GOAL_US = 5.0, 10.0
NUM_CLIENTS, NUM_QUEUED, NUM_OCTAVES = 50, 100_000, 8
CHUNK_ROWS = 4096


class Deck:
    """A policy with one kernel and one worker, driven as ledger and core drive it."""

    def __init__(self, num_clients: int) -> None:
        self.policy = PullPolicy(SchedulingConfig(max_bins=NUM_OCTAVES))
        self.spec = parse(SPEC)
        self.queue = self.policy.queue(("nap", self.spec.digest, "batch", b"", (), ("seconds",), ""), self.spec, "batch")
        self.offer = Offer(kinds=frozenset((self.queue.kind,)), max_bytes=1 << 30, is_idle=True, worker="w")
        self.now = 0.0
        self._draw = random.Random(7)
        self._sessions = [SimpleNamespace(account=self.policy.accounts.get("uid:0", f"c{i}")) for i in range(num_clients)]
        self._seq = 0

    def runs(self, num_rows: int, rows_per_run: int, cost: Callable[[random.Random], float]) -> list[Run]:
        """Runs that are not queued yet, the clients in turn; equal rows have one cost, as `Spec.cost_ms` gives it."""
        made = list[Run]()
        for _ in range(num_rows // rows_per_run):
            self._seq += 1
            session: Any = self._sessions[self._seq % len(self._sessions)]
            run = Run(session, self._seq.to_bytes(16), "nap", rows_per_run, self._seq, self.now)
            costs = [cost(self._draw) for _ in range(rows_per_run)]
            run.cost_ms: Cost = costs[0] if len(set(costs)) == 1 else costs
            run.deadline, run.queue = self.now + 60.0, self.queue
            made.append(run)
        return made

    def push(self, runs: list[Run]) -> None:
        """As `Ledger.enqueue` does."""
        policy = self.policy
        for run in runs:
            policy.estimate(run)
            (piece,) = run.pieces
            for at in reversed(policy.cuts(piece)):
                policy.push(piece.split(at))
            policy.push(piece)

    def take(self) -> Batch | None:
        """A batch, its rows out of the queue."""
        return self.policy.take(self.offer, self.now)

    def batches(self, num_rows: int) -> Iterator[Batch]:
        """Batches until so many rows are out, or none is left."""
        while num_rows > 0 and (batch := self.take()) is not None:
            yield batch
            num_rows -= batch.num_rows

    def complete(self, batch: Batch) -> None:
        self.policy.completed(batch, "cpu", 1.02 * batch.load_ms + 0.1)


def equal(draw: random.Random) -> float:
    return 5.0


def spread(draw: random.Random) -> float:
    """Every octave as likely."""
    return 2.0 ** draw.uniform(0.0, NUM_OCTAVES)


def one_in_flight(num_tasks: int) -> dict[str, float]:
    """Single tasks of one client, each pushed, taken, removed and completed before the next one comes."""
    deck = Deck(1)
    runs = deck.runs(num_tasks, 1, equal)
    started = time.process_time()
    for run in runs:
        deck.push([run])
        batch = deck.take()
        assert batch is not None
        deck.complete(batch)
    return {"us": 1e6 * (time.process_time() - started) / num_tasks}


def chunks(deck: Deck, num_tasks: int, rows_per_run: int, cost: Callable[[random.Random], float]) -> dict[str, float]:
    """So many rows more, as many taken, all of it completed; again and again, at the depth that the queue has."""
    spent = {"push us": 0.0, "take us": 0.0, "complete us": 0.0}
    num_done = num_batches = 0
    while num_done < num_tasks:
        runs = deck.runs(CHUNK_ROWS, rows_per_run, cost)
        deck.now += 0.01
        marks = [time.process_time()]
        deck.push(runs)
        marks.append(time.process_time())
        batches = list(deck.batches(CHUNK_ROWS))
        marks.append(time.process_time())
        for batch in batches:
            deck.complete(batch)
        marks.append(time.process_time())
        for name, start, end in zip(spent, marks, marks[1:], strict=False):
            spent[name] += 1e6 * (end - start)
        num_done += sum(batch.num_rows for batch in batches)
        num_batches += len(batches)
    per_task = {name: us / num_done for name, us in spent.items()}
    return {"us": sum(per_task.values()), **per_task, "rows per batch": num_done / num_batches}


def full(num_tasks: int, rows_per_run: int) -> dict[str, float]:
    """With 100,000 rows queued in 8 bins by 50 clients; also the time of one look at the boundaries."""
    deck = Deck(NUM_CLIENTS)
    deck.push(deck.runs(NUM_QUEUED // rows_per_run * rows_per_run, rows_per_run, spread))
    chunks(deck, 2 * CHUNK_ROWS, rows_per_run, spread)
    started = time.process_time()
    deck.policy.maintain(deck.now + 60.0)
    maintain_ms = 1e3 * (time.process_time() - started)
    return {**chunks(deck, num_tasks, rows_per_run, spread), "maintain ms": maintain_ms}


CASES: dict[str, tuple[float, Callable[[int], dict[str, float]]]] = {
    "one client, one task in flight": (DEFAULT_GOAL_US, one_in_flight),
    "one client, runs of 128": (DEFAULT_GOAL_US, lambda n: chunks(Deck(1), n, 128, equal)),
    "100k queued, 8 bins, 50 clients, single tasks": (FULL_GOAL_US, lambda n: full(n, 1)),
    "100k queued, 8 bins, 50 clients, runs of 128": (FULL_GOAL_US, lambda n: full(n, 128)),
}


def measure(num_tasks: int = 20_000, num_rounds: int = 5) -> dict[str, Any]:
    """Every case in every round; medians of CPU time. Without garbage collection, as in the broker."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    gc.collect()
    gc.disable()
    try:
        for _ in range(num_rounds):
            for name, (_, run) in CASES.items():
                rounds[name].append(run(num_tasks))
                gc.collect()
    finally:
        gc.enable()
    return {
        "cases": {
            name: {"goal us": CASES[name][0], **{key: statistics.median(r[key] for r in rows) for key in rows[0]}}
            for name, rows in rounds.items()
        },
        "rounds": rounds,
    }


def lines(result: dict[str, Any]) -> list[str]:
    made = [f"{'us per task, deciding only':48s} {'all':>7s} {'goal':>6s}  of which"]
    for name, row in result["cases"].items():
        parts = ", ".join(f"{key.removesuffix(' us')} {row[key]:.1f}" for key in row if key not in ("us", "goal us"))
        verdict = "" if row["us"] <= row["goal us"] else "  NOT MET"
        made.append(f"{name:48s} {row['us']:7.2f} {row['goal us']:6.0f}  {parts}{verdict}")
    return made
