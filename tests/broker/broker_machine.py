"""A stateful property test of the core: random clients, workers, crashes and time, against what the protocol promises.

After every step `Core.check` must hold; here is what only an outside observer can say: each accepted row ends exactly once,
with its own bytes, at its own client; a batch holds rows of one key; what is not idempotent starts once; a row goes on
from the newest checkpoint of those who held it; and when everybody is well again, everything ends.
"""

import struct
from dataclasses import dataclass
from typing import Any

from broker_world import (
    BLOB,
    Declared,
    FakeClient,
    FakeWorker,
    World,
    X,
    blob_rows,
    echo_block,
    number_per_row,
    rows_of,
    spec,
    tensor_rows,
)
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.broker import protocol as p
from penstock.broker.columns import Block
from penstock.broker.events import PeerLost

INDEX = st.integers(0, 1 << 16)
SPECS = {
    "echo": spec("echo", max_batch_size=12),
    "sum": spec("sum", (X, number_per_row("ms", 1.0)), combine="sum", max_batch_cost_ms=6.0, per={"ms": 1.0}),
    "once": spec("once", idempotent=False, max_batch_size=8),
    "mine": spec("mine", (BLOB,), scoped=True, max_batch_size=6),
    "tokens": spec("tokens", modes=["batch", "stream"], max_batch_size=2, checkpoints=True),
}
LATE = spec("late", max_batch_size=3)
FAILED = p.Error("kernel_failed", "it broke")
RUNS = st.tuples(
    st.sampled_from([*SPECS, "echo", "once", "late"]), st.integers(1, 9), st.integers(4, 5),
    st.none() | st.none() | st.integers(1, 20_000), st.integers(0, 2), st.none() | st.none() | st.integers(0, 2),
)  # fmt: skip
"""(kernel, rows, priority, timeout_ms, variant, key)"""
PIECES = st.tuples(st.integers(0, 7), st.integers(1, 5), st.booleans())


@dataclass
class Sent:
    """A submission as its client knows it. `names` are the payload's, which runs with one idempotency key share."""

    client: FakeClient
    kernel: str
    statics: bytes
    rows: int
    names: bytes
    message: p.Submit
    is_over: bool = False


class BrokerMachine(RuleBasedStateMachine):
    """See the module. Rules choose by index, so that a shrunk example stays readable."""

    @initialize()
    def start(self) -> None:
        self.world = World(
            predictor=Declared(),
            window_rows=60, max_queue_rows=150, session_ttl_s=20.0, liveness_s=5.0, worker_grace_s=10.0, dedup_window_s=30.0,
            progress_s=12.0,
        )  # fmt: skip
        self.clients = [self.world.client(f"c{i}", f"uid:{i % 2}") for i in range(3)]
        self.workers: list[FakeWorker] = []
        self.sent: dict[bytes, Sent] = {}
        self.by_names: dict[bytes, Sent] = {}
        self.starts: dict[bytes, int] = {}
        self.seen: set[int] = set()
        self.saved: dict[bytes, bytes] = {}
        self.add_worker(2)

    # --- choosing ----------------------------------------------------------------------------------------------------

    def is_here(self, peer: FakeClient | FakeWorker) -> bool:
        return (peer.side, peer.route) in self.world.peers

    def here(self) -> list[FakeClient]:
        return [c for c in self.clients if self.is_here(c)]

    def holders(self) -> list[FakeWorker]:
        return [w for w in self.workers if w.leases and self.is_here(w)]

    # --- clients -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.here())
    @rule(which=INDEX, runs=st.lists(RUNS, min_size=1, max_size=6), is_turn=st.booleans())
    def submit(self, which: int, runs: list[tuple[Any, ...]], is_turn: bool) -> None:
        for number, run in enumerate(runs):
            client = self.here()[(which + number // 2) % len(self.here())]
            self.submit_one(client, *run)
        if is_turn:
            self.world.turn()

    def submit_one(
        self, client: FakeClient, kernel: str, rows: int, priority: int, timeout_ms: int | None, variant: int, key: int | None
    ) -> None:
        run_id = struct.pack("<Q8s", next(self.world.numbers), b"run-id")
        names = run_id
        if key is not None:  # the same key is the same submission: principal, kernel and content follow from it
            kernel, rows, variant = list(SPECS)[key], 3 + key, key
            names = struct.pack("<Q8s", key, client.principal.encode())
        message = p.Submit(
            id=run_id, kernel=kernel, block=self.block_of(kernel, names, rows, variant), statics=b"s" * (variant % 2),
            priority=priority, timeout_ms=timeout_ms, key=None if key is None else b"key%d" % key,
            wants_partials=kernel == "tokens" and variant == 1,
            scalars={"ms": [1 + (i + variant) % 7 for i in range(rows)]} if kernel == "sum" else {},
        )  # fmt: skip
        self.sent[run_id] = sent = Sent(client, kernel, message.statics, rows, names, message)
        self.by_names[names] = sent
        client.send(message, is_turn=False)

    def block_of(self, kernel: str, names: bytes, rows: int, variant: int) -> Block:
        if kernel == "mine":
            return blob_rows(names, [20 + 7 * i for i in range(rows)])
        return tensor_rows(names, rows, "int32" if variant == 2 else "uint8", items=20)

    @precondition(lambda self: self.sent)
    @rule(which=INDEX, how=st.sampled_from(["cancel", "cancel", "again", "acknowledge", "drop", "attach", "attach", "goodbye"]))
    def client_acts(self, which: int, how: str) -> None:
        if how == "attach":
            self.attach_client(self.clients[which % len(self.clients)])
        elif how == "again":
            self.submit_again(which)
        elif how == "cancel":
            self.cancel(which, start=which % 7, num=1 + which % 9)
        elif self.here():
            client = self.here()[which % len(self.here())]
            if how == "acknowledge":
                client.send(p.Ack(seq=max(0, client.received - which % 4)))
            elif how == "drop":
                self.drop_client(client, is_noticed=which % 2 == 0)
            elif which % 4 == 0:
                self.say_goodbye(client)

    def submit_again(self, which: int) -> None:
        sent = list(self.sent.values())[which % len(self.sent)]
        if self.is_here(sent.client) and not sent.is_over and not self.has_ended(sent):
            sent.client.send(sent.message)

    def cancel(self, which: int, start: int, num: int) -> None:
        sent = list(self.sent.values())[which % len(self.sent)]
        if which % 2:  # mostly one of the latest, which are still open
            sent = list(self.sent.values())[-(which % 12) - 1 :][0]
        if self.is_here(sent.client):
            sent.client.send(p.Cancel(id=sent.message.id, start=start, stop=start + num))

    def drop_client(self, client: FakeClient, is_noticed: bool) -> None:
        client.vanish()
        if is_noticed:
            self.world.step(PeerLost(client.side, client.route))

    def attach_client(self, client: FakeClient) -> None:
        mine = [s for s in self.sent.values() if s.client is client and not s.is_over]
        awaited = [s.message.id for s in mine if not self.has_ended(s)]
        welcome = client.attach(awaited)
        unknown = {welcome.unknown[i : i + 16] for i in range(0, len(welcome.unknown), 16)}
        for sent in mine:  # the session ended without us, and its tasks with it
            sent.is_over |= not welcome.is_resumed or sent.message.id in unknown
            assert not (welcome.is_resumed and sent.message.id in unknown), "an accepted submission was forgotten"

    def say_goodbye(self, client: FakeClient) -> None:
        client.send(p.Goodbye())
        client.vanish()
        for sent in self.sent.values():
            sent.is_over |= sent.client is client

    # --- workers -----------------------------------------------------------------------------------------------------

    def add_worker(self, batches: int) -> None:
        alive = [w for w in self.workers if self.is_here(w)]
        if len(alive) < 3:
            number = next(self.world.numbers)
            num_bytes = 1 << 30 if batches < 3 else 150
            made = self.world.worker(*SPECS.values(), name="w", batches=batches, num_bytes=num_bytes, pid=10_000 + number)
            self.workers.append(made)

    @precondition(lambda self: self.holders())
    @rule(which=INDEX, pieces=st.lists(PIECES, min_size=1, max_size=5), is_turn=st.booleans())
    def answer(self, which: int, pieces: list[tuple[int, int, bool]], is_turn: bool) -> None:
        """Pieces of one lease, mostly of a large one, in any order."""
        worker = self.holders()[which % len(self.holders())]
        sizes = {token: len(rows_of(assign)) for token, assign in worker.leases.items()}
        token = max(sizes, key=lambda t: sizes[t]) if which % 3 else next(iter(sizes))
        for start, num, is_error in pieces:
            start %= sizes[token]
            worker.answer(token, start, min(sizes[token], start + num), FAILED if is_error else None, is_turn)

    @precondition(lambda self: self.holders())
    @rule(which=INDEX, how=st.sampled_from(["finish", "finish", "finish", "stream", "forge", "pull"]))
    def worker_works(self, which: int, how: str) -> None:
        worker = self.holders()[which % len(self.holders())]
        token = list(worker.leases)[which % len(worker.leases)]
        if how == "finish":
            worker.finish(token)
        elif how == "forge":
            self.forge(which)
        elif how == "pull":
            worker.pull(which % 3, 40 * (which % 3))
        elif worker.leases[token].mode == "stream":
            worker.send(p.WorkerPartial(lease=token, part=which % 5, block=echo_block(rows_of(worker.leases[token]))))
            for _ in range(1 + which % 2):
                self.save(worker, token)

    def save(self, worker: FakeWorker, token: int) -> None:
        """A checkpoint, which counts if the broker still has this lease with this worker, and the row no outcome."""
        (row,) = rows_of(worker.leases[token])
        number = next(self.world.numbers)
        lease = self.world.state.ledger.leases.get(token)
        if lease is not None and lease.worker.route == worker.route and lease.pieces[0].state == "leased":
            self.saved[row[:20]] = b"%d" % number
        worker.save(token, b"%d" % number, part=number)

    def forge(self, which: int) -> None:
        """An answer to somebody else's lease, and one beside the rows of a lease."""
        leases = {token: assign.mode for w in self.holders() for token, assign in w.leases.items()}
        for worker in self.holders():
            others = [token for token, mode in leases.items() if mode == "stream" and token not in worker.leases]
            if others:
                worker.send(p.Checkpoint(lease=others[which % len(others)], block=echo_block([b"forged"])))
            token = list(leases)[which % len(leases)]
            if token not in worker.leases:
                worker.send(p.WorkerFinal(lease=token, answers=[p.Answer(0, 1, echo_block([b"forged"]))]))

    @rule(which=INDEX, how=st.sampled_from(["add", "add", "crash", "vanish", "disconnect", "back", "back", "drain", "goodbye"]))
    def workers_change(self, which: int, how: str) -> None:
        if how == "add" or not self.workers:
            self.add_worker(1 + which % 3)
            return
        worker = self.workers[which % len(self.workers)]
        if how == "crash":
            worker.crash()
            self.workers.remove(worker)
        elif how == "vanish":
            worker.vanish()
        elif how == "back":
            self.reconnect(worker, is_complete=which % 2 == 0)
        elif self.is_here(worker) and how == "disconnect":
            worker.disconnect()
        elif self.is_here(worker) and how == "drain":
            worker.send(p.Drain())
        elif self.is_here(worker):
            for data in (row for a in worker.leases.values() for row in rows_of(a)):
                self.starts[data[:20]] -= 1  # by its own word it had not started them
            worker.send(p.Goodbye())
            worker.vanish()
            self.workers.remove(worker)

    def reconnect(self, worker: FakeWorker, is_complete: bool) -> None:
        worker.hello()
        if is_complete and not worker.take(p.Welcome)[-1].is_resumed:
            is_complete = False
        worker.ready(None if is_complete else list(worker.leases)[1:])
        if not is_complete:
            worker.leases = {t: a for t, a in worker.leases.items() if t in self.world.state.ledger.leases}

    # --- time --------------------------------------------------------------------------------------------------------

    @rule(ms=st.sampled_from([1, 100, 900, 2500, 2500, 7000]), how=st.sampled_from(["alive"] * 3 + ["quiet", "stopped"]))
    def time_passes(self, ms: int, how: str) -> None:
        if how == "stopped":  # the broker's process was, and its peers were not heard
            self.world.now += ms / 250.0
            self.world.turn()
            return
        if how == "alive":
            self.hear_from_all()
        self.world.advance(ms / 1000.0)

    def hear_from_all(self) -> None:
        for client in self.here():
            client.send(p.Heartbeat())
        for worker in self.workers:
            if self.is_here(worker):
                worker.heartbeat(progress=next(self.world.numbers))

    # --- what must hold ----------------------------------------------------------------------------------------------

    def has_ended(self, sent: Sent) -> bool:
        if sent.message.id in sent.client.refused:
            return True
        return all(sent.client.row(sent.message.id, row).num_finals for row in range(sent.rows))

    @invariant()
    def batches_are_pure(self) -> None:
        for worker in self.workers:
            for token, assign in worker.leases.items():
                if token in self.seen:
                    continue
                self.seen.add(token)
                rows = rows_of(assign)
                kernel = {**SPECS, "late": LATE}[assign.kernel]
                assert len(rows) <= (1 if assign.mode == "stream" else kernel["max_batch_size"])
                runs = [self.by_names[data[:16]] for data in rows]
                self.check_checkpoint(assign, rows)
                assert {(r.kernel, r.statics) for r in runs} == {(assign.kernel, assign.statics)}
                if assign.kernel == "sum":
                    costs = assign.scalars["ms"]
                    costs = costs if isinstance(costs, list) else [costs] * len(rows)
                    assert len(costs) == len(rows)
                    assert len(rows) == 1 or sum(costs) <= 6.0
                if assign.kernel == "mine":
                    assert {r.client.principal for r in runs} == {assign.principal}
                if assign.kernel == "once" and all(r.message.key is None for r in runs):
                    for data in rows:
                        self.starts[data[:20]] = self.starts.get(data[:20], 0) + 1
                        assert self.starts[data[:20]] == 1, "started twice, and not idempotent"
                else:
                    for data in rows:
                        self.starts[data[:20]] = self.starts.get(data[:20], 0) + 1

    def check_checkpoint(self, assign: p.Assign, rows: list[bytes]) -> None:
        wanted = self.saved.get(rows[0][:20]) if assign.mode == "stream" else None
        if wanted is None:
            assert assign.checkpoint is None, "from nowhere"
        else:
            assert assign.checkpoint is not None, "it begins anew"
            assert bytes(assign.checkpoint.row(0, 0)) == rows[0][:20] + wanted
            assert assign.part == int(wanted)

    @invariant()
    def checkpoints_are_those_of_their_holders(self) -> None:
        for lease in self.world.state.ledger.leases.values():
            piece = lease.pieces[0]
            if lease.mode == "stream" and piece.state == "leased":
                wanted = self.saved.get(bytes(piece.run.block.row(0, piece.start))[:20])
                assert (piece.saved and piece.saved.part) == (wanted and int(wanted))

    @invariant()
    def rows_end_once_with_their_own_bytes(self) -> None:
        for client in self.clients:
            for (run_id, row), got in client.got.items():
                if not got.num_finals:
                    continue
                sent = self.sent[run_id]
                assert sent.client is client, "somebody else's row"
                assert run_id not in client.refused, "an outcome of a refused submission"
                assert got.num_finals == 1, "two outcomes"
                assert row < sent.rows
                if got.data is not None:
                    assert got.data[:20] == sent.names + struct.pack("<I", row), "another row's bytes"

    @invariant()
    def clients_have_their_credit(self) -> None:
        """A client with nothing open may submit its whole window."""
        for client in self.here():
            session = self.world.core.clients.by_route.get(client.route)
            if session is not None and not session.runs and client.received == session.last_seq:
                assert session.returned_rows == session.used_rows
                assert session.returned_bytes == session.used_bytes

    def teardown(self) -> None:
        """Everybody is well again: then everything ends."""
        if not hasattr(self, "world"):
            return
        for client in self.clients:
            self.attach_client(client)
        for worker in list(self.workers):
            worker.crash()
        healer = self.world.worker(*SPECS.values(), LATE, batches=2, pid=1)
        self.workers = [healer]
        for _ in range(400):
            self.batches_are_pure()
            healer.leases = {t: a for t, a in healer.leases.items() if t in self.world.state.ledger.leases}
            if not healer.leases:
                break
            healer.finish(next(iter(healer.leases)))
        assert self.world.state.ledger.num_open == 0, "something does not end"
        self.rows_end_once_with_their_own_bytes()
        for sent in self.sent.values():
            assert sent.is_over or self.has_ended(sent), "an accepted row without outcome"
        for client in self.clients:
            client.send(p.Ack(seq=client.received))
        for session in self.world.core.clients.by_route.values():
            assert not session.outbox
            assert not session.finished
            assert session.num_unacked_bytes == 0


def check_machine(max_examples: int, step_count: int = 40, seed: int = 0) -> None:
    """Run the machine; whatever it finds is raised. What it does hangs on the seed, and on the modules that are loaded."""
    import hypothesis
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis.stateful import run_state_machine_as_test

    chosen: Any = settings(
        max_examples=max_examples, stateful_step_count=step_count, deadline=None, database=None,
        phases=[Phase.generate], report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    machine = hypothesis.seed(seed)(type("Machine", (BrokerMachine,), {}))
    run_state_machine_as_test(machine, settings=chosen)  # type: ignore[no-untyped-call]
