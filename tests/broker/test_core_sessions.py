"""Client sessions: they outlive their connection, what they missed is sent again, and they end."""

import pytest
from broker_world import World, spec

from penstock.broker import promises
from penstock.broker import protocol as p
from penstock.broker.events import Malformed, Stop, Turn
from penstock.broker.storage.store import MemoryStore
from penstock.broker.wire import ProtocolError, decode, encode


def test_hello_is_answered_with_epoch_and_credit() -> None:
    w = World(window_rows=100, window_bytes=5000)
    client = w.client()
    (welcome,) = client.take(p.Welcome)
    assert (welcome.epoch, welcome.is_resumed, list(welcome.credit)) == (7, False, [100, 5000])
    assert welcome.limits["max_rows_per_run"] == 4096


def test_before_hello_nothing_is_done() -> None:
    w = World()
    client = w.client(is_connected=False)
    client.connect()
    client.submit()
    client.send(p.Heartbeat())
    assert [f.error.code for f in client.take(p.Fault)] == ["unattached"] * 2
    assert w.state.ledger.num_open == 0
    client.hello()
    client.send(p.Heartbeat())
    assert client.take(p.Heartbeat)


def test_hello_twice_keeps_the_session() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    run = client.submit()
    client.send(p.Hello(name="client", secret=client.secret))
    assert client.take(p.Welcome)[-1].is_resumed
    worker.finish()
    assert client.row(run).num_finals == 1
    assert len(w.core.clients) == 1


def test_missed_results_come_again_after_attach() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=1), batches=9)
    runs = [client.submit() for _ in range(4)]
    worker.finish(next(iter(worker.leases)))
    client.vanish()  # the broker does not know yet
    worker.finish(next(iter(worker.leases)))
    worker.finish(next(iter(worker.leases)))
    welcome = client.attach(runs[1:])
    assert welcome.is_resumed
    assert welcome.unknown == b""
    assert [client.row(run).num_finals for run in runs] == [1, 1, 1, 0]
    worker.finish()
    assert client.row(runs[3]).num_finals == 1
    assert client.num_duplicates == 0
    assert w.counters["peers_lost"] == 1


def test_attach_resends_only_what_was_not_received() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=1), batches=9)
    for _ in range(3):
        client.submit()
    worker.finish_all()
    client.received = 1  # the others were lost on the way
    client.got.clear()
    client.attach()
    assert client.received == 3
    assert len(client.got) == 2


def test_attach_names_the_submissions_that_never_arrived() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=1), batches=2)
    known, finished = client.submit(), client.submit()
    worker.finish(list(worker.leases)[1])
    lost = [b"lost............", b"lost too........"]
    welcome = client.attach([known, lost[0], finished, lost[1]])
    assert welcome.unknown == b"".join(lost)


def test_attach_to_a_new_broker() -> None:
    w = World()
    client = w.client()
    run = client.submit()
    fresh = World()
    client.world = fresh
    fresh.numbers = w.numbers
    client.epoch, client.received = 3, 17
    welcome = client.attach([run])
    assert not welcome.is_resumed
    assert welcome.unknown == run
    assert list(welcome.credit) == [4096, 256 << 20]
    assert client.received == 0
    again = client.submit(run_id=run, is_again=True)
    fresh.worker().finish_all()
    assert client.row(again).num_finals == 1


def test_attach_needs_principal_and_secret() -> None:
    w = World()
    owner = w.client(principal="uid:1")
    run = owner.submit()
    thief = w.client(principal="uid:2", is_connected=False)
    thief.secret = owner.secret
    welcome = thief.attach([run])
    assert not welcome.is_resumed
    assert welcome.unknown == run
    w.worker().finish_all()
    assert thief.got == {}
    assert owner.row(run).num_finals == 1


def test_acknowledged_results_are_forgotten() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=1), batches=9)
    for _ in range(4):
        client.submit()
    worker.finish_all()
    session = w.core.clients.by_route[client.route]
    assert session.num_unacked_bytes == 80
    client.send(p.Ack(seq=2))
    assert [m.seq for m in session.outbox] == [3, 4]
    client.send(p.Ack(seq=1))
    client.send(p.Heartbeat(ack=3))
    assert [m.seq for m in session.outbox] == [4]
    client.send(p.Ack(seq=1 << 40))
    assert (len(session.outbox), session.num_unacked_bytes, session.finished) == (0, 0, {})


def test_a_silent_client_is_dropped_and_its_tasks_are_cancelled_over_turns() -> None:
    w = World(session_ttl_s=60.0, window_rows=5000, liveness_s=1e6)
    client, other = w.client(), w.client()
    for _ in range(2000):
        client.submit(is_turn=False)
    w.turn()
    worker = w.worker(batches=2)
    kept = other.submit()
    for _ in range(8):
        w.advance(10.0)
        other.send(p.Heartbeat())
    assert len(w.core.clients) == 1
    assert w.counters["lost_clients"] == 1
    assert w.state.ledger.num_open == 1
    assert len(worker.cancelled) == 2
    worker.finish_all()
    assert other.row(kept).num_finals == 1
    assert client.got == {}
    client.send(p.Heartbeat())
    assert client.take(p.Fault)[-1].error.code == "unattached"


def test_the_cancels_of_a_session_that_ended_are_bounded_per_turn() -> None:
    w = World(window_rows=5000)
    client = w.client()
    for _ in range(1500):
        client.submit(is_turn=False)
    w.turn()
    w.handle(client.event(p.Goodbye()))
    w.handle(Turn())
    assert 0 < w.state.ledger.num_open < 1500
    assert w.core.next_deadline(w.now) == w.now
    w.turn()
    assert w.state.ledger.num_open == 0


def test_any_message_keeps_a_session() -> None:
    w = World(session_ttl_s=60.0)
    client = w.client()
    client.submit()
    for _ in range(5):
        w.advance(50.0)
        client.send(p.Status(request=1, id=b"0" * 16))
    assert len(w.core.clients) == 1


def test_a_silent_client_is_away_until_it_attaches_again() -> None:
    """Nothing is sent to somebody who may not be there, and nothing is lost to somebody who is."""
    w = World(client_liveness_s=5.0, session_ttl_s=60.0)
    client, worker = w.client(), w.worker()
    run = client.submit()
    for _ in range(6):
        w.advance(1.0)
        worker.heartbeat()
    assert w.core.operators.report(w.now)["num_clients_away"] == w.counters["silent_clients"] == len(w.core.clients) == 1
    worker.finish()
    assert client.results(run) == [None]
    client.send(p.Heartbeat())
    assert client.take(p.Fault)[-1].error.code == "unattached"
    client.attach()
    assert client.row(run).num_finals == 1
    assert w.core.operators.report(w.now)["num_clients_away"] == 0


def test_a_client_that_beats_is_not_away() -> None:
    w = World(client_liveness_s=5.0)
    client = w.client()
    for _ in range(12):
        w.advance(4.0)
        client.send(p.Heartbeat())
    w.now += 300.0  # the broker stood still
    w.turn()
    client.send(p.Heartbeat())
    assert w.counters["silent_clients"] == 0
    assert not client.take(p.Fault)


def test_goodbye_ends_the_session_and_its_tasks() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=1))
    client.submit()
    client.submit(3)
    client.send(p.Goodbye())
    assert len(w.core.clients) == 0
    assert w.state.ledger.outcomes["cancelled"] == 4
    assert worker.cancelled == [worker.the_lease()]
    worker.finish()
    assert worker.leases == {}
    client.hello()
    assert not client.take(p.Welcome)[-1].is_resumed


def test_two_sessions_from_one_address() -> None:
    """A second hello with another secret takes the address; the first session is away, and ends without harm."""
    w = World(session_ttl_s=60.0)
    client, worker = w.client(), w.worker()
    first = client.submit()
    old, client.secret = client.secret, b"another secret!!"
    client.send(p.Hello(name="second", secret=client.secret))
    worker.finish()
    assert client.results(first) == [None], "not this session's"
    run = client.submit()
    worker.finish()
    assert client.row(run).num_finals == 1
    for _ in range(5):
        w.advance(20.0)
        client.send(p.Heartbeat())
    assert len(w.core.clients) == 1
    assert client.route in w.core.clients.by_route
    assert not client.take(p.Fault)
    client.send(p.Goodbye())
    assert len(w.core.clients) == 0
    assert old != client.secret


def test_malformed_bytes_are_counted_and_answered() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    run = client.submit()
    for peer in (client, worker):
        w.step(Malformed(peer.side, peer.route, "no good"))
        assert peer.take(p.Fault)[0].error == p.Error("protocol", "no good")
    w.step(Malformed("front", b"nobody", "no good"))
    assert w.counters["malformed"] == 3
    worker.finish()
    assert client.row(run).num_finals == 1


def test_a_broker_that_stops_finishes_what_is_open() -> None:
    w = World()
    client, worker = w.client(), w.worker(spec(max_batch_size=1))
    runs = [client.submit(), client.submit()]
    w.step(Stop())
    assert not w.core.is_idle
    late = client.submit()
    assert client.refused[late].code == "unavailable"
    worker.finish_all()
    assert all(client.row(run).num_finals == 1 for run in runs)
    assert w.core.is_idle
    assert {(a.side, type(a.message)) for a in w.core.farewell()} == {("front", p.Goodbye), ("back", p.Goodbye)}


def test_equal_events_give_equal_actions() -> None:
    def play() -> list[object]:
        w = World()
        heard = list[object]()
        client, worker = w.client(), w.worker(spec("a"), spec("b"), batches=2)
        for number in range(20):
            client.submit(1 + number % 3, kernel="ab"[number % 2], priority=number % 10, timeout_ms=100.0 + number)
            if number % 3 == 0 and worker.leases:
                worker.finish(next(iter(worker.leases)))
        w.now += 0.11
        w.turn()
        worker.finish_all()
        for (run, row), got in client.got.items():
            heard.append((run, row, got.data, got.error))
        return heard

    assert play() == play()


def test_an_acceptance_that_was_lost_with_the_connection_is_told_again() -> None:
    w = World(store=MemoryStore())
    client = w.client()
    run = client.submit(is_durable=True, wants_accepted=True)
    client.vanish()
    w.commit()
    assert not client.take(p.Accepted)
    client.attach([run])
    w.commit()
    assert [m.id for m in client.take(p.Accepted)] == [run]


def test_an_attach_names_so_many_submissions_at_most() -> None:
    with pytest.raises(ProtocolError, match="at most 16777216"):
        decode(p.FROM_CLIENT, encode(p.Attach(name="c", secret=b"s" * 16, epoch=7, open=bytes((16 << 20) + 16))))


def test_many_answers_that_wait_for_one_commit_come_in_order() -> None:
    w = World(store=MemoryStore())
    w.worker()
    client = w.client()
    runs = [client.submit(is_durable=True, is_turn=False) for _ in range(600)]
    w.turn()
    w.commit()
    client.submit(is_durable=True)
    for number, run in enumerate(runs):
        client.send(p.Fetch(request=number, id=run), is_turn=False)
    w.commit()
    assert [m.request for m in client.take(p.Reply)] == list(range(600))


def test_who_has_too_many_messages_waiting_has_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "MAX_HELD", 1000)
    w = World(store=MemoryStore())
    worker, client = w.worker(), w.client()
    run = client.submit(is_durable=True)
    worker.finish()
    for number in range(100):
        client.send(p.Status(request=number), is_turn=False)
    assert len(w.promises) < 20 and not client.take(p.Reply)
    assert {m.error.code for m in client.take(p.Fault)} == {"unattached"}
    client.attach([run])
    w.commit()
    assert client.row(run).num_finals == 1


def test_what_follows_a_message_that_found_a_full_pipe_is_lost_with_it() -> None:
    w = World()
    worker, client = w.worker(), w.client()
    runs = [client.submit(), client.submit()]
    client.disconnect()
    worker.finish()
    worker.finish()
    client.connect()
    client.inbox.clear()
    client.num_blocked = 1  # the welcome; there is room again for the results
    client.send(p.Attach(name="client", secret=client.secret, epoch=client.epoch, received=0))
    assert not client.take(p.Results) and not client.take(p.Welcome)
    client.send(p.Status(request=1))
    assert client.take(p.Fault)[0].error.code == "unattached"
    client.attach(runs)
    assert [client.row(run).num_finals for run in runs] == [1, 1]


def test_what_waits_for_the_disk_behind_a_message_that_found_a_full_pipe_is_lost_with_it() -> None:
    w = World(store=MemoryStore())
    w.worker()
    client = w.client()
    runs = [client.submit(is_durable=True, wants_accepted=True) for _ in range(3)]
    client.num_blocked = 1
    w.commit()
    assert not client.take(p.Accepted) and not len(w.promises)
    client.attach(runs)
    w.commit()
    assert {m.id for m in client.take(p.Accepted)} == set(runs)


def test_an_attach_names_no_more_than_a_session_may_have_open() -> None:
    w = World(window_rows=10)
    client = w.client()
    client.send(p.Attach(name="client", secret=client.secret, epoch=client.epoch, open=bytes(16 * 65_537)))
    assert client.take(p.Fault)[0].error.code == "protocol"
    assert client.take(p.Welcome)[1:] == []
    welcome = client.attach([bytes([i]) * 16 for i in range(256)])
    assert len(welcome.unknown) == 16 * 256
