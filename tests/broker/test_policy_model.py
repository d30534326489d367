"""The pull policy against the simplest thing that could be right: a sorted list of rows per batch key."""

from typing import Any

from broker_world import spec, tensor_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.broker.policy import Offer, PullPolicy
from penstock.broker.sessions import ClientSession
from penstock.broker.spec import parse
from penstock.broker.tasks import Piece, Run

SPECS = {
    "count": parse(spec("count", max_batch_size=5)),
    "sum": parse(spec("sum", combine="sum", max_batch_cost_ms=9.0, max_batch_size=6)),
    "max": parse(spec("max", combine="max", max_batch_cost_ms=4.0, max_batch_size=6)),
    "stream": parse(spec("stream", modes=["stream"])),
}
SESSION = ClientSession("uid:1", "c", b"s" * 16, b"r", 0.0)
BLOCKS = {rows: tensor_rows(b"b" * 16, rows) for rows in range(1, 8)}
ROW_BYTES = 20

Row = tuple[int, float, int, int]
"""(priority, deadline, seq, row): the order in which rows go."""


class Model:
    """The policy, and beside it what it should hold."""

    def __init__(self) -> None:
        self.policy = PullPolicy()
        self.rows: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
        self.pieces: list[Piece] = []
        self.num_runs = 0

    def push(self, kernel: str, variant: int, rows: int, priority: int, deadline: int, costs: list[float]) -> None:
        self.num_runs += 1
        run = Run(SESSION, b"%016d" % self.num_runs, kernel, rows, self.num_runs, 0.0)
        run.priority, run.deadline = priority, float(deadline or "inf")
        run.block, run.num_bytes = BLOCKS[rows], rows * ROW_BYTES
        run.cost_ms = (costs * 7)[:rows]
        mode = SPECS[kernel].modes[0]
        key = (kernel, SPECS[kernel].digest, mode, b"%d" % variant, (), (), "")
        run.queue = self.policy.queue(key, SPECS[kernel], mode)
        (piece,) = run.pieces
        self.policy.push(piece)
        self.pieces.append(piece)

    def order(self, queue: Any) -> list[tuple[Any, ...]]:
        """(sort key, piece, row) of every row queued under a batch key."""
        mine = [p for p in self.pieces if p.run.queue is queue]
        return sorted(
            ((p.run.priority, p.run.deadline, p.run.seq, row, id(p)), p, row) for p in mine for row in range(p.start, p.stop)
        )

    def expected(self, kernels: list[str], max_bytes: int, is_idle: bool) -> list[tuple[Piece, int]] | None:
        """Rows one by one from the most urgent head's key, while the budgets last."""
        queues = {id(p.run.queue): p.run.queue for p in self.pieces if p.run.kernel in kernels}
        heads = [self.order(queue)[0] for queue in queues.values()]
        if not heads:
            return None
        queue = min(heads)[1].run.queue
        made, rows, cost = SPECS[queue.spec.name], list[tuple[Piece, int]](), 0.0
        for _, piece, row in self.order(queue):
            alone = piece.run.cost_ms[row]
            after = cost + alone if made.combine == "sum" else max(cost, alone)
            is_stream = queue.mode == "stream"
            if rows and (piece.is_isolated or rows[0][0].is_isolated) and rows[-1][0] is not piece:
                break
            if piece.is_isolated and not is_idle:
                break  # a suspect has a worker to itself
            over_count = len(rows) == (1 if is_stream else made.max_batch_size)
            over_cost = made.max_batch_cost_ms is not None and cost > 0.0 and after > made.max_batch_cost_ms
            over_bytes = not is_stream and (len(rows) + 1) * ROW_BYTES > max_bytes
            if over_count or over_cost or over_bytes:
                if not rows and is_idle:
                    rows.append((piece, row))
                break
            rows.append((piece, row))
            cost = after
        return rows or None

    def take(self, kernels: list[str], max_bytes: int, is_idle: bool) -> None:
        kinds = {(k, SPECS[k].digest, SPECS[k].modes[0]) for k in kernels}
        expected = self.expected(kernels, max_bytes, is_idle)
        taken = self.policy.take(Offer(kinds, max_bytes, is_idle))
        if taken is None:
            assert expected is None
            return
        queue, picked = taken
        assert expected == [(piece, piece.start + i) for piece, rows in picked for i in range(rows)]
        assert all(piece.run.queue is queue and rows > 0 for piece, rows in picked)
        for piece, rows in picked:
            if rows == piece.num_rows:
                self.remove(piece)
            else:
                self.policy.trim(piece, piece.start + rows, piece.stop)

    def remove(self, piece: Piece) -> None:
        self.policy.remove(piece)
        self.pieces.remove(piece)

    def check(self) -> None:
        self.policy.check()
        assert self.policy.num_rows == sum(p.num_rows for p in self.pieces)
        shown = sum(row["queued"] for row in self.policy.occupancy())
        assert shown == self.policy.num_rows


PUSH = st.tuples(
    st.just("push"), st.sampled_from(list(SPECS)), st.integers(0, 1), st.integers(1, 7), st.integers(0, 2), st.integers(0, 2),
    st.lists(st.integers(1, 12).map(float), min_size=1, max_size=3),
)  # fmt: skip
TAKE = st.tuples(
    st.just("take"), st.lists(st.sampled_from(list(SPECS)), max_size=4, unique=True),
    st.sampled_from([1 << 30, 0, -50, 25, 70]), st.booleans(),
)  # fmt: skip
CHANGE = st.tuples(st.sampled_from(["remove", "trim", "isolate", "again"]), st.integers(0, 99), st.integers(0, 9))


@given(steps=st.lists(PUSH | PUSH | TAKE | CHANGE, max_size=30))
@settings(max_examples=400)
def test_the_policy_is_a_sorted_list(steps: list[tuple[Any, ...]]) -> None:
    model = Model()
    for what, *args in steps:
        if what == "push":
            model.push(*args)
        elif what == "take":
            model.take(*args)
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
    for _ in range(200):
        if not model.pieces:
            break
        model.take(list(SPECS), 1 << 30, True)
        model.check()
    assert not model.pieces
    assert model.policy.take(Offer({(k, s.digest, s.modes[0]) for k, s in SPECS.items()}, 1 << 30, True)) is None


def test_many_keys_come_and_go() -> None:
    model = Model()
    for number in range(5000):
        model.push("count", number, 1, 5, 0, [1.0])
        model.take(["count"], 1 << 30, True)
    assert not model.pieces
    assert len(model.policy._queues) <= 1100
