"""The worker's session as values in and out: credit, leases, reconnecting, messages that are too large."""

import numpy as np
import pytest
from fake_broker import assign, received, tensor_block

from penstock.broker import protocol
from penstock.broker.columns import pack
from penstock.broker.layout import Column
from penstock.broker.protocol import Answer, Error, Welcome
from penstock.broker.wire import decode
from penstock.worker.link import ATTACHED, AWAY, WELCOME, Credit, Final, Link, LinkError, encode_answers

MB = 1 << 20
ROW = tensor_block(np.ones((1, 4), np.float32))


def attached() -> Link:
    link = Link("cpu-0", "cpu", MB)
    link.hello()
    link.on_welcome(Welcome(epoch=1, heartbeat_ms=100.0))
    link.ready([], {}, {})
    return link


def answer(link: Link, lease: int) -> protocol.WorkerFinal:
    final = Final(lease, [Answer(0, 1, ROW)], {})
    [(frames, _)] = link.encode(final)
    link.sent(final)
    message = decode(protocol.FROM_WORKER, received(frames))
    assert isinstance(message, protocol.WorkerFinal)
    return message


def test_hello_welcome_ready() -> None:
    link = Link("cpu-0", "cpu", MB)
    hello = link.hello()
    assert (hello.name, hello.device, hello.secret) == ("cpu-0", "cpu", link.secret)
    assert not link.on_welcome(Welcome(epoch=7, heartbeat_ms=50.0))
    ready = link.ready([], {"heavy": "absent"}, {"kind": "cpu"})
    assert link.state == ATTACHED
    assert (list(ready.leases), tuple(ready.credit), link.heartbeat_ms) == ([], (2, MB), 50.0)


def test_moves_that_are_not_in_the_table_are_errors() -> None:
    link = Link("cpu-0", "cpu", MB)
    with pytest.raises(LinkError, match="ready while away"):
        link.ready([], {}, {})


def test_credit_follows_the_answers() -> None:
    link = attached()
    assert link.on_assign(assign(5, "scale", ROW))
    assert not link.on_assign(assign(5, "scale", ROW))
    assert tuple(answer(link, 5).credit) == (3, MB + 16)
    assert not link.held


@pytest.mark.parametrize(("took_ms", "window"), [(0.1, 4), (0.9, 4), (1.5, 3), (10.0, 2), (499.0, 2), (501.0, 1)])
def test_the_window_follows_the_time_of_a_batch(took_ms: float, window: int) -> None:
    credit = Credit(MB)
    assert credit.window == 2
    credit.measure(took_ms)
    assert credit.window == window


def test_one_slow_batch_among_fast_ones_changes_little() -> None:
    credit = Credit(MB)
    for took_ms in [5.0, 10_000.0, 5.0, 20.0]:
        credit.measure(took_ms)
        assert credit.window == 2
    for _ in range(8):
        credit.measure(2000.0)
    assert credit.window == 1


def test_credit_never_shrinks() -> None:
    credit = Credit(MB)
    totals = []
    for took_ms in [0.1, 0.1, *[2000.0] * 9]:
        credit.measure(took_ms)
        totals.append(credit.total(1)[0])
        credit.answered(0)
    assert totals == sorted(totals)
    assert totals[-1] == 11 + 1


def test_a_lease_is_held_until_its_answer_has_left() -> None:
    link = attached()
    link.on_assign(assign(5, "scale", ROW))
    link.on_assign(assign(6, "count", ROW, mode="stream"))
    final = Final(5, [Answer(0, 1, ROW)], {})
    assert link.encode(final)
    link.lost()
    assert link.state == AWAY
    assert not link.on_assign(assign(7, "scale", ROW))
    link.hello()
    assert link.on_welcome(Welcome(epoch=1, heartbeat_ms=100.0, is_resumed=True))
    ready = link.ready([], {}, {})
    assert list(ready.leases) == [5, 6]
    assert tuple(ready.credit) == (2, MB)
    assert tuple(answer(link, 5).credit) == (3, MB)  # its bytes count no more
    assert tuple(answer(link, 6).credit) == (0, 0)  # streams use no credit


def test_a_broker_that_does_not_know_the_session_makes_it_forget() -> None:
    link = attached()
    link.on_assign(assign(5, "scale", ROW))
    link.lost()
    link.hello()
    assert not link.on_welcome(Welcome(epoch=2, heartbeat_ms=100.0))
    assert not link.held
    assert link.encode(Final(5, [Answer(0, 1, ROW)], {})) == []


def test_only_the_answer_to_the_last_hello_is_expected() -> None:
    link = Link("cpu-0", "cpu", MB)
    assert link.hello().number == 1
    link.lost()
    assert not link.is_expected(welcome(1))
    assert link.hello().number == 2
    assert not link.is_expected(welcome(1))
    assert link.is_expected(welcome(2))
    link.on_welcome(welcome(2))
    assert link.state == WELCOME


def test_a_broker_that_does_not_count_hellos_is_understood() -> None:
    link = Link("cpu-0", "cpu", MB)
    link.hello()
    assert link.is_expected(welcome(0))


def welcome(number: int) -> Welcome:
    return Welcome(epoch=1, heartbeat_ms=100.0, number=number)


def test_answers_that_are_too_many_for_a_header_travel_in_several_messages() -> None:
    detail = "x" * 4000
    errors = [Answer(i, i + 1, error=Error("kernel_failed", "y" * 4000, None, detail)) for i in range(40)]
    check_pieces(errors, 40)


def test_a_block_that_is_too_large_for_a_header_is_cut() -> None:
    lengths = [100_000] * 4096
    columns = [
        (Column(f"c{i}", "int8", (0,), True), lengths, [b""]) for i in range(5)
    ]  # five lists of 4,096 lengths of five bytes each: 100 KiB of header
    check_pieces([Answer(0, 4096, pack(columns, 4096))], 4096)


def check_pieces(answers: list[Answer], num_rows: int) -> None:
    messages = encode_answers(9, answers, {"compute_ms": 1.0}, (3, 4))
    assert len(messages) > 1
    finals = [decode(protocol.FROM_WORKER, received(frames)) for frames, _ in messages]
    rows: list[int] = []
    for final in finals:
        assert isinstance(final, protocol.WorkerFinal)
        rows += [i for a in final.answers for i in range(a.start, a.stop)]
        assert tuple(final.credit) == ((3, 4) if final is finals[-1] else (0, 0))
    assert rows == list(range(num_rows))
