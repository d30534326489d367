"""Kernels that are not there yet, come, change and go."""

from broker_world import BLOB, World, blob_rows, spec, tensor_rows

from penstock.broker import protocol as p


def test_an_unknown_kernel_with_workers_is_refused_at_once() -> None:
    w = World()
    client = w.client()
    w.worker(spec("a"), spec("b"))
    run = client.submit(kernel="c")
    assert client.refused[run].code == "unknown_kernel"
    assert "known kernels: a, b" in client.refused[run].message


def test_a_task_waits_for_its_first_worker() -> None:
    w = World()
    client = w.client()
    run = client.submit(2)
    assert not client.refused
    client.send(p.Status(request=1, id=run))
    assert client.take(p.Reply)[0].body["is_waiting_for_kernel"]
    worker = w.worker(is_ready=False)
    assert client.results(run, 2) == [None, None]
    worker.ready()
    worker.finish_all()
    assert None not in client.results(run, 2)


def test_a_task_waits_while_a_worker_is_starting() -> None:
    w = World()
    client = w.client()
    w.worker(spec("a"), name="first")
    second = w.worker(spec("b"), name="second", is_ready=False)
    run = client.submit(kernel="b")
    assert not client.refused
    second.ready()
    second.finish_all()
    assert client.row(run).num_finals == 1


def test_the_grace_counts_from_the_last_worker_that_came_or_left() -> None:
    """A broker that stood alone for long still waits for the kernels of its first worker, which is starting."""
    w = World(worker_grace_s=30.0, liveness_s=20.0, session_ttl_s=1e6)
    client = w.client()
    w.advance(100.0)
    worker = w.worker(is_ready=False)
    run, unknown = client.submit(), client.submit(kernel="nobody has it")
    w.advance(10.0)
    assert not client.refused
    worker.ready()
    worker.finish_all()
    assert client.row(run).num_finals == 1
    w.advance(1.0)
    assert client.results(unknown) == ["unknown_kernel"]


def test_after_the_grace_what_waits_is_refused() -> None:
    w = World(worker_grace_s=30.0)
    client = w.client()
    run = client.submit(2)
    w.advance(29.0)
    assert client.results(run, 2) == [None, None]
    w.advance(2.5)
    assert client.results(run, 2) == ["unknown_kernel"] * 2
    late = client.submit()
    assert client.refused[late].code == "unknown_kernel"


def test_what_waits_is_refused_when_workers_come_without_it() -> None:
    w = World()
    client = w.client()
    run = client.submit(kernel="b")
    w.worker(spec("a"))
    w.advance(2.0)
    assert client.results(run) == ["unknown_kernel"]


def test_a_waiting_task_expires_and_is_cancelled_like_any_other() -> None:
    w = World()
    client = w.client()
    expires, cancelled = client.submit(timeout_ms=500.0), client.submit(3)
    client.send(p.Cancel(id=cancelled, start=1, stop=2))
    w.advance(1.0)
    assert client.results(expires) == ["deadline_exceeded"]
    worker = w.worker()
    worker.finish_all()
    assert [r == "cancelled" for r in client.results(cancelled, 3)] == [False, True, False]


def test_a_waiting_task_that_its_kernel_does_not_take() -> None:
    w = World()
    client = w.client()
    run = client.submit(2)
    w.worker(spec(inputs=(BLOB,)))
    assert client.results(run, 2) == ["invalid_input"] * 2


def test_a_known_kernel_waits_for_its_next_worker() -> None:
    w = World(worker_grace_s=5.0, session_ttl_s=1e6)
    client, worker = w.client(), w.worker()
    worker.send(p.Goodbye())
    run = client.submit()
    w.advance(100.0)
    assert not client.refused
    w.worker().finish_all()
    assert client.row(run).num_finals == 1


def test_a_new_version_takes_over_what_is_queued() -> None:
    w = World()
    client = w.client()
    old = w.worker(spec(max_batch_size=2), name="old")
    run = client.submit(6)
    blob = b"b" * 16
    new = w.worker(spec(digest=b"version2"), name="new", is_ready=False)
    old.finish()
    new.ready()
    assert old.sizes() == [2], "the old version still serves"
    old.send(p.Goodbye())
    assert new.sizes() == [4], "then everything goes by the new one, in its batch size"
    new.finish_all()
    assert None not in client.results(run, 6)
    client.submit(run_id=blob, block=blob_rows(blob, [20]))
    assert client.refused[blob].code == "invalid_input"


def test_a_new_version_that_takes_other_input() -> None:
    w = World()
    client, old = w.client(), w.worker(spec(max_batch_size=2))
    run = client.submit(4)
    old.finish()
    old.specs = [spec(inputs=(BLOB,), digest=b"version2")]
    old.disconnect()
    old.hello()
    old.ready(leases=[])
    assert client.results(run, 4)[2:] == ["invalid_input"] * 2
    assert all(client.row(run, row).num_finals == 1 for row in range(4))


def test_a_worker_changes_its_version_while_it_holds_leases() -> None:
    """Batches under way end under the old version; what is queued, of the same runs too, goes by the new one."""
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=3), batches=1)
    whole, part = client.submit(2, is_turn=False), client.submit(4, is_turn=False)
    w.turn()
    assert worker.sizes() == [3]
    worker.specs = [spec(max_batch_size=2, digest=b"version2")]
    worker.disconnect()
    worker.hello()
    worker.ready()
    assert worker.finish_all() == [3, 2, 1]
    assert None not in client.results(whole, 2) + client.results(part, 4)


def test_two_versions_side_by_side_and_one_leaves() -> None:
    w = World()
    client = w.client()
    first, second = w.worker(name="a"), w.worker(spec(digest=b"version2"), name="b")
    runs = [client.submit() for _ in range(4)]
    second.send(p.Goodbye())
    runs += [client.submit() for _ in range(2)]
    first.finish_all()
    assert all(client.row(run).num_finals == 1 for run in runs)


def test_resident_states_are_reported() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    worker.send(p.Resident(kernel="echo", state="loading"))
    client.send(p.Status(request=1))
    assert client.take(p.Reply)[0].body["workers"][0]["resident"] == {"echo": "loading"}


def test_status_without_workers_says_so() -> None:
    w = World()
    client = w.client()
    client.submit(2)
    client.send(p.Status(request=7))
    (reply,) = client.take(p.Reply)
    assert reply.request == 7
    assert not reply.body["is_ready"]
    assert reply.body["tasks"]["open"] == 2
    worker = w.worker()
    client.send(p.Status(request=8))
    body = client.take(p.Reply)[0].body
    assert body["is_ready"]
    assert body["workers"][0]["leases"] == 1
    assert body["kernels"]["echo"]["max_batch_size"] == 8
    worker.finish_all()


def test_many_batch_keys_leave_nothing_behind() -> None:
    w = World(window_rows=100_000)
    client, worker = w.client(), w.worker(batches=9)
    for number in range(1500):
        client.submit(statics=b"%d" % number, key=b"same", block=tensor_rows(b"b" * 16, 1), is_turn=False)
        client.submit(statics=b"k%d" % number)
        worker.finish_all()
    assert len(w.state.policy._queues) < 1200
