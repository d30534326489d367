"""All doors of a broker, and the messages that pass them: frames in, events for the core; messages out, frames.

Knows sockets, the codec, and of whom a name is asked. Does not know when something is ready, nor what a message does.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from penstock.broker.address import Address
from penstock.broker.columns import Buffer
from penstock.broker.config import BrokerConfig
from penstock.broker.connections import Connections
from penstock.broker.door import Door
from penstock.broker.events import Event, Malformed, Received
from penstock.broker.failpoints import ARMED, hit_message
from penstock.broker.gate import Gate
from penstock.broker.processes import Processes
from penstock.broker.protocol import (
    FROM_CLIENT,
    FROM_WORKER,
    Attach,
    Code,
    Error,
    Fault,
    Hello,
    Reply,
    Share,
    WorkerHeartbeat,
    WorkerHello,
)
from penstock.broker.state import BACK, FRONT, Send
from penstock.broker.wire import MAX_FRAMES, Message, ProtocolError, decode, encode

log = logging.getLogger("penstock.broker")

# Plain integers: pyzmq's enum flags cost more than the calls they are given to.
_SNDMORE, _NOBLOCK = int(zmq.SNDMORE), int(zmq.NOBLOCK)
COPIED_BYTES = 2048
"""Up to here a received frame is copied: keeping a frame object costs more memory than the copy takes time."""
_REVOKED = Fault(error=Error(Code.NOT_AUTHORISED, "this key is not allowed any more"))


class Doors:
    """See the module.

    Args:
        gate: who may come in over tcp; None: everybody on this machine.
        processes: watches those that hold leases or share memory.
        counters: what is turned away is counted here.
        handle: takes each event; perform: sends an answer in its turn.
    Attributes:
        owners: what to call when a socket or a monitor is ready.
    """

    def __init__(
        self,
        context: "zmq.Context[Any]",
        gate: Gate | None,
        processes: Processes,
        counters: Counter[str],
        handle: Callable[[Event], None],
        perform: Callable[[list[Send]], None],
    ) -> None:
        self.owners: dict[Any, Callable[[], None]] = {}
        self._context = context
        self._gate = gate
        self._processes = processes
        self._counters = counters
        self._handle = handle
        self._perform = perform
        self._doors: list[Door] = []
        self._connections: list[Connections] = []
        self._types = {FRONT: FROM_CLIENT, BACK: FROM_WORKER}

    def open(self, addresses: Sequence[Address], config: BrokerConfig) -> None:
        """Bind all sockets, and see that strangers stay out.

        Raises:
            AlreadyRunning: an address is taken.
            ValueError: one cannot be had, or the gate would let strangers in.
        """
        for address in addresses:
            for side in (FRONT, BACK):
                door = Door(len(self._doors), side, address, self._gate, self._context)
                self._doors.append(door)
                self.owners[door.socket] = functools.partial(self._receive, door)
                door.open(config.max_message_bytes, config.group_access)
        if self._gate is not None:
            self.owners[self._gate.socket] = self._gate.turn
            for door in self._doors:
                if door.gate is not None:
                    self._gate.check(door.side, door.endpoint)
        for door in self._doors:
            door.watch(2 * max(config.max_message_bytes, config.window_bytes), self._counters)
            if door.connections is not None:
                self._connections.append(door.connections)
                self.owners[door.connections.events] = door.connections.turn

    def next_deadlines(self) -> list[float | None]:
        """When `sweep` is due, per door whose connections have limits."""
        return [connections.next_deadline() for connections in self._connections]

    def sweep(self, now: float) -> None:
        """End connections that have gone over their limits."""
        for connections in self._connections:
            connections.sweep(now)

    def close(self) -> None:
        for door in self._doors:
            door.close()
        if self._gate is not None:
            self._gate.close()

    def _receive(self, door: Door) -> None:
        s = door.socket
        try:
            route = door.tag + s.recv(_NOBLOCK)
        except zmq.Again:  # the poller saw the first frame of a message whose sender was cut off
            return
        first: Any = s.recv(_NOBLOCK, copy=False)
        frame, frames = first, [first.bytes]
        while frame.more:
            frame = s.recv(_NOBLOCK, copy=False)
            if len(frames) <= MAX_FRAMES:
                frames.append(frame if len(frame) > COPIED_BYTES else frame.bytes)
        principal, pid = "", 0
        if door.gate is not None:  # with every message: a key may be revoked while its connection stands
            principal, _ = door.identify(first)
            if not principal:
                self._turn_away(door, route, first)
                return
        if not door.hear(first):
            self._counters["unidentified"] += 1
            return
        try:
            message = decode(self._types[door.side], frames)
        except ProtocolError as e:
            self._handle(Malformed(door.side, route, str(e)))
            return
        if ARMED:
            hit_message("broker.received", message)
        if not principal and isinstance(message, Hello | Attach | WorkerHello | WorkerHeartbeat | Share):
            principal, pid = door.identify(first)
            if not principal:
                self._counters["unidentified"] += 1
                return
        if isinstance(message, WorkerHello | Share):
            self._processes.watch(pid)
        self._handle(Received(door.side, route, principal, message, pid))

    def _turn_away(self, door: Door, route: bytes, frame: Any) -> None:
        """A key that was revoked: say so, and end its connection."""
        self._counters["refused_revoked"] += 1
        door.hear(frame, must_go=True)
        self._perform([Send(door.side, route, _REVOKED)])

    def send(self, action: Send) -> bool:
        """Send one message; False if nobody takes it."""
        s, frames = self._doors[action.route[0]].socket, self._encode(action.message)
        if not frames:
            return True
        if ARMED:
            hit_message("broker.sending", action.message)
        try:
            s.send(action.route[1:], _SNDMORE | _NOBLOCK)
        except zmq.ZMQError as e:
            # Unroutable, or so far behind that it counts as gone: it comes back with an attach.
            if e.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        last = frames.pop()
        for frame in frames:
            s.send(frame, _SNDMORE, copy=not isinstance(frame, zmq.Frame))  # only a received frame is worth it
        s.send(last, 0, copy=not isinstance(last, zmq.Frame))
        if ARMED:
            hit_message("broker.sent", action.message)
        return True

    def _encode(self, message: Message) -> list[Buffer]:
        """The frames; none, and an entry in the log, where the core says what cannot travel: nothing may end the loop."""
        try:
            return encode(message)
        except ProtocolError as e:
            log.error("%s: a fault of this broker: %s", message.TYPE, e)
            self._counters["unsendable"] += 1
            if isinstance(message, Reply):
                return encode(Reply(request=message.request, error=Error(Code.INVALID, f"the answer cannot travel: {e}")))
            return []
