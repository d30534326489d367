"""A session and a model broker in one place, with virtual time between them."""

import random

import numpy as np
from client_fakes import SPECS, ModelBroker

from penstock.broker import protocol
from penstock.broker.wire import decode, encode
from penstock.client.config import ClientConfig
from penstock.client.connection import READY
from penstock.client.plan import Plan
from penstock.client.run import Options, Run
from penstock.client.session import Session

PLANS = {name: Plan(name, spec) for name, spec in SPECS.items()}
PLAIN = Options(timeout=None)
X = np.zeros(4, "f4")


class Rig:
    """A session, a model broker and the time between them. `peer` is the session's present connection."""

    def __init__(self, config: ClientConfig | None = None, **model: object) -> None:
        self.random = random.Random(7)
        self.session = Session(config or ClientConfig(), "test", self.random.randbytes)
        self.broker = ModelBroker(**model)  # type: ignore[arg-type]
        self.now, self.peer = 100.0, 0

    def attached(self) -> "Rig":
        self.session.open(self.now)
        self.exchange()
        assert self.session.connection.state == READY
        self.broker.log.clear()
        return self

    def send(self) -> list[protocol.Message]:
        """All that the session has to send, delivered to the broker."""
        sent = []
        while (frames := self.session.take(self.now)) is not None:
            sent.append(decode(protocol.FROM_CLIENT, frames))
            self.broker.handle(self.peer, frames)
            self.session.check()
        return sent

    def deliver(self) -> None:
        out, self.broker.out = self.broker.out, []
        for peer, frames in out:
            if peer == self.peer:
                self.session.receive(frames, self.now)
                self.session.check()

    def exchange(self) -> None:
        while self.send() or self.broker.out:
            self.deliver()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.session.tick(self.now)
        self.session.check()
        if self.session.connection.must_reconnect:
            self.reconnect()

    def reconnect(self) -> None:
        self.peer += 1
        self.session.reconnected(self.now)

    def tell(self, message: protocol.Message) -> None:
        self.session.receive(encode(message), self.now)
        self.session.check()

    def submit(self, kernel: str = "hold", options: Options = PLAIN, **inputs: object) -> tuple[Run, int]:
        """As a driver does it: what can go out goes out at once."""
        taken = self.session.submit(PLANS[kernel].row(inputs or {"x": X}), options, self.now)
        self.send()
        return taken

    def submits(self) -> list[protocol.Submit]:
        return [m for m in self.broker.log if isinstance(m, protocol.Submit)]


def codes(run: Run) -> list[str | None]:
    return [None if part is None else part.error.code if part.error else "ok" for part in run.slots]
