"""Workers that vanish, hang, come back, drain and leave; poison is found and its batch-mates are done."""

import pytest
from broker_world import FakeClient, FakeWorker, World, spec, tag

from penstock.broker import protocol as p
from penstock.broker.events import ProcessEnded, Received
from penstock.broker.state import BACK


def crash_on(w: World, victims: list[tuple[bytes, int]], limit: int = 60, **fields: object) -> int:
    """Workers come one after another; each dies when its batch holds one of the victims. Returns the number of deaths."""
    deaths = 0
    for number in range(limit):
        worker = w.worker(spec(**fields), pid=5000 + number, name=f"w{number}")  # type: ignore[arg-type]
        while worker.leases:
            if any(row in victims for row in worker.batches()[0]):
                worker.crash()
                deaths += 1
                break
            worker.finish()
        else:
            worker.send(p.Goodbye())
            return deaths
    raise AssertionError("it goes on for ever")


@pytest.mark.parametrize("is_one_run", [True, False])
def test_what_kills_a_worker_alone_twice_is_dead_and_its_mates_are_done(is_one_run: bool) -> None:
    w = World()
    client = w.client()
    runs = [client.submit(8)] if is_one_run else [client.submit() for _ in range(8)]
    rows = [(runs[0], row) for row in range(8)] if is_one_run else [(run, 0) for run in runs]
    deaths = crash_on(w, [rows[5]])
    outcomes = [client.row(*row) for row in rows]
    assert [g.error.code if g.error else "done" for g in outcomes] == ["done"] * 5 + ["dead"] + ["done"] * 2
    assert all(g.num_finals == 1 for g in outcomes)
    dead = outcomes[5].error
    assert dead is not None
    assert "alone" in dead.message and "has ended" in dead.detail
    assert deaths <= 5


def test_suspects_return_in_halves_and_are_never_topped_up() -> None:
    w = World()
    client, worker = w.client(), w.worker(pid=5000)
    run = client.submit(8)
    others = [client.submit() for _ in range(4)]
    worker.crash()
    sizes = list[list[tuple[bytes, int]]]()
    worker = w.worker(pid=5001)
    while worker.leases:
        sizes.append(worker.batches()[0])
        worker.finish()
    suspects = sorted([len(batch) for batch in sizes if batch[0][0] == run])
    assert suspects == [4, 4]
    assert all(len({r == run for r, _ in batch}) == 1 for batch in sizes), "fresh tasks never join suspects"
    assert all(client.row(other).num_finals == 1 for other in others)
    assert w.counters["redelivered"] == 8


@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_who_was_queued_behind_a_killer_is_not_blamed(max_batch_size: int) -> None:
    """Several batches in one worker: its death tells nothing of any one of them."""
    w = World()
    client = w.client()
    runs = [client.submit() for _ in range(12)]
    killers = {runs[0], runs[6]}
    for number in range(40):
        worker = w.worker(spec(max_batch_size=max_batch_size), pid=5000 + number, batches=4)
        while worker.leases:
            if any(run in killers for run, _ in worker.batches()[0]):
                worker.crash()
                break
            worker.finish(next(iter(worker.leases)))
        else:
            worker.send(p.Goodbye())
    assert {run for run in runs if client.results(run) == ["dead"]} == killers
    assert all(client.row(run).num_finals == 1 for run in runs)


def test_a_suspect_has_a_worker_to_itself() -> None:
    w = World()
    client, worker = w.client(), w.worker(pid=5000)
    suspect = client.submit()
    worker.crash()
    worker = w.worker(pid=5001, batches=4)
    assert worker.batches() == [[(suspect, 0)]]
    other = client.submit()
    assert worker.sizes() == [1], "nothing joins it"
    worker.finish()
    assert worker.batches() == [[(other, 0)]]
    worker.finish()
    assert client.row(suspect).num_finals == client.row(other).num_finals == 1


def test_rows_already_answered_are_not_redelivered() -> None:
    w = World()
    client, worker = w.client(), w.worker(pid=5000)
    run = client.submit(4)
    worker.answer(worker.the_lease(), 1, 3)
    client.send(p.Cancel(id=run, start=3, stop=4))
    worker.crash()
    assert w.counters["redelivered"] == 1
    w.worker().finish_all()
    assert [client.row(run, row).num_finals for row in range(4)] == [1] * 4
    assert client.row(run, 1).outcome.attempt == 1  # type: ignore[union-attr]
    assert client.row(run, 0).outcome.attempt == 1, "it was not alone: row 3 ran as well"  # type: ignore[union-attr]


def test_what_is_cancelled_in_a_batch_does_not_leave_the_others_alone() -> None:
    """The row that was cancelled, or whose time was over, may be what killed the worker."""
    w = World(max_attempts=1)
    client, worker = w.client(), w.worker(pid=5000)
    run = client.submit(2)
    client.send(p.Cancel(id=run, start=1, stop=2))
    worker.crash()
    w.worker().finish_all()
    assert client.results(run, 2) == [tag(run, 0), "cancelled"]


def test_a_row_whose_batch_mates_were_answered_was_alone() -> None:
    w = World(max_attempts=1)
    client, worker = w.client(), w.worker(pid=5000)
    run = client.submit(2)
    worker.answer(worker.the_lease(), 1, 2)
    worker.crash()
    assert client.results(run, 2) == ["dead", tag(run, 1)]


def test_who_says_goodbye_has_answered_what_had_begun() -> None:
    """What it still holds is given to another, also if it may run only once."""
    w = World()
    client, worker = w.client(), w.worker(spec(idempotent=False), batches=1)
    run = client.submit()
    worker.send(p.Goodbye(reason="interrupted"))
    w.worker(spec(idempotent=False)).finish_all()
    assert client.row(run).error is None


def test_who_is_expelled_may_have_begun() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(idempotent=False), batches=1, principal="worker:one")
    run, waiting = client.submit(), client.submit()
    w.core.workers.expel(["worker:one"], w.now)
    w.worker(spec(idempotent=False)).finish_all()
    assert client.results(run) == ["worker_lost"]
    assert client.row(waiting).error is None, "it had not started"
    assert worker.take(p.Fault)


def test_a_kernel_that_is_not_idempotent_is_not_run_again() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(idempotent=False), pid=5000)
    run = client.submit(3)
    worker.answer(worker.the_lease(), 0, 1)
    waiting = client.submit()
    worker.crash()
    assert client.results(run, 3)[1:] == ["worker_lost"] * 2
    assert "not idempotent" in client.row(run, 1).error.message  # type: ignore[union-attr]
    w.worker(spec(idempotent=False)).finish_all()
    assert client.row(waiting).error is None, "it had not started"


def test_a_silent_worker_is_lost_after_its_liveness() -> None:
    w = World(liveness_s=5.0)
    client, worker = w.client(), w.worker()
    run = client.submit()
    w.advance(4.9)
    assert w.core.workers.by_secret
    w.advance(2.0)
    assert not w.core.workers.by_secret
    w.worker(name="next").finish_all()
    assert client.row(run).num_finals == 1
    worker.finish()
    assert worker.take(p.Fault)[-1].error.code == "unattached", "it is told that its session is over"
    assert client.row(run).num_finals == 1


def heartbeats(w: World, worker: FakeWorker, seconds: int, progress: int = 0) -> None:
    for _ in range(seconds):
        w.advance(1.0)
        worker.heartbeat(progress)


def test_a_worker_that_lives_but_makes_no_progress_is_lost() -> None:
    w = World(progress_s=20.0, session_ttl_s=1e6)
    client, worker = w.client(), w.worker()
    heartbeats(w, worker, 60)
    assert w.core.workers.by_secret, "without work nobody expects progress"
    worker.heartbeat(1)
    client.submit()
    heartbeats(w, worker, 19, progress=1)
    assert w.core.workers.by_secret
    heartbeats(w, worker, 5, progress=1)
    assert not w.core.workers.by_secret
    assert w.counters["workers_lost"] == 1


def test_progress_renews_a_lease() -> None:
    w = World(progress_s=20.0, session_ttl_s=1e6)
    client, worker = w.client(), w.worker()
    client.submit()
    for second in range(60):
        heartbeats(w, worker, 1, progress=second)
    assert w.core.workers.by_secret
    worker.finish()


def test_waiting_idle_for_long_is_not_held_against_the_next_lease() -> None:
    """Progress counts from the assignment: an idle worker made none."""
    w = World(progress_s=20.0, session_ttl_s=1e6)
    client, worker = w.client(), w.worker()
    heartbeats(w, worker, 100)
    client.submit()
    heartbeats(w, worker, 10)
    assert w.core.workers.by_secret


def test_the_brokers_own_pause_is_nobodys_fault() -> None:
    w = World(liveness_s=5.0, session_ttl_s=60.0)
    client, worker = w.client(), w.worker()
    run = client.submit()
    w.now += 300.0  # SIGSTOP; then the first turn comes before what the peers sent meanwhile
    w.turn()
    assert w.core.workers.by_secret
    assert len(w.core.clients) == 1
    worker.finish()
    assert client.row(run).num_finals == 1
    w.advance(7.0)
    assert not w.core.workers.by_secret, "but silence after it counts"


def test_a_long_idle_broker_does_not_grant_its_first_worker_a_future() -> None:
    w = World(liveness_s=5.0)
    w.now += 3600.0
    worker = w.worker(is_ready=False)
    worker.vanish()
    w.advance(10.0)
    assert not w.core.workers.by_secret


def test_a_worker_comes_back_with_the_leases_it_holds() -> None:
    w = World()
    client, worker = w.client(), w.worker(batches=2)
    runs = [client.submit(2), client.submit(2)]
    worker.disconnect()
    assert w.core.workers.report()[0]["state"] == "away"
    worker.hello()
    assert worker.take(p.Welcome)[-1].is_resumed
    worker.ready()
    assert len(worker.leases) == 2
    worker.finish_all()
    assert [client.row(run, row).outcome.attempt for run in runs for row in range(2)] == [1] * 4  # type: ignore[union-attr]


def test_a_worker_comes_back_without_a_lease() -> None:
    """The assignment was lost on the way: its rows go out again, with nobody blamed."""
    w = World()
    client, worker = w.client(), w.worker(batches=2)
    first, second = client.submit(2), client.submit(2)
    held = next(iter(worker.leases))
    worker.disconnect()
    worker.hello()
    worker.ready(leases=[held])
    assert w.counters["leases_lost_on_the_way"] == 1
    worker.finish_all()
    assert None not in client.results(first, 2) + client.results(second, 2)
    assert w.counters["late_answers"] == 0


def test_a_non_idempotent_lease_that_was_lost_on_the_way_is_not_run_again() -> None:
    """Its answer may be what was lost."""
    w = World()
    client, worker = w.client(), w.worker(spec(idempotent=False))
    run = client.submit()
    worker.disconnect()
    worker.hello()
    worker.ready(leases=[])
    assert client.results(run) == ["worker_lost"]


def test_an_assignment_to_an_address_that_is_gone_goes_out_again() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    worker.vanish()
    run = client.submit()
    assert worker.leases == {}
    worker.hello()
    worker.ready()
    worker.finish_all()
    assert client.row(run).num_finals == 1


@pytest.mark.parametrize("by", ["worker", "operator"])
def test_drain(by: str) -> None:
    w = World()
    client, worker = w.client(), w.worker(batches=5)
    run = client.submit(2)
    if by == "worker":
        worker.send(p.Drain())
    else:
        client.send(p.Control(request=1, op="drain", target="worker"))
        assert client.take(p.Reply)[0].error is None
    assert worker.is_drained
    waiting = client.submit()
    assert worker.sizes() == [2], "nothing more is assigned"
    assert w.core.workers.report()[0]["state"] == "draining"
    worker.finish()
    worker.send(p.Goodbye())
    assert not w.core.workers.by_secret
    assert w.counters["workers_lost"] == 0
    w.worker().finish_all()
    assert None not in client.results(run, 2) + client.results(waiting)


def test_goodbye_returns_what_is_held_without_suspicion() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    run = client.submit(4)
    worker.send(p.Goodbye())
    other = w.worker()
    assert other.sizes() == [4]
    other.finish()
    assert client.row(run).outcome.attempt == 1  # type: ignore[union-attr]


def test_control_names_what_it_does_not_know() -> None:
    w = World()
    client = w.client()
    w.worker()
    client.send(p.Control(request=1, op="drain", target="nobody"))
    client.send(p.Control(request=2, op="explode"))
    texts = [r.error.message for r in client.take(p.Reply)]
    assert "workers: worker" in texts[0]
    assert "there are: drain, reload" in texts[1]


def test_one_killed_one_drained_one_slow_and_nothing_is_lost() -> None:
    w = World()
    client = w.client()
    workers = [w.worker(spec(max_batch_size=4), name=f"w{i}", pid=6000 + i, batches=2) for i in range(3)]
    runs = [client.submit(4) for _ in range(12)]
    workers[0].crash()
    workers[1].send(p.Drain())
    workers[1].finish_all()
    workers[1].send(p.Goodbye())
    workers[2].finish_all()
    assert all(client.row(run, row).num_finals == 1 for run in runs for row in range(4))


def test_two_sessions_from_one_address() -> None:
    """A second hello with another secret takes the address; the first session is away."""
    w = World()
    worker = w.worker()
    first, route = worker.secret, worker.route
    worker.secret = b"another secret!!"
    worker.send(p.WorkerHello(name="second", secret=worker.secret, pid=0, device="cpu"))
    assert w.core.workers.by_secret[first].route is None
    assert w.core.workers.by_route[route].secret == worker.secret
    w.advance(4.0)
    worker.heartbeat()
    w.advance(4.0)
    worker.heartbeat()
    assert list(w.core.workers.by_secret) == [worker.secret]
    assert route in w.core.workers.by_route


def test_an_answer_behind_the_next_hello() -> None:
    """Two connections of one worker are read in turns: what it answered before the first one broke does not run again."""
    w = World()
    client, worker = w.client(), w.worker()
    run = client.submit()
    old, lease = worker.route, worker.the_lease()
    worker.hello()
    new, worker.route = worker.route, old
    worker.answer(lease)
    assert client.row(run).num_finals == 1
    assert w.counters["unattached"] == 0
    worker.route = new
    worker.ready([])
    assert w.counters["leases_lost_on_the_way"] == 0
    worker.route = old
    worker.send(p.WorkerFinal(lease=lease, answers=[]))
    assert w.counters["unattached"] == 1, "it has said what it holds"


def test_a_worker_whose_predecessor_has_ended_says_so() -> None:
    """Where the kernel does not tell the broker of a process's end: what it held is suspect at once, and its name free."""
    w = World(liveness_s=5.0)
    client, old, other = w.client(), w.worker(name="a"), w.worker(name="b")
    run = client.submit(2)
    assert old.leases
    old.vanish()
    other.send(p.WorkerHello(name="b", secret=other.secret, pid=0, device="cpu", ended=old.secret))
    assert w.counters["workers_lost"] == 1
    w.worker(name="a").finish_all()
    assert [worker.name for worker in w.core.workers.by_secret.values()] == ["b", "a"]
    assert [client.row(run, row).num_finals for row in range(2)] == [1, 1]


def test_nobody_ends_the_session_of_another() -> None:
    w = World()
    old, other = w.worker(name="a"), w.worker(name="b", principal="worker:b")
    other.send(p.WorkerHello(name="b", secret=other.secret, pid=0, device="cpu", ended=old.secret))
    other.send(p.WorkerHello(name="b", secret=other.secret, pid=0, device="cpu", ended=other.secret))
    assert len(w.core.workers.by_secret) == 2
    assert w.counters["workers_lost"] == 0


def test_status_of_a_task_on_its_way() -> None:
    w = World()
    client: FakeClient = w.client()
    worker = w.worker(spec(max_batch_size=2))
    run = client.submit(5)
    client.send(p.Status(request=1, id=run))
    body = client.take(p.Reply)[0].body
    assert (body["state"], body["leased"], body["queued"], body["workers"]) == ("running", 2, 3, ["worker"])
    worker.finish_all()
    client.send(p.Status(request=2, id=run))
    client.send(p.Status(request=3, id=b"0" * 16))
    assert [r.body["state"] for r in client.take(p.Reply)] == ["finished", "unknown"]


def test_a_process_that_ends_is_not_that_of_a_worker_elsewhere() -> None:
    """A worker on another machine, or in a container, may say the number that a process here has."""
    w = World()
    w.worker(name="here", pid=500)
    elsewhere = w.worker(name="elsewhere", principal="worker:gpu2")
    hello = p.WorkerHello(name="elsewhere", secret=elsewhere.secret, pid=500, device="cpu")
    w.step(Received(BACK, elsewhere.route, elsewhere.principal, hello, 0))
    w.step(ProcessEnded(500))
    assert [worker.name for worker in w.state.workers.values()] == ["elsewhere"]


def test_versions_that_nobody_offers_any_more_are_forgotten() -> None:
    w = World()
    worker, client = w.worker(), w.client()
    for number in range(50):
        worker.specs = [spec(digest=b"version %d" % number)]
        worker.ready()
    assert len(w.state.kernels._interned) == 1
    run = client.submit()
    worker.finish_all()
    assert client.row(run).num_finals == 1
def test_a_worker_cannot_fill_tables_with_kernels_that_it_does_not_offer() -> None:
    w = World()
    worker = w.worker(spec("echo"))
    for i in range(100):
        worker.send(p.Resident(kernel=f"made up {i}", state="ready"))
    worker.send(p.Resident(kernel="echo", state="loading"))
    assert w.core.workers.by_route[worker.route].resident == {"echo": "loading"}
