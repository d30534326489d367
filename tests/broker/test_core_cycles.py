"""The broker runs without the cyclic collector, so nothing that ends may hang in a cycle."""

import gc
from collections import Counter
from contextlib import suppress

from broker_world import BLOB, World, blob_rows, spec, tensor_rows

from penstock.broker import protocol as p
from penstock.broker.wire import ProtocolError, decode, encode

FAILED = p.Error("kernel_failed", "it broke")


def test_what_has_ended_is_freed_without_the_collector() -> None:
    w = World(window_rows=10_000)
    streams = spec("stream", modes=["stream"], max_batch_size=2)
    client = w.client()
    worker = w.worker(spec(max_batch_size=3), streams, spec("blob", (BLOB,)), batches=4, pid=5000)
    block = tensor_rows(b"b" * 16, 4)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for number in range(300):
            cancelled = client.submit(5, statics=b"%d" % number)
            client.submit(2, timeout_ms=10.0)
            client.submit(kernel="nobody has it")
            client.submit(scalars={"y": 1.0})
            client.submit(block=block, key=b"%d" % (number // 2))
            client.submit(block=block, key=b"%d" % (number // 2))
            client.submit(kernel="stream", wants_partials=True)
            client.submit(run_id=(run := b"%016d" % number), kernel="blob", block=blob_rows(run, [20, 30]))
            client.send(p.Cancel(id=cancelled, start=1, stop=3))
            if number % 10 == 0:
                worker.crash()
                worker = w.worker(*worker.specs, batches=4, pid=5001 + number)
            worker.answer(next(iter(worker.leases)), 0, 1, FAILED)
            w.now += 0.02
            w.turn()
            worker.finish_all()
            client.send(p.Ack(seq=client.received))
            client.got.clear()
        gc.collect()
        left = Counter(type(o).__qualname__ for o in gc.garbage if type(o).__module__.startswith("penstock"))
        assert sum(left.values()) < 30, left
        assert sum(isinstance(o, dict | list | tuple) for o in gc.garbage) < 1000
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_what_is_refused_as_malformed_is_freed_too() -> None:
    frames = [bytes(f) for f in encode(p.Submit(id=b"i" * 16, kernel="k", block=tensor_rows(b"b" * 16, 3)))]
    gc.collect()
    gc.disable()
    try:
        for number in range(600):
            wrong = [*frames[:2], frames[2][: number % 50]] if number % 2 else [frames[0], frames[1][: number % 60], frames[2]]
            with suppress(ProtocolError):
                decode(p.FROM_CLIENT, wrong)
        assert gc.collect() < 100
    finally:
        gc.enable()
