"""Hypothesis strategies for blocks, errors, outcomes and every message of the protocol."""

import dataclasses
from typing import Any

from hypothesis import strategies as st

from penstock.broker import protocol as p
from penstock.broker import wire as w
from penstock.broker.columns import Block, pack
from penstock.broker.layout import BLOBS, ITEM_BYTES, Column

COUNTS = st.integers(0, p.MAX_COUNT)
NAMES = st.text(min_size=1, max_size=64)
SMALL = st.integers(0, 3)
PLAIN = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.text(max_size=9)
TIMINGS = st.dictionaries(st.text(max_size=32), st.floats(0, 1e9) | st.integers(0, 99), max_size=16)
MAPS = st.dictionaries(st.text(max_size=9), PLAIN | st.lists(PLAIN, max_size=3), max_size=4)
NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False)


@st.composite
def column(draw: st.DrawFn, name: str) -> Column:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    if dtype in BLOBS:
        return Column(name, dtype, (), True, draw(st.booleans()))
    shape = tuple(draw(st.lists(SMALL, max_size=3)))
    return Column(name, dtype, shape, draw(st.booleans()), draw(st.booleans()))


@st.composite
def rows_of(draw: st.DrawFn, columns: tuple[Column, ...], num_rows: int) -> tuple[Block, list[list[bytes]]]:
    """A block, and the same as one list of rows per column."""
    made, data = list[Any](), list[list[bytes]]()
    for c in columns:
        lengths = draw(st.lists(SMALL, min_size=num_rows, max_size=num_rows)) if c.is_ragged else None
        sizes = [c.item_bytes * n for n in lengths] if lengths is not None else [c.item_bytes] * num_rows
        rows = [draw(st.binary(min_size=1, max_size=1)) * size for size in sizes]
        made.append((c, lengths, rows))
        data.append(rows)
    return pack(made, num_rows), data


@st.composite
def column_sets(draw: st.DrawFn) -> tuple[Column, ...]:
    names = draw(st.lists(NAMES, max_size=3, unique=True))
    return tuple(draw(column(name)) for name in names)


@st.composite
def blocks(draw: st.DrawFn, num_rows: int | None = None) -> Block:
    count = draw(st.integers(0, 4)) if num_rows is None else num_rows
    return draw(rows_of(draw(column_sets()), count))[0]


TEXTS = st.text(max_size=99)
ERRORS = st.builds(p.Error, st.text(min_size=1, max_size=32), TEXTS, st.none() | st.floats(0, p.MAX_TIMEOUT_MS), TEXTS)
SPANS = st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 4096), st.integers(0, 4096))


@st.composite
def outcomes(draw: st.DrawFn) -> p.Outcome:
    is_error = draw(st.booleans())
    return p.Outcome(
        draw(st.lists(SPANS, max_size=3)), None if is_error else draw(blocks()), draw(ERRORS) if is_error else None,
        draw(st.lists(st.floats(0, 1e9), max_size=3)), draw(st.none() | MAPS), draw(COUNTS), draw(COUNTS),
    )  # fmt: skip


@st.composite
def answers(draw: st.DrawFn) -> p.Answer:
    start, num_rows = draw(st.integers(0, 4000)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        return p.Answer(start, start + num_rows, None, draw(ERRORS))
    return p.Answer(start, start + num_rows, draw(blocks(num_rows)))


NESTED = st.recursive(
    PLAIN | st.floats() | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)
_SCALARS = st.dictionaries(st.text(max_size=9), NUMBERS | st.lists(NUMBERS, max_size=4), max_size=3)
_PAIRS = st.lists(COUNTS, min_size=2, max_size=2)
_IDS = st.binary(min_size=16, max_size=16)
_BY_NAME: dict[str, st.SearchStrategy[Any]] = {
    "answers": st.lists(answers(), max_size=3), "attempt": COUNTS, "block": blocks(), "blocks": st.lists(blocks(), max_size=3),
    "checkpoint": st.none() | blocks(), "ended": st.binary(max_size=16),
    "body": MAPS, "credit": _PAIRS, "device": MAPS, "digest": st.binary(max_size=32), "error": ERRORS, "id": _IDS,
    "is_again": st.booleans(), "is_durable": st.booleans(), "is_fault": st.booleans(), "is_resumed": st.booleans(),
    "key": st.none() | st.binary(min_size=1, max_size=128),
    "leases": st.lists(COUNTS, max_size=5), "limits": MAPS, "load_ms": st.floats(0, 1e9), "heartbeat_ms": st.floats(0, 1e9),
    "memory": MAPS, "mode": st.text(min_size=1, max_size=16), "name": NAMES, "kernel": NAMES, "op": NAMES, "state": NAMES,
    "shared": MAPS, "segments": st.lists(COUNTS, max_size=4), "slots": st.lists(COUNTS, max_size=4),
    "is_unshared": st.booleans(),
    "what": st.sampled_from(["", "tasks", "jobs", "dead"]), "take": st.booleans(),
    "open": st.binary(max_size=64), "unknown": st.binary(max_size=64), "outcomes": st.lists(outcomes(), max_size=3),
    "predicted_ms": st.floats(0, 1e9), "principal": st.text(max_size=99), "priority": st.integers(0, 9),
    "reason": st.text(max_size=99), "resident": MAPS,
    "scalars": _SCALARS, "secret": _IDS, "session": _IDS, "specs": st.lists(MAPS, max_size=2),
    "statics": st.binary(max_size=99),
    "start": st.integers(0, 4096), "stop": st.integers(0, 4096), "target": st.text(max_size=64),
    "timeout_ms": st.none() | st.floats(-1e9, 1e9), "timings": TIMINGS, "traceparent": st.none() | st.text(max_size=64),
    "wants_accepted": st.booleans(), "wants_partials": st.booleans(),
}  # fmt: skip


def messages(cls: type[w.Message]) -> st.SearchStrategy[Any]:
    """Any message of a class, with any of its fields at their defaults."""

    @st.composite
    def build(draw: st.DrawFn) -> Any:
        values = dict[str, Any]()
        for name, _, default in cls.FIELDS:
            if default is dataclasses.MISSING or draw(st.booleans()):
                chosen = _BY_NAME.get(name, COUNTS)
                if name == "id" and cls in (p.Status, p.Fetch, p.Control):
                    chosen = st.none() | _IDS
                elif (cls, name) in ((p.WorkerHello, "device"), (p.Reply, "error")):
                    chosen = NAMES if name == "device" else st.none() | ERRORS
                values[name] = draw(chosen)
        return cls(**values)

    return build()


EVERY = {
    **{("from client", t): (p.FROM_CLIENT, c) for t, c in p.FROM_CLIENT.items()},
    **{("to client", t): (p.TO_CLIENT, c) for t, c in p.TO_CLIENT.items()},
    **{("from worker", t): (p.FROM_WORKER, c) for t, c in p.FROM_WORKER.items()},
    **{("to worker", t): (p.TO_WORKER, c) for t, c in p.TO_WORKER.items()},
}
