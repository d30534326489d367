"""The pull policy under random work: every batch is one that it may form, nothing is lost, and nobody waits for ever.

The exact order is checked where it is simple (one account, one class); the order between accounts in test_policy_fairness.py.
"""

from typing import Any

from broker_world import spec, tensor_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.broker.scheduling.batch import Batch, Offer
from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.scheduling.pull import PullPolicy
from penstock.broker.sessions import ClientSession
from penstock.broker.spec import parse
from penstock.broker.tasks import Piece, Run

SPECS = {
    "count": parse(spec("count", max_batch_size=5)),
    "sum": parse(spec("sum", combine="sum", max_batch_cost_ms=9.0, max_batch_size=6)),
    "max": parse(spec("max", combine="max", max_batch_cost_ms=4.0, max_batch_size=6)),
    "stream": parse(spec("stream", modes=["stream"])),
}
BLOCKS = {rows: tensor_rows(b"b" * 16, rows) for rows in range(1, 8)}
ROW_BYTES = 20
KINDS = {name: (name, s.digest, s.modes[0]) for name, s in SPECS.items()}


class Model:
    """The policy, and beside it what it should hold."""

    def __init__(self, **config: Any) -> None:
        self.policy = PullPolicy(SchedulingConfig(**config))
        self.sessions = [
            ClientSession("uid:1", f"c{n}", bytes([n]) * 16, b"r", 0.0, self.policy.accounts.get("uid:1", f"c{n}", 1.0 + n))
            for n in range(3)
        ]
        self.pieces: list[Piece] = []
        self.num_runs = 0

    def push(self, kernel: str, variant: int, rows: int, client: int, priority: int, deadline: int, costs: list[float]) -> None:
        self.num_runs += 1
        run = Run(self.sessions[client], b"%016d" % self.num_runs, kernel, rows, self.num_runs, 0.001 * self.num_runs)
        run.priority, run.deadline = priority, float(1000 * deadline or "inf")
        run.block, run.num_bytes = BLOCKS[rows], rows * ROW_BYTES
        run.cost_ms = (costs * 7)[:rows] if len(costs) > 1 else costs[0]
        mode = SPECS[kernel].modes[0]
        key = (kernel, SPECS[kernel].digest, mode, b"%d" % variant, (), (), "")
        run.queue = self.policy.queue(key, SPECS[kernel], mode)
        self.policy.estimate(run)
        (piece,) = run.pieces
        for at in reversed(self.policy.cuts(piece)):
            self.add(piece.split(at))
        self.add(piece)

    def add(self, piece: Piece) -> None:
        self.policy.push(piece)
        self.pieces.append(piece)

    def take(self, kernels: list[str], max_bytes: int, is_idle: bool, now: float = 10.0) -> Batch | None:
        kinds = [KINDS[k] for k in kernels]
        waiting = [p for p in self.pieces if p.run.kernel in kernels]
        before = {id(p): (p.start, p.stop) for p in self.pieces}
        batch = self.policy.take(Offer(kinds, max_bytes, is_idle, "w", is_busy=not is_idle), now)
        assert not self.policy.hopeless, "nothing is known yet that could call a task hopeless"
        if batch is None:
            assert not (is_idle and waiting), "work conserving: an idle worker gets what there is"
            return None
        self.check_batch(batch, kernels, max_bytes, is_idle, before)
        self.pieces = [p for p in self.pieces if p.entry is not None]
        return batch

    def check_batch(
        self, batch: Batch, kernels: list[str], max_bytes: int, is_idle: bool, before: dict[int, tuple[int, int]]
    ) -> None:
        made, picked = batch.queue.spec, batch.picked
        assert made.name in kernels and picked
        assert len({id(piece) for piece, _ in picked}) == len(picked)
        for p, n in picked:
            start, stop = before[id(p)]
            assert p.run.queue is batch.queue and 0 < n <= stop - start
            assert (p.entry is None) if n == stop - start else (p.start, p.stop) == (start + n, stop)
        assert all(p.entry is None for p, _ in picked[:-1]), "rows left out in between"
        num_rows = sum(n for _, n in picked)
        assert num_rows == batch.num_rows <= (1 if batch.queue.mode == "stream" else made.max_batch_size)
        if batch.queue.mode == "batch" and not (is_idle and num_rows == 1):
            assert num_rows * ROW_BYTES <= max_bytes
        if any(p.is_isolated for p, _ in picked):
            assert len(picked) == 1 and is_idle, "a suspect runs alone"
        alone = [ms for p, n in picked for ms in alone_ms(p, before[id(p)][0], n)]
        total = sum(alone) if made.combine == "sum" else max(alone)
        is_one_too_long = num_rows == 1 or max(alone) == alone[0] == total
        assert made.max_batch_cost_ms is None or total <= made.max_batch_cost_ms or is_one_too_long
        assert sum(n for _, n, *_ in batch.charges) == num_rows and all(ms >= 0.0 for *_, ms in batch.charges)

    def order(self) -> list[tuple[float, int, int]]:
        """(time limit, seq, row) of every row; without a limit, as if it had one of 60 s."""
        return sorted(
            (p.run.deadline if p.run.deadline < float("inf") else p.run.arrived + 60.0, p.run.seq, row)
            for p in self.pieces for row in range(p.start, p.stop)
        )  # fmt: skip

    def remove(self, piece: Piece) -> None:
        self.policy.remove(piece)
        self.pieces.remove(piece)

    def check(self) -> None:
        self.policy.check()
        assert self.policy.num_rows == sum(p.num_rows for p in self.pieces)
        assert {id(p) for p in self.policy.pieces()} == {id(p) for p in self.pieces}


def alone_ms(piece: Piece, start: int, num_rows: int) -> list[float]:
    ms = piece.run.alone_ms
    return ms[start : start + num_rows] if isinstance(ms, list) else [ms] * num_rows


PUSH = st.tuples(
    st.just("push"), st.sampled_from(list(SPECS)), st.integers(0, 1), st.integers(1, 7), st.integers(0, 2), st.integers(0, 9),
    st.integers(0, 2), st.lists(st.integers(1, 12).map(float), min_size=1, max_size=3),
)  # fmt: skip
TAKE = st.tuples(
    st.just("take"), st.lists(st.sampled_from(list(SPECS)), max_size=4, unique=True),
    st.sampled_from([1 << 30, 0, -50, 25, 70]), st.booleans(),
)  # fmt: skip
CHANGES = ["remove", "trim", "isolate", "again", "complete", "abandon"]
CHANGE = st.tuples(st.sampled_from(CHANGES), st.integers(0, 99), st.integers(0, 9))


@given(steps=st.lists(PUSH | PUSH | TAKE | CHANGE, max_size=30), edges=st.sampled_from([(), (3.0,), (2.0, 5.0, 8.0)]))
@settings(max_examples=400)
def test_every_batch_is_one_that_may_be_formed(steps: list[tuple[Any, ...]], edges: tuple[float, ...]) -> None:
    model = Model(boundaries_ms=edges)
    batches = list[Batch]()
    for what, *args in steps:
        if what == "push":
            model.push(*args)
        elif what == "take":
            batch = model.take(*args)
            batches += [batch] if batch else []
        elif what in ("complete", "abandon") and batches:
            batch = batches.pop(args[0] % len(batches))
            if what == "complete":
                model.policy.completed(batch, "cpu", float(args[1]))
            else:
                model.policy.abandoned(batch)
        elif model.pieces:
            piece = model.pieces[args[0] % len(model.pieces)]
            if what == "remove":
                model.remove(piece)
            elif what == "isolate":
                piece.is_isolated = True
            elif what == "trim" and piece.num_rows > 1:
                cut = 1 + args[1] % (piece.num_rows - 1)
                model.policy.trim(piece, piece.start + cut, piece.stop)
            elif what == "again":
                model.policy.remove(piece)
                model.policy.push(piece)
        model.check()
    for _ in range(300):
        if not model.pieces:
            break
        model.take(list(SPECS), 1 << 30, True)
        model.check()
    assert not model.pieces
    assert model.policy.take(Offer(list(KINDS.values()), 1 << 30, True, "w"), 10.0) is None


@given(runs=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 3)), min_size=1, max_size=20))
@settings(max_examples=200)
def test_in_an_account_and_class_the_earliest_time_limit_goes_first(runs: list[tuple[int, int]]) -> None:
    model = Model()
    for rows, deadline in runs:
        model.push("count", 0, rows, 0, 5, deadline, [1.0])
    expected = model.order()
    while model.pieces:
        batch = model.take(["count"], 1 << 30, True)
        assert batch is not None
        del expected[: batch.num_rows]
        assert model.order() == expected


def test_many_keys_come_and_go() -> None:
    model = Model()
    for number in range(5000):
        model.push("count", number, 1, 0, 5, 0, [1.0])
        model.take(["count"], 1 << 30, True)
    assert not model.pieces
    assert len(list(model.policy.known_queues())) <= 1100


def test_many_clients_come_and_go() -> None:
    model = Model()
    for number in range(9000):
        model.policy.accounts.get("uid:1", f"passing {number}")
    assert len(list(model.policy.accounts)) <= 4200
    assert model.sessions[0].account.name == "c0"
