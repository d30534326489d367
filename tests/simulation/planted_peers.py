"""Bugs to plant: client and worker."""

from typing import Any

from penstock.broker import protocol as p
from penstock.client import session as client_session
from penstock.client.receipts import Receipts
from penstock.client.run import Run
from penstock.client.submissions import Submissions
from penstock.worker.link import Credit, Link
from penstock.worker.work import Work
from simulation.bugs import bug, change, disable


@bug("client")
def does_not_count_from_one() -> None:
    """With a new session on the broker's side the numbers go on from the old ones."""
    change(Receipts, "restart", lambda restart: lambda self: None if hasattr(self, "received") else restart(self))


@bug("client")
def submits_again_under_a_new_id() -> None:
    """What the broker has lost is submitted as something else."""

    def make(come_back: Any) -> Any:
        def renamed(self: Submissions, run: Run, rest_until: float | None = None) -> None:
            come_back(self, run, rest_until)
            run.id = self.draw_id()

        return renamed

    change(Submissions, "_come_back", make)


@bug("client")
def does_not_say_again() -> None:
    """What an earlier broker may have started is submitted as if it were new."""
    change(
        client_session, "submit_message",
        lambda submit: lambda run, ack, now: (setattr(run, "is_again", False), submit(run, ack, now))[1],
    )  # fmt: skip


@bug("client")
def forgets_what_the_broker_lost() -> None:
    """What the broker says that it does not have is not submitted again."""
    change(client_session.Session, "_on_welcome", _without_unknown)


def _without_unknown(on_welcome: Any) -> Any:
    def forgetful(self: Any, m: p.Welcome, frames: Any, now: float) -> None:
        on_welcome(self, p.Welcome(**{name: getattr(m, name) for name in _KEPT}), frames, now)

    client_session._HANDLERS[p.Welcome] = forgetful
    return forgetful


_KEPT = ("epoch", "heartbeat_ms", "is_resumed", "credit", "limits", "shared")


@bug("client")
def tells_a_row_again() -> None:
    """An outcome replaces the one that a row has."""

    def settle(self: Run, start: int, stop: int, part: Any) -> int:
        num_new = self.slots[start:stop].count(None)
        self.slots[start:stop] = [part] * (stop - start)
        self.num_open -= num_new
        return num_new

    Run.settle = settle  # type: ignore[method-assign]


@bug("worker")
def keeps_leases_of_an_old_broker() -> None:
    """What is held goes on with a broker that does not know of it."""

    def on_welcome(self: Link, welcome: p.Welcome) -> bool:
        if self.state != "away":
            self._move("welcome")
            self.epoch, self.heartbeat_ms = welcome.epoch, welcome.heartbeat_ms
        return True

    Link.on_welcome = on_welcome  # type: ignore[method-assign]


@bug("worker")
def runs_what_it_has_forgotten() -> None:
    """Batches that wait when a session ends are run all the same."""
    disable(Work, "forget")


@bug("worker")
def never_lets_go_of_a_lease() -> None:
    """A lease counts as held when its answer has left."""
    disable(Link, "sent")


@bug("worker")
def takes_leave_of_what_it_runs() -> None:
    """A worker that is interrupted says goodbye with what must not run twice in its hands."""
    disable(Work, "end_begun", True)


@bug("worker")
def drops_what_is_cancelled() -> None:
    """A batch that is cancelled before it began is never answered."""

    def cancel(self: Work, lease: int) -> None:
        for index, (assign, _) in enumerate(self._waiting):
            if assign.lease == lease:
                del self._waiting[index]
                return

    Work.cancel = cancel  # type: ignore[method-assign]


@bug("worker")
def grants_without_bound() -> None:
    """A worker takes as many batches as there are."""
    disable(Credit, "total", (1_000_000, 1_000_000_000))
