"""The heartbeats' rules, without socket or thread: when the broker counts as silent."""

from penstock.broker.protocol import Code, Error, Fault, Heartbeat
from penstock.broker.wire import encode
from penstock.worker.pulse import MAX_SILENT, Pulse

INTERVAL_S = 0.1


def test_silence_begins_with_a_beat_that_has_no_answer() -> None:
    """This process may have stood still, while torch was loaded say: that is no silence of the broker."""
    pulse, later = Pulse(bytes(16)), 10 * MAX_SILENT * INTERVAL_S
    pulse.begin(1e3 * INTERVAL_S)
    pulse.look(later)
    assert not pulse.is_lost
    pulse.beat(0, {}, later)
    pulse.look(later + INTERVAL_S)
    assert not pulse.is_lost
    pulse.look(2 * later)
    assert pulse.is_lost
    assert pulse.interval_s is None


def test_an_answer_ends_the_silence() -> None:
    pulse = Pulse(bytes(16))
    pulse.begin(1e3 * INTERVAL_S)
    pulse.beat(0, {}, 1.0)
    pulse.receive(encode(Heartbeat()))
    pulse.look(100.0)
    assert not pulse.is_lost


def test_who_is_not_known_greets_again() -> None:
    pulse = Pulse(bytes(16))
    pulse.begin(1e3 * INTERVAL_S)
    pulse.receive(encode(Fault(error=Error(Code.UNATTACHED, "no session"))))
    assert pulse.is_lost
    pulse.begin(1e3 * INTERVAL_S)
    assert not pulse.is_lost
