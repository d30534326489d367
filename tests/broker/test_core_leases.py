"""Leases: answers in any pieces and order, and what a worker may get wrong without harm to anybody."""

from broker_world import World, echo_block, rows_of, spec

from penstock.broker import protocol as p

FAILED = p.Error("kernel_failed", "it broke")


def test_answers_come_split_and_out_of_order() -> None:
    w = World()
    client, worker = w.client(), w.worker(is_ready=False)
    runs = [client.submit(3), client.submit(3)]
    worker.ready()
    token = worker.the_lease()
    for start, stop in ((4, 6), (0, 1), (2, 4), (1, 2)):
        worker.answer(token, start, stop)
    for run in runs:
        assert [str(r)[:2] for r in client.results(run, 3)] == ["b'"] * 3
        assert [client.row(run, row).num_finals for row in range(3)] == [1, 1, 1]
    assert not w.state.ledger.leases


def test_several_answers_in_one_message() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    run = client.submit(5)
    token = worker.the_lease()
    rows = rows_of(worker.leases[token])
    answers = [
        p.Answer(3, 5, echo_block(rows[3:5])),
        p.Answer(1, 2, None, FAILED),
        p.Answer(0, 1, echo_block(rows[:1])),
        p.Answer(2, 3, echo_block(rows[2:3])),
    ]
    worker.send(p.WorkerFinal(lease=token, answers=answers))
    assert client.results(run, 5) == [rows[0], "kernel_failed", *rows[2:]]


def test_a_batch_of_several_sessions_goes_to_its_owners_only() -> None:
    w = World()
    clients = [w.client(principal=f"uid:{i % 2}") for i in range(4)]
    worker = w.worker(spec(max_batch_size=64), is_ready=False)
    runs = [(client, client.submit(2)) for _ in range(3) for client in clients]
    worker.ready()
    token = worker.the_lease()
    worker.answer(token, 5, 17)
    worker.answer(token, 0, 5)
    worker.answer(token, 17, 24)
    for client, run in runs:
        assert all(d is not None and bytes(d)[:16] == run for d in client.results(run, 2))  # type: ignore[arg-type]
    assert [len(client.got) for client in clients] == [6] * 4


def test_rows_of_one_run_over_two_workers() -> None:
    w = World()
    client = w.client()
    workers = [w.worker(spec(max_batch_size=4), name=f"w{i}", is_ready=False) for i in range(2)]
    run = client.submit(8)
    for worker in workers:
        worker.ready()
    assert [worker.sizes() for worker in workers] == [[4], [4]]
    workers[1].finish()
    workers[0].finish()
    assert None not in client.results(run, 8)


def test_the_least_loaded_worker_goes_first() -> None:
    w = World()
    client = w.client()
    workers = [w.worker(spec(max_batch_size=1), name=f"w{i}", batches=4) for i in range(2)]
    for _ in range(4):
        client.submit()
    assert [len(worker.leases) for worker in workers] == [2, 2]


def test_an_error_for_one_row_leaves_the_others() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    run = client.submit(3)
    token = worker.the_lease()
    worker.answer(token, 1, 2, FAILED)
    worker.answer(token, 0, 1)
    worker.answer(token, 2, 3)
    assert client.results(run, 3)[1] == "kernel_failed"
    assert client.row(run, 1).error == FAILED
    assert w.core.workers.report()[0]["done"] == 2
    assert w.core.workers.report()[0]["failed"] == 1


def test_answers_outside_the_lease_give_nothing_and_its_rows_run_again() -> None:
    w = World()
    client, worker = w.client(), w.worker(batches=2)
    run = client.submit(2)
    token = worker.the_lease()
    rows = rows_of(worker.leases[token])
    worker.send(p.WorkerFinal(lease=token, answers=[p.Answer(100, 102, echo_block(rows))]))
    assert client.results(run, 2) == [None, None]
    assert w.counters["unanswered"] == 2
    del worker.leases[token]
    worker.finish_all()
    assert client.results(run, 2) == rows


def test_rows_answered_twice_count_once_and_those_left_out_run_again() -> None:
    w = World()
    client, worker = w.client(), w.worker(batches=2)
    run = client.submit(3)
    token = worker.the_lease()
    worker.answer(token, 0, 2)
    worker.answer(token, 0, 2)
    assert w.counters["late_answers"] == 2
    assert w.counters["unanswered"] == 1
    assert worker.sizes() == [3, 1]
    del worker.leases[token]
    worker.finish()
    assert [client.row(run, row).num_finals for row in range(3)] == [1, 1, 1]


def test_an_answer_in_parts_that_comes_again_over_another_connection_counts_once() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(idempotent=False))
    run = client.submit(4)
    token = worker.the_lease()
    rows = rows_of(worker.leases[token])
    worker.answer(token, 0, 2)
    worker.hello()
    worker.ready([token])
    worker.answer(token, 0, 2)
    assert client.results(run, 4) == [*rows[:2], None, None]
    worker.answer(token, 2, 4)
    assert client.results(run, 4) == rows
    assert w.counters["unanswered"] == 0
    assert not w.state.ledger.leases


def test_a_welcome_has_the_number_of_its_hello() -> None:
    w = World()
    worker = w.worker()
    worker.take(p.Welcome)
    for number in (0, 3):
        worker.send(p.WorkerHello(name="worker", secret=worker.secret, pid=0, device="cpu", number=number))
    assert [m.number for m in worker.take(p.Welcome)] == [0, 3]


def test_a_worker_that_always_leaves_rows_out_does_not_keep_them_for_ever() -> None:
    w = World(max_attempts=2)
    client, worker = w.client(), w.worker(batches=9)
    run = client.submit(2)
    for _ in range(2):
        token = worker.the_lease()
        block = echo_block(rows_of(worker.leases.pop(token)))
        worker.send(p.WorkerFinal(lease=token, answers=[p.Answer(100, 102, block)]))
    assert client.results(run, 2) == ["kernel_failed", "kernel_failed"]


def test_rows_of_a_non_idempotent_kernel_that_were_left_out_do_not_run_again() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(idempotent=False), batches=2)
    run = client.submit(3)
    token = worker.the_lease()
    worker.answer(token, 0, 2)
    worker.answer(token, 0, 2)
    assert client.results(run, 3)[2] == "worker_lost"
    assert worker.sizes() == [3]


def test_a_wrong_lease_and_another_workers_lease_change_nothing() -> None:
    w = World()
    client = w.client()
    worker, other = w.worker(), w.worker(name="other")
    run = client.submit()
    holder, thief = (worker, other) if worker.leases else (other, worker)
    token = holder.the_lease()
    for lease in (token, token + 1, 0, (1 << 63) - 1):
        thief.send(p.WorkerFinal(lease=lease, answers=[p.Answer(0, 1, echo_block([b"forged"]))]))
        thief.send(p.WorkerPartial(lease=lease, part=0, block=echo_block([b"forged"])))
    assert client.results(run) == [None]
    assert w.counters["late_answers"] == 8
    holder.finish()
    assert client.row(run).data != b"forged"


def test_an_answer_after_the_last_one_is_late() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    run = client.submit()
    token = worker.the_lease()
    worker.answer(token)
    worker.answer(token)
    assert client.row(run).num_finals == 1
    assert w.counters["late_answers"] == 1


def test_an_unattached_worker_is_told_to_say_hello() -> None:
    w = World()
    worker = w.worker(is_ready=False)
    worker.connect()
    worker.send(p.Pull(credit=[1, 1]))
    assert worker.take(p.Fault)[0].error.code == "unattached"
    stranger = w.worker(is_ready=False, principal="uid:2")
    stranger.send(p.WorkerHeartbeat(session=worker.secret))
    assert stranger.take(p.Fault)[0].error.code == "unattached"


def test_a_malformed_spec_is_refused_and_the_worker_stays_unready() -> None:
    w = World()
    for wrong in (
        {"modes": ["fast"]}, {"combine": "min"}, {"max_batch_size": 0}, {"cost": {}}, {"inputs": [["x", "tensor"]]},
        {"inputs": [["x", "tensor", {"dtypes": None, "rank": None, "ragged": "often"}]]}, {"name": 5},
        {"inputs": [["x", "row", {"default": None, "min": "low", "max": None}]]},
        {"inputs": [["x", "tensor", {"dtypes": [1, 2], "rank": None, "ragged": "exact"}]]},
        {"inputs": [["x", "tensor", {"dtypes": None, "rank": "two", "ragged": "exact"}]]},
        {"cost": {"base_ms": float("nan"), "per": {}}}, {"digest": b"x" * 33}, {"name": ""}, {"name": "n" * 65},
    ):  # fmt: skip
        worker = w.worker({**spec(), **wrong}, is_ready=False)
        worker.ready()
        assert worker.take(p.Fault)[0].error.code == "protocol", wrong
        assert not w.core.operators.report(w.now)["is_ready"]


def test_two_workers_of_one_name_get_two_names() -> None:
    w = World()
    for _ in range(3):
        w.worker(name="gpu0")
    assert [row["name"] for row in w.core.workers.report()] == ["gpu0", "gpu0-2", "gpu0-3"]
