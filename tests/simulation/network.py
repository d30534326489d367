"""Connections between peers and the broker, as ZeroMQ's DEALER and ROUTER make them.

Within a connection nothing is lost or reordered; it breaks as a whole, and what was on its way is lost, all but a beginning of
it perhaps. Each connection is a route of its own for the broker, so what an old one still carries may arrive behind what the
new one has brought. A partition holds back what is on its way, in one direction or both. Knows frames, not messages.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from simulation.timeline import Timeline

if TYPE_CHECKING:
    from simulation.broker import Broker

UP, DOWN = "up", "down"
"""Towards the broker, and from it."""
Frames = Sequence[Any]


class Unroutable(Exception):
    """The broker has nobody at this address, or that one does not take anything."""


class Lane:
    """One direction of a connection: first in, first out."""

    __slots__ = ("_deliver", "_last", "_queue", "_timeline", "is_held", "num_held")

    def __init__(self, timeline: Timeline, deliver: Callable[[Frames], None]) -> None:
        self.is_held = False
        self.num_held = 0
        self._timeline = timeline
        self._deliver = deliver
        self._queue: deque[Frames] = deque()
        self._last = 0.0

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, frames: Frames, delay: float) -> None:
        self._queue.append(frames)
        self._plan(delay)

    def _plan(self, delay: float) -> None:
        self._last = max(self._last, self._timeline.now + delay)
        self._timeline.at(self._last, self._arrive)

    def _arrive(self) -> None:
        if self.is_held:
            self.num_held += 1
        elif self._queue:
            self._deliver(self._queue.popleft())

    def release(self) -> None:
        self.is_held = False
        for _ in range(self.num_held):
            self._plan(self._timeline.random.uniform(0.0001, 0.02))
        self.num_held = 0

    def cut(self, num_kept: int) -> None:
        """What is on its way is lost, all but the first so many."""
        while len(self._queue) > num_kept:
            self._queue.pop()

    @property
    def last(self) -> float:
        """When what was put in last arrives."""
        return self._last


class Connection:
    """One route. The broker may believe in it for some time after it broke."""

    __slots__ = ("is_routed", "lanes", "owner", "route", "side", "slowness", "socket")

    def __init__(self, network: "Network", socket: "Socket", route: bytes) -> None:
        self.socket: Socket | None = socket
        self.route = route
        self.side, self.owner = socket.side, socket.owner
        self.is_routed = True
        self.slowness = 0.0
        broker = network.broker
        self.lanes = {
            UP: Lane(network.timeline, lambda frames: broker.receive(self, frames)),
            DOWN: Lane(network.timeline, self._to_peer),
        }

    def _to_peer(self, frames: Frames) -> None:
        if self.socket is not None:
            self.socket.deliver(frames)


class Network:
    """All connections; who is cut off, and how slow it is."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.broker: Broker
        self.routes: dict[tuple[str, bytes], Connection] = {}
        self.blocked: set[tuple[str, str]] = set()
        """(owner, direction)."""
        self.full: set[str] = set()
        """Owners whose connections take nothing more from the broker."""
        self._num_routes = 0

    def is_blocked(self, owner: str) -> bool:
        return (owner, UP) in self.blocked or (owner, DOWN) in self.blocked

    def connect(self, socket: "Socket") -> Connection:
        self._num_routes += 1
        connection = Connection(self, socket, b"\0%04d" % self._num_routes)
        self.routes[socket.side, connection.route] = connection
        return connection

    def delay(self, connection: Connection) -> float:
        return self.timeline.random.uniform(0.00005, 0.0012) + connection.slowness * self.timeline.random.random()

    def send(self, side: str, route: bytes, frames: Frames) -> None:
        """From the broker. Raises Unroutable."""
        connection = self.routes.get((side, route))
        if connection is None or (connection.owner in self.full and len(connection.lanes[DOWN]) > 1):
            raise Unroutable
        connection.lanes[DOWN].put(frames, self.delay(connection))

    def drop(self, connection: Connection, notice_s: float, num_kept: int = 0) -> None:
        """A connection ends; the broker notices after a while, and takes the first of what was on its way to it."""
        connection.socket = None
        connection.lanes[DOWN].cut(0)
        connection.lanes[UP].cut(num_kept)
        self.timeline.after(notice_s, self._forget, connection)

    def _forget(self, connection: Connection) -> None:
        connection.is_routed = False
        self.routes.pop((connection.side, connection.route), None)

    def drop_all(self) -> None:
        """The broker is gone."""
        for connection in list(self.routes.values()):
            socket = connection.socket
            self.drop(connection, 0.0)
            connection.is_routed = False
            if socket is not None:
                socket.has_lost()
        self.routes.clear()

    def block(self, owner: str, directions: Sequence[str]) -> None:
        for direction in directions:
            self.blocked.add((owner, direction))
            for connection in self.routes.values():
                if connection.owner == owner:
                    connection.lanes[direction].is_held = True

    def unblock(self, owner: str) -> None:
        self.blocked -= {(owner, UP), (owner, DOWN)}
        for connection in list(self.routes.values()):
            if connection.owner == owner:
                for lane in connection.lanes.values():
                    lane.release()


class Socket:
    """A peer's DEALER: it connects again by itself, and tells only who asks that it has.

    Args:
        on_frames: a message has come; on_change: it connected, or the connection broke.
    """

    def __init__(
        self, network: Network, side: str, owner: str, on_frames: Callable[[Frames], None], on_change: Callable[[], None]
    ) -> None:
        self.side, self.owner = side, owner
        self.has_broken = False
        """Since it was last taken back: what a monitor tells."""
        self.connection: Connection | None = None
        self._network = network
        self._on_frames = on_frames
        self._on_change = on_change
        self._is_closed = False
        self._retry(0.0)

    def _retry(self, after: float) -> None:
        self._network.timeline.after(after + self._network.timeline.random.uniform(0.0002, 0.002), self._connect)

    def _connect(self) -> None:
        if self._is_closed or self.connection is not None:
            return
        if not self._network.broker.is_up or self._network.is_blocked(self.owner):
            self._retry(0.1)
            return
        self.connection = self._network.connect(self)
        self._on_change()

    @property
    def can_send(self) -> bool:
        return self.connection is not None

    def send(self, frames: Frames) -> bool:
        """False if there is no connection."""
        if self.connection is None:
            return False
        self.connection.lanes[UP].put([bytes(f) for f in frames], self._network.delay(self.connection))
        return True

    def deliver(self, frames: Frames) -> None:
        if not self._is_closed:
            self._on_frames(frames)

    def has_lost(self) -> None:
        """The connection broke under it."""
        self.connection = None
        if not self._is_closed:
            self.has_broken = True
            self._retry(0.1)
            self._on_change()

    def cut(self) -> None:
        """Break the connection; what it had sent may have arrived in part."""
        if self.connection is not None:
            random = self._network.timeline.random
            self._network.drop(self.connection, random.choice((0.0, 0.01, 1.0)), random.choice((0, 0, 1, 2)))
            self.has_lost()

    def close(self, is_gentle: bool = False) -> float:
        """Let go of it; gently, what was sent arrives. When the last of it does."""
        self._is_closed = True
        if self.connection is None:
            return self._network.timeline.now
        random = self._network.timeline.random
        num_kept = len(self.connection.lanes[UP]) if is_gentle else random.choice((0, 1, 3, 100))
        self._network.drop(self.connection, random.choice((0.0, 0.05, 0.5)), num_kept)
        last, self.connection = self.connection.lanes[UP].last, None
        return last
