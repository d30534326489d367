"""A small broker for the client's tests: correct, without limits or workers, and able to misbehave on demand.

`ModelBroker` is sans-IO: frames in, (peer, frames) out. `FakeBroker` runs one on a real ROUTER in a thread. Written
against the protocol only; shares no code with the broker under test elsewhere.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import zmq

from penstock.broker import protocol
from penstock.broker.columns import Block, frame_bytes, gather, pack, view
from penstock.broker.layout import Column
from penstock.broker.protocol import Code, Error, Outcome, Submit
from penstock.broker.wire import decode, encode

TENSOR = {"dtypes": None, "rank": None, "ragged": "exact"}
SPECS: dict[str, Any] = {
    "echo": {"inputs": [["x", "tensor", TENSOR]], "modes": ["batch"]},
    "ragged": {"inputs": [["x", "tensor", {**TENSOR, "ragged": "pad"}]], "modes": ["batch"]},
    "two": {"inputs": [["a", "tensor", TENSOR], ["b", "tensor", TENSOR]], "modes": ["batch"]},
    "text": {"inputs": [["text", "blob", {"kind": "text"}], ["upper", "static", {"required": False}]], "modes": ["batch"]},
    "data": {"inputs": [["data", "blob", {"kind": "bytes"}]], "modes": ["batch"]},
    "sleep": {
        "inputs": [["seconds", "row", {"default": None, "min": 0.0, "max": 100.0}], ["mode", "static", {"required": False}]],
        "modes": ["batch"],
    },
    "fail": {"inputs": [["x", "tensor", TENSOR]], "modes": ["batch"]},
    "hold": {"inputs": [["x", "tensor", TENSOR]], "modes": ["batch"]},
    "count": {"inputs": [["steps", "row", {"default": None, "min": 0.0, "max": 1000.0}]], "modes": ["stream"]},
    "hold_stream": {"inputs": [["steps", "row", {"default": None}]], "modes": ["batch", "stream"]},
    "small": {"inputs": [["x", "tensor", {"dtypes": ["float32"], "rank": 1, "ragged": "exact"}]], "modes": ["batch"]},
}


def renamed(block: Block) -> Block:
    """The same rows with a single column called "out"."""
    if len(block.columns) != 1:
        return block
    c = block.columns[0]
    return Block(block.num_rows, (Column("out", c.dtype, c.shape, c.is_ragged, c.is_framed),), block.lengths, block.frames)


def numbers(values: Sequence[float]) -> Block:
    data = np.asarray(values, "<f4")
    return pack([(Column("out", "float32"), None, [data.tobytes()])], len(values))


class ModelSession:
    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self.peer: Any = None
        self.seq = 0
        self.unacked: dict[int, protocol.Message] = {}
        self.submitted: dict[bytes, Submit] = {}
        self.open_rows: dict[bytes, set[int]] = {}
        self.rows = self.bytes = 0
        self.done_rows = self.done_bytes = 0


class ModelBroker:
    """See the module.

    `held` are submissions to "hold" kernels, answered by `release`. `log` has every message that came.
    """

    def __init__(self, window: tuple[int, int] = (4096, 256 << 20), epoch: int = 1, heartbeat_ms: float = 1000.0) -> None:
        self.window, self.epoch, self.heartbeat_ms = window, epoch, heartbeat_ms
        self.sessions: dict[bytes, ModelSession] = {}
        self.peers: dict[Any, ModelSession] = {}
        self.out: list[tuple[Any, list[Any]]] = []
        self.log: list[protocol.Message] = []
        self.specs = dict(SPECS)
        self.is_settled = True
        self.held: list[tuple[ModelSession, Submit]] = []
        self.refuse: Callable[[Submit], Error | None] = lambda m: None
        self.idempotent = True
        self.is_mute = False
        self.told: dict[str, Any] = {}  # of every task, as brokers since 1.1 do
        self.shared: dict[str, Any] = {}  # what is offered, as brokers since 1.2 do
        self.controls: list[tuple[str, str]] = []
        self.durable: dict[bytes, Submit] = {}  # by key, else id; outlive a restart
        self.jobs: list[dict[str, Any]] | None = None
        self.control_error: Error | None = None

    def handle(self, peer: Any, frames: Sequence[Any]) -> None:
        message = decode(protocol.FROM_CLIENT, frames)
        self.log.append(message)
        if self.is_mute:
            return
        if isinstance(message, protocol.Hello | protocol.Attach):
            self._greet(peer, message)
            return
        session = self.peers.get(peer)
        if session is None:
            self.out.append((peer, encode(protocol.Fault(error=Error(Code.UNATTACHED, "say hello")))))
            return
        getattr(self, "_" + message.TYPE)(session, message)

    def restart(self) -> None:
        """A new process: everything forgotten, another epoch."""
        self.epoch += 1
        self.sessions.clear()
        self.peers.clear()
        self.held.clear()
        self.out.clear()

    def drop_connections(self) -> None:
        self.peers.clear()
        for session in self.sessions.values():
            session.peer = None

    def _send(self, session: ModelSession, message: protocol.Message) -> None:
        if session.peer is not None:
            self.out.append((session.peer, encode(message)))

    def _credit(self, s: ModelSession) -> tuple[int, int]:
        return s.done_rows + self.window[0], s.done_bytes + self.window[1]

    def _greet(self, peer: Any, m: Any) -> None:
        session = self.sessions.get(m.secret)
        is_resumed = session is not None and isinstance(m, protocol.Attach) and m.epoch == self.epoch
        if session is None or not is_resumed:
            session = self.sessions[m.secret] = ModelSession(m.secret)
        self.peers = {p: s for p, s in self.peers.items() if s is not session}
        self.peers[peer], session.peer = session, peer
        open_ids = getattr(m, "open", b"")
        ids = [open_ids[i : i + 16] for i in range(0, len(open_ids), 16)]
        unknown = b"".join(i for i in ids if i not in session.submitted)
        self._send(session, protocol.Welcome(
            epoch=self.epoch, heartbeat_ms=self.heartbeat_ms, is_resumed=is_resumed, credit=self._credit(session),
            unknown=unknown, shared=self.shared,
        ))  # fmt: skip
        if is_resumed:
            self._on_ack(session, m.received)
            for message in list(session.unacked.values()):
                self._send(session, message)

    def _on_ack(self, session: ModelSession, seq: int) -> None:
        for known in [n for n in session.unacked if n <= seq]:
            del session.unacked[known]

    def _submit(self, s: ModelSession, m: Submit) -> None:
        self._on_ack(s, m.ack)
        nbytes = sum(map(frame_bytes, m.block.frames))
        s.rows, s.bytes = s.rows + m.block.num_rows, s.bytes + nbytes
        rows, allowed = self._credit(s)
        error = self.refuse(m)
        if s.rows > rows or s.bytes > allowed:
            error = Error(Code.OVERLOADED, "past the credit", 100.0)
        if m.kernel not in self.specs:
            error = Error(Code.UNKNOWN_KERNEL, f"no kernel {m.kernel}")
        if m.is_again and not self.idempotent:
            error = Error(Code.UNAVAILABLE, "an earlier broker may have run it")
        if error is not None:
            s.rows, s.bytes = s.rows - m.block.num_rows, s.bytes - nbytes
            self._send(s, protocol.Refused(id=m.id, error=error))
            return
        assert m.id not in s.submitted, "a submission came twice"
        s.submitted[m.id] = m
        s.open_rows[m.id] = set(range(m.block.num_rows))
        if m.is_durable:
            self.durable[m.key or m.id] = m
        if m.wants_accepted:
            self._send(s, protocol.Accepted(id=m.id, is_durable=m.is_durable))
        if m.kernel.startswith("hold"):
            self.held.append((s, m))
        else:
            self.answer(s, m)

    def answer(self, s: ModelSession, m: Submit) -> None:
        """Run the submission's kernel for the rows that are still open."""
        n = m.block.num_rows
        if m.kernel == "fail":
            self.finish(s, m, 0, n, error=Error(Code.FAILED, "it raised", None, "Traceback"))
        elif m.kernel == "sleep":
            seconds = m.scalars["seconds"]
            self.finish(s, m, 0, n, block=numbers(seconds if isinstance(seconds, list) else [seconds] * n))
        elif m.kernel == "count":
            steps = int(m.scalars["steps"])
            for part in range(steps if m.wants_partials else 0):
                self.partial(s, m, part)
            self.finish(s, m, 0, n, block=numbers([steps]))
        elif m.kernel == "text" and m.statics:
            rows = [bytes(m.block.row(0, r)).upper() for r in range(n)]
            column = (Column("out", "str", (), True), [len(r) for r in rows], rows)
            self.finish(s, m, 0, n, block=pack([column], n))
        else:
            self.finish(s, m, 0, n, block=renamed(m.block))

    def partial(self, s: ModelSession, m: Submit, part: int) -> None:
        outcome = Outcome([(m.id, 0, 1)], numbers([part]), part=part)
        self._numbered(s, lambda seq: protocol.Partial(seq=seq, outcomes=[outcome]))

    def finish(
        self, s: ModelSession, m: Submit, start: int, stop: int, block: Block | None = None, error: Error | None = None
    ) -> None:
        """Answer those of the rows [start, stop) that are open with a block of all these rows, or an error."""
        open_rows = s.open_rows.get(m.id, set())
        rows = sorted(set(range(start, stop)) & open_rows)
        if len(rows) != stop - start:
            for row in rows:
                at = row - start
                self.finish(s, m, row, row + 1, block and gather([(block, at, at + 1)]), error)
            return
        open_rows.difference_update(rows)
        s.done_rows += stop - start
        if not open_rows:
            s.done_bytes += m.block.nbytes
        timings = {"batch_size": stop - start, "worker": "fake", "compute_ms": 0.5}
        outcome = Outcome([(m.id, start, stop)], block, error, [0.25], timings)
        self._numbered(s, lambda seq: protocol.Results(seq=seq, outcomes=[outcome], credit=self._credit(s)))

    def _numbered(self, s: ModelSession, make: Callable[[int], protocol.Message]) -> None:
        s.seq += 1
        s.unacked[s.seq] = make(s.seq)
        self._send(s, s.unacked[s.seq])

    def release(self, count: int | None = None) -> None:
        """Answer held submissions."""
        due, self.held = self.held[:count], self.held[len(self.held[:count]) :]
        for s, m in due:
            if self.sessions.get(s.secret) is s:
                self.answer(s, m)

    def _share(self, s: ModelSession, m: protocol.Share) -> None:
        """That it was said is in the log."""

    def _cancel(self, s: ModelSession, m: protocol.Cancel) -> None:
        submitted = s.submitted.get(m.id)
        for row in range(m.start, min(m.stop, submitted.block.num_rows if submitted else 0)):
            if submitted is not None and row in s.open_rows[m.id]:
                self.finish(s, submitted, row, row + 1, error=Error(Code.CANCELLED, "cancelled"))
        if submitted is not None and not s.open_rows[m.id]:
            self.held = [(o, h) for o, h in self.held if h.id != m.id]

    def _ack(self, s: ModelSession, m: protocol.Ack) -> None:
        self._on_ack(s, m.seq)

    def _heartbeat(self, s: ModelSession, m: protocol.Heartbeat) -> None:
        self._on_ack(s, m.ack)
        self._send(s, protocol.Heartbeat())

    def _fetch(self, s: ModelSession, m: protocol.Fetch) -> None:
        """Sessions hold what is open; what none holds is open after a restart, and over if its session has left."""
        found = [d for key, d in self.durable.items() if (m.key is not None and key == m.key) or d.id == m.id]
        if not found:
            error = Error(Code.UNKNOWN_TASK, "no such task")
            self._send(s, protocol.Reply(request=m.request, error=error))
            return
        task, n = found[0], found[0].block.num_rows
        owner = next((o for o in self.sessions.values() if o.open_rows.get(task.id)), None)
        is_over = any(task.id in o.submitted and not o.open_rows[task.id] for o in self.sessions.values())
        is_handed = m.take or owner in (None, s)
        open_rows = owner.open_rows[task.id] if owner else set(range(0 if is_over else n))
        uses = (len(open_rows), 0 if is_over else task.block.nbytes)
        told = {"id": task.id, "kernel": task.kernel, "rows": n, "client": "other", "seen_ms": 1500.0, "key": task.key}
        self._send(s, protocol.Reply(request=m.request, body={**told, "is_handed": is_handed, "uses": uses}))
        if is_handed and is_over:
            outcome = Outcome([(task.id, 0, n)], renamed(task.block))
            self._numbered(s, lambda seq: protocol.Results(seq=seq, outcomes=[outcome], credit=self._credit(s)))
        elif is_handed and owner is not s:
            s.rows, s.bytes = s.rows + uses[0], s.bytes + uses[1]
            s.submitted[task.id], s.open_rows[task.id] = task, open_rows
            if owner is not None:
                owner.open_rows[task.id] = set()
            self.held = [*((o, h) for o, h in self.held if h is not task), (s, task)]

    def _status(self, s: ModelSession, m: protocol.Status) -> None:
        body: dict[str, Any] = {"kernels": self.specs, "is_settled": self.is_settled}
        known = {id_: submit for o in self.sessions.values() for id_, submit in o.submitted.items() if o.open_rows[id_]}
        if m.id is not None:
            body = self._report(known[m.id]) if m.id in known else {"state": "unknown"}
        elif m.what == "tasks" and self.told:
            body = {"tasks": [self._report(submit) for submit in known.values()][:100], "num_open": len(known)}
        elif m.what in ("jobs", "dead") and self.jobs is not None:
            body = {"jobs": self.jobs if m.what == "jobs" else [job for job in self.jobs if job["dead"]]}
        elif m.what:
            body["tasks"] = {"open": len(known)}  # older brokers do not know the question
        self._send(s, protocol.Reply(request=m.request, body=body))

    def _report(self, m: Submit) -> dict[str, Any]:
        return {"state": "queued", "id": m.id, "kernel": m.kernel, **self.told} if self.told else {"state": "queued"}

    def _control(self, s: ModelSession, m: protocol.Control) -> None:
        self.controls.append((m.op, m.target or (m.key or m.id or b"").hex()))
        body = {"id": b"\x09" * 16} if m.op == "requeue" else {}
        self._send(s, protocol.Reply(request=m.request, error=self.control_error, body=body))

    def _goodbye(self, s: ModelSession, m: protocol.Goodbye) -> None:
        self.sessions.pop(s.secret, None)
        self.peers = {p: o for p, o in self.peers.items() if o is not s}


class FakeBroker:
    """A `ModelBroker` behind a ROUTER in a thread. Use `model` only within `lock`."""

    def __init__(self, folder: Any, **model: Any) -> None:
        self.url = f"ipc://{folder}"
        self.model = ModelBroker(**model)
        self.lock = threading.Lock()
        self._is_stopping = False
        self._context = zmq.Context()
        self._thread = threading.Thread(target=self._run, name="fake-broker")
        self._is_bound = threading.Event()

    def __enter__(self) -> "FakeBroker":
        self._thread.start()
        assert self._is_bound.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopping = True
        self._thread.join()
        self._context.term()

    def _run(self) -> None:
        router = self._context.socket(zmq.ROUTER)
        router.linger = 0
        router.bind(f"{self.url}/clients.sock")
        self._is_bound.set()
        while not self._is_stopping:
            if router.poll(5):
                for _ in range(100):
                    if not router.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                        break
                    peer, *frames = router.recv_multipart()
                    with self.lock:
                        self.model.handle(peer, frames)
                    self._flush(router)
            self._flush(router)
        router.close()

    def _flush(self, router: Any) -> None:
        with self.lock:
            out, self.model.out = self.model.out, []
        for peer, frames in out:
            router.send_multipart([peer, *(bytes(view(f)) for f in frames)])

    def release(self, count: int | None = None) -> None:
        with self.lock:
            self.model.release(count)

    def wait_until(self, condition: Callable[[ModelBroker], bool], limit_s: float = 5.0) -> None:
        until = time.monotonic() + limit_s
        while True:
            with self.lock:
                if condition(self.model):
                    return
            assert time.monotonic() < until, "the fake broker did not get there"
            time.sleep(0.002)
