"""The pages' HTTP: bytes in and bytes out, and a responder that nobody can keep from answering, driven turn by turn."""

import contextlib
import socket
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from penstock.broker.http import MAX_REQUEST_BYTES, BadRequest, Page, Request, parse, respond
from penstock.broker.responder import KEPT_S, MAX_CONNECTION_S, MAX_CONNECTIONS, MAX_DISCARDED_BYTES, Responder

PAGES = {
    "/metrics": lambda now: Page(200, f"made at {now:.1f}\n"),
    "/healthz": lambda now: Page(503, "no worker\n"),
    "/large": lambda now: Page(200, "x" * 20_000_000),
    "/broken": lambda now: 1 / 0,  # type: ignore[dict-item, return-value]
}  # fmt: skip


def split(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers, body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    version, status, _ = line.split(" ", 2)
    assert version == "HTTP/1.1"
    return int(status), dict(one.split(": ", 1) for one in lines), body


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9464\r\nAccept: */*\r\n\r\n", Request("GET", "/metrics")),
        (b"HEAD /metrics?name[]=x HTTP/1.0\r\n\r\n", Request("HEAD", "/metrics")),
        (b"GET / HTTP/1.1\nhost: localhost\n\n", Request("GET", "/")),
        (b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", Request("GET", "/")),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", Request("POST", "/metrics")),
        (b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n", None), (b"", None), (b"\r\n", None),
    ],
)  # fmt: skip
def test_requests(data: bytes, expected: Request | None) -> None:
    assert parse(data) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n", b"hello\r\n\r\n", b"GET /\r\n\r\n", b"get / HTTP/1.1\r\n\r\n", b"GET / HTTP/2\r\n\r\n", b"\xff\xfe\n\n",
        b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"GET / HTTP/1.1\r\nHost: 127.0.0.1.evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * MAX_REQUEST_BYTES, b"GET / HTTP/1.1\r\nX: " + b"x" * MAX_REQUEST_BYTES + b"\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_no_request(data: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(data)
    assert split(respond(data, PAGES, 0.0) or b"")[0] == 400


def test_a_request_is_answered_byte_by_byte_as_at_once() -> None:
    data = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    assert [respond(data[:n], PAGES, 1.0) for n in range(len(data))] == [None] * len(data)
    status, headers, body = split(respond(data, PAGES, 1.0) or b"")
    assert (status, body) == (200, b"made at 1.0\n")
    assert (headers["Content-Length"], headers["Connection"]) == ("12", "close")


def test_a_head_is_a_get_without_its_body() -> None:
    get, head = (respond(f"{m} /metrics HTTP/1.1\r\n\r\n".encode(), PAGES, 1.0) or b"" for m in ("GET", "HEAD"))
    assert split(head) == (*split(get)[:2], b"")


@pytest.mark.parametrize(
    ("line", "status"),
    [("GET /healthz", 503), ("GET /", 404), ("POST /nothing", 404), ("POST /metrics", 405), ("DELETE /healthz", 405)],
)
def test_answers_by_status(line: str, status: int) -> None:
    found, headers, body = split(respond(f"{line} HTTP/1.1\r\n\r\n".encode(), PAGES, 0.0) or b"")
    assert found == status
    assert body.endswith(b"\n")
    assert ("Allow" in headers) == (status == 405)


@given(st.binary(max_size=200))
def test_any_bytes_are_taken(data: bytes) -> None:
    answer = respond(data + b"\r\n\r\n", PAGES | {"/broken": PAGES["/metrics"]}, 0.0)
    assert answer is not None
    assert split(answer)[0] in (200, 400, 404, 405, 503)


# --- sockets -------------------------------------------------------------------------------------------------------


class World:
    """A responder in a poll loop of its own, and peers."""

    def __init__(self) -> None:
        self.now = 100.0
        self.poller = zmq.Poller()
        self.responder = Responder(PAGES)
        self.port = self.responder.open("127.0.0.1", 0)
        self.responder.attach(self.poller)
        self.peers: list[socket.socket] = []

    def peer(self, data: bytes = b"") -> socket.socket:
        s = socket.create_connection(("127.0.0.1", self.port))
        s.setblocking(False)
        self.peers.append(s)
        if data:
            s.sendall(data)
        return s

    def turn(self, wait_ms: int = 0) -> int:
        """One round of the loop: how many descriptors were ready."""
        ready = self.poller.poll(wait_ms)
        for fd, _ in ready:
            if self.responder.owns(fd):
                self.responder.handle(fd, self.now)
        self.responder.sweep(self.now)
        return len(ready)

    def settle(self) -> None:
        """Until nothing more is to be done."""
        for _ in range(200):
            if not self.turn(20):
                return
        raise AssertionError("a descriptor stays ready: the loop would spin")

    def read(self, s: socket.socket) -> bytes:
        """Everything until the answer's end."""
        data = b""
        for _ in range(100_000):
            with contextlib.suppress(BlockingIOError):
                part = s.recv(1 << 20)
                if not part:
                    return data
                data += part
            self.turn()
        raise AssertionError(f"no end after {len(data)} bytes")

    @property
    def num_watched(self) -> int:
        return len(self.poller.sockets)

    def close(self) -> None:
        self.responder.close()
        for s in self.peers:
            s.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()
    assert made.num_watched == 0


GET = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_a_peer_is_answered_and_forgotten(world: World) -> None:
    assert world.responder.next_deadline() is None
    peer = world.peer(GET)
    assert split(world.read(peer))[2] == b"made at 100.0\n"
    assert world.responder.next_deadline() == 105.0
    peer.close()
    world.settle()
    assert world.responder.next_deadline() is None
    assert world.num_watched == 1


def test_a_page_is_made_once_for_many(world: World) -> None:
    first = world.read(world.peer(GET))
    world.now += KEPT_S / 2
    assert world.read(world.peer(GET)) == first
    world.now += KEPT_S
    assert world.read(world.peer(GET)) != first


def test_a_page_that_cannot_be_made_is_an_answer(world: World) -> None:
    assert split(world.read(world.peer(b"GET /broken HTTP/1.1\r\n\r\n")))[0] == 500
    assert split(world.read(world.peer(GET)))[0] == 200


def test_a_slow_reader_is_left_waiting_and_others_are_not(world: World) -> None:
    slow = world.peer(b"GET /large HTTP/1.1\r\n\r\n")
    world.settle()  # its buffers are full, and the loop does not spin
    assert split(world.read(world.peer(GET)))[0] == 200
    assert len(split(world.read(slow))[2]) == 20_000_000


def test_who_is_silent_or_does_not_read_is_gone_in_time(world: World) -> None:
    silent, slow = world.peer(b"GET /met"), world.peer(b"GET /large HTTP/1.1\r\n\r\n")
    world.settle()
    deadline = world.responder.next_deadline()
    assert deadline == 100.0 + MAX_CONNECTION_S
    world.now = deadline - 0.001
    world.turn()
    assert world.num_watched == 3
    world.now = deadline
    world.turn()
    assert world.num_watched == 1
    assert world.read(silent) == b""
    assert world.responder.next_deadline() is None
    with contextlib.suppress(ConnectionResetError):
        assert len(world.read(slow)) < 20_000_000


def test_more_peers_than_places_wait_their_turn(world: World) -> None:
    silent = [world.peer(b"GET") for _ in range(MAX_CONNECTIONS)]
    world.settle()
    waiting = world.peer(GET)
    world.settle()
    assert world.num_watched == MAX_CONNECTIONS, "nobody is let in, and the listener is not watched in vain"
    silent[7].close()
    assert split(world.read(waiting))[0] == 200
    world.now += MAX_CONNECTION_S
    world.turn()
    assert world.num_watched == 1


def test_a_body_that_nobody_wants_does_not_destroy_the_answer(world: World) -> None:
    peer = world.peer(b"POST /metrics HTTP/1.1\r\nContent-Length: 40000\r\n\r\n" + b"x" * 40_000)
    assert split(world.read(peer))[0] == 405


def test_who_goes_on_sending_is_cut_off(world: World) -> None:
    peer = world.peer(GET)
    world.settle()
    sent = 0
    with contextlib.suppress(ConnectionError):
        for _ in range(10_000):
            with contextlib.suppress(BlockingIOError):
                sent += peer.send(b"x" * 65536)
            world.turn()
        raise AssertionError("it may send for ever")
    assert sent > MAX_DISCARDED_BYTES
    assert world.num_watched == 1


def test_peers_that_vanish_at_any_moment(world: World) -> None:
    for data in (b"", b"GET", GET, b"GET /large HTTP/1.1\r\n\r\n"):
        before, after = world.peer(data), world.peer(data)
        before.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        before.close()  # with a reset
        world.turn(20)
        after.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        after.close()
        world.settle()
        assert world.num_watched == 1


def test_without_descriptors_it_pauses_and_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(socket.socket, "accept", refuse)
        peer = world.peer(GET)
        world.settle()
        assert world.responder.next_deadline() == 101.0
    world.now = 101.0
    assert split(world.read(peer))[0] == 200


def test_an_address_in_use_is_one_line(world: World) -> None:
    with pytest.raises(ValueError, match=f"metrics: cannot listen at 127.0.0.1:{world.port}: Address already in use"):
        Responder(PAGES).open("127.0.0.1", world.port)
