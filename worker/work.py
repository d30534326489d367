"""The leases of a worker while they wait and run: batches one at a time, streams a step at a time.

Knows the engine and the link; does not know sockets: frames to send go to a callable. Everything here is run by the
thread of the data loop.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from penstock.broker.columns import Buffer, any_shared
from penstock.broker.peer_memory import PeerMemory
from penstock.broker.protocol import Answer, Assign, Code, Error, Resident, WorkerPartial
from penstock.broker.segments import SegmentError
from penstock.broker.shared import DescriptorError
from penstock.broker.wire import encode
from penstock.worker.config import WorkerConfig
from penstock.worker.engine import Engine
from penstock.worker.failures import Failure
from penstock.worker.link import Final, Link
from penstock.worker.streams import Ended

log = logging.getLogger("penstock.worker")

Outgoing = list[Buffer] | Final


class Work:
    """What this worker has taken and not answered.

    Args:
        memory: what is shared with this machine's clients.
        send: takes what is to be sent, in order: the frames of a message, or the answers to a lease.

    Attributes:
        progress: grows with every batch and step; heartbeats carry it.
        is_in_kernel: a kernel runs, and may be interrupted by an exception.
        fault: the device is broken for good, and why.
    """

    def __init__(self, config: WorkerConfig, link: Link, memory: PeerMemory, send: Callable[[Outgoing], None]) -> None:
        self.engine = Engine(config, self._announce)
        self.progress = 0
        self.is_in_kernel = False
        self.fault: Failure | None = None
        self._link = link
        self._memory = memory
        self._send = send
        self._waiting: deque[tuple[Assign, float]] = deque()

    @property
    def is_empty(self) -> bool:
        return not self._waiting and not len(self.engine.streams)

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
        received_at = time.perf_counter()
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

    def forget(self) -> None:
        """Nobody waits for anything that is held."""
        self._waiting.clear()
        self.engine.streams.clear()

    def run_batch(self) -> bool:
        """Run and answer the batch that waits longest; False if none does."""
        if not self._waiting:
            return False
        assign, received_at = self._waiting.popleft()
        began = time.perf_counter()
        self.is_in_kernel = True
        answers, clock, fault = self.engine.runner.run(assign, received_at)
        self.is_in_kernel = False
        self.progress += 1
        self._link.credit.measure((time.perf_counter() - began) * 1e3 - clock.load_ms)
        self._send(Final(assign.lease, self._placed(assign.lease, answers), clock.timings()))
        self.fault = self.fault or fault
        return True

    def step_streams(self) -> None:
        """One step of everything that streams."""
        with self._in_kernel():
            events = list(self.engine.streams.step())
        self.progress += 1
        for event in events:
            if isinstance(event, WorkerPartial):
                self._send(encode(event))
            else:
                self._end(event)

    @contextmanager
    def _in_kernel(self) -> Iterator[None]:
        self.is_in_kernel = True
        try:
            yield
        finally:
            self.is_in_kernel = False

    def _end(self, ended: Ended) -> None:
        self.progress += 1
        self._send(Final(ended.lease, self._placed(ended.lease, [ended.answer]), ended.clock.timings()))
        self.fault = self.fault or ended.fault

    def _announce(self, resident: Resident) -> None:
        was_in_kernel, self.is_in_kernel = self.is_in_kernel, False  # a signal must not cut a message in two
        self._send(encode(resident))
        self.is_in_kernel = was_in_kernel
