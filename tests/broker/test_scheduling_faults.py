"""Faults that the scheduler once had, each by the smallest history that showed it."""

import math
from dataclasses import replace
from typing import Any

import pytest
from broker_world import (
    WHOLE_BATCHES,
    Declared,
    FakeClient,
    FakeWorker,
    World,
    X,
    number_per_row,
    spec,
    tensor_rows,
)
from policy_bench import Bench

from penstock.broker import protocol as p
from penstock.broker.configuration import Configuration, Settings
from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.scheduling.quotas import ClientRules
from penstock.broker.wire import ProtocolError


def costly(name: str = "echo", **fields: Any) -> dict[str, Any]:
    return spec(name, [X, number_per_row("ms")], per={"ms": 1.0}, **fields)


def reload_to(w: World, scheduling: SchedulingConfig) -> None:
    config = w.state.config
    current = Settings(config, w.state.policy.config, {})
    w.core.operators.configuration = Configuration(current, lambda: Settings(config, scheduling, {}), w.now)
    assert w.core.operators.reload(w.now) is None


def make_known(w: World, worker: FakeWorker, client: FakeClient, ms: float, kernel: str) -> None:
    """Let the broker measure a kernel often enough to go by it."""
    for _ in range(25):
        client.submit(kernel=kernel)
        w.now += 0.001
        while worker.leases:
            worker.finish(compute_ms=ms)


def test_a_reload_with_other_bins_while_a_lease_is_out() -> None:
    w = World(predictor=Declared())
    worker, client = w.worker(costly()), w.client()
    run = client.submit(scalars={"ms": 700.0})
    reload_to(w, replace(WHOLE_BATCHES, max_bins=1))
    worker.finish(compute_ms=700.0)
    assert client.row(run).num_finals == 1


def test_a_queue_that_was_forgotten_comes_back_with_the_bins_of_now() -> None:
    w = World(replace(WHOLE_BATCHES, max_bins=1), Declared(), window_rows=5000)
    first, client = w.worker(costly(), pid=1, batches=2), w.client()
    client.submit(scalars={"ms": 700.0}, statics=b"first")
    for number in range(1100):  # so many other batch keys that the empty queue of the first is dropped
        key = ("echo", b"version1", "batch", b"%d" % number, (), (), "")
        w.state.policy.queue(key, w.state.kernels.known["echo"], "batch")
    reload_to(w, replace(WHOLE_BATCHES, max_bins=8))
    first.crash()
    client.submit(scalars={"ms": 10.0}, statics=b"first")
    assert sum(w.worker(costly(), pid=2, name="second").finish_all()) == 2


def test_settings_that_cannot_be_applied_are_refused_before_anything_changes() -> None:
    with pytest.raises(ValueError, match="1 to 4096"):
        SchedulingConfig(first_batch_sizes=(5000, 32, 16))


@pytest.mark.parametrize("name", ["compute_ms", "num_runs", "oom_rows"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e9])
def test_timings_that_cannot_be_are_no_message(name: str, value: float) -> None:
    w = World()
    worker, client = w.worker(), w.client()
    client.submit()
    with pytest.raises(ProtocolError, match="timings"):
        worker.finish(**{name: value})


def test_what_was_guessed_when_it_came_is_not_dropped_for_that_guess() -> None:
    w = World(SchedulingConfig(first_batch_sizes=(1, 1, 1)))
    worker, client = w.worker(costly(max_batch_size=1)), w.client()
    runs = [client.submit(scalars={"ms": 10_000.0}, timeout_ms=5000.0) for _ in range(30)]
    while worker.leases:
        w.now += 0.01
        worker.finish(compute_ms=10.0)
    assert all(client.row(run).error is None for run in runs)


def test_work_of_other_workers_kernels_is_not_ahead() -> None:
    w = World()
    busy = w.worker(spec("a", base_ms=1000.0, max_batch_size=1), name="busy")
    idle = w.worker(spec("b", base_ms=10.0, max_batch_size=1), name="idle")
    client = w.client()
    make_known(w, busy, client, 1000.0, "a")
    make_known(w, idle, client, 10.0, "b")
    for _ in range(40):
        client.submit(kernel="a")
    run = client.submit(kernel="b", timeout_ms=5000.0)
    assert run not in client.refused
    assert idle.leases


def test_own_work_of_a_later_class_is_not_ahead() -> None:
    w = World()
    worker, client = w.worker(spec("a", base_ms=1000.0, max_batch_size=1)), w.client()
    make_known(w, worker, client, 1000.0, "a")
    for _ in range(40):
        client.submit(kernel="a", priority=9)
    assert client.submit(kernel="a", timeout_ms=5000.0, priority=0) not in client.refused


def test_a_new_batch_key_is_not_refused_by_a_guess() -> None:
    w = World()
    worker, client = w.worker(spec("a", base_ms=10.0, max_batch_size=64)), w.client()
    make_known(w, worker, client, 10.0, "a")
    assert client.submit(64, kernel="a", timeout_ms=50.0, statics=b"other") not in client.refused


def test_a_submission_that_shares_an_outcome_costs_nothing() -> None:
    w = World()
    worker, client = w.worker(spec("a", base_ms=1000.0, max_batch_size=1)), w.client()
    make_known(w, worker, client, 1000.0, "a")
    block = tensor_rows(b"b" * 16, 1)
    for _ in range(3):
        client.submit(kernel="a")
    first = client.submit(kernel="a", block=block, key=b"k", timeout_ms=5500.0)
    again = client.submit(kernel="a", block=block, key=b"k", timeout_ms=5500.0)
    assert not {first, again} & set(client.refused)


def test_a_lost_worker_does_not_teach_that_waits_are_long() -> None:
    w = World()
    worker, client = w.worker(spec("a", base_ms=100.0, max_batch_size=64), pid=1, name="w1"), w.client()
    make_known(w, worker, client, 100.0, "a")
    for _ in range(60):
        client.submit(kernel="a", timeout_ms=60_000.0, is_turn=False)
    w.turn()
    for second in range(4):
        w.now += 1.0
        worker.heartbeat(second + 1)
    worker.crash()
    w.worker(spec("a", base_ms=100.0, max_batch_size=64), pid=2, name="w2").finish_all()
    assert client.submit(kernel="a", timeout_ms=300.0) not in client.refused


def test_a_suspect_gets_its_worker_although_others_stream() -> None:
    w = World(predictor=Declared())
    both = w.worker(spec(), spec("s", modes=["stream"], max_batch_size=2), pid=2, name="both")
    mine, streaming = w.client("mine"), w.client("streaming")
    for _ in range(4):
        streaming.submit(kernel="s", wants_partials=True)
    first = w.worker(spec(), pid=1, name="first")
    mine.submit()
    if not first.leases:
        both.finish(next(token for token, assign in both.leases.items() if assign.mode == "batch"))
        mine.submit()
    assert first.leases
    first.crash()
    for _ in range(50):
        w.now += 0.1
        w.turn()
        if any(assign.mode == "batch" for assign in both.leases.values()):
            return
        streaming.submit(kernel="s", wants_partials=True)
        both.finish(next(iter(both.leases)))
    pytest.fail("the suspect starves")


def test_a_spared_worker_is_not_spared_for_one_that_may_not_run_it() -> None:
    w = World()
    workers = [w.worker(name="w1"), w.worker(name="w2")]
    w.core.dispatch._spared.add(("w1", "echo"))
    for _ in range(5):
        w.state.breakers.finished("w2", "echo", True, w.now)
    w.client().submit()
    assert any(worker.leases for worker in workers)


def test_a_cancelled_probe_closes_no_breaker() -> None:
    w = World()
    worker, client = w.worker(), w.client()
    for _ in range(5):
        w.state.breakers.finished("worker", "echo", True, w.now)
    w.advance(1.6)
    run = client.submit()
    assert worker.leases
    client.send(p.Cancel(id=run))
    worker.finish(error=p.Error("cancelled", "cancelled before it began"), compute_ms=0.0, num_runs=0)
    assert not w.state.breakers.is_all_closed


def test_device_seconds_are_split_as_they_were_used() -> None:
    w = World(predictor=Declared())
    w.state.quotas.replace({"small": ClientRules(device_s_per_s=0.05)})
    worker = w.worker(costly(combine="sum", max_batch_size=64))
    big, small = w.client("big"), w.client("small")
    big.submit(scalars={"ms": 1.0})
    small.submit(31, scalars={"ms": 1.0}, is_turn=False)
    big.submit(scalars={"ms": 90.0})
    worker.finish(compute_ms=1.0)
    worker.finish(compute_ms=121.0)
    over = w.state.quotas.check(("uid:1", "small"), 1, 0, 0, 0, w.now)
    assert over is None, "31 ms of 50"


def test_the_next_batch_begins_when_the_first_is_lost_on_the_way() -> None:
    w = World(predictor=Declared())
    worker, client = w.worker(spec(base_ms=100.0, max_batch_size=1), batches=2), w.client()
    for _ in range(3):
        client.submit()
    w.advance(0.095)
    _, second = worker.leases
    worker.connect()
    worker.hello()
    worker.ready([second])
    (session,) = w.state.workers.values()
    assert session.leases[second].began_at == w.now


def test_a_full_batch_does_not_wait_behind_a_held_one() -> None:
    bench = Bench(max_wait_ms=50.0)
    bench.submit(statics=b"lone")
    bench.now += 0.001
    for _ in range(4):
        bench.submit(statics=b"many")
    batch = bench.pull()
    assert batch is not None and batch.is_full


def test_the_watch_hears_of_every_batch() -> None:
    """Of short batches few are learned from; a kernel that became one of those looked as if it had lost its throughput."""
    w = World()
    worker, client = w.worker(), w.client()
    for _ in range(100):
        client.submit()
        worker.finish(compute_ms=0.1)
    assert w.core.dispatch._watch._cases["echo"].figures._num_batches == 100


def test_bad_input_of_one_client_says_nothing_of_a_probe() -> None:
    w = World()
    worker, client = w.worker(), w.client()
    for _ in range(5):
        w.state.breakers.finished("worker", "echo", True, w.now)
    w.advance(1.6)
    client.submit()
    worker.finish(error=p.Error("kernel_failed", "bad input"))
    assert not w.state.breakers.is_all_closed
