"""Targets in this process: the codec, and a client's session that a hostile broker talks to."""

import random
import time
import tracemalloc
from typing import Any, Final

import numpy as np
import samples
from mutate import Frames, mutate

from penstock.broker import protocol as p
from penstock.broker.wire import ProtocolError, decode, encode
from penstock.client.config import ClientConfig
from penstock.client.errors import PenstockError
from penstock.client.outputs import values_of
from penstock.client.plan import Plan
from penstock.client.run import CLOSED, Options, Run
from penstock.client.session import Session

MAX_BYTES: Final = 4 << 20
"""More than the input itself, while it is decoded."""
MAX_S_PER_64K: Final = 0.005
MEASURED_EVERY: Final = 16
MAX_CORPUS: Final = 300


class Violation(Exception):
    """An input did what no input may do; the text says what."""


class Corpus:
    """Inputs to begin with, and those that brought an answer not seen before; a bounded number of each."""

    def __init__(self, first: list[Frames]) -> None:
        self._first = first
        self._found: list[Frames] = []
        self._seen: set[str] = set()

    def draw(self, draw: random.Random) -> Frames:
        pool = self._found if self._found and draw.random() < 0.5 else self._first
        return mutate(draw, draw.choice(pool), self._first)

    def learn(self, frames: Frames, answer: str) -> bool:
        """Whether the answer is new, whatever numbers are in it."""
        kind = "".join(c for c in answer if not c.isdigit())[:80]
        if kind in self._seen or len(self._seen) > 10_000:
            return False
        self._seen.add(kind)
        if sum(map(len, frames)) < 1 << 20:
            self._found.append(frames)
            del self._found[:-MAX_CORPUS]
        return True


class CodecTarget:
    """Any bytes are a message or a ProtocolError, at most 4 MiB and 5 ms per 64 KiB."""

    def __init__(self, seed: int) -> None:
        self._corpora = {name: Corpus(samples.corpus(name)) for name in samples.TABLES}
        self.worst_s_per_64k = 0.0
        self.worst_bytes = 0

    def make(self, draw: random.Random) -> tuple[str, Frames]:
        name = draw.choice(list(self._corpora))
        if draw.random() < 0.05:
            return name, [
                b"PS\x01\x02"[: draw.randrange(5)],
                draw.randbytes(draw.randrange(200)),
                draw.randbytes(draw.randrange(99)),
            ]
        return name, self._corpora[name].draw(draw)

    def run(self, number: int, name: str, frames: Frames) -> None:
        """Raises Violation."""
        answer, took_s = self._decode(name, frames)
        size = max(1.0, sum(map(len, frames)) / 65536)
        if took_s / size > MAX_S_PER_64K:  # perhaps something else ran meanwhile
            took_s = min(self._decode(name, frames)[1] for _ in range(5))
        self.worst_s_per_64k = max(self.worst_s_per_64k, took_s / size)
        if took_s / size > MAX_S_PER_64K:
            raise Violation(f"{1000 * took_s:.1f} ms for {sum(map(len, frames))} bytes")
        if self._corpora[name].learn(frames, answer) or number % MEASURED_EVERY == 0:
            self._measure(name, frames)

    @staticmethod
    def _decode(name: str, frames: Frames) -> tuple[str, float]:
        began = time.thread_time()
        try:
            message = decode(samples.TABLES[name], frames)
        except ProtocolError as e:
            return str(e), time.thread_time() - began
        except Exception as e:
            raise Violation(f"{type(e).__name__}: {e}") from e
        took_s = time.thread_time() - began
        try:
            encode(message)
        except Exception as e:
            raise Violation(f"it was read and cannot be written: {type(e).__name__}: {e}") from e
        return message.TYPE, took_s

    def _measure(self, name: str, frames: Frames) -> None:
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            self._decode(name, frames)
            num_bytes = tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
        num_bytes -= 2 * sum(map(len, frames))  # what is written again
        self.worst_bytes = max(self.worst_bytes, num_bytes)
        if num_bytes > MAX_BYTES:
            raise Violation(f"{num_bytes / 2**20:.1f} MiB for {sum(map(len, frames))} bytes")

    def lines(self) -> list[str]:
        return [f"at most {1000 * self.worst_s_per_64k:.2f} ms per 64 KiB, {self.worst_bytes / 2**20:.2f} MiB"]

    def close(self) -> None:
        """Nothing is open."""


X = np.zeros(4, "f4")
PLAN = Plan("echo", {"inputs": [["x", "tensor", samples.TENSOR]], "modes": ["batch", "stream"]})


class ClientTarget:
    """A broker that says anything: the session goes on or ends with an error of ours, and its tasks end as tasks end."""

    def __init__(self, seed: int) -> None:
        self._corpus = Corpus(samples.corpus("to client"))
        self._seed = seed
        self._begin()

    def _begin(self) -> None:
        self._session = Session(ClientConfig(), "fuzz", random.Random(self._seed).randbytes)
        self._now, self._runs, self._num_told = 0.0, list[Run](), 0
        self._session.open(self._now)
        self._drain()
        self._tell(p.Welcome(epoch=1, heartbeat_ms=1000.0, credit=[4096, 1 << 28]))
        for i in range(6):
            options = Options(timeout=None, is_durable=i == 2)
            run, _ = self._session.submit(PLAN.row({"x": X}), options, self._now)
            run.wants_partials = i == 1
            self._runs.append(run)
            self._session.flush()
            self._drain()
        self._session.ask(lambda n: p.Fetch(request=n, key=b"key"), self._now)
        self._session.ask(lambda n: p.Status(request=n), self._now)
        self._drain()

    def _tell(self, message: Any) -> None:
        self._session.receive([bytes(f) for f in encode(message)], self._now)

    def _drain(self) -> None:
        for _ in range(200):
            if self._session.take(self._now) is None:
                return
        raise Violation("it sends without end")

    def make(self, draw: random.Random) -> tuple[str, Frames]:
        """Half of them hit something that is open, under the number that is due."""
        frames = self._corpus.draw(draw)
        if draw.random() < 0.5:
            return "to client", frames
        try:
            message = decode(p.TO_CLIENT, frames)
        except ProtocolError:
            return "to client", frames
        open_runs = [run.id for run in self._runs if run.state != CLOSED] or [samples.ID]
        if isinstance(message, p.Results | p.Partial):
            message.seq = self._session._receipts.received + 1  # type: ignore[misc]
            for outcome in message.outcomes:
                outcome.spans = [(draw.choice(open_runs), start, stop) for _, start, stop in outcome.spans]  # type: ignore[misc]
        elif isinstance(message, p.Accepted | p.Refused):
            message.id = draw.choice(open_runs)  # type: ignore[misc]
        elif isinstance(message, p.Reply):
            message.request = draw.randrange(4)  # type: ignore[misc]
        return "to client", [bytes(f) for f in encode(message)]

    def run(self, number: int, name: str, frames: Frames) -> None:
        """Raises Violation."""
        began = time.thread_time()
        try:
            self._session.receive(frames, self._now)
            self._drain()
            self._now += 0.01
            self._session.tick(self._now)
            if self._session.connection.must_reconnect:
                self._session.reconnected(self._now)
            self._drain()
            self._use()
        except PenstockError:
            self._begin()
        except Violation:
            raise
        except Exception as e:
            raise Violation(f"{type(e).__name__}: {e}") from e
        if time.thread_time() - began > 0.5:
            raise Violation(f"it took {time.thread_time() - began:.1f} s")
        self._corpus.learn(frames, self._session.last_fault)
        self._num_told += 1
        if self._session.error is not None or self._num_told > 50 or all(run.state == CLOSED for run in self._runs):
            self._begin()

    def _use(self) -> None:
        """Look at what has come, as whoever waits for it does."""
        for run in [run for run in self._runs if run.state == CLOSED]:
            self._runs.remove(run)
            list(values_of(run, return_exceptions=True))

    def lines(self) -> list[str]:
        return []

    def close(self) -> None:
        self._session.close()
