"""Who goes first, and with whom: the order of decisions, by examples in virtual time."""

import pytest
from broker_world import spec
from policy_bench import Bench

from penstock.broker.spec import parse
from penstock.broker.tasks import Run

ONE = {"k": parse(spec("k", max_batch_size=1))}


def order(bench: Bench, runs: list[Run]) -> list[int]:
    """Who was run, by their place in `runs`, until nothing is left."""
    seen = list[int]()
    while ran := bench.run():
        seen += [runs.index(run) for run in ran]
    return seen


def test_the_client_with_the_least_service_goes_first() -> None:
    bench = Bench(ONE)
    runs = [bench.submit(30.0, "long") for _ in range(4)] + [bench.submit(10.0, "short") for _ in range(6)]
    seen = ["long" if i < 4 else "short" for i in order(bench, runs)]
    assert seen[:8].count("long") == 2, "three short ones for each long one"


def test_two_backlogged_clients_never_drift_apart_whatever_the_sizes_of_their_tasks() -> None:
    bench = Bench({"k": parse(spec("k", max_batch_size=8))})
    for _ in range(400):
        bench.submit(5.0, "small")
        bench.submit(50.0, "large")
    largest = 0.0
    while {a.name for *_, a in bench.policy.accounts.backlogged} == {"small", "large"}:
        before = dict(bench.service)
        bench.run()
        gap = abs(bench.service.get("small", 0.0) - bench.service.get("large", 0.0))
        largest = max(largest, *(bench.service[name] - before.get(name, 0.0) for name in bench.service))
        assert gap <= 2 * largest


@pytest.mark.parametrize("batch", [1, 8])
def test_weights_give_shares(batch: int) -> None:
    bench = Bench({"k": parse(spec("k", max_batch_size=batch))})
    for n in range(1, 5):
        for _ in range(500):
            bench.submit(10.0, f"c{n}", weight=float(n))
    while bench.policy.accounts.get("uid:1", "c4", 4.0).num_rows > 50:
        bench.run()
    total = sum(bench.service.values())
    for n in range(1, 5):
        assert bench.service[f"c{n}"] / total == pytest.approx(n / 10, rel=0.05)


def test_who_was_away_gets_no_credit_for_it() -> None:
    bench = Bench(ONE)
    for _ in range(50):
        bench.submit(10.0, "busy")
    for _ in range(20):
        bench.run()
    runs = [bench.submit(10.0, "back") for _ in range(20)]
    seen = [ran in runs for _ in range(20) for ran in bench.run()]
    assert 9 <= sum(seen) <= 11, "level from its return on: neither first for long nor last"


def test_a_newcomer_does_not_wait_behind_a_greedy_client() -> None:
    bench = Bench(ONE)
    for _ in range(1000):
        bench.submit(10.0, "greedy")
    for _ in range(5):
        bench.run()
    for _ in range(20):
        run = bench.submit(10.0, "light")
        waited = 0
        while run not in bench.run():
            waited += 1
        assert waited <= 1


def test_priorities_order_a_clients_own_work_and_waiting_raises_them() -> None:
    bench = Bench(ONE)
    runs = [bench.submit(1.0, priority=p) for p in (9, 5, 0, 1)]
    assert order(bench, runs) == [2, 3, 1, 0]
    low = bench.submit(1.0, priority=6)
    bench.now += 3.3  # its class has 3.2 s, the next one 0.05 s
    high = bench.submit(1.0, priority=0)
    assert order(bench, [low, high]) == [0, 1]


def test_the_lowest_class_keeps_a_floor() -> None:
    bench = Bench(ONE, floor_every=4)
    low = [bench.submit(1.0, priority=9) for _ in range(3)]
    for _ in range(40):
        bench.submit(1.0, priority=0)
    seen = [run in low for _ in range(16) for run in bench.run()]
    assert sum(seen) == 3, "one of four, whatever comes at high priority"


def test_in_a_class_the_earliest_time_limit_goes_first_across_batch_keys() -> None:
    bench = Bench(ONE)
    runs = [bench.submit(1.0, statics=s, timeout=t) for s, t in ((b"a", None), (b"b", 50.0), (b"a", 20.0), (b"c", 5.0))]
    assert order(bench, runs) == [3, 2, 1, 0]


def test_what_cannot_finish_any_more_is_found_and_not_run() -> None:
    bench = Bench(ONE)
    hopeless, fine = bench.submit(100.0, timeout=0.15), bench.submit(10.0, timeout=1.0)
    bench.now += 0.1
    assert bench.run() == [fine]
    assert bench.hopeless == [hopeless]


def test_a_bin_keeps_long_tasks_out_of_short_batches() -> None:
    bench = Bench({"k": parse(spec("k", max_batch_size=4))}, boundaries_ms=(50.0,))
    short = [bench.submit(10.0) for _ in range(8)]
    long = [bench.submit(90.0) for _ in range(8)]
    for _ in range(4):
        ran = bench.run()
        assert len(ran) == 4
        assert set(ran) <= set(short) or set(ran) <= set(long)


def test_with_less_than_a_batch_a_much_longer_task_does_not_join() -> None:
    bench = Bench({"k": parse(spec("k", max_batch_size=8))})
    short, near, long = bench.submit(10.0), bench.submit(12.0), bench.submit(400.0)
    assert bench.run() == [short, near], "12 ms with 10 ms ends both sooner; 400 ms would not"
    assert bench.run() == [long]


def test_with_less_than_a_batch_shorter_tasks_ride_along() -> None:
    bench = Bench({"k": parse(spec("k", max_batch_size=8))})
    long = bench.submit(400.0)
    bench.now += 0.001
    short = bench.submit(10.0)
    assert bench.run() == [long, short]


def test_an_incomplete_batch_is_held_exactly_as_long_as_it_may() -> None:
    bench = Bench(max_wait_ms=50.0)
    bench.submit()
    assert bench.pull() is None
    assert bench.policy.wake_at == pytest.approx(bench.now + 0.05)
    bench.now += 0.0499
    assert bench.pull() is None
    bench.now += 0.0001
    lone = bench.pull()
    assert lone is not None and lone.num_rows == 1
    for _ in range(4):
        bench.submit()
    full = bench.pull()
    assert full is not None and full.num_rows == 4, "a full one goes at once"


def test_one_worker_is_kept_from_slow_work_while_there_is_other_work() -> None:
    bench = Bench(ONE)
    slow = bench.submit(900.0)
    bench.now += 0.01
    fast = bench.submit(10.0)
    assert bench.run("a", num_workers=2, num_slow=1) == [fast]
    assert bench.run("a", num_workers=2, num_slow=1) == [slow], "but it does not stay idle"


def test_two_kernels_alternating_both_batch() -> None:
    bench = Bench({n: parse(spec(n, max_batch_size=4)) for n in ("x", "y")})
    for _ in range(8):
        bench.submit(kernel="x")
        bench.submit(kernel="y")
    assert [len(bench.run()) for _ in range(4)] == [4, 4, 4, 4]


def test_other_boundaries_apply_to_what_is_queued() -> None:
    bench = Bench({"k": parse(spec("k", max_batch_size=4))}, max_bins=1)
    runs = [bench.submit(ms) for ms in (10.0, 90.0, 11.0, 91.0, 12.0, 92.0, 13.0, 93.0)]
    config = Bench(boundaries_ms=(50.0,)).policy.config
    for piece in bench.policy.reconfigure(config):
        bench.policy.push(piece)
    bench.policy.check()
    assert bench.run() == runs[0::2]
    assert bench.run() == runs[1::2]


def test_single_tasks_teach_what_a_full_batch_would_take() -> None:
    bench = Bench({"k": parse(spec("k", max_batch_size=32))})
    for _ in range(5):
        bench.submit(30.0)
        batch = bench.pull()
        assert batch is not None
        for _ in range(64):
            bench.submit(30.0)  # what comes while it runs says nothing about it
        bench.policy.completed(batch, "cpu", 30.0)
        while bench.run():
            pass
    (queue,) = bench.policy.known_queues()
    assert queue.share == pytest.approx(1 / 32, rel=0.01)
