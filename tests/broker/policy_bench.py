"""A policy with a clock that tests move: submit tasks of known length, pull batches, see who went."""

from collections.abc import Mapping
from typing import Any

from broker_world import spec

from penstock.broker.scheduling.batch import Batch, Offer
from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.scheduling.prediction import BatchLoad, Estimate, Predictor
from penstock.broker.scheduling.pull import PullPolicy
from penstock.broker.sessions import ClientSession
from penstock.broker.spec import Cost, Spec, parse
from penstock.broker.tasks import Run


class Oracle(Predictor):
    """Knows the truth: the declared cost is the time; a batch takes its longest row, or their sum."""

    def estimate(self, kernel: str, context: bytes, cost_ms: Cost, row_bytes: float) -> Estimate:
        return Estimate(cost_ms, 1.0)

    def batch_ms(self, load: BatchLoad, worker: str) -> tuple[float, float]:
        return load.cost_ms, load.cost_ms

    def observe(self, load: BatchLoad, worker: str, device: str, measured_ms: float) -> float:
        return load.cost_ms

    def is_known(self, kernel: str) -> bool:
        return True

    def fixed_and_row_ms(self, kernel: str, worker: str) -> tuple[float, float]:
        return 0.0, 0.0


class Bench:
    """One policy, its clients and specs."""

    def __init__(self, specs: Mapping[str, Spec] | None = None, **config: Any) -> None:
        config.setdefault("first_batch_sizes", (4096, 4096, 4096))
        self.now = 100.0
        self.policy = PullPolicy(SchedulingConfig(**config), Oracle())
        self.specs = dict(specs or {"k": parse(spec("k", max_batch_size=4))})
        self.kinds = [(name, s.digest, s.modes[0]) for name, s in self.specs.items()]
        self.num_runs = 0
        self.service: dict[str, float] = {}
        self.hopeless: list[Run] = []

    def submit(
        self, ms: Cost = 10.0, client: str = "a", *, rows: int = 1, kernel: str = "k", statics: bytes = b"",
        weight: float = 1.0, priority: int = 5, timeout: float | None = None,
    ) -> Run:  # fmt: skip
        self.num_runs += 1
        account = self.policy.accounts.get("uid:1", client, weight)
        session = ClientSession("uid:1", client, b"s" * 16, b"r", 0.0, account)
        run = Run(session, b"%016d" % self.num_runs, kernel, rows, self.num_runs, self.now)
        run.priority, run.cost_ms = priority, ms
        run.deadline = float("inf") if timeout is None else self.now + timeout
        made = self.specs[kernel]
        run.queue = self.policy.queue((kernel, made.digest, made.modes[0], statics, (), (), ""), made, made.modes[0])
        self.policy.estimate(run)
        (piece,) = run.pieces
        for part in [piece, *(piece.split(at) for at in reversed(self.policy.cuts(piece)))]:
            self.policy.push(part)
        self.policy.check()
        return run

    def pull(self, worker: str = "w", *, is_busy: bool = False, num_workers: int = 1, num_slow: int = 0) -> Batch | None:
        offer = Offer(self.kinds, 1 << 40, not is_busy, worker, is_busy, num_workers, num_slow)
        self.policy.wake_at = None
        batch = self.policy.take(offer, self.now)
        while self.policy.hopeless:
            hopeless, self.policy.hopeless = self.policy.hopeless, []
            for piece in hopeless:
                self.policy.remove(piece)
                self.hopeless.append(piece.run)
            batch = batch or self.policy.take(offer, self.now)
        self.policy.check()
        return batch

    def run(self, worker: str = "w", **offer: Any) -> list[Run]:
        """Pull a batch and let it take as long as it takes; whose rows were in it, a run per row."""
        batch = self.pull(worker, **offer)
        if batch is None:
            return []
        took_ms = batch.predicted_ms
        self.now += 0.001 * took_ms
        for account, _, alone_ms, _ in batch.charges:
            self.service[account.name] = self.service.get(account.name, 0.0) + took_ms * alone_ms / batch.alone_ms
        self.policy.completed(batch, "cpu", took_ms)
        return [piece.run for piece, rows in batch.picked for _ in range(rows)]
