"""The same submission twice: by id, and by idempotency key while its twin is open and after it has ended."""

import pytest
from broker_world import FakeClient, FakeWorker, World, number_per_row, spec, tensor_rows

from penstock.broker import protocol as p

KEY = b"key"
FAILED = p.Error("kernel_failed", "it broke")
BLOCK = tensor_rows(b"b" * 16, 4)


def two(**config: object) -> tuple[World, FakeClient, FakeClient, FakeWorker]:
    w = World(**config)
    return w, w.client("first"), w.client("second"), w.worker(batches=9)


# --- ids -----------------------------------------------------------------------------------------------------------


def test_the_same_id_and_content_runs_once() -> None:
    w, client, _, worker = two()
    run = client.submit(2)
    client.submit(2, run_id=run)
    client.submit(2, run_id=run, wants_accepted=True)
    assert client.take(p.Accepted)[0].id == run
    assert worker.sizes() == [2]
    worker.finish_all()
    assert [client.row(run, row).num_finals for row in range(2)] == [1, 1]
    assert w.counters["repeated"] == 2
    assert client.credit[0] == 4096 + 2, "a repeat uses no credit"


@pytest.mark.parametrize("other", ["rows", "statics", "kernel", "bytes", "scalars"])
def test_the_same_id_with_other_content_is_a_conflict(other: str) -> None:
    w = World()
    client = w.client()
    worker = w.worker(spec(inputs=(["x", "tensor", {"dtypes": None, "rank": None, "ragged": "exact"}],
                                   number_per_row("ms", 0.0))), spec("other"))  # fmt: skip
    run = client.submit(2, scalars={"ms": 1.0})
    changed: dict[str, dict[str, object]] = {
        "rows": {"rows": 3}, "statics": {"statics": b"x"}, "kernel": {"kernel": "other"},
        "bytes": {"block": tensor_rows(b"?" * 16, 2)}, "scalars": {"scalars": {"ms": 2.0}},
    }  # fmt: skip
    client.submit(**{"rows": 2, "scalars": {"ms": 1.0}, **changed[other]}, run_id=run)  # type: ignore[arg-type]
    assert client.refused[run].code == "conflict"
    worker.finish_all()
    assert None not in client.results(run, 2), "the first is not disturbed"


def test_an_id_of_another_session() -> None:
    _, first, second, worker = two()
    run = first.submit(2)
    second.submit(2, run_id=run)
    assert second.refused[run].code == "conflict"
    worker.finish_all()
    assert second.got == {}


def test_other_principals_have_other_ids_and_keys() -> None:
    w = World()
    first, second = w.client(principal="uid:1"), w.client(principal="uid:2")
    worker = w.worker(batches=2)
    run = first.submit(1, key=KEY)
    second.submit(1, run_id=run, key=KEY)
    assert worker.sizes() == [1, 1]
    worker.finish_all()
    assert first.row(run).num_finals == second.row(run).num_finals == 1


def test_the_same_id_after_the_finish_is_answered_from_the_outbox() -> None:
    w, client, _, worker = two()
    run = client.submit(2)
    worker.finish_all()
    client.submit(2, run_id=run)
    assert client.num_duplicates == 1
    assert worker.leases == {}
    client.send(p.Ack(seq=client.received))
    assert not w.core.clients.by_route[client.route].finished


# --- keys ----------------------------------------------------------------------------------------------------------


def test_a_follower_shares_the_answer() -> None:
    w, first, second, worker = two()
    a = first.submit(block=BLOCK, key=KEY)
    b = second.submit(block=BLOCK, key=KEY)
    c = first.submit(block=BLOCK, key=KEY)
    assert worker.sizes() == [4]
    token = worker.the_lease()
    worker.answer(token, 2, 4, FAILED)
    worker.answer(token, 0, 2)
    worker.leases.clear()
    for client, run in ((first, a), (second, b), (first, c)):
        assert client.results(run, 4)[2:] == ["kernel_failed"] * 2
        assert bytes(client.results(run, 4)[1]).startswith(b"b" * 16)  # type: ignore[arg-type]
        assert [client.row(run, row).num_finals for row in range(4)] == [1] * 4
    assert w.state.ledger.num_open == 0


def test_a_follower_that_comes_late_is_told_what_there_is_already() -> None:
    w, first, second, worker = two()
    first.submit(block=BLOCK, key=KEY)
    token = worker.the_lease()
    worker.answer(token, 1, 3)
    worker.answer(token, 3, 4, FAILED)
    b = second.submit(block=BLOCK, key=KEY)
    assert [r is None for r in second.results(b, 4)] == [True, False, False, False]
    worker.answer(token, 0, 1)
    assert second.results(b, 4)[3] == "kernel_failed"
    assert [second.row(b, row).num_finals for row in range(4)] == [1] * 4
    assert w.state.ledger.num_open == 0


def test_a_replay_after_the_finish() -> None:
    w, first, second, worker = two()
    a = first.submit(block=BLOCK, key=KEY)
    worker.answer(worker.the_lease(), 0, 3)
    worker.answer(worker.the_lease(), 3, 4, FAILED)
    worker.leases.clear()
    b = second.submit(block=BLOCK, key=KEY, wants_accepted=True)
    assert second.take(p.Accepted)
    assert second.results(b, 4) == first.results(a, 4)
    assert worker.leases == {}
    assert second.credit[0] == 4096 + 4
    second.submit(block=BLOCK, key=KEY, run_id=b)
    assert second.num_duplicates == 1
    second.send(p.Ack(seq=second.received))
    assert w.counters["replayed"] == 4


def test_a_long_replay_comes_in_several_messages() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=1))
    block = tensor_rows(b"b" * 16, 900)
    client.submit(block=block, key=KEY)
    worker.finish_all()
    again = client.submit(block=block, key=KEY)
    assert None not in client.results(again, 900)
    client.send(p.Ack(seq=client.received))
    assert not w.core.clients.by_route[client.route].finished


def test_another_payload_under_a_key_is_a_conflict() -> None:
    _, first, second, worker = two()
    first.submit(4, key=KEY)
    for _ in range(2):  # while it is open, and after
        run = second.submit(block=tensor_rows(b"c" * 16, 4), key=KEY)
        assert second.refused[run].code == "conflict"
        worker.finish_all()


def test_a_key_is_forgotten_after_its_window() -> None:
    w, first, _, worker = two(dedup_window_s=100.0, session_ttl_s=1e6, liveness_s=1e6)
    first.submit(block=BLOCK, key=KEY)
    worker.finish_all()
    w.advance(99.0)
    first.submit(block=BLOCK, key=KEY)
    assert worker.leases == {}
    w.advance(2.0)
    first.submit(block=BLOCK, key=KEY)
    assert worker.sizes() == [4]


def test_a_result_that_is_no_longer_kept() -> None:
    _, first, _, worker = two(dedup_bytes=100)
    first.submit(block=BLOCK, key=KEY)
    worker.finish_all()
    first.submit(block=BLOCK, key=b"another")
    worker.finish_all()
    gone = first.submit(block=BLOCK, key=KEY)
    assert first.refused[gone].code == "result_gone"
    kept = first.submit(block=BLOCK, key=b"another")
    assert None not in first.results(kept, 4)


@pytest.mark.parametrize("is_leased", [True, False])
@pytest.mark.parametrize("by", ["cancel", "expiry", "leaving"])
def test_when_its_twin_ends_without_an_answer_the_follower_runs(by: str, is_leased: bool) -> None:
    w = World()
    first, second = w.client(), w.client()
    worker = w.worker(batches=9, is_ready=is_leased)
    a = first.submit(block=BLOCK, key=KEY, timeout_ms=1000.0)
    b, c = second.submit(block=BLOCK, key=KEY), second.submit(block=BLOCK, key=KEY)
    if by == "cancel":
        first.send(p.Cancel(id=a))
    elif by == "leaving":
        first.send(p.Goodbye())
    else:
        w.now += 1.0
        w.turn()
    if not is_leased:
        worker.ready()
    worker.finish_all()
    assert None not in second.results(b, 4) + second.results(c, 4)
    assert w.state.ledger.num_open == 0


def test_when_part_of_its_twin_is_cancelled_the_follower_still_gets_all() -> None:
    w, first, second, worker = two()
    a = first.submit(block=BLOCK, key=KEY)
    b = second.submit(block=BLOCK, key=KEY)
    first.send(p.Cancel(id=a, start=1, stop=2))
    worker.finish_all()
    assert [second.row(b, row).num_finals for row in range(4)] == [1] * 4
    assert [isinstance(r, bytes) for r in second.results(b, 4)] == [True] * 4
    assert first.results(a, 4)[1] == "cancelled"
    assert w.state.ledger.num_open == 0


def test_a_follower_has_its_own_deadline_and_cancel() -> None:
    w, first, second, worker = two()
    a = first.submit(block=BLOCK, key=KEY)
    b = second.submit(block=BLOCK, key=KEY, timeout_ms=1000.0)
    c = second.submit(block=BLOCK, key=KEY)
    second.send(p.Cancel(id=c, start=0, stop=3))
    w.now += 1.0
    w.turn()
    assert second.results(b, 4) == ["deadline_exceeded"] * 4
    worker.finish_all()
    assert None not in first.results(a, 4)
    assert second.results(c, 4)[:3] == ["cancelled"] * 3
    assert second.results(c, 4)[3] is not None
    assert w.state.ledger.num_open == 0


def test_a_follower_of_an_unknown_kernel_runs_when_its_twin_is_cancelled_later() -> None:
    """Both wait for the kernel; it comes, the first runs; then the first is cancelled: the second is not forgotten."""
    w = World()
    first, second = w.client(), w.client()
    a = first.submit(block=BLOCK, key=KEY)
    b = second.submit(block=BLOCK, key=KEY)
    worker = w.worker(batches=9)
    assert worker.sizes() == [4]
    first.send(p.Cancel(id=a))
    worker.finish_all()
    assert None not in second.results(b, 4)


def test_a_follower_of_a_parked_twin_that_the_kernel_refuses() -> None:
    w = World()
    first, second = w.client(), w.client()
    first.submit(block=BLOCK, key=KEY)
    a = first.submit(block=BLOCK, key=b"other")
    b = second.submit(block=BLOCK, key=b"other")
    for start in (0, 2):
        first.send(p.Cancel(id=a, start=start, stop=start + 1))
    second.send(p.Cancel(id=b, start=0, stop=1))
    second.send(p.Cancel(id=b, start=2, stop=3))
    w.worker(spec(inputs=(["x", "tensor", {"dtypes": ["float64"], "rank": None, "ragged": "exact"}],)))
    assert first.results(a, 4) == second.results(b, 4) == ["cancelled", "invalid_input"] * 2
    assert w.state.ledger.num_open == 0


def test_leader_and_follower_of_many_rows_in_one_session() -> None:
    """Both answers at once would be a block of more rows than a message may have."""
    w = World(window_rows=20_000)
    client, worker = w.client(), w.worker(spec(max_batch_size=4096), batches=2)
    block = tensor_rows(b"b" * 16, 4096)
    a, b = client.submit(block=block, key=KEY), client.submit(block=block, key=KEY)
    worker.finish()
    assert None not in client.results(a, 4096) + client.results(b, 4096)


def test_durable_is_refused_by_a_broker_that_forgets() -> None:
    _, client, _, _ = two()
    run = client.submit(is_durable=True)
    assert client.refused[run].code == "invalid_input"


def test_again_under_a_new_broker_only_for_idempotent_kernels() -> None:
    w = World()
    client = w.client()
    worker = w.worker(spec("safe"), spec("once", idempotent=False), batches=3)
    safe, once = client.submit(kernel="safe", is_again=True), client.submit(kernel="once", is_again=True)
    assert client.refused[once].code == "unavailable"
    worker.finish_all()
    assert client.row(safe).num_finals == 1


def test_a_follower_dies_with_its_twin() -> None:
    w = World()
    first, second = w.client(), w.client()
    worker = w.worker(pid=5000)
    a, b = first.submit(key=KEY, block=tensor_rows(b"b" * 16, 1)), second.submit(key=KEY, block=tensor_rows(b"b" * 16, 1))
    worker.crash()
    w.worker(pid=5001).crash()
    assert first.results(a) == second.results(b) == ["dead"]
    again = second.submit(key=KEY, block=tensor_rows(b"b" * 16, 1))
    assert second.results(again) == ["dead"], "and so does whoever asks later"
