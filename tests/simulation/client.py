"""A client of a user: the real session, and what a program does with it.

Knows what `client/link.py` does around a session, without sockets; and that a user whose client died asks for its durable tasks
by key with the next one. What a user is told goes to the oracle.
"""

from collections import deque
from typing import TYPE_CHECKING, Any

from penstock.broker import protocol as p
from penstock.broker.protocol import Code
from penstock.broker.state import FRONT
from penstock.client.config import ClientConfig
from penstock.client.questions import Request
from penstock.client.run import CLOSED, Row, Run, deadline_of
from penstock.client.session import Session
from simulation.network import Frames, Socket
from simulation.oracle import Violation
from simulation.tasks import Task

if TYPE_CHECKING:
    from simulation.user import User

CONFIG = ClientConfig(name="user", shared_bytes=0, max_retries=10)
ASK_AGAIN_S = 0.7


class Client:
    """One process of a user's, from its first hello until it dies or says goodbye."""

    def __init__(self, user: "User", name: str) -> None:
        world = user.world
        self._user, self._timeline, self._oracle = user, world.timeline, world.oracle
        self.name = name
        self.is_over = self.is_paused = False
        self.session = Session(CONFIG, user.name, world.timeline.random.randbytes)
        self._inbox: deque[Frames] = deque()
        self._is_awake = False
        self._num_turns = 0
        self._due = float("inf")
        self._rows: dict[Run, list[tuple[Task, int] | None]] = {}
        self._seen: dict[Run, list[Any]] = {}
        self._changed: list[Run] = []
        self._asked: list[tuple[Request, Task]] = []
        self.tasks: set[Task] = set()
        """Those that this client is to bring the outcome of."""
        self._socket = Socket(world.network, FRONT, name, self._on_frames, self.wake)
        self.session.open(self._timeline.now)
        self.wake()

    def append(self, run: Run) -> None:
        """Something happened to a run (`run.watchers`)."""
        self._changed.append(run)

    # --- what the user wants ---------------------------------------------------------------------------------------

    def submit(self, task: Task) -> None:
        """One row may ride with others; several are a run of their own."""
        session, now = self.session, self._timeline.now
        task.num_asked += 1
        self.tasks.add(task)
        options = task.options
        rows = [Row(task.shape, [[row]], [None], [], len(row)) for row in task.rows]
        if len(rows) == 1:
            run, index = session.submit(rows[0], session.backlog.intern(options), now)
            self._watch(run, [None] * index + [(task, 0)])
        else:
            run = Run(session.submissions.draw_id(), task.shape, options, deadline_of(options, now))
            run.fill(rows, sum(row.nbytes for row in rows))
            self._watch(run, [(task, index) for index in range(len(rows))])
            session.send(run, now)
        self.wake()

    def _watch(self, run: Run, rows: list[tuple[Task, int] | None]) -> None:
        known = self._rows.setdefault(run, [])
        known += rows[len(known) :] if len(known) < len(rows) else []
        self._seen.setdefault(run, [])
        if run.watchers is None:
            run.watchers = [self]
        self._changed.append(run)

    def may_be_forgotten(self) -> None:
        """The broker may end this session: what is not durable ends with it, and starts anew where a twin brings it."""
        for task in self.tasks:
            task.is_spoiled = task.is_spoiled or not task.options.is_durable

    def cancel(self, task: Task) -> None:
        for run, rows in list(self._rows.items()):
            mine = [i for i, row in enumerate(rows) if row is not None and row[0] is task]
            if mine and run.state != CLOSED:
                task.is_cancelled = task.is_spoiled = True
                self.session.cancel(run, mine[0], mine[-1] + 1)
        self.wake()

    def fetch(self, task: Task, is_taken: bool) -> None:
        """Ask for a durable task by its key."""
        task.num_asked += 1
        self.tasks.add(task)
        key = task.options.key
        request = self.session.ask(lambda n: p.Fetch(request=n, key=key, take=is_taken), self._timeline.now)
        self._asked.append((request, task))
        self.wake()

    # --- the driver ------------------------------------------------------------------------------------------------

    def _on_frames(self, frames: Frames) -> None:
        self._inbox.append(frames)
        self.wake()

    def cut(self) -> None:
        """The connection breaks; nobody tells the session."""
        self._socket.cut()

    def wake(self) -> None:
        if not self._is_awake and not self.is_over:
            self._is_awake = True
            self._timeline.after(0.00002, self._turn)

    def _turn(self) -> None:
        """As `Link.turn`: receive and send until nothing is left to do; then look at what has come."""
        self._is_awake = False
        if self.is_over or self.is_paused:
            return
        session, now = self.session, self._timeline.now
        while True:
            while self._inbox:
                session.receive(self._inbox.popleft(), now)
            while self._socket.can_send and (frames := session.take(now)) is not None:
                self._socket.send(frames)
            session.can_send = self._socket.can_send
            due = session.next_deadline()
            if now < due:
                break
            session.tick(now)
            if session.connection.must_reconnect:
                self._inbox.clear()
                self._socket.close()
                self._socket = Socket(self._user.world.network, FRONT, self.name, self._on_frames, self.wake)
                session.reconnected(now)
        if due < self._due or self._due <= now:
            self._due = due
            if due < float("inf"):
                self._timeline.at(due + 1e-6, self._on_due)
        self._look()

    def _on_due(self) -> None:
        if self._timeline.now >= self._due:
            self._due = float("inf")
        self.wake()

    def _look(self) -> None:
        """Tell what is new, and see that nothing has changed that was told."""
        self._num_turns += 1
        if self._num_turns % self._user.world.check_every == 0:
            self.check()
        for request, task in [pair for pair in self._asked if pair[0].is_done]:
            self._asked.remove((request, task))
            self._on_fetched(request, task)
        changed, self._changed = self._changed, []
        for run in changed:
            self._tell(run)

    def check(self) -> None:
        """Everything inside must fit together."""
        try:
            self.session.check()
        except AssertionError as e:
            raise Violation("client", str(e) or repr(e)) from e

    def _tell(self, run: Run) -> None:
        seen, rows = self._seen[run], self._rows[run]
        seen += [None] * (run.num_rows - len(seen))
        for index, part in enumerate(run.slots):
            if seen[index] is not None and seen[index] is not part:
                raise Violation("told twice", f"row {index} of {run.id.hex()[:8]}")
            row = rows[index] if index < len(rows) else None
            if row is not None and row[0].options.is_durable and run.accepted:
                row[0].is_accepted = True
            if part is None or seen[index] is not None or row is None:
                continue
            seen[index] = part
            task, number = row
            self._oracle.told(task, number, part.block, part.base + index - part.start, part.error, part.queue_ms is not None)
        if run.state == CLOSED:
            self.tasks -= {row[0] for row in rows if row is not None}

    def _on_fetched(self, request: Request, task: Task) -> None:
        error = request.error
        if error is None and request.run is not None:
            task.is_accepted = True
            self._watch(request.run, [(task, index) for index in range(len(task.rows))])
        elif error is None or error.code == Code.OVERLOADED:  # another client's still, or no room: later
            self._timeline.after(ASK_AGAIN_S, self._fetch_again, task)
        elif error.code == Code.UNKNOWN_TASK and not task.is_accepted:
            self.submit(task)
        else:
            raise self._oracle.lost(task, f"{error.code}: {error.message}")

    def _fetch_again(self, task: Task) -> None:
        if not self.is_over:
            self.fetch(task, is_taken=self._timeline.random.random() < 0.5)

    # --- the end ---------------------------------------------------------------------------------------------------

    def end(self, is_gentle: bool) -> None:
        """The process is gone, with a goodbye or without."""
        if is_gentle and not self.is_paused:
            self._look()
            self.session.close()
            while self._socket.can_send and (frames := self.session.take(self._timeline.now)) is not None:
                self._socket.send(frames)
        self.is_over = True
        self._timeline.note(self.name, "says goodbye" if is_gentle else "dies")
        self._socket.close(is_gentle)
