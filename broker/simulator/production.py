"""The production broker under the virtual clock: its core, unchanged, with clients and workers that are columns of numbers.

Knows the messages that a client and a worker exchange with the core. Decides nothing. Does not use sockets or the codec.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

from penstock.broker import protocol as p
from penstock.broker.columns import Block, pack
from penstock.broker.config import BrokerConfig
from penstock.broker.core import Core
from penstock.broker.events import Received, Turn
from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.scheduling.pull import PullPolicy
from penstock.broker.scheduling.quotas import ClientRules
from penstock.broker.simulator.clients import Client, Task
from penstock.broker.simulator.engine import DEADLINE, REFUSED, Batch
from penstock.broker.state import BACK, FRONT, Send
from penstock.broker.wire import Message

KERNEL: Final = "simulated"
PRINCIPAL: Final = "uid:0"
NO_LIMIT: Final = 10**12
NEVER_S: Final = 1e9
RETRY_S: Final = 1.0
"""After a refusal that does not say when to try again."""
SWEEP_MS: Final = 1e6
"""Nobody here falls silent, so that nobody has to be watched."""


def broker_config() -> BrokerConfig:
    """Of the broker's own limits only those of [scheduling] are left."""
    return BrokerConfig(
        max_queue_rows=NO_LIMIT, max_queue_bytes=NO_LIMIT, window_rows=NO_LIMIT, window_bytes=NO_LIMIT,
        max_result_bytes=NO_LIMIT, heartbeat_ms=SWEEP_MS, liveness_s=NEVER_S, client_liveness_s=NEVER_S,
        progress_s=NEVER_S, session_ttl_s=NEVER_S,
        max_clients=NO_LIMIT, max_workers=NO_LIMIT,
    )  # fmt: skip


def kernel_spec(batch_size: int) -> dict[str, Any]:
    """A kernel whose tasks declare how long they take, as a worker would offer it."""
    length = ["length_ms", "row", {"default": None, "min": 0.0, "max": None}]
    return {
        "name": KERNEL, "version": "1", "digest": b"simulated", "inputs": [length], "modes": ["batch"], "combine": "max",
        "idempotent": True, "scoped": False, "resident": False, "max_batch_size": batch_size, "max_batch_cost_ms": None,
        "cost": {"base_ms": 0.0, "per": {"length_ms": 1.0}},
    }  # fmt: skip


class Production:
    """A broker with its clients and workers.

    Args:
        clients: in the order of their indexes; names and weights are what the broker knows of them.
        credit: batches that a worker may hold.
    """

    def __init__(
        self, clients: Sequence[Client], batch_size: int, num_servers: int, credit: int, config: SchedulingConfig
    ) -> None:
        self.ended: list[tuple[Task, str, float]] = []
        self.core = Core(broker_config(), epoch=1, now=0.0, policy=PullPolicy(config))
        rules = {client.account or client.name: ClientRules(weight=client.weight) for client in clients}
        self.core.state.quotas.replace(rules)
        self._clients = clients
        self._blocks: dict[int, Block] = {}
        self._open: dict[bytes, list[Task]] = {}
        self._num_submitted = 0
        self._granted = [credit] * num_servers
        self._formed: list[Batch] = []
        for index, client in enumerate(clients):
            self._tell(FRONT, _route(index), p.Hello(name=client.account or client.name, secret=_secret(index)), 0.0)
        for index in range(num_servers):
            hello = p.WorkerHello(name=f"worker-{index}", secret=_secret(index), pid=0, device="simulated")
            self._tell(BACK, _route(index), hello, 0.0)
            self._tell(BACK, _route(index), p.Ready(specs=[kernel_spec(batch_size)], credit=[credit, NO_LIMIT]), 0.0)

    @property
    def num_queued(self) -> int:
        queued: int = self.core.state.ledger.num_rows["queued"]
        return queued

    def submit(self, tasks: Sequence[Task], now: float) -> None:
        self._num_submitted += 1
        run_id = self._num_submitted.to_bytes(p.ID_BYTES, "little")  # the tables are parted by the first byte
        self._open[run_id] = list(tasks)
        first = tasks[0]
        lengths: Any = [task.predicted_ms for task in tasks] if len(tasks) > 1 else first.predicted_ms
        timeout_ms = None if first.deadline == math.inf else 1000.0 * (first.deadline - now)
        submit = p.Submit(
            id=run_id, kernel=KERNEL, block=self._block(len(tasks)), scalars={"length_ms": lengths},
            priority=self._clients[first.client].priority, timeout_ms=timeout_ms,
        )  # fmt: skip
        self._tell(FRONT, _route(first.client), submit, now)

    def completed(self, batch: Batch, now: float) -> None:
        self._granted[batch.server] += 1
        final = p.WorkerFinal(
            lease=batch.handle, answers=[p.Answer(0, len(batch.tasks), self._block(len(batch.tasks)))],
            timings={"compute_ms": 1000.0 * (batch.finished - batch.started)}, credit=[self._granted[batch.server], NO_LIMIT],
        )  # fmt: skip
        self._tell(BACK, _route(batch.server), final, now)

    def turn(self, has_more: bool, now: float) -> Sequence[Batch]:
        self._act(self.core.handle(Turn(), now), now)
        formed, self._formed = self._formed, []
        return formed

    def wake_at(self, now: float) -> float | None:
        due: float | None = self.core.next_deadline(now)
        return due

    def events(self) -> list[dict[str, Any]]:
        """What the broker did by itself, with its reasons, the newest first; times are of the virtual clock."""
        recent: list[dict[str, Any]] = self.core.state.events.recent()
        return recent

    # --- messages --------------------------------------------------------------------------------------------------

    def _tell(self, side: str, route: bytes, message: Message, now: float) -> None:
        self._act(self.core.handle(Received(side, route, PRINCIPAL, message), now), now)

    def _act(self, actions: Sequence[Send], now: float) -> None:
        """Do what the clients and workers would do with these messages."""
        for action in actions:
            match message := action.message:
                case p.Assign():
                    self._assigned(int.from_bytes(action.route), message)
                case p.Results():
                    self._told(message)
                    self._tell(FRONT, action.route, p.Ack(seq=message.seq), now)
                case p.Refused():
                    retry_ms = message.error.retry_after_ms
                    retry_s = RETRY_S if retry_ms is None else retry_ms / 1000.0
                    self.ended += [(task, REFUSED, retry_s) for task in self._open.pop(message.id)]
                case p.Fault():
                    raise RuntimeError(f"the broker did not understand the simulator: {message.error.message}")

    def _assigned(self, server: int, assign: p.Assign) -> None:
        lease = self.core.state.ledger.leases[assign.lease]
        tasks = [task for piece in lease.pieces for task in self._open[piece.run.id][piece.start : piece.stop]]
        self._formed.append(Batch(server, tasks, lease.batch.label, handle=assign.lease))

    def _told(self, results: p.Results) -> None:
        """Of what ended without an error the world knows already."""
        for outcome in results.outcomes:
            for run_id, start, stop in outcome.spans:
                tasks = self._open[run_id]
                if outcome.error is not None:
                    assert outcome.error.code == p.Code.DEADLINE, outcome.error
                    self.ended += [(task, DEADLINE, 0.0) for task in tasks[start:stop]]
                if stop - start == len(tasks):
                    del self._open[run_id]

    def _block(self, num_rows: int) -> Block:
        block = self._blocks.get(num_rows)
        if block is None:
            block = self._blocks[num_rows] = pack([], num_rows)
        return block


def _route(index: int) -> bytes:
    return index.to_bytes(4)


def _secret(index: int) -> bytes:
    return index.to_bytes(p.SECRET_BYTES)
