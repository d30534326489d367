"""What the broker does about workers and kernels that fail: breakers, emergencies, smaller batches, and who is told."""

from broker_world import Declared, FakeClient, World, spec

from penstock.broker import protocol as p
from penstock.broker.scheduling.config import SchedulingConfig

FAILED = p.Error("kernel_failed", "it broke")


def events(client: FakeClient) -> dict[str, list[str]]:
    client.send(p.Status(request=1))
    (reply,) = client.take(p.Reply)
    told: dict[str, list[str]] = {}
    for event in reply.body["events"]:
        told.setdefault(event["kind"], []).append(event["reason"])
    return told


def test_a_worker_that_keeps_failing_a_kernel_gets_none_of_it_until_a_probe_succeeds() -> None:
    w = World()
    client = w.client()
    bad = w.worker(spec(max_batch_size=2), name="bad")
    for _ in range(5):
        client.submit(2)
        bad.finish(error=FAILED)
    assert "breaker_opened" in events(client)
    waiting = client.submit(2)
    assert bad.sizes() == []
    client.send(p.Status(request=2, id=waiting))
    (reply,) = client.take(p.Reply)
    assert "keeps failing" in reply.body["why"]
    w.advance(1.0)
    assert bad.sizes() == [2], "one batch is the probe"
    bad.finish()
    assert "breaker_closed" in events(client)


def test_the_other_worker_goes_on_while_a_breaker_is_open() -> None:
    w = World()
    client = w.client()
    bad = w.worker(spec(max_batch_size=2), name="bad")
    for _ in range(5):
        client.submit(2)
        bad.finish(error=FAILED)
    good = w.worker(spec(max_batch_size=2), name="good")
    client.submit(2)
    assert (bad.sizes(), good.sizes()) == ([], [2])


def test_bad_input_of_one_client_opens_no_breaker() -> None:
    w = World()
    clumsy, other = w.client("clumsy"), w.client("other")
    worker = w.worker()
    for _ in range(20):
        clumsy.submit()
        worker.finish(error=FAILED)
    assert "breaker_opened" not in events(clumsy)
    other.submit()
    assert worker.sizes() == [1]


def test_batches_that_only_succeed_row_by_row_are_an_emergency() -> None:
    w = World(liveness_s=100.0, session_ttl_s=100.0)
    client, worker = w.client(), w.worker()
    for _ in range(3):
        client.submit(4)
        worker.finish(num_runs=7)
    assert "one task at a time" in events(client)["emergency"][0]
    client.submit(4)
    assert worker.sizes() == [1]
    w.advance(31.0)
    worker.finish()
    assert worker.sizes() == [3]


def test_running_out_of_memory_halves_the_batches_of_that_worker() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    client.submit(8)
    worker.finish(num_runs=3, num_oom=1, oom_rows=8)
    assert "out of memory with 8 rows" in events(client)["out_of_memory"][0]
    client.submit(8)
    assert worker.sizes() == [4]


def test_nearly_full_memory_is_told() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    client.submit(8)
    worker.finish()
    worker.send(p.WorkerHeartbeat(session=worker.secret, progress=1, memory={"used_fraction": 0.99}))
    w.advance(1.0)
    assert "99 % of the memory" in events(client)["memory"][0]


def test_what_a_broken_device_held_is_suspect_and_what_a_healthy_one_gives_back_is_not() -> None:
    for is_fault in (True, False):
        w = World()
        client = w.client()
        worker = w.worker(spec(max_batch_size=4), name="gpu0")
        run = client.submit(4)
        assert worker.sizes() == [4]
        worker.send(p.Goodbye(reason="the device is broken: an illegal access", is_fault=is_fault))
        second = w.worker(spec(max_batch_size=4), name="gpu0", batches=8)
        assert second.sizes() == ([2] if is_fault else [4])
        while second.leases:
            second.finish(next(iter(second.leases)))
        assert None not in client.results(run, 4)


def test_the_reason_of_a_broken_device_is_the_evidence() -> None:
    w = World(max_attempts=2)
    client = w.client()
    run = client.submit(1)
    for _ in range(2):
        worker = w.worker(name="gpu0")
        assert worker.sizes() == [1]
        worker.send(p.Goodbye(reason="the device is broken: an illegal access", is_fault=True))
    error = client.row(run).error
    assert error is not None
    assert (error.code, "an illegal access" in error.detail) == ("dead", True)


def test_a_worker_that_is_back_after_a_fault_gets_small_batches_first() -> None:
    w = World(scheduling=SchedulingConfig(max_bins=1))
    client = w.client()
    worker = w.worker(spec(max_batch_size=16), name="gpu0", facts={"fault": "a run of kernel 'spin' has taken 10.2 s"})
    client.submit(100)
    seen = []
    while worker.leases:
        seen += worker.sizes()
        worker.finish()
    assert seen[:5] == [1, 2, 4, 8, 16]
    assert sum(seen) == 100
    assert any("'spin' has taken" in reason for reason in events(client)["fault"])


def test_only_long_batches_say_what_they_are_predicted_to_take() -> None:
    w = World(predictor=Declared())
    client = w.client()
    long, short = (spec(name, base_ms=ms) for name, ms in (("long", 5000.0), ("short", 5.0)))
    worker = w.worker(long, short, batches=2)
    for kernel in ("long", "short"):
        client.submit(kernel=kernel)
        worker_told = {lease.kernel: lease.predicted_ms for lease in worker.leases.values()}
        if kernel == "long":
            assert worker_told["long"] >= 5000.0
            worker.finish()
    assert worker_told["short"] == 0.0
