"""Which rows share a batch, in what order they go, and how far budgets and credit let them."""

import pytest
from broker_world import BLOB, ONE_BIN, PACK, PAD, Declared, World, X, blob_rows, number_per_row, rows_of, spec, tensor_rows


def test_a_task_goes_out_at_once_and_its_answer_comes_back() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    run = client.submit()
    assert worker.sizes() == [1]
    worker.finish()
    got = client.row(run)
    assert got.data is not None
    assert got.data.startswith(run)
    assert got.outcome is not None
    assert got.outcome.timings == {"compute_ms": 1.0, "batch_size": 1, "bin": "fast", "worker": "worker"}
    assert got.outcome.attempt == 1
    assert w.state.ledger.num_open == 0


def test_what_arrives_while_the_worker_is_busy_joins_one_batch() -> None:
    w = World()
    clients, worker = [w.client(), w.client()], w.worker()
    clients[0].submit()
    runs = [(c, c.submit()) for _ in range(3) for c in clients]
    assert worker.sizes() == [1], "credit for one batch"
    worker.finish()
    assert worker.sizes() == [6]
    worker.finish()
    assert all(client.row(run).num_finals == 1 for client, run in runs)


def test_the_batch_is_formed_at_the_turn_not_at_the_first_arrival() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    for _ in range(5):
        client.submit(is_turn=False)
    assert worker.sizes() == []
    w.turn()
    assert worker.sizes() == [5]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"statics": b"a"}, {"statics": b"b"}),
        ({"kernel": "echo"}, {"kernel": "other"}),
        ({"dtype": "uint8"}, {"dtype": "int32"}),
        ({"items": 20}, {"items": 21}),
        ({"wants_partials": False}, {"wants_partials": True}),
    ],
)
def test_batch_keys_never_mix(first: dict[str, object], second: dict[str, object]) -> None:
    w = World()
    client = w.client()
    worker = w.worker(spec(modes=["batch", "stream"]), spec("other"), batches=4, is_ready=False)
    for fields in (first, second, first, second):
        run = b"%016d" % next(w.numbers)
        shape = {k: fields[k] for k in ("dtype", "items") if k in fields}
        rest = {k: v for k, v in fields.items() if k not in shape}
        client.submit(run_id=run, block=tensor_rows(run, 2, **shape), **rest)  # type: ignore[arg-type]
    worker.ready()
    if "wants_partials" in second:
        assert sorted(worker.sizes()) == [1, 1, 1, 1, 4], "a slot holds one task"
    else:
        assert worker.sizes() == [4, 4]


@pytest.mark.parametrize(("scoped", "sizes"), [(True, [2, 1]), (False, [3])])
def test_a_scoped_kernel_keeps_principals_apart(scoped: bool, sizes: list[int]) -> None:
    w = World()
    mine, yours = w.client(principal="uid:1"), w.client(principal="uid:2")
    worker = w.worker(spec(scoped=scoped), batches=4, is_ready=False)
    mine.submit()
    yours.submit()
    mine.submit()
    worker.ready()
    assert worker.sizes() == sizes
    assert {a.principal for a in worker.leases.values()} == ({"uid:1", "uid:2"} if scoped else {""})


def test_priority_goes_first_then_deadline_then_arrival() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=1), is_ready=False)
    wanted = [(5, None), (5, 9000.0), (5, 8000.0), (9, 1000.0), (0, None), (5, None)]
    runs = [client.submit(priority=p, timeout_ms=t) for p, t in wanted]
    worker.ready()
    order = list[bytes]()
    while worker.leases:
        order.append(worker.batches()[0][0][0])
        worker.finish()
    assert [runs.index(run) for run in order] == [4, 2, 1, 0, 5, 3]


def test_the_urgent_head_takes_its_batch_along() -> None:
    """A batch key's place is that of its most urgent task; the batch is filled from the same key in order."""
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=3), is_ready=False)
    late = [client.submit(statics=b"a", priority=7) for _ in range(3)]
    client.submit(statics=b"b", priority=5)
    urgent = client.submit(statics=b"a", priority=1)
    worker.ready()
    assert [run for run, _ in worker.batches()[0]] == [urgent, *late[:2]]


def test_two_kernels_in_turns_both_batch() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec("a"), spec("b"), is_ready=False)
    for _ in range(8):
        client.submit(kernel="a")
        client.submit(kernel="b")
    worker.ready()
    assert worker.finish_all() == [8, 8]


def test_the_count_budget_splits_a_run() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=8))
    run = client.submit(20)
    assert worker.finish_all() == [8, 8, 4]
    assert None not in client.results(run, 20)


def test_a_batch_of_one() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=1))
    run = client.submit(3)
    client.submit()
    assert worker.finish_all() == [1, 1, 1, 1]
    assert None not in client.results(run, 3)


@pytest.mark.parametrize(
    ("combine", "budget", "sizes"),
    [("sum", 10.0, [3, 1, 2]), ("max", 10.0, [6]), ("max", 6.0, [3, 1, 2]), ("sum", 1.0, [1, 1, 1, 1, 1, 1])],
)
def test_the_cost_budget(combine: str, budget: float, sizes: list[int]) -> None:
    """Rows of 3, 3, 3, 10, 3, 3 ms: what does not fit the budget even alone runs alone."""
    w = World(scheduling=ONE_BIN)
    made = spec(inputs=(X, number_per_row("ms")), combine=combine, max_batch_cost_ms=budget, base_ms=1.0, per={"ms": 1.0})
    client, worker = w.client(), w.worker(made)
    run = client.submit(6, scalars={"ms": [2.0, 2.0, 2.0, 9.0, 2.0, 2.0]})
    assert worker.finish_all() == sizes
    assert None not in client.results(run, 6)


def test_what_is_past_the_budget_alone_takes_nobody_along() -> None:
    w = World()
    made = spec(inputs=(X, number_per_row("ms")), combine="sum", max_batch_cost_ms=6.0, per={"ms": 1.0})
    client, worker = w.client(), w.worker(made, is_ready=False)
    for ms in (7.0, 2.0, 2.0, 9.0, 9.0):
        client.submit(scalars={"ms": ms})
    worker.ready()
    assert worker.finish_all() == [1, 2, 1, 1]


def test_what_is_past_the_budget_alone_does_not_wait_for_an_idle_worker() -> None:
    w = World()
    made = spec(inputs=(X, number_per_row("ms")), combine="sum", max_batch_cost_ms=6.0, per={"ms": 1.0})
    client, worker = w.client(), w.worker(made, batches=2)
    for _ in range(2):
        client.submit(scalars={"ms": 9.0})
    assert worker.sizes() == [1, 1]


def test_cost_counts_bytes_and_numel() -> None:
    w = World(scheduling=ONE_BIN)
    made = spec(inputs=(BLOB,), combine="sum", max_batch_cost_ms=100.0, per={"x.bytes": 1.0})
    client, worker = w.client(), w.worker(made)
    run = b"r" * 16
    client.submit(run_id=run, block=blob_rows(run, [40, 40, 40, 100, 20, 20]))
    assert worker.finish_all() == [2, 1, 1, 2]


def test_row_scalars_follow_their_rows() -> None:
    w = World()
    client = w.client()
    worker = w.worker(spec(inputs=(X, number_per_row("ms")), max_batch_size=4), is_ready=False)
    client.submit(3, scalars={"ms": [1, 2, 3]})
    client.submit(2, scalars={"ms": 7})
    worker.ready()
    (assign,) = worker.leases.values()
    assert assign.scalars == {"ms": [1, 2, 3, 7]}
    worker.finish()
    (assign,) = worker.leases.values()
    assert assign.scalars == {"ms": 7}


def test_one_number_for_all_stays_one_number() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(inputs=(X, number_per_row("ms"))), is_ready=False)
    client.submit(3, scalars={"ms": 4})
    client.submit(2, scalars={"ms": 4})
    worker.ready()
    (assign,) = worker.leases.values()
    assert assign.scalars == {"ms": 4}


def test_padded_rows_share_a_batch_within_a_power_of_two() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(inputs=(PAD,)), batches=4, is_ready=False)
    for lengths in ([33, 60], [62], [70, 20], [127]):
        run = b"%016d" % next(w.numbers)
        client.submit(run_id=run, block=blob_rows(run, lengths, "uint8"))
    worker.ready()
    assert [[len(r) for r in rows_of(a)] for a in worker.leases.values()] == [[33, 60, 62], [70, 20, 127]]


def test_fixed_rows_become_ragged_when_the_kernel_pads() -> None:
    """One run with lengths and one with a plain shape still share a batch."""
    w = World()
    client, worker = w.client(), w.worker(spec(inputs=(PAD,)), is_ready=False)
    first, second = b"a" * 16, b"b" * 16
    client.submit(run_id=first, block=blob_rows(first, [40, 50], "uint8"))
    client.submit(run_id=second, block=tensor_rows(second, 2, items=33))
    worker.ready()
    (assign,) = worker.leases.values()
    (block,) = assign.blocks
    assert list(block.lengths) == [[40, 50, 33, 33]]
    worker.finish()
    assert None not in client.results(first, 2) + client.results(second, 2)


def test_equal_lengths_become_fixed_when_the_kernel_wants_exact_shapes() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(inputs=(X,)), batches=2)
    same, differ = b"a" * 16, b"b" * 16
    client.submit(run_id=same, block=blob_rows(same, [40, 40], "uint8"))
    client.submit(run_id=differ, block=blob_rows(differ, [40, 41], "uint8"))
    (assign,) = worker.leases.values()
    assert assign.blocks[0].columns[0].shape == (40,)
    assert client.refused[differ].code == "invalid_input"


@pytest.mark.parametrize("wanted", [PACK, BLOB])
def test_packed_rows_and_blobs_of_any_length_share_a_batch(wanted: list[object]) -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(inputs=(wanted,)), is_ready=False)
    dtype = "bytes" if wanted is BLOB else "uint8"
    for lengths in ([20, 3000], [500]):
        run = b"%016d" % next(w.numbers)
        client.submit(run_id=run, block=blob_rows(run, lengths, dtype))
    worker.ready()
    assert worker.sizes() == [3]


def test_large_rows_travel_in_frames_of_their_own() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(inputs=(BLOB,)), is_ready=False)
    large, small = b"l" * 16, b"s" * 16
    client.submit(run_id=large, block=blob_rows(large, [70_000, 80_000]))
    client.submit(run_id=small, block=blob_rows(small, [20]))
    worker.ready()
    worker.finish_all()
    assert [len(d or b"") for d in client.results(large, 2) + client.results(small)] == [70_000, 80_000, 20]


def test_bad_input_is_refused_with_what_the_kernel_wants() -> None:
    w = World()
    client = w.client()
    w.worker(spec(inputs=(["x", "tensor", {"dtypes": ["uint8"], "rank": 1, "ragged": "exact"}], number_per_row("ms"))))
    run = b"r" * 16
    cases = {
        "missing: ms": client.submit(),
        "takes uint8, not int32": client.submit(block=tensor_rows(run, 1, "int32", 5), scalars={"ms": 1.0}),
        "is a tensor, not bytes": client.submit(block=blob_rows(run, [20]), scalars={"ms": 1.0}),
        "from 0 to 1e+06, not -1": client.submit(scalars={"ms": -1.0}),
        "not nan": client.submit(scalars={"ms": float("nan")}),
        "2 values for 1 tasks": client.submit(scalars={"ms": [1.0, 2.0]}),
        "unknown: y": client.submit(scalars={"ms": 1.0, "y": 1.0}),
        "does not stream": client.submit(scalars={"ms": 1.0}, wants_partials=True),
    }
    for text, refused in cases.items():
        assert client.refused[refused].code == "invalid_input"
        assert text in client.refused[refused].message
    assert w.state.ledger.num_open == 0


def test_a_busy_worker_gets_its_next_batch_just_in_time() -> None:
    w = World(predictor=Declared())
    client = w.client()
    worker = w.worker(spec(inputs=(X, number_per_row("ms")), per={"ms": 1.0}), batches=2)
    for _ in range(3):
        client.submit(scalars={"ms": 100.0})
    assert worker.sizes() == [1], "two wait for company"
    w.advance(0.089)
    client.submit(scalars={"ms": 100.0})
    assert worker.sizes() == [1]
    w.advance(0.002)
    assert worker.sizes() == [1, 3], "10 ms before the end it has the next one"


def test_what_waits_at_the_worker_has_not_begun() -> None:
    w = World(predictor=Declared())
    client = w.client()
    worker = w.worker(spec(inputs=(X, number_per_row("ms")), per={"ms": 1.0}, max_batch_size=1), batches=3)
    for _ in range(3):
        client.submit(scalars={"ms": 8.0})
    (session,) = w.core.state.workers.values()
    assert session.left_ms(w.now) == pytest.approx(16.0), "the third has to wait: two have more than 10 ms"
    w.advance(0.007)
    assert session.left_ms(w.now) == pytest.approx(1.0 + 8.0 + 8.0)
    worker.finish(min(worker.leases))
    assert session.left_ms(w.now) == pytest.approx(16.0)
