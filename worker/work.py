"""The leases of a worker while they wait and run: batches one at a time or several in flight, streams a step at a time.

Knows the engine and the link; does not know torch, nor sockets: frames to send go to a callable. Everything here is run by
the thread of the data loop.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from penstock.broker.columns import Buffer, any_shared
from penstock.broker.peer_memory import PeerMemory
from penstock.broker.protocol import Answer, Assign, Checkpoint, Code, Error, Resident, WorkerPartial
from penstock.broker.segments import SegmentError
from penstock.broker.shared import DescriptorError
from penstock.broker.wire import encode
from penstock.worker.link import Final, Link
from penstock.worker.pressure import Pressure

if TYPE_CHECKING:
    from penstock.worker.engine import Engine
    from penstock.worker.failures import Failure
    from penstock.worker.flights import Flights, Landed
    from penstock.worker.streams import Ended

log = logging.getLogger("penstock.worker")

Outgoing = list[Buffer] | Final
Announce = Callable[[Resident], None]


class Work:
    """What this worker has taken and not answered.

    Args:
        make_engine: given who is told when a kernel's state changes, what runs the kernels.
        memory: what is shared with this machine's clients.
        send: takes what is to be sent, in order: the frames of a message, or the answers to a lease.
        clock: seconds, for how long things take.

    Attributes:
        progress: grows with every batch and step; heartbeats carry it.
        is_in_kernel: a kernel runs, and may be interrupted by an exception.
        interrupted: no kernel is to begin any more: the process ends with this status.
        fault: the device is broken for good, and why.
    """

    def __init__(
        self,
        make_engine: "Callable[[Announce], Engine]",
        link: Link,
        memory: PeerMemory,
        send: Callable[[Outgoing], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.engine = make_engine(self._announce)
        self._clock = clock
        self.progress = 0
        self.is_in_kernel = False
        self.interrupted: int | None = None
        self.fault: Failure | None = None
        self._link = link
        self._memory = memory
        self._send = send
        self._waiting: deque[tuple[Assign, float]] = deque()
        self._stalled: Assign | None = None
        self._leaving: list[Landed] = []
        if self.engine.flights is not None:
            link.credit.num_slots = self.engine.flights.pipeline.num_slots

    @property
    def is_empty(self) -> bool:
        return not self._waiting and not len(self.engine.streams) and not self.is_flying

    @property
    def is_flying(self) -> bool:
        """Batches are in flight: the device will have something to say."""
        return self.engine.flights is not None and len(self.engine.flights) > 0

    def has_landed(self) -> bool:
        """Whether `run_batch` has an answer to send."""
        return self.engine.flights is not None and self.engine.flights.is_done()

    @property
    def has_streams(self) -> bool:
        return len(self.engine.streams) > 0

    def take(self, assign: Assign) -> None:
        """A lease has come: a batch waits for its turn, a stream is opened."""
        if not self._link.on_assign(assign):
            log.warning("ignored lease %d: it is held already, or of another session", assign.lease)
            return
        if any_shared(assign.blocks) and not self._open(assign):
            return
        received_at = self._clock()
        if assign.mode != "stream":
            self._waiting.append((assign, received_at))
            return
        with self._in_kernel():
            ended = self.engine.streams.open(assign, received_at)
        if ended is not None:
            self._end(ended)

    def _open(self, assign: Assign) -> bool:
        """Open what the rows of a lease lie in; if that cannot be, it is answered: they come again in frames."""
        try:
            for block in assign.blocks:
                self.engine.pins.pin(self._memory.opened.attach(block.frames))
        except (SegmentError, DescriptorError) as e:
            self._memory.turn_off(str(e))
            num_rows = self._link.held[assign.lease].num_rows
            self._send(Final(assign.lease, [Answer(0, num_rows, error=Error(Code.UNSHARED, str(e)))], {"num_runs": 0}))
            return False
        return True

    def _placed(self, lease: int, answers: Sequence[Answer]) -> Sequence[Answer]:
        """The answers with large rows where those who wait can read them."""
        held = self._link.held.get(lease)
        if self._memory.arena is None or held is None or held.is_unshared:
            return answers
        if not any(a.block is not None and a.block.layout.num_framed for a in answers):
            return answers
        placed = [a if a.block is None else Answer(a.start, a.stop, self._memory.place_rows(a.block)) for a in answers]
        if self._memory.must_tell:
            self._send(encode(self._memory.share()))
        return placed

    def cancel(self, lease: int) -> None:
        """A batch that has not begun and a stream end here; a batch under way is finished."""
        for index, (assign, _) in enumerate(self._waiting):
            if assign.lease == lease:
                del self._waiting[index]
                error = Error(Code.CANCELLED, "cancelled before it began")
                self._send(Final(lease, [Answer(0, self._link.held[lease].num_rows, error=error)], {"num_runs": 0}))
                return
        ended = self.engine.streams.cancel(lease)
        if ended is not None:
            self._end(ended)

    def end_begun(self) -> bool:
        """This process ends: what has begun and must not run again is answered, all else goes back. False if it cannot be."""
        waiting = {assign.lease for assign, _ in self._waiting}
        plans = self.engine.runner.plans
        once = [n for n, held in self._link.held.items() if held.kernel in plans and not plans[held.kernel].is_idempotent]
        begun = [lease for lease in once if lease not in waiting]
        error = Error(Code.WORKER_LOST, "its worker was stopped while it ran; it is not idempotent, so it was not run again")
        for lease in begun:
            self._send(Final(lease, [Answer(0, self._link.held[lease].num_rows, error=error)], {}))
        return not any(lease in self._link.held for lease in begun)

    def forget(self) -> None:
        """Nobody waits for anything that is held."""
        self._waiting.clear()
        self.engine.streams.clear()
        if self.engine.flights is not None:
            self.engine.flights.forget()
            self._let_go()

    def run_batch(self) -> bool:
        """Run and answer the batch that waits longest; or begin what there is room for, and answer what has landed. False
        if there was nothing to do."""
        if self.engine.flights is not None:
            return self._fly(self.engine.flights)
        if not self._waiting:
            return False
        assign, received_at = self._waiting.popleft()
        began = self._clock()
        self._enter_kernel()
        answers, clock, fault = self.engine.run(assign, received_at)
        self.is_in_kernel = False
        self.progress += 1
        self._link.credit.measure((self._clock() - began) * 1e3 - clock.load_ms)
        if answers:
            self._send(Final(assign.lease, self._placed(assign.lease, answers), clock.timings()))
        self.fault = self.fault or fault
        return True

    def _fly(self, flights: "Flights") -> bool:
        if self._leaving:
            self._let_go()
        was_busy = False
        while self._waiting and flights.has_room and self.fault is None:
            assign, received_at = self._waiting.popleft()
            with self._in_kernel():
                flights.take(assign, received_at)
            was_busy = True
        if self._waiting and not flights.pipeline.has_room and self._waiting[0][0] is not self._stalled:  # counted once
            self._stalled = self._waiting[0][0]
            flights.pipeline.num_stalls += 1
        with self._in_kernel():
            landed = flights.landed()
        for one in landed:
            self._land(one)
        return was_busy or bool(landed)

    def _land(self, landed: "Landed") -> None:
        clock = landed.clock
        self.progress += 1
        self.fault = self.fault or landed.fault
        if not landed.answers:
            return  # the device is broken: the broker finds out which rows are to blame
        self._link.credit.measure(max(clock.h2d_ms, clock.compute_ms, clock.d2h_ms))
        self._send(Final(landed.lease, landed.answers, clock.timings()))
        self._leaving.append(landed)
        self._let_go()

    def _let_go(self) -> None:
        """Give back the memory of answers that have left, or that nobody waits for."""
        staying = []
        for landed in self._leaving:
            if landed.lease in self._link.held:
                staying.append(landed)
            else:
                landed.release()
        self._leaving = staying

    def step_streams(self, may_save: bool) -> None:
        """One step of everything that streams; `may_save`: nothing waits to be sent, so that a checkpoint delays nothing."""
        limits = self._link.checkpoints if may_save else None
        with self._in_kernel():
            events = list(self.engine.streams.step(limits))
        self.progress += 1
        for event in events:
            if isinstance(event, WorkerPartial | Checkpoint):
                self._send(encode(event))
            else:
                self._end(event)

    def relieve(self, pressure: Pressure) -> None:
        """Memory is short, or no longer: give back caches first, then kernels that nobody waits for, one at a time."""
        share, pressure.has_news = 100.0 * pressure.fraction, False
        if not pressure.is_high:
            log.info("memory: %.0f %% in use, no longer short", share)
            return
        num_bytes = self.engine.runner.recover_memory()
        log.warning("memory: %.0f %% in use; caches cleared, %.0f MiB of them kernels' own", share, num_bytes / 2**20)
        if pressure.num_high > 1:
            wanted = {assign.kernel for assign, _ in self._waiting} | self.engine.streams.kernels
            wanted |= self.engine.flights.kernels if self.engine.flights is not None else set()
            name = self.engine.runner.unload_one(but=wanted)
            if name is not None:
                log.warning("memory: unloaded kernel %r, the one used least recently", name)

    def _enter_kernel(self) -> None:
        """From here on a signal may cut it short, and one that came just before does so here."""
        self.is_in_kernel = True
        if self.interrupted is not None:
            self.is_in_kernel = False
            raise SystemExit(self.interrupted)

    @contextmanager
    def _in_kernel(self) -> Iterator[None]:
        self._enter_kernel()
        try:
            yield
        finally:
            self.is_in_kernel = False

    def _end(self, ended: "Ended") -> None:
        self.progress += 1
        if ended.answer is not None:
            self._send(Final(ended.lease, self._placed(ended.lease, [ended.answer]), ended.clock.timings()))
        self.fault = self.fault or ended.fault

    def _announce(self, resident: Resident) -> None:
        was_in_kernel, self.is_in_kernel = self.is_in_kernel, False  # a signal must not cut a message in two
        self._send(encode(resident))
        if was_in_kernel:
            self._enter_kernel()
