"""A world around one `Core`: a clock that tests move, clients and workers that play by the protocol, no sockets.

Every message goes through the codec in both directions, as it would on the wire. Each row's payload names its row, so that
an answer which reaches the wrong row is seen by whoever receives it.
"""

import itertools
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fake_memory import FakeHost

from penstock.broker import invariants
from penstock.broker import protocol as p
from penstock.broker.columns import Block, pack
from penstock.broker.config import BrokerConfig
from penstock.broker.core import Core
from penstock.broker.durable import DurableJournal
from penstock.broker.events import Copied, Event, PeerLost, ProcessEnded, Received, Turn
from penstock.broker.layout import FRAMED_ROW_BYTES, Column
from penstock.broker.operators import KeyList
from penstock.broker.promises import Promises
from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.scheduling.prediction import BatchLoad, Predictor
from penstock.broker.scheduling.pull import PullPolicy
from penstock.broker.state import BACK, FRONT, Send
from penstock.broker.storage.store import MemoryStore
from penstock.broker.wire import Message, decode, encode

WHOLE_BATCHES = SchedulingConfig(first_batch_sizes=(4096, 4096, 4096))
"""Batches as large as the kernel allows from the first on: how they grow is another test's business."""
ONE_BIN = replace(WHOLE_BATCHES, max_bins=1)
TAG_BYTES = 20
START = 1000.0
MAX_TURNS = 100


def tag(run_id: bytes, row: int) -> bytes:
    """What the payload of a row begins with: which row it is."""
    return run_id + struct.pack("<I", row)


def tensor_rows(run_id: bytes, rows: int, dtype: str = "uint8", items: int = TAG_BYTES, is_framed: bool = False) -> Block:
    """Rows of one fixed shape in a column `x`."""
    item = {"uint8": 1, "int32": 4, "float32": 4}[dtype]
    assert items * item >= TAG_BYTES
    data = [tag(run_id, row).ljust(items * item, b"\0") for row in range(rows)]
    return pack([(Column("x", dtype, (items,), is_framed=is_framed), None, data)], rows)


def blob_rows(run_id: bytes, lengths: Sequence[int], dtype: str = "bytes") -> Block:
    """Ragged rows: blobs, or tensors that differ in dimension 0."""
    data = [tag(run_id, row).ljust(n, b"\0") for row, n in enumerate(lengths)]
    assert all(len(d) == n for d, n in zip(data, lengths, strict=True))
    is_framed = max(lengths) >= FRAMED_ROW_BYTES
    return pack([(Column("x", dtype, (), True, is_framed), list(lengths), data)], len(lengths))


X = ["x", "tensor", {"dtypes": None, "rank": None, "ragged": "exact"}]
PAD = ["x", "tensor", {"dtypes": None, "rank": 1, "ragged": "pad"}]
PACK = ["x", "tensor", {"dtypes": None, "rank": 1, "ragged": "pack"}]
BLOB = ["x", "blob", {"kind": "bytes"}]


def number_per_row(name: str, default: float | None = None) -> list[Any]:
    return [name, "row", {"default": default, "min": 0.0, "max": 1e6}]


def spec(
    name: str = "echo",
    inputs: Iterable[Any] = (X,),
    *,
    modes: Sequence[str] = ("batch",),
    combine: str = "max",
    idempotent: bool = True,
    scoped: bool = False,
    max_batch_size: int = 8,
    max_batch_cost_ms: float | None = None,
    base_ms: float = 0.0,
    per: Mapping[str, float] | None = None,
    digest: bytes = b"version1",
    checkpoints: bool = False,
) -> dict[str, Any]:
    """A synthetic kernel's spec as a worker sends it."""
    return {
        "name": name, "version": "1", "digest": digest, "inputs": [list(i) for i in inputs], "modes": list(modes),
        "combine": combine, "idempotent": idempotent, "scoped": scoped, "resident": False,
        "max_batch_size": max_batch_size, "max_batch_cost_ms": max_batch_cost_ms,
        "cost": {"base_ms": base_ms, "per": dict(per or {})}, **({"checkpoints": True} if checkpoints else {}),
    }  # fmt: skip


class Declared(Predictor):
    """Learns nothing: what a kernel declares is what it takes."""

    def observe(self, load: BatchLoad, worker: str, device: str, measured_ms: float) -> float:
        return load.cost_ms


class World:
    """One core, its peers, and the time."""

    def __init__(
        self,
        scheduling: SchedulingConfig = WHOLE_BATCHES,
        predictor: Predictor | None = None,
        memory: FakeHost | None = None,
        store: MemoryStore | None = None,
        **config: Any,
    ) -> None:
        self.now = START
        self.memory = memory
        self.peers: dict[tuple[str, bytes], Peer] = {}
        self.numbers = itertools.count(1)
        config.setdefault("client_liveness_s", 1e6)  # clients here send no heartbeats
        self._scheduling, self._predictor, self._config = scheduling, predictor, BrokerConfig(**config)
        self._start(7, store)

    def _start(self, epoch: int, store: MemoryStore | None, gate: KeyList | None = None) -> None:
        config, journal = self._config, None
        if store is not None:
            kept = (config.result_ttl_s, config.max_kept_bytes)
            journal = DurableJournal(config.dedup_window_s, config.dedup_bytes, *kept, wall_offset_s=1e9)
        policy = PullPolicy(self._scheduling, self._predictor)
        operators = ("uid:1",)
        self.core = Core(
            config, epoch=epoch, now=self.now, policy=policy, journal=journal, memory=self.memory, operators=operators
        )
        self.core.operators.gate = gate
        self.store = store
        self.promises = Promises(store, self._send, self._lose)
        if store is not None:
            self.core.restore(store.load(), self.now)

    def commit(self) -> None:
        """What the journal was told is safe from now on; what waited for that is sent."""
        assert self.store is not None
        self.store.commit()
        self.promises.release()
        for folder, error in self.store.take_copies():
            self.step(Copied(folder, error))

    def restart(self, num_kept: int = 0, gate: KeyList | None = None) -> None:
        """Kill the broker and start another on what its disk has; `num_kept` groups that were not yet safe are there, too."""
        assert self.store is not None
        self.peers.clear()
        self._start(self.core.state.epoch + 1, self.store.crash(num_kept), gate)
        self.turn()

    @property
    def state(self) -> Any:
        return self.core.state

    @property
    def counters(self) -> Any:
        return self.core.state.counters

    def handle(self, event: Event) -> None:
        """One event without a turn after it: what arrives together."""
        self._deliver(self.core.handle(event, self.now))

    def turn(self) -> None:
        """Everything that arrived is taken in; then every invariant must hold."""
        self._deliver(self.core.handle(Turn(), self.now))
        for _ in range(MAX_TURNS):
            due = self.core.next_deadline(self.now)
            if due is None or due > self.now:
                break
            self._deliver(self.core.handle(Turn(), self.now))
        else:
            raise AssertionError(f"still busy after {MAX_TURNS} turns")
        invariants.check(self.core, self.now)

    def step(self, event: Event) -> None:
        self.handle(event)
        self.turn()

    def advance(self, seconds: float) -> None:
        """Let time pass as the shell does: a turn whenever one is due, and everybody heard from in between."""
        end = self.now + seconds
        while True:
            due = self.core.next_deadline(self.now)
            if due is None or due > end:
                break
            self.now = max(self.now, due)
            self.turn()
        self.now = end
        self.turn()

    def client(self, name: str = "client", principal: str = "uid:1", **kwargs: Any) -> "FakeClient":
        return FakeClient(self, name, principal, **kwargs)

    def worker(self, *specs: Mapping[str, Any], **kwargs: Any) -> "FakeWorker":
        return FakeWorker(self, specs or (spec(),), **kwargs)

    def _deliver(self, actions: list[Send]) -> None:
        self.promises.perform(actions, self.core.take_writes())

    def _send(self, action: Send) -> bool:
        types = {FRONT: p.TO_CLIENT, BACK: p.TO_WORKER}
        message = decode(types[action.side], encode(action.message))
        if self.memory is not None:
            self.memory.read(message)
        peer = self.peers.get((action.side, action.route))
        if peer is None:
            return False
        if peer.num_blocked:
            peer.num_blocked -= 1
            return False
        peer.receive(message)
        return True

    def _lose(self, action: Send) -> None:
        self.handle(PeerLost(action.side, action.route))


class Peer:
    """An address, a secret, and what came."""

    side = FRONT
    types = p.FROM_CLIENT

    def __init__(self, world: World, name: str, principal: str) -> None:
        self.world = world
        self.name = name
        self.principal = principal
        self.secret = struct.pack("<16s", b"s%d" % next(world.numbers))
        self.route = b""
        self.pid = 0
        self.num_blocked = 0
        """So many messages find its pipe full."""
        self.inbox: list[Message] = []

    def connect(self) -> None:
        """Come from a new address, as a reconnected socket does."""
        self.vanish()
        self.route = b"r%d" % next(self.world.numbers)
        self.world.peers[self.side, self.route] = self

    def vanish(self) -> None:
        """The address is gone; the broker notices when it sends something there."""
        self.world.peers.pop((self.side, self.route), None)

    def disconnect(self) -> None:
        """The address is gone and the broker knows."""
        self.vanish()
        self.world.step(PeerLost(self.side, self.route))

    def receive(self, message: Message) -> None:
        self.inbox.append(message)

    def event(self, message: Message) -> Received:
        return Received(self.side, self.route, self.principal, decode(self.types, encode(message)), self.pid)

    def send(self, message: Message, is_turn: bool = True) -> None:
        """Through the codec to the core; `is_turn=False`: more arrives before the broker acts."""
        self.world.handle(self.event(message))
        if is_turn:
            self.world.turn()

    def take(self, kind: type[Any]) -> list[Any]:
        """The messages of a type that came since the last time."""
        taken = [m for m in self.inbox if type(m) is kind]
        self.inbox = [m for m in self.inbox if type(m) is not kind]
        return taken


@dataclass
class Got:
    """What a client was told about one row."""

    data: bytes | None = None
    error: p.Error | None = None
    outcome: p.Outcome | None = None
    partials: list[p.Outcome] = field(default_factory=list)
    num_finals: int = 0


class FakeClient(Peer):
    """Drops what it has had by seq, checks order, and files outcomes under (id, row)."""

    def __init__(self, world: World, name: str, principal: str, is_connected: bool = True, pid: int = 0) -> None:
        super().__init__(world, name, principal)
        self.pid = pid
        self.received = self.num_duplicates = 0
        self.epoch = 0
        self.credit: Sequence[int] = (0, 0)
        self.got: dict[tuple[bytes, int], Got] = {}
        self.refused: dict[bytes, p.Error] = {}
        if is_connected:
            self.hello()

    def hello(self) -> None:
        self.connect()
        self.send(p.Hello(name=self.name, secret=self.secret))

    def attach(self, open_ids: Sequence[bytes] = ()) -> p.Welcome:
        self.connect()
        message = p.Attach(
            name=self.name, secret=self.secret, epoch=self.epoch, received=self.received, open=b"".join(open_ids)
        )
        self.send(message)
        welcome: p.Welcome = self.take(p.Welcome)[-1]
        return welcome

    def submit(
        self,
        rows: int = 1,
        kernel: str = "echo",
        *,
        block: Block | None = None,
        run_id: bytes | None = None,
        is_turn: bool = True,
        **fields: Any,
    ) -> bytes:
        """Send a run and return its id; rows of 20 bytes unless a block is given."""
        run_id = run_id or struct.pack("<Q8s", next(self.world.numbers), b"run-id")
        block = block or tensor_rows(run_id, rows)
        self.send(p.Submit(id=run_id, kernel=kernel, block=block, **fields), is_turn)
        return run_id

    def row(self, run_id: bytes, row: int = 0) -> Got:
        return self.got.setdefault((run_id, row), Got())

    def results(self, run_id: bytes, rows: int = 1) -> list[bytes | str | None]:
        """Per row its payload, the code of its error, or None when it has no outcome."""
        got = [self.row(run_id, row) for row in range(rows)]
        return [g.error.code if g.error else g.data for g in got]

    def receive(self, message: Message) -> None:
        super().receive(message)
        match message:
            case p.Welcome():
                self.epoch, self.credit = message.epoch, message.credit
                if not message.is_resumed:
                    self.received = 0
            case p.Refused():
                self.refused[message.id] = message.error
            case p.Results() | p.Partial():
                self._file(message)

    def _file(self, message: p.Results | p.Partial) -> None:
        if message.seq <= self.received:
            self.num_duplicates += 1
            return
        assert message.seq == self.received + 1, f"seq {message.seq} after {self.received}"
        self.received = message.seq
        for outcome in message.outcomes:
            rows = [(run_id, row) for run_id, start, stop in outcome.spans for row in range(start, stop)]
            assert outcome.block is None or outcome.block.num_rows == len(rows)
            for at, (run_id, row) in enumerate(rows):
                got = self.row(run_id, row)
                if isinstance(message, p.Partial):
                    got.partials.append(outcome)
                    continue
                got.num_finals += 1
                got.outcome, got.error = outcome, outcome.error
                got.data = bytes(outcome.block.row(0, at)) if outcome.block is not None and outcome.block.columns else None
        if isinstance(message, p.Results):
            self.credit = message.credit


class FakeWorker(Peer):
    """Holds what it was assigned until a test says what to answer."""

    side = BACK
    types = p.FROM_WORKER

    def __init__(
        self,
        world: World,
        specs: Sequence[Mapping[str, Any]],
        *,
        name: str = "worker",
        batches: int = 1,
        num_bytes: int = 1 << 30,
        is_ready: bool = True,
        principal: str = "uid:1",
        pid: int = 0,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(world, name, principal)
        self.facts = facts or {}
        self.specs = list(specs)
        self.credit = [batches, num_bytes]
        self.leases: dict[int, p.Assign] = {}
        self.cancelled: list[int] = []
        self.is_drained = False
        self.pid = pid
        self.hello()
        if is_ready:
            self.ready()

    def hello(self) -> None:
        self.connect()
        self.send(p.WorkerHello(name=self.name, secret=self.secret, pid=self.pid, device="cpu"))

    def ready(self, leases: Sequence[int] | None = None) -> None:
        held = list(self.leases) if leases is None else list(leases)
        self.leases = {token: self.leases[token] for token in held if token in self.leases}
        self.send(p.Ready(specs=self.specs, credit=self.credit, leases=held, device=self.facts))

    def receive(self, message: Message) -> None:
        super().receive(message)
        match message:
            case p.Assign():
                assert message.lease not in self.leases, "one lease assigned twice"
                self.leases[message.lease] = message
            case p.CancelLease():
                self.cancelled.append(message.lease)
            case p.Drain():
                self.is_drained = True

    def save(self, token: int | None = None, data: bytes = b"", part: int = 0) -> None:
        """Send a checkpoint of a streaming lease: `data` after the name of its row."""
        token = self.the_lease() if token is None else token
        (row,) = rows_of(self.leases[token])
        self.send(p.Checkpoint(lease=token, block=echo_block([row[:TAG_BYTES] + data]), part=part))

    def batches(self) -> list[list[tuple[bytes, int]]]:
        """The leases held, as lists of (run id, row)."""
        return [[(d[:16], struct.unpack_from("<I", d, 16)[0]) for d in rows_of(a)] for a in self.leases.values()]

    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches()]

    def the_lease(self) -> int:
        (token,) = self.leases
        return token

    def answer(
        self, token: int, start: int = 0, stop: int | None = None, error: p.Error | None = None, is_turn: bool = True
    ) -> None:
        """Answer rows [start, stop) of a lease with what came in; the lease stays in hand."""
        rows = rows_of(self.leases[token])
        stop = len(rows) if stop is None else stop
        block = None if error else echo_block(rows[start:stop])
        self.send(p.WorkerFinal(lease=token, answers=[p.Answer(start, stop, block, error)]), is_turn)

    def finish(self, token: int | None = None, error: p.Error | None = None, **timings: float) -> None:
        """Answer a lease in full, let go of it, and grant one batch more in its place; `timings` beside the usual."""
        token = self.the_lease() if token is None else token
        assign = self.leases[token]
        rows = rows_of(assign)
        block = None if error else echo_block(rows)
        del self.leases[token]
        if assign.mode == "batch":
            self.credit = [self.credit[0] + 1, self.credit[1] + sum(b.nbytes for b in assign.blocks)]
        answers = [p.Answer(0, len(rows), block, error)]
        timings = {"compute_ms": 1.0, **timings}
        self.send(p.WorkerFinal(lease=token, answers=answers, credit=self.credit, timings=timings))

    def finish_all(self, limit: int = 1000) -> list[int]:
        """Answer until nothing is left; the sizes of the batches."""
        sizes = list[int]()
        while self.leases:
            token = next(iter(self.leases))
            sizes.append(len(rows_of(self.leases[token])))
            self.finish(token)
            assert len(sizes) < limit
        return sizes

    def pull(self, batches: int, num_bytes: int = 0) -> None:
        self.credit = [self.credit[0] + batches, self.credit[1] + num_bytes]
        self.send(p.Pull(credit=self.credit))

    def heartbeat(self, progress: int = 0) -> None:
        self.send(p.WorkerHeartbeat(session=self.secret, progress=progress))

    def crash(self) -> None:
        """The kernel tells the broker that the process has ended."""
        self.vanish()
        self.leases.clear()
        self.world.step(ProcessEnded(self.pid))


def rows_of(assign: p.Assign) -> list[bytes]:
    """The payload of each row of a batch, in order."""
    return [bytes(block.row(0, row)) for block in assign.blocks for row in range(block.num_rows)]


def echo_block(rows: Sequence[bytes]) -> Block:
    return pack([(Column("out", "bytes", (), True), [len(r) for r in rows], rows)], len(rows))
