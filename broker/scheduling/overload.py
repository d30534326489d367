"""When to refuse new work: by the predicted work ahead of it (Little's law), and by the delay that its class has seen (CoDel).

Knows predicted device time, waiting times and classes. Does not know tasks, clients or their quotas. An accepted task is
never dropped here: only the door closes.
"""

import math
from collections.abc import Sequence

from penstock.broker.scheduling.events import duration_text
from penstock.broker.wire import record

MIN_RETRY_S = 0.02
MAX_RETRY_S = 3600.0
INTERVAL = 20
"""Targets per CoDel interval."""


@record
class Overload:
    """Why not now: one line for people, and when to try again; None if waiting does not help."""

    reason: str
    retry_after_s: float | None


def retry_after(wait_s: float) -> float:
    """A predicted wait as a hint to a client, seconds."""
    return min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S)


@record
class Backlog:
    """What is ahead of a submission, in predicted device-milliseconds.

    Args:
        queued_ms: all that is queued.
        own_ms: of that, the submitting account's.
        share: its weight over the weights of all backlogged accounts, itself among them; in (0, 1].
        leased_ms: left of what runs now, on all workers together.
    """

    queued_ms: float
    own_ms: float
    share: float
    leased_ms: float
    num_workers: int

    def wait_s(self, more_ms: float = 0.0) -> float:
        """How long the account waits for what it has queued and `more_ms`, if every rival stays backlogged."""
        if not self.num_workers:
            return math.inf
        fair_ms = min(self.queued_ms + more_ms, (self.own_ms + more_ms) / self.share)
        return (fair_ms + self.leased_ms) / (1000.0 * self.num_workers)


def work_refusal(
    ahead: Backlog, work_ms: float, alone_ms: float, left_s: float, budget_s: float, max_queue_s: float
) -> Overload | None:
    """Whether a submission is too much, by prediction.

    Its last batch has to begin within the class's wait budget and to end within its time limit; a run of many rows is
    judged like as many tasks one after another. Without workers nothing is predicted, so nothing refused.

    Args:
        work_ms: marginal device-ms of all its rows.
        alone_ms: q95 of the time that its largest row takes alone.
        left_s: until its deadline; inf if it has none.
        budget_s: what its class may wait; inf for ever.
        max_queue_s: device-seconds that may be queued per worker; inf for any.
    """
    if not ahead.num_workers:
        return None
    room_s = max_queue_s * ahead.num_workers
    if (ahead.queued_ms + work_ms) / 1000.0 > room_s:
        return _queue_full(ahead, work_ms / 1000.0, room_s)
    before_ms = max(work_ms - alone_ms, 0.0)
    begin_s = ahead.wait_s(before_ms)
    if begin_s + alone_ms / 1000.0 <= left_s and begin_s <= budget_s:
        return None
    return _too_late(ahead, before_ms / (1000.0 * ahead.num_workers), alone_ms / 1000.0, left_s, budget_s)


def _queue_full(ahead: Backlog, work_s: float, room_s: float) -> Overload:
    work, room = duration_text(work_s), duration_text(room_s)
    if work_s > room_s:
        return Overload(f"this is about {work} of work and the queue holds {room}: submit less at a time", None)
    retry_s = retry_after((ahead.queued_ms + ahead.leased_ms) / (1000.0 * ahead.num_workers))
    queued = duration_text(ahead.queued_ms / 1000.0)
    return Overload(
        f"the queue is full: {queued} of work is queued, this is {work} more, and it holds {room}: "
        f"try again in {duration_text(retry_s)}",
        retry_s,
    )


def _too_late(ahead: Backlog, before_s: float, alone_s: float, left_s: float, budget_s: float) -> Overload:
    if before_s + alone_s > left_s:
        need, has = duration_text(before_s + alone_s), duration_text(left_s)
        return Overload(f"this takes about {need} with nothing ahead of it and has {has}: give it a longer timeout", None)
    if before_s > budget_s:
        work, most = duration_text(before_s + alone_s), duration_text(budget_s)
        return Overload(f"this is about {work} of work and its priority waits at most {most}: submit less at a time", None)
    wait_s = ahead.wait_s()
    retry_s = retry_after(wait_s)
    again = f"about {duration_text(wait_s)} of work is queued ahead and %s: try again in {duration_text(retry_s)}, or %s"
    if left_s <= budget_s + alone_s:
        return Overload(again % (f"the task has {duration_text(left_s)}", "give it a longer timeout"), retry_s)
    waits = f"its priority waits at most {duration_text(budget_s)}"
    return Overload(again % (waits, "give it a later priority"), retry_s)


class CoDel:
    """Closes the door to a class whose every dispatched task, for an interval, had waited longer than the target.

    After Nichols and Jacobson, "Controlling Queue Delay" (2012): the minimum over an interval tells a standing queue from a
    burst. It opens with the first task below the target, and after an interval without any dispatch.

    Args:
        targets_s: per class; inf for a class that is never closed.
    """

    def __init__(self, targets_s: Sequence[float]) -> None:
        self._targets_s = list(targets_s)
        self._above_since = [math.inf] * len(targets_s)
        self._last_at = [-math.inf] * len(targets_s)
        self._delays_s = [0.0] * len(targets_s)

    def dispatched(self, priority: int, delay_s: float, now: float) -> None:
        """A task of the class left its queue after `delay_s`."""
        self._delays_s[priority] = delay_s
        target_s = self._targets_s[priority]
        if delay_s <= target_s:
            self._above_since[priority] = math.inf
        elif self._above_since[priority] > now or now - self._last_at[priority] >= INTERVAL * target_s:
            self._above_since[priority] = now
        self._last_at[priority] = now

    def is_closed(self, priority: int, now: float) -> bool:
        """Whether new tasks of the class are to be refused."""
        interval_s = INTERVAL * self._targets_s[priority]
        return now - self._above_since[priority] >= interval_s > now - self._last_at[priority]

    def delay_s(self, priority: int) -> float:
        """What the last dispatched task of the class had waited."""
        return self._delays_s[priority]

    def refusal(self, priority: int, wait_s: float, now: float) -> Overload | None:
        """The refusal of a closed class; `wait_s` is the predicted time until what is queued ahead has drained."""
        if not self.is_closed(priority, now):
            return None
        target, since = duration_text(self._targets_s[priority]), duration_text(now - self._above_since[priority])
        retry_s = retry_after(wait_s)
        return Overload(
            f"every task of priority {priority} has waited longer than {target} for {since} now: "
            f"try again in {duration_text(retry_s)}",
            retry_s,
        )
