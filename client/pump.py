"""The thread that drives a shared link while no caller does but somebody must listen.

That is: callbacks, tasks that wait for credit, and whatever is due by the clock, such as heartbeats. The pump is rung only
if something is due before it would look up by itself, so a loop of calls never wakes it. Knows `shared_link.py`'s rules.
"""

import math
import select
import threading
import time
from typing import TYPE_CHECKING, Final

from penstock.client.bell import Bell

if TYPE_CHECKING:
    from penstock.client.shared_link import SharedLink

NAP_S: Final = 0.002
MAX_NAP_S: Final = 0.016
"""While others are at work the pump looks up this often at first, and at least, and stands in when they have stopped."""
MAX_POLL_S: Final = 3600.0


def is_never_done() -> bool:
    """What the pump waits for when it drives."""
    return False


class Pump:
    """See the module. `until` is when it will look up by itself."""

    def __init__(self) -> None:
        self.bell = Bell()
        self.until = math.inf
        self._thread: threading.Thread | None = None

    def take_over(self, shared: "SharedLink") -> None:
        """With the lock: nobody waits any more; see to it that the pump looks up as early as it has to."""
        due = shared.link.due
        if shared.session.must_listen:
            due = min(due, time.monotonic() + MAX_NAP_S)
        if due < self.until:
            self.until = due
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(shared,), name="penstock-client", daemon=True)
                self._thread.start()
            else:
                self.bell.ring()

    def join(self) -> None:
        """After the link was closed: until the thread has seen it."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self, shared: "SharedLink") -> None:
        nap, seen_turns, was_rung = NAP_S, -1, True
        bell_only = select.poll()
        bell_only.register(self.bell.fileno(), select.POLLIN)
        while True:
            with shared.lock:
                if shared.is_closed:
                    return
                now = time.monotonic()
                if shared.driver is is_never_done:
                    shared.driver = None
                is_free = shared.driver is None and not shared.sleepers
                if is_free and (was_rung or shared.num_turns == seen_turns):
                    nap, poll = NAP_S, self._stand_in(shared, bell_only)
                else:
                    if shared.orphans:
                        shared.turn()
                    wake = now + nap if shared.session.must_listen else shared.session.next_deadline()
                    self.until, poll = max(wake, now + NAP_S), bell_only
                    nap = min(MAX_NAP_S, nap * 2)
                seen_turns = shared.num_turns
                timeout_ms = poll_ms(self.until, now)
            shared.call_back()
            was_rung = any(fd == self.bell.fileno() for fd, _ in poll.poll(timeout_ms))
            if was_rung:
                self.bell.silence()

    def _stand_in(self, shared: "SharedLink", bell_only: "select.poll") -> "select.poll":
        """With the lock: do what is due, and become the driver if somebody must listen; what to poll comes back."""
        shared.turn()
        shared.look_up = self.until = shared.link.due
        if not shared.session.must_listen:
            return bell_only
        shared.driver, shared.polled_socket = is_never_done, shared.link.num_sockets
        poll = select.poll()
        poll.register(self.bell.fileno(), select.POLLIN)
        poll.register(shared.link.fileno(), select.POLLIN)
        return poll


def poll_ms(until: float, now: float) -> int:
    """What to give `poll`, which takes whole milliseconds."""
    return max(0, math.ceil((min(until, now + MAX_POLL_S) - now) * 1000))
