"""Which kernels there are: the specs that workers offer, and the submissions that wait for one to turn up."""

from collections import Counter, deque
from collections.abc import Iterable

from penstock.broker.sessions import WorkerSession
from penstock.broker.spec import Spec
from penstock.broker.tasks import Run


class KernelTable:
    """Names to current specs. A kernel stays known when its last worker leaves: its tasks wait for the next one.

    Attributes:
        parked: what waits for a kernel to turn up, by its name; lasting: what is durable and waits beyond any grace. After a
            restart that may be a million submissions.
    """

    def __init__(self) -> None:
        self.known: dict[str, Spec] = {}
        self.parked: dict[str, deque[Run]] = {}
        self.lasting: dict[str, deque[Run]] = {}
        self._offers: Counter[tuple[str, bytes]] = Counter()
        self._interned: dict[tuple[str, bytes], Spec] = {}

    def offer(self, worker: WorkerSession, specs: list[Spec]) -> None:
        """A worker is ready with these, instead of what it offered before."""
        self.withdraw(worker)
        for spec in specs:
            kind = (spec.name, spec.digest)
            spec = self._interned.setdefault(kind, spec)
            worker.specs[kind] = spec
            self._offers[kind] += 1
            replaced = self.known.get(spec.name, spec)
            self.known[spec.name] = spec
            if replaced is not spec and (spec.name, replaced.digest) not in self._offers:
                del self._interned[spec.name, replaced.digest]
            for mode in spec.modes:
                worker.kinds[*kind, mode] = spec

    def withdraw(self, worker: WorkerSession) -> None:
        """A worker offers nothing any more."""
        for kind in worker.specs:
            self._offers[kind] -= 1
            if not self._offers[kind]:
                del self._offers[kind]
                self._fall_back(kind)
        worker.specs, worker.kinds = {}, {}

    def _fall_back(self, kind: tuple[str, bytes]) -> None:
        """The last worker with this version has left: another version that is still offered becomes the current one."""
        name = kind[0]
        current = self.known[name]
        if (current.name, current.digest) == kind:
            others = [k for k in self._offers if k[0] == name]
            if others:
                self.known[name] = self._interned[others[-1]]
                del self._interned[kind]

    def current(self) -> set[tuple[str, bytes]]:
        """What queued work may be bound to: versions on offer, and versions that nobody offers but nothing replaces."""
        return set(self._offers) | {(s.name, s.digest) for s in self.known.values()}

    def park(self, run: Run) -> None:
        (self.lasting if run.is_durable else self.parked).setdefault(run.kernel, deque()).append(run)

    def awaited(self) -> Iterable[str]:
        """The known kernels that submissions still wait for."""
        return [name for table in (self.parked, self.lasting) for name in table if name in self.known]

    def unpark(self, name: str, most: int) -> list[Run]:
        """The next open submissions that waited for this kernel, those that are not durable first."""
        taken: list[Run] = []
        for table in (self.parked, self.lasting):
            waiting = table.get(name, ())
            while waiting and len(taken) < most:
                run = waiting.popleft()
                if run.num_open:
                    taken.append(run)
            if not waiting:
                table.pop(name, None)
        return taken

    def give_up(self, name: str) -> list[Run]:
        """The open submissions that wait for this kernel no longer: those that are not durable."""
        return [run for run in self.parked.pop(name, ()) if run.num_open]
