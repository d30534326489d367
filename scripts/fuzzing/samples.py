"""One message of every type, every field set: what mutations begin with. Knows the protocol, no mutations."""

import dataclasses
from typing import Any, Final

import msgpack

from penstock.broker import protocol as p
from penstock.broker.columns import Block, pack
from penstock.broker.layout import Column
from penstock.broker.shared import SharedBytes
from penstock.broker.wire import Message, encode

ID: Final = b"sixteen bytes id"
TABLES: Final = {"from client": p.FROM_CLIENT, "to client": p.TO_CLIENT, "from worker": p.FROM_WORKER, "to worker": p.TO_WORKER}
TENSOR: Final = {"dtypes": None, "rank": None, "ragged": "exact"}


def spec(name: str) -> dict[str, Any]:
    """A kernel's, as a worker offers it."""
    return {
        "name": name,
        "version": "1",
        "digest": b"12345678",
        "inputs": [["x", "tensor", TENSOR], ["ms", "row", {"default": 1.0, "min": 0.0, "max": 9.0}]],
        "modes": ["batch", "stream"],
        "combine": "max",
        "idempotent": True,
        "scoped": False,
        "resident": False,
        "max_batch_size": 16,
        "max_batch_cost_ms": 10.0,
        "cost": {"base_ms": 0.0, "per": {"ms": 1.0, "x.bytes": 0.1}},
    }


def blocks() -> dict[str, Block]:
    """Packed, ragged, framed and shared rows: two of each."""
    large = bytes(70_000)
    shared = [SharedBytes((1, 5, 77), offset, 70_000) for offset in (0, 70_000)]
    return {
        "packed": pack([(Column("x", "float32", (2,)), None, [bytes(8), bytes(8)])], 2),
        "ragged": pack([(Column("x", "int32", (), True), [1, 3], [bytes(4), bytes(12)])], 2),
        "mixed": pack([(Column("t", "str", (), True), [2, 1], [b"ab", b"c"]), (Column("x", "uint8"), None, [b"x", b"y"])], 2),
        "framed": pack([(Column("x", "uint8", (70_000,), is_framed=True), None, [large, large])], 2),
        "shared": pack([(Column("x", "uint8", (70_000,), is_framed=True), None, shared)], 2),
    }


def _value(cls: type[Message], name: str, block: Block) -> Any:
    error = p.Error("failed", "it raised", 5.0, "Traceback")
    outcomes = [
        p.Outcome([(ID, 0, 2)], block, None, [0.5], {"compute_ms": 1.0, "worker": "w"}, 0, 1),
        p.Outcome([(ID, 2, 3)], None, error),
    ]
    values = {
        "answers": [p.Answer(0, 2, block), p.Answer(2, 3, error=error)],
        "block": block,
        "blocks": [block, block],
        "checkpoint": block,
        "body": {"id": ID, "state": "queued", "is_handed": True, "uses": [1, 8], "kernel": "echo", "rows": 2, "client": "c"},
        "credit": [100, 1 << 30],
        "device": "cpu" if cls is p.WorkerHello else {"device": "cpu", "fault": ""},
        "digest": b"12345678",
        "error": error,
        "id": ID,
        "key": b"key",
        "kernel": "echo",
        "leases": [1, 2],
        "limits": {"window_rows": 4096},
        "load_ms": 1.0,
        "heartbeat_ms": 1000.0,
        "memory": {"used_fraction": 0.5},
        "mode": "batch",
        "name": "name",
        "op": "drain",
        "state": "ready",
        "shared": {"probe": [1, 5, 77], "min_bytes": 1, "max_bytes": 1 << 20, "held": [5, 0]},
        "segments": [77],
        "slots": [5, 0],
        "what": "jobs",
        "open": ID,
        "unknown": ID,
        "outcomes": outcomes,
        "predicted_ms": 1.0,
        "principal": "uid:1",
        "reason": "why",
        "resident": {"echo": "ready"},
        "scalars": {"ms": [1.0, 2.0], "one": 3},
        "secret": ID,
        "session": ID,
        "specs": [spec("fuzzed")],
        "statics": msgpack.packb({"factor": 2.0}),
        "target": "w",
        "timeout_ms": 1000.0,
        "timings": {"compute_ms": 1.0, "num_runs": 1},
        "traceparent": "00-1-2-01",
    }
    flags = name.startswith(("is_", "wants_")) or name == "take"
    return values.get(name, flags or 3)


def messages(cls: type[Message]) -> list[Message]:
    """With every field, and with none that has a default; once per kind of block."""
    needed = {name: _value(cls, name, blocks()["packed"]) for name, _, default in cls.FIELDS if default is dataclasses.MISSING}
    made = [cls(**needed)]
    for block in blocks().values():
        made.append(cls(**{name: _value(cls, name, block) for name, _, _ in cls.FIELDS}))
        if not {"block", "blocks", "answers", "outcomes"} & {name for name, _, _ in cls.FIELDS}:
            break
    return made


def corpus(table: str) -> list[list[bytes]]:
    """The frames of them all."""
    return [[bytes(f) for f in encode(m)] for cls in TABLES[table].values() for m in messages(cls)]
