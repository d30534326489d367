"""The worker side of the core: sessions, credit, and workers that vanish.

Knows what a worker offers and when it is lost. Does not know what becomes of its leases (`leases.py`), nor who gets a batch
next.
"""

from collections.abc import Collection, Sequence
from typing import Any

from penstock.broker import checkpoints
from penstock.broker.dispatch import Dispatch
from penstock.broker.leases import Leases
from penstock.broker.protocol import (
    Checkpoint,
    Code,
    Drain,
    Error,
    Fault,
    Goodbye,
    Heartbeat,
    Pull,
    Ready,
    Resident,
    Share,
    Welcome,
    WorkerFinal,
    WorkerHeartbeat,
    WorkerHello,
    WorkerPartial,
)
from penstock.broker.sessions import Route, WorkerSession
from penstock.broker.spec import parse
from penstock.broker.state import BACK, BrokerState
from penstock.broker.wire import Message

MAX_FORMER_ROUTES = 1024


class Workers:
    """All worker sessions."""

    def __init__(self, state: BrokerState, leases: Leases, dispatch: Dispatch) -> None:
        self.state = state
        self.by_route: dict[Route, WorkerSession] = {}
        self._former: dict[Route, WorkerSession] = {}
        """Addresses that sessions have left, until they say from the next one what they hold."""
        self.by_secret = state.workers
        self.changed_at = state.started_at
        self._leases = leases
        self._dispatch = dispatch

    # --- messages --------------------------------------------------------------------------------------------------

    def receive(self, route: Route, principal: str, m: Message, now: float, pid: int = 0) -> None:
        """Act on one message from the back socket. `pid` is the peer's process as the kernel knows it, or 0."""
        if isinstance(m, WorkerHello):
            self._enter(route, principal, m, now, pid)
            return
        if isinstance(m, WorkerHeartbeat):
            self._heartbeat(route, principal, m, now)
            return
        worker = self.by_route.get(route)
        if worker is None and isinstance(m, WorkerFinal):
            former = self._former.get(route)
            if former is not None and (not principal or principal == former.principal):
                self._leases.final(former, m, now)
                return
        if worker is None or (principal and principal != worker.principal):
            self.state.counters["unattached"] += 1
            self._send_unattached(route)
            return
        worker.last_seen = now
        match m:
            case WorkerFinal():
                self._grant(worker, m.credit)
                self._leases.final(worker, m, now)
            case WorkerPartial():
                self._leases.partial(worker, m, now)
            case Checkpoint():
                self._leases.checkpoint(worker, m, now)
            case Pull():
                self._grant(worker, m.credit)
            case Ready():
                self._ready(worker, m, now)
            case Resident():
                if any(name == m.kernel for name, _ in worker.specs):  # no table grows with names that a worker makes up
                    worker.resident[m.kernel] = m.state
                    if m.state == "ready":
                        self.state.metrics.loaded(m.kernel, m.load_ms)
                worker.progress_at = now
            case Drain():
                self.drain(worker)
            case Share():
                self.state.sharing.share(worker, m, pid)
            case Goodbye():
                # It has answered what had begun, as far as that must not run twice.
                self.lose(worker, m.reason or "it said goodbye", now, is_suspect=m.is_fault, may_have_begun=m.is_fault)

    def _send_unattached(self, route: Route) -> None:
        error = Error(Code.UNATTACHED, "this address has no worker session: say hello, then ready")
        self.state.send(BACK, route, Fault(error=error))

    # --- sessions --------------------------------------------------------------------------------------------------

    def _enter(self, route: Route, principal: str, m: WorkerHello, now: float, pid: int) -> None:
        before = self.by_secret.get(m.ended)
        if before is not None and before.principal == principal and m.ended != m.secret:
            self.lose(before, "its process has ended", now)
        worker = self.by_secret.get(m.secret)
        is_resumed = worker is not None and worker.principal == principal
        if worker is None or not is_resumed:
            if worker is not None or len(self.by_secret) >= self.state.config.max_workers:
                error = Error(Code.OVERLOADED, f"the broker has {len(self.by_secret)} workers, or this secret is another's")
                self.state.send(BACK, route, Fault(error=error))
                return
            worker = self.by_secret[m.secret] = WorkerSession(principal, self._free_name(m.name), m.secret, route, now)
            self.changed_at = now
        self.lose_route(route)  # whoever was at this address is not there any more
        if worker.route is not None:
            self.lose_route(worker.route)
        worker.route, worker.last_seen, worker.progress_at = route, now, now
        worker.pid, worker.known_pid, worker.device, worker.is_ready = pid or m.pid, pid, m.device, False
        self.by_route[route] = worker
        config = self.state.config
        shared = self.state.sharing.offer(worker, config, pid)
        welcome = Welcome(
            epoch=self.state.epoch, heartbeat_ms=config.heartbeat_ms, is_resumed=is_resumed, shared=shared,
            limits=checkpoints.limits(config), number=m.number,
        )  # fmt: skip
        self.state.send(BACK, route, welcome)

    def _free_name(self, wanted: str) -> str:
        taken = {w.name for w in self.by_secret.values()}
        names = (wanted if n == 1 else f"{wanted[:58]}-{n}" for n in range(1, len(taken) + 2))
        return next(n for n in names if n not in taken)

    def _ready(self, worker: WorkerSession, m: Ready, now: float) -> None:
        self._forget_former(worker)
        specs = [parse(wire) for wire in m.specs]
        held = set(m.leases)
        lost = [lease for token, lease in worker.leases.items() if token not in held]
        for lease in lost:
            self.state.counters["leases_lost_on_the_way"] += 1
            self._leases.recover(lease, f"worker {worker.name} reconnected without it", now, is_suspect=False)
        for lease in worker.leases.values():
            lease.num_answered = 0  # its answer comes whole from here, whatever of it has come before
        worker.turn_to_next(now)
        worker.assigned_batches, worker.assigned_bytes = worker.batches, 0
        worker.credit_batches, worker.credit_bytes = m.credit
        worker.facts, worker.resident = m.device, {k: str(v) for k, v in m.resident.items()}
        worker.device = str(m.device.get("device", worker.device))[:64]
        worker.is_ready = True
        self._dispatch.arrived(worker, now)
        self.state.kernels.offer(worker, specs)
        self._leases.rebind(now)

    def _heartbeat(self, route: Route, principal: str, m: WorkerHeartbeat, now: float) -> None:
        worker = self.by_secret.get(m.session)
        if worker is None or worker.principal != principal or worker.route is None:
            self._send_unattached(route)
            return
        worker.last_seen, worker.memory = now, m.memory
        if m.progress != worker.progress:
            worker.progress, worker.progress_at = m.progress, now
        self.state.send(BACK, route, Heartbeat())

    def drain(self, worker: WorkerSession) -> None:
        """Assign nothing more, and say so."""
        worker.is_draining = True
        self.state.send(BACK, worker.route, Drain())

    def lose_route(self, route: Route) -> None:
        """The address is gone; the session has until its liveness ends to come back. Answers that it sent from there before may
        still come, behind the hello from its next address."""
        worker = self.by_route.pop(route, None)
        if worker is not None:
            worker.route = None
            self._former[route] = worker
            if len(self._former) > MAX_FORMER_ROUTES:
                del self._former[next(iter(self._former))]

    def _forget_former(self, worker: WorkerSession) -> None:
        for route in [route for route, other in self._former.items() if other is worker]:
            del self._former[route]

    def lose_process(self, pid: int, now: float) -> None:
        """The kernel says that this process has ended."""
        for worker in [w for w in self.by_secret.values() if w.known_pid == pid]:
            self.lose(worker, f"its process {pid} has ended", now)

    def lose(
        self, worker: WorkerSession, reason: str, now: float, is_suspect: bool = True, may_have_begun: bool = True
    ) -> None:
        """The session is over; its leases return."""
        self._forget_former(worker)
        del self.by_secret[worker.secret]
        if worker.route is not None:
            self.by_route.pop(worker.route, None)
        worker.route = None
        self.state.sharing.leave(worker)
        self.changed_at = now
        self.state.counters["workers_lost" if is_suspect else "workers_left"] += 1
        self.state.kernels.withdraw(worker)
        self._dispatch.left(worker)
        is_alone = len(worker.leases) == 1
        for lease in list(worker.leases.values()):
            self._leases.recover(lease, f"worker {worker.name}: {reason}", now, is_suspect, is_alone, may_have_begun)
        self._leases.rebind(now)

    def expel(self, principals: Collection[str], now: float) -> None:
        """Their keys are allowed no more: what they hold goes to others."""
        for worker in [w for w in self.by_secret.values() if w.principal in principals]:
            self.state.counters["expelled"] += 1
            error = Error(Code.NOT_AUTHORISED, "this key is not allowed any more")
            self.state.send(BACK, worker.route, Fault(error=error))
            self.lose(worker, "its key was revoked", now, is_suspect=False)

    def sweep(self, now: float) -> None:
        """Lose workers that are silent, or that hold work and make no progress."""
        config = self.state.config
        for worker in list(self.by_secret.values()):
            if now - worker.last_seen > config.liveness_s:
                self.lose(worker, f"silent for {now - worker.last_seen:.1f} s", now)
            elif worker.leases and now - worker.progress_at > config.progress_s:
                self.lose(worker, f"no progress for {now - worker.progress_at:.0f} s", now)

    def forgive(self, pause_s: float, now: float) -> None:
        """The broker itself stood still: nobody else is to blame for it."""
        for worker in self.by_secret.values():
            worker.last_seen = min(worker.last_seen + pause_s, now)
            worker.progress_at = min(worker.progress_at + pause_s, now)

    def _grant(self, worker: WorkerSession, credit: Sequence[int]) -> None:
        worker.credit_batches = max(worker.credit_batches, credit[0])
        worker.credit_bytes = max(worker.credit_bytes, credit[1])

    def report(self) -> list[dict[str, Any]]:
        """One row per worker, for status."""
        return [
            {
                "name": w.name, "pid": w.pid, "device": w.device, "state": w.state, "leases": len(w.leases),
                "done": w.num_done, "failed": w.num_failed, "memory": dict(w.memory), "resident": dict(w.resident),
                "kernels": sorted({name for name, _ in w.specs}),
            }
            for w in sorted(self.by_secret.values(), key=lambda w: w.name)
        ]  # fmt: skip
