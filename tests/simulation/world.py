"""One seed: its parties, what they do, when what goes wrong; then everything heals, and all that is open must end.

Knows the order of a run. The promises are the oracle's business, the faults are in `faults.py`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random

from simulation.broker import Broker
from simulation.client import Client
from simulation.faults import FAULTS, KINDS
from simulation.network import Network
from simulation.oracle import Oracle, Violation
from simulation.supervisor import Supervisor
from simulation.tasks import BREAKS, HANGS, KILLS, OK, ONCE, RAISES, SHARED, SIZES, Task, payload
from simulation.timeline import START, Timeline
from simulation.user import User

CHAOS_S = 4.0
HEAL_S = 200.0
"""Everything that is open must end within this time once nothing goes wrong any more."""
_HARMLESS = {"worker_crash", "worker_quit", "worker_drain", "worker_pause", "device_fault", "slow_kernel", "slow_disk"}
FORGETFUL = FAULTS.keys() - _HARMLESS
"""Where one of these strikes, a client may have what the broker does not know it to have."""
MAX_EVENTS = 60_000
LOOK_EVERY = 20


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a seed. `invariant` is empty if all promises were kept."""

    seed: int
    digest: str
    num_events: int
    kinds: tuple[str, ...]
    invariant: str = ""
    text: str = ""
    story: Sequence[str] = ()


class World:
    """See the module.

    Args:
        without: kinds of faults and inputs that are left out.
        chaos_s: for how long things go wrong.
    """

    def __init__(self, seed: int, without: Collection[str] = (), chaos_s: float = CHAOS_S) -> None:
        self.seed = seed
        self.timeline = timeline = Timeline(seed)
        random = timeline.random
        self._times = {kind: Random(random.getrandbits(64)) for kind in FAULTS}
        """Of their own, so that the others strike at the same times when one is left out."""
        drawn = [kind for kind in KINDS if random.random() < 0.35]
        self.kinds = tuple(kind for kind in drawn if kind not in without)
        self._chaos_until = START + chaos_s
        self.check_every = random.choice((2, 10, 30))
        self.principals: dict[str, str] = {}
        self.network = Network(timeline)
        self.oracle = Oracle(timeline)
        self._num_pids = 100
        self.network.broker = self.broker = Broker(self)
        self.users: list[User] = []
        self.supervisors: list[Supervisor] = []

    def next_pid(self) -> int:
        self._num_pids += 1
        return self._num_pids

    def _start(self) -> None:
        random = self.timeline.random
        self.broker.start()
        tells = random.random() < 0.5
        for index in range(random.choice((1, 2, 2, 3))):
            name = f"worker-{index}"
            self.principals[name] = "uid:0"
            self.supervisors.append(Supervisor(self, name, random.choice((0, 0, 2)), tells))
        for name in ("ann", "bob", "cy")[: random.choice((1, 2, 3))]:
            user = User(self, name)
            self.users.append(user)
            for _ in range(random.choice((1, 1, 2))):
                user.connect()
            self._submit_later(user)
        for kind in self.kinds:
            if kind in FAULTS:
                self._strike_later(kind)

    # --- what users do ---------------------------------------------------------------------------------------------

    def _submit_later(self, user: User) -> None:
        self.timeline.after(self.timeline.random.expovariate(3.0), self._submit, user)

    def _submit(self, user: User) -> None:
        if self.timeline.now >= self._chaos_until:
            return
        self._submit_later(user)
        clients = list(user.clients.values())
        if not clients:
            return
        random = self.timeline.random
        for _ in range(random.choice((1, 1, 1, 4))):
            task = self._task(user)
            client = random.choice(clients)
            client.submit(task)
            if "twins" in self.kinds and random.random() < 0.3:
                for other in clients:
                    if other is not client:
                        self.timeline.after(random.choice((0.0, 0.01, 0.5)), self._submit_twin, other, task)
            if "cancels" in self.kinds and random.random() < 0.2:
                self.timeline.after(random.choice((0.0, 0.005, 0.05, 0.5)), self._cancel, client, task)

    def _submit_twin(self, client: "Client", task: Task) -> None:
        if not client.is_over and not task.is_over:
            task.is_twin = True
            client.submit(task)

    def _cancel(self, client: "Client", task: Task) -> None:
        if not client.is_over:
            client.cancel(task)

    def _task(self, user: User) -> Task:
        random = self.timeline.random
        number, size = len(user.tasks), random.choice(SIZES)
        kernel = random.choice((SHARED, SHARED, ONCE))
        kinds = [OK] * 20
        if "poison" in self.kinds:
            kinds += [KILLS, HANGS, BREAKS]
        if "raises" in self.kinds:
            kinds += [RAISES] * 2
        rows = [payload(user.name, number, row, random.choice(kinds), size) for row in range(random.choice((1, 1, 2, 5, 10)))]
        timeout = random.choice((0.05, 0.4, 2.0, 5.0, None)) if "time_limits" in self.kinds else None
        options = user.options(number, random.random() < 0.6, timeout)
        task = Task(user.name, number, kernel, rows, options, size, self.timeline.now)
        user.tasks.append(task)
        self.oracle.wanted(task)
        return task

    # --- what goes wrong -------------------------------------------------------------------------------------------

    def _strike_later(self, kind: str) -> None:
        self.timeline.after(self._times[kind].expovariate(0.6), self._strike, kind)

    def _strike(self, kind: str) -> None:
        if self.timeline.now < self._chaos_until:
            self.timeline.note("fault", kind)
            FAULTS[kind](self)
            self._strike_later(kind)

    def free_disk(self) -> None:
        self.broker.disk.is_full = False

    # --- a run -----------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """From the first process to the last outcome."""
        invariant = text = ""
        try:
            self._run()
        except Violation as violation:
            invariant, text = violation.invariant, str(violation)
        except Exception as e:
            at = _where(e)
            invariant, text = f"exception {type(e).__name__}", f"{type(e).__name__} at {at}: {e}"
        story = self.timeline.story() if invariant else ()
        timeline = self.timeline
        return Result(self.seed, timeline.digest(), timeline.num_events, self.kinds, invariant, text, story)

    def _run(self) -> None:
        timeline = self.timeline
        self._start()
        while timeline.now < self._chaos_until:
            self._step()
        self._heal()
        limit = timeline.now + HEAL_S
        while not all(user.is_content for user in self.users):
            for _ in range(LOOK_EVERY):
                self._step()
            if timeline.now > limit:
                raise Violation("stuck", f"still open: {self._open_tasks()}")
        self._come_to_rest(limit)

    def _step(self) -> None:
        self.timeline.step()
        if self.timeline.num_events > MAX_EVENTS:
            raise Violation("stuck", f"{MAX_EVENTS} events; open: {self._open_tasks()}")

    def _open_tasks(self) -> str:
        tasks = [task for user in self.users for task in user.tasks if not task.is_over and not task.is_given_up]
        return ", ".join(f"{t.name} {t.kernel} rows {sorted(set(range(len(t.rows))) - set(t.told))}" for t in tasks[:5])

    def _heal(self) -> None:
        """Nothing goes wrong from now on; what stands still or is cut off goes on when its time has come."""
        self.timeline.note("fault", "none from now on")
        self.network.full.clear()
        self.broker.is_doomed = False
        for connection in self.network.routes.values():
            connection.slowness = 0.0

    def _come_to_rest(self, limit: float) -> None:
        """Nothing is left over anywhere, once the last acknowledgements have come."""
        while left := self._left_over():
            self._step()
            if self.timeline.now > limit:
                raise Violation("left over", left)
        self.broker.check()
        for user in self.users:
            for client in user.clients.values():
                client.check()

    def _left_over(self) -> str:
        broker = self.broker
        if not broker.is_up or broker.is_paused:
            return "the broker is not back"
        state, journal = broker.core.state, broker.core.state.journal
        left = {
            "open rows": state.ledger.num_open, "leases": len(state.ledger.leases), "held messages": broker.num_held,
            "writes": len(journal.writes), "waiting writes": broker.disk.num_waiting,
            "unacknowledged": sum(len(s.outbox) + len(s.finished) for s in broker.core.clients.sessions() if s.route),
            "kept": 0 if FORGETFUL & set(self.kinds) else len(journal.retained),
            "held leases": sum(len(s.worker.link.held) for s in self.supervisors if s.worker is not None),
            "busy clients": sum(c.session.is_busy for u in self.users for c in u.clients.values()),
        }  # fmt: skip
        return ", ".join(f"{count} {what}" for what, count in left.items() if count)


def _where(e: Exception) -> str:
    tb = e.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    return "?" if tb is None else f"{tb.tb_frame.f_code.co_filename.rpartition('/')[2]}:{tb.tb_lineno}"


def run_seed(seed: int, without: Collection[str] = (), chaos_s: float = CHAOS_S) -> Result:
    return World(seed, without, chaos_s).run()
