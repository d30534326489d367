"""The session state machine, message by message, without sockets or clocks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from session_rig import PLAIN, PLANS, Rig, X, codes

from penstock.broker import protocol
from penstock.broker.protocol import Code, Error
from penstock.broker.wire import decode
from penstock.client.config import ClientConfig
from penstock.client.connection import GREETING, READY
from penstock.client.receipts import MAX_ASKED
from penstock.client.run import CLOSED, PENDING, SENT, WAITING, Options, Run


def test_hello_then_submit_on_an_idle_line_goes_out_at_once():
    rig = Rig().attached()
    run, row = rig.submit("echo")
    (sent,) = rig.submits()
    assert (sent.id, sent.block.num_rows, sent.timeout_ms, row) == (run.id, 1, None, 0)
    rig.deliver()
    assert run.state == CLOSED
    assert codes(run) == ["ok"]
    assert run.block is None  # the payload is let go


def test_nothing_goes_out_before_the_welcome():
    rig = Rig()
    rig.session.open(rig.now)
    rig.session.submit(PLANS["hold"].row({"x": X}), PLAIN, rig.now)
    assert [type(m) for m in rig.send()] == [protocol.Hello]
    rig.deliver()
    assert [type(m) for m in rig.send()] == [protocol.Submit]


def test_rows_share_a_run_on_a_busy_line_until_it_is_full():
    rig = Rig().attached()
    taken = [rig.submit() for _ in range(4 + 128 + 3)]
    rig.send()
    assert [m.block.num_rows for m in rig.submits()] == [1, 1, 1, 1, 128]
    assert [row for _, row in taken[4:132]] == list(range(128))
    assert taken[132][0].state == PENDING
    rig.session.flush()
    rig.send()
    assert rig.submits()[-1].block.num_rows == 3


def test_a_pending_run_leaves_after_flush_s_or_when_the_line_is_idle():
    rig = Rig().attached()
    for _ in range(5):
        run, _ = rig.submit()
    rig.send()
    assert run.state == PENDING
    assert rig.session.next_deadline() == pytest.approx(rig.now + 0.002)
    rig.advance(0.002)
    rig.send()
    assert run.state == SENT
    late, _ = rig.submit()
    assert late.state == PENDING
    rig.broker.release()
    rig.deliver()
    assert late.state == WAITING  # flushed since nothing is under way any more


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [
        (PLAIN, PLAIN, True),
        (Options(timeout=60.0), Options(timeout=60.0), False),  # distinct objects: options are interned by the client
        (PLAIN, Options(timeout=None, priority=1), False),
    ],
)
def test_only_tasks_with_the_same_options_share(first, second, share):
    rig = Rig().attached()
    for _ in range(4):
        rig.submit()
    assert (rig.submit(options=first)[0] is rig.submit(options=second)[0]) == share


def test_only_near_deadlines_and_equal_shapes_share():
    rig = Rig().attached()
    for _ in range(4):
        rig.submit()
    minute, blink = Options(timeout=60.0), Options(timeout=0.1)
    run, _ = rig.submit(options=minute)
    rig.now += 0.0019
    assert rig.submit(options=minute)[0] is run
    rig.now += 0.004
    assert rig.submit(options=minute)[0] is not run
    assert run.state == SENT
    run, _ = rig.submit(options=blink)
    rig.now += 0.0015  # more than 1 % of 0.1 s
    assert rig.submit(options=blink)[0] is not run
    assert rig.submit(options=blink, x=np.zeros(5, "f4"))[0] is not rig.submit(options=blink)[0]


def test_an_idempotency_key_keeps_a_task_alone():
    rig = Rig().attached()
    for _ in range(4):
        rig.submit()
    keyed = Options(timeout=None, key=b"k")
    assert rig.submit(options=keyed)[0] is not rig.submit(options=keyed)[0]
    rig.send()
    assert [m.key for m in rig.submits()][-2:] == [b"k", b"k"]


def test_past_the_credit_submissions_wait_and_go_on_when_it_comes():
    rig = Rig(window=(2, 1 << 20)).attached()
    runs = [rig.submit()[0] for _ in range(3)]
    rig.submit(x=np.zeros(5, "f4"))
    assert [r.state for r in runs] == [SENT, SENT, WAITING]
    rig.broker.release(1)
    rig.exchange()
    assert [r.state for r in runs] == [CLOSED, SENT, SENT]
    assert rig.session.backlog.num_rows == 1


def test_credit_in_bytes_holds_too_and_a_lone_giant_is_sent_to_be_refused():
    rig = Rig(window=(100, 40)).attached()
    small, big = rig.submit()[0], rig.submit(x=np.zeros(100, "f4"))[0]
    rig.exchange()
    assert (small.state, big.state) == (SENT, WAITING)
    rig.broker.release()
    rig.exchange()
    assert codes(big) == [Code.OVERLOADED]


def test_sooner_priorities_overtake_while_waiting():
    rig = Rig(window=(1, 1 << 20)).attached()
    rig.submit()
    late, soon = rig.submit()[0], rig.submit(options=Options(timeout=None, priority=1))[0]
    rig.session.flush()
    rig.exchange()
    rig.broker.release()
    rig.exchange()
    assert (late.state, soon.state) == (WAITING, SENT)


def test_the_room_for_waiting_tasks_is_bounded():
    rig = Rig(ClientConfig(max_waiting=3), window=(1, 1 << 20)).attached()
    for _ in range(4):
        rig.submit()
    rig.send()
    assert rig.session.backlog.num_rows == 3
    assert not rig.session.backlog.has_room(1, 16)
    rig.broker.release()
    rig.exchange()
    assert rig.session.backlog.has_room(1, 16)


def test_the_wire_carries_what_remains_and_waiting_tasks_end_on_their_instant():
    rig = Rig(window=(1, 1 << 20)).attached()
    rig.submit()
    quick, slow = rig.submit(options=Options(timeout=1.0))[0], rig.submit(options=Options(timeout=5.0))[0]
    rig.exchange()
    assert rig.session.next_deadline() <= rig.now + 1.0
    rig.advance(0.999)
    assert codes(quick) == [None]
    rig.advance(0.001)
    assert codes(quick) == [Code.DEADLINE]
    rig.broker.release()
    rig.exchange()
    assert slow.state == SENT
    assert rig.submits()[-1].timeout_ms == pytest.approx(4000.0)


def test_a_sent_task_gets_a_little_grace():
    rig = Rig().attached()
    run, _ = rig.submit(options=Options(timeout=1.0))
    rig.send()
    rig.advance(1.2)
    assert codes(run) == [None]
    rig.advance(0.06)
    assert codes(run) == [Code.DEADLINE]
    rig.broker.release()
    rig.exchange()  # the late answer changes nothing
    assert codes(run) == [Code.DEADLINE]


def test_a_time_limit_in_the_past_never_travels():
    rig = Rig().attached()
    run, _ = rig.submit(options=Options(timeout=-1.0))
    assert codes(run) == [Code.DEADLINE]
    assert rig.send() == []


def test_acks_ride_along_or_go_after_16_messages():
    rig = Rig().attached()
    for _ in range(15):
        rig.submit("echo")
        rig.exchange()
    acks = [m.ack for m in rig.submits()]
    assert acks == list(range(15))
    runs = [rig.submit(x=np.full(i + 1, i, "f4"))[0] for i in range(20)]
    rig.session.flush()
    rig.send()
    rig.broker.release()
    rig.broker.log.clear()
    rig.exchange()
    assert all(r.state == CLOSED for r in runs)
    assert protocol.Ack(seq=35) in rig.broker.log
    (session,) = rig.broker.sessions.values()
    assert not session.unacked


def test_a_mebibyte_of_results_is_acknowledged_at_once():
    rig = Rig().attached()
    rig.submit("echo", x=np.zeros(1 << 18, "f4"))
    rig.exchange()
    assert rig.broker.log[-1] == protocol.Ack(seq=1)


def test_a_seq_that_was_there_is_dropped():
    rig = Rig().attached()
    run, _ = rig.submit("echo")
    rig.send()
    ((_, frames),) = rig.broker.out
    rig.session.receive(frames, rig.now)
    events = rig.session.news.num_events
    rig.session.receive(frames, rig.now)
    assert rig.session.news.num_events == events
    assert codes(run) == ["ok"]


def test_a_gap_asks_for_what_is_missing():
    rig = Rig().attached()
    runs = [rig.submit("echo")[0] for _ in range(3)]
    rig.broker.out.pop(1)
    rig.deliver()
    assert rig.session.connection.state == GREETING
    rig.exchange()
    assert [codes(r) for r in runs] == [["ok"]] * 3


def test_what_is_lost_again_and_again_is_asked_for_again():
    rig = Rig().attached()
    runs = [rig.submit("echo")[0] for _ in range(2)]
    for _ in range(MAX_ASKED):
        del rig.broker.out[next(i for i, (_, frames) in enumerate(rig.broker.out) if is_results(frames))]
        rig.deliver()
        assert rig.session.connection.state == GREETING
        rig.send()
    rig.deliver()
    assert [codes(r) for r in runs] == [["ok"]] * 2


def test_what_the_broker_cannot_send_is_given_up_and_told(caplog):
    rig = Rig().attached()
    runs = [rig.submit("echo")[0] for _ in range(2)]
    for _ in range(MAX_ASKED + 1):
        del rig.broker.out[next(i for i, (_, frames) in enumerate(rig.broker.out) if is_results(frames))]
        rig.deliver()
        rig.send()
    assert [codes(r) for r in runs] == [[None], ["ok"]]
    assert "missing between its messages 0 and 2" in rig.session.last_fault


def is_results(frames):
    return isinstance(decode(protocol.TO_CLIENT, frames), protocol.Results)


def test_unattached_leads_to_attach_and_missed_results_come_again():
    rig = Rig().attached()
    run, _ = rig.submit("echo")
    rig.send()
    rig.broker.out.clear()
    rig.broker.drop_connections()
    rig.advance(1.0)
    rig.exchange()
    attach = next(m for m in rig.broker.log if isinstance(m, protocol.Attach))
    assert (attach.received, attach.open) == (0, run.id)
    assert codes(run) == ["ok"]
    assert len(rig.submits()) == 1


def test_resumed_with_unknown_submits_again_and_keeps_the_credit_right():
    rig = Rig(window=(2, 1 << 20)).attached()
    lost, _ = rig.session.submit(PLANS["hold"].row({"x": X}), PLAIN, rig.now)
    assert rig.session.take(rig.now)  # it never arrives
    rig.reconnect()
    rig.exchange()
    (again,) = rig.submits()
    assert (again.id, again.is_again) == (lost.id, False)
    second, third = rig.submit()[0], rig.submit()[0]
    rig.exchange()
    assert (second.state, third.state) == (SENT, WAITING)


def test_a_new_epoch_gets_open_tasks_again_under_their_ids():
    rig = Rig().attached()
    run, _ = rig.submit()
    version = rig.session.specs_version
    rig.exchange()
    rig.broker.restart()
    rig.advance(1.0)
    rig.exchange()
    first, again = rig.submits()
    assert (again.id, again.is_again, first.is_again) == (run.id, True, False)
    assert rig.session.specs_version > version
    rig.broker.release()
    rig.exchange()
    assert codes(run) == ["ok"]


def test_what_must_not_run_twice_ends_unavailable():
    rig = Rig().attached()
    run, _ = rig.submit()
    rig.exchange()
    rig.broker.restart()
    rig.broker.idempotent = False
    rig.advance(1.0)
    rig.exchange()
    assert codes(run) == [Code.UNAVAILABLE]


def test_silence_makes_a_new_socket_but_only_while_something_is_open():
    rig = Rig().attached()
    rig.broker.is_mute = True
    for _ in range(10):
        rig.advance(1.0)
        rig.send()
    assert rig.peer == 0
    run, _ = rig.submit()
    rig.send()
    for _ in range(3):
        rig.advance(1.0)
        rig.send()
    assert (rig.peer, rig.session.connection.state) == (1, GREETING)
    rig.broker.is_mute = False
    rig.advance(6.0)
    rig.exchange()
    assert rig.session.connection.state == READY
    rig.broker.release()
    rig.exchange()
    assert codes(run) == ["ok"]


def test_a_long_task_with_a_live_broker_is_not_silence():
    rig = Rig().attached()
    rig.submit()
    for _ in range(20):
        rig.advance(0.5)
        rig.submit()  # something is sent all the time: heartbeats must go out nevertheless
        rig.exchange()
    assert rig.peer == 0


def test_heartbeats_only_when_nothing_else_was_sent():
    rig = Rig().attached()
    rig.exchange()
    assert rig.session.next_deadline() == pytest.approx(rig.now + 1.0)
    rig.advance(0.5)
    assert rig.send() == []
    rig.advance(0.5)
    assert [type(m) for m in rig.send()] == [protocol.Heartbeat]


def test_a_socket_that_cannot_send_makes_nothing_due():
    rig = Rig().attached()
    rig.session.can_send = False
    assert rig.session.next_deadline() == math.inf


def test_refused_ends_the_run_and_forgets_the_specs():
    rig = Rig().attached()
    rig.broker.refuse = lambda m: Error(Code.INVALID, "wrong shape")
    version = rig.session.specs_version
    run, _ = rig.submit("echo")
    rig.exchange()
    assert codes(run) == [Code.INVALID]
    assert rig.session.specs_version == version + 1


def test_cancel_at_once_while_waiting_and_by_asking_when_sent():
    rig = Rig(window=(1, 1 << 20)).attached()
    sent, waiting = rig.submit()[0], rig.submit()[0]
    rig.exchange()
    for run in (sent, waiting):
        rig.session.cancel(run, 0, 1)
    assert (codes(sent), codes(waiting)) == ([None], [Code.CANCELLED])
    rig.exchange()
    assert codes(sent) == [Code.CANCELLED]
    assert len(rig.submits()) == 1


def test_a_cancel_survives_a_reconnection():
    rig = Rig().attached()
    run, _ = rig.submit()
    rig.exchange()
    rig.session.cancel(run, 0, 1)
    rig.reconnect()
    rig.exchange()
    assert codes(run) == [Code.CANCELLED]


def test_one_cancelled_row_of_a_waiting_run():
    rig = Rig(window=(3, 1 << 20)).attached()
    for _ in range(4):
        rig.submit()
    run, _ = rig.submit()
    assert rig.submit()[0] is run
    assert run.state == PENDING
    rig.session.cancel(run, 0, 1)
    assert codes(run) == [Code.CANCELLED, None]
    rig.session.flush()
    for _ in range(3):
        rig.exchange()
        rig.broker.release()
    assert codes(run) == [Code.CANCELLED, "ok"]


def test_not_authorised_ends_everything():
    rig = Rig().attached()
    run, _ = rig.submit()
    rig.send()
    rig.tell(protocol.Fault(error=Error(Code.NOT_AUTHORISED, "no")))
    assert codes(run) == [Code.NOT_AUTHORISED]
    late, _ = rig.submit()
    assert codes(late) == [Code.NOT_AUTHORISED]


def test_another_major_version_ends_the_session_with_both_named():
    rig = Rig()
    rig.session.open(rig.now)
    rig.send()
    rig.session.receive([b"PS\x09\x00", b"\x80"], rig.now)
    assert "9.0 met 1.3" in str(rig.session.error)


def test_garbage_and_misfits_are_noted_and_nothing_else():
    rig = Rig().attached()
    run, _ = rig.submit()
    rig.send()
    rig.session.receive([b"what"], rig.now)
    assert "cannot be read" in rig.session.last_fault
    outcome = protocol.Outcome([(run.id, 0, 5)], None, Error(Code.FAILED, "x"))
    rig.tell(protocol.Results(seq=1, outcomes=[outcome]))
    assert "does not fit" in rig.session.last_fault
    assert codes(run) == [None]


def test_what_cannot_travel_costs_no_credit():
    rig = Rig(window=(2, 1 << 20)).attached()
    huge = Options(timeout=None, key=bytes(1 << 17))  # more than a header holds
    for _ in range(5):
        run, _ = rig.submit("echo", options=huge)
        assert codes(run) == [Code.INVALID]
    run, _ = rig.submit("echo")
    rig.exchange()
    assert codes(run) == ["ok"]


def test_nothing_is_sent_before_the_welcome():
    rig = Rig().attached()
    run, _ = rig.submit()
    rig.exchange()
    rig.reconnect()
    assert [type(m) for m in rig.send()] == [protocol.Attach]
    rig.session.cancel(run, 0, 1)
    assert rig.send() == []
    rig.exchange()
    assert codes(run) == [Code.CANCELLED]


def test_goodbye_from_the_broker_waits_for_the_next_one():
    rig = Rig().attached()
    run, _ = rig.submit()
    rig.exchange()
    rig.tell(protocol.Goodbye(reason="stopping"))
    rig.broker.restart()
    rig.advance(1.0)
    rig.exchange()
    rig.broker.release()
    rig.exchange()
    assert codes(run) == ["ok"]


def test_close_says_goodbye_and_cancels():
    rig = Rig().attached()
    run, _ = rig.submit()
    rig.exchange()
    rig.session.close()
    assert [type(m) for m in rig.send()] == [protocol.Goodbye]
    assert codes(run) == [Code.CANCELLED]


def test_the_deadline_heap_is_compacted():
    rig = Rig().attached()
    for _ in range(500):
        rig.submit("echo", options=Options(timeout=60.0))
        rig.exchange()
    assert len(rig.session.submissions.deadlines) <= 130


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.sampled_from([None, 0.5, 30.0]), st.integers(1, 40)),
        st.tuples(st.just("send"), st.integers(1, 3)),
        st.tuples(st.just("deliver"), st.integers(1, 3)),
        st.tuples(st.just("release"), st.integers(1, 3)),
        st.tuples(st.just("advance"), st.sampled_from([0.001, 0.3, 1.1, 4.0])),
        st.tuples(st.just("cancel"), st.integers(0, 50)),
        st.tuples(st.just("lose"),),
        st.tuples(st.just("restart"),),
        st.tuples(st.just("flush"),),
        st.tuples(st.just("full"), st.sampled_from([20.0, 2000.0])),
    ),
    max_size=60,
)  # fmt: skip


@given(STEPS, st.sampled_from([4, 33, 4096]))
def test_every_task_ends_exactly_once_whatever_is_lost(steps, window):
    """Messages are lost with their connection, brokers with their memory, and brokers are full; at the end each task has
    its own answer."""
    rig = Rig(window=(window, 1 << 30)).attached()
    options = {t: Options(timeout=t) for t in (None, 0.5, 30.0)}
    tasks: list[tuple[Run, int, float]] = []
    seen: dict[tuple[bytes, int], object] = {}
    for step in steps:
        match step:
            case ("submit", timeout, count):
                for _ in range(count):
                    value = float(len(tasks))
                    run, row = rig.submit(options=options[timeout], x=np.full(2, value, "f4"))
                    tasks.append((run, row, value))
            case ("send", count):
                for _ in range(count):
                    frames = rig.session.take(rig.now)
                    if frames is not None:
                        rig.broker.handle(rig.peer, frames)
            case ("deliver", count):
                due, rig.broker.out = rig.broker.out[:count], rig.broker.out[count:]
                for peer, frames in due:
                    if peer == rig.peer:
                        rig.session.receive(frames, rig.now)
            case ("release", count):
                rig.broker.release(count)
            case ("advance", seconds):
                rig.advance(seconds)
            case ("cancel", index) if index < len(tasks):
                run, row, _ = tasks[index]
                rig.session.cancel(run, row, row + 1)
            case ("lose",):
                rig.broker.out.clear()
                rig.broker.drop_connections()
                rig.reconnect()
            case ("restart",):
                rig.broker.restart()
            case ("flush",):
                rig.session.flush()
            case ("full", retry_after_ms):
                full = Error(Code.OVERLOADED, "full", retry_after_ms)
                rig.broker.refuse = lambda m, full=full: full if m.block.num_rows % 2 else None
        rig.session.check()
        for run, row, _ in tasks:
            part = run.slots[row]
            assert seen.setdefault((run.id, row), part or seen.get((run.id, row))) in (None, part)
            if part is not None:
                seen[run.id, row] = part
            else:
                del seen[run.id, row]
    rig.broker.refuse = lambda m: None
    for _ in range(60):
        rig.session.flush()
        rig.exchange()
        rig.broker.release()
        rig.exchange()
        rig.advance(1.0)
    for run, row, value in tasks:
        part = run.slots[row]
        assert part is not None
        if part.error is None:
            got = np.frombuffer(part.block.row(0, part.base + row - part.start), "<f4")
            assert got.tolist() == [value, value]
        else:
            assert part.error.code in (Code.DEADLINE, Code.CANCELLED, Code.OVERLOADED)
            assert part.error.code == Code.CANCELLED or run.deadline < math.inf
    assert not rig.session.submissions.flight.runs
    assert rig.session.backlog.num_rows == 0
