"""One client of `scripts/chaos`, as a process of its own: submits, logs what it did and saw, and comes back after its death.

    python load.py KIND --name NAME --url URL --folder DIR [--key FILE] [--poison-s S] [--seed N] [--rate R]

Runs until there is a file `end` in its folder; then it submits nothing new, waits for the end of everything, says so in its
log and ends with 0. Killed and started again, it asks for whatever its log has no end of. `NAME.log` is for the account
(`accounting.py`); `NAME.times` has a line per outcome: when it came and when it was submitted (CLOCK_MONOTONIC), and which
worker made it.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import queue
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accounting import ACCEPTED, Log

from penstock.broker.protocol import Code
from penstock.client import Client, PenstockError, Task, UnknownTask

CONNECT_S = 120.0
PAUSES_MS, LONG_MS = (0.0, 0.0, 2.0, 10.0, 40.0), 300.0
LARGE_BYTES, LARGE_COPIES = 2 << 20, 1 << 15  # 2 MiB in, 1 MiB out: both through shared memory on one machine
NO_EVIDENCE = "dead_without_evidence"
END = "end"
VICTIM = "durable"
"""The client whose tasks the stranger asks for."""
TRANSIENT = (Code.OVERLOADED, Code.UNAVAILABLE, Code.UNKNOWN_KERNEL, "timeout")
"""Nothing was promised, or nobody could tell: it is asked for, or submitted, again after `AGAIN_S`."""
AGAIN_S = 0.5
FIRST_POISON_S = 8.0
ASK_S = 30.0
Ended = queue.SimpleQueue[tuple[str, Task]]


@dataclass(frozen=True)
class Kind:
    """What a client does.

    Attributes:
        rate: tasks per second at most; window: tasks under way; durable: share of its tasks that are durable.
        large: share with large content and answer; long: share that takes `LONG_MS`; cancel: share that it cancels.
        life_s: it kills itself after about so long; 0: never.
    """

    rate: float
    window: int
    durable: float = 0.0
    large: float = 0.0
    long: float = 0.0
    cancel: float = 0.0
    life_s: float = 0.0


KINDS = {
    "durable": Kind(rate=25.0, window=32, durable=1.0, large=0.02),
    "canceller": Kind(rate=15.0, window=16, durable=0.5, cancel=0.5),
    "mortal": Kind(rate=10.0, window=16, durable=0.9, long=0.1, life_s=20.0),
    "large": Kind(rate=1.0, window=4, durable=0.5, large=1.0),
}
"""Those that keep a window of tasks under way; the others have loops of their own, `LOOPS`."""


class Load:
    """One life of a client."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder: Path = args.folder
        path = self.folder / f"{args.name}.log"
        self._next = path.read_bytes().count(b'"submitted"') if path.exists() else 0
        self.log = Log(path, args.name)
        self.again: list[tuple[float, str]] = [(0.0, key) for key in self.log.unsettled()]
        self.random = random.Random(f"{args.seed} {args.name} {self._next}")
        self.ps = Client(args.url, name=args.name, key=args.key, timeout=None, connect_timeout=CONNECT_S)
        self._times = os.open(self.folder / f"{args.name}.times", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._prefix = "" if args.key else f"{args.name}/"  # on ipc all clients are one principal
        self._poison_s = args.poison_s
        self._poison_at = time.monotonic() + FIRST_POISON_S if args.poison_s else math.inf
        self._begun: dict[str, float] = {}
        self._end = self.folder / END

    @property
    def is_stopping(self) -> bool:
        return os.path.exists(self._end)

    @property
    def is_over(self) -> bool:
        """Nothing is left to be submitted."""
        return self.is_stopping and not self.again

    # --- one task ------------------------------------------------------------------------------------------------------

    def new_key(self, purpose: str) -> str:
        self._next += 1
        return f"{purpose}-{self._next:06d}"

    def due_again(self) -> str | None:
        """A key whose end is not known, and that is to be asked for now."""
        if not self.again or self.again[0][0] > time.monotonic():
            return None
        return self.again.pop(0)[1]

    def is_poison_due(self) -> bool:
        if time.monotonic() < self._poison_at or self.is_stopping:
            return False
        self._poison_at = time.monotonic() + self._poison_s
        return True

    def content(self, key: str) -> dict[str, Any]:
        """Write down that it is about to be submitted; the arguments of the kernel, which follow from the key."""
        is_large = key.startswith("large")
        self._begun[key] = time.monotonic()
        data = self.log.submitted(key, is_durable(key), LARGE_BYTES if is_large else 0)
        pause_ms = LONG_MS if key.startswith("long") else PAUSES_MS[sum(key.encode()) % len(PAUSES_MS)]
        return {"data": data, "num_copies": LARGE_COPIES if is_large else 1, "pause_ms": pause_ms}

    def wire_key(self, key: str) -> str:
        return self._prefix + key

    def begin(self, key: str) -> Task | None:
        """Submit a task, or find the one that was accepted before; None if that cannot be now."""
        try:
            return self._found(key) or self._submit(key)
        except UnknownTask:
            self.log.gone(key)
        except (PenstockError, TimeoutError) as e:
            self.end(key, None, e)
        return None

    def _found(self, key: str) -> Task | None:
        """What was promised has to be there. Half of it is fetched; the rest, submitted again, must be the same task.

        Raises:
            UnknownTask: the broker has lost it.
        """
        if not self.log.has_promise(key):
            return None
        if self.random.random() < 0.5:
            return self.ps.fetch(key=self.wire_key(key), take=True, timeout=ASK_S)
        self.ps.job(key=self.wire_key(key), timeout=ASK_S)
        return None

    def _submit(self, key: str) -> Task:
        content = self.content(key)
        ps = self.ps.options(durable=True, idempotency_key=self.wire_key(key)) if is_durable(key) else self.ps
        return ps.submit("risky", **content)

    def wait_accepted(self, key: str, task: Task) -> None:
        """If it is refused instead, that is its outcome."""
        with contextlib.suppress(PenstockError):
            task.accepted()
            self.log.accepted(key)

    def end_task(self, key: str, task: Task) -> None:
        """One that has ended."""
        error = task.exception()
        self.end(key, None if error else task.result(), error, task.timings.get("worker", "-"))

    def end(self, key: str, value: Any, error: PenstockError | TimeoutError | None, worker: str = "-") -> None:
        """Write down what became of it, as its user sees it."""
        if error is None:
            self.log.done(key, value.tobytes())
            os.write(self._times, f"{time.monotonic():.4f} {self._begun.pop(key, 0.0):.4f} {worker}\n".encode())
            return
        code = getattr(error, "code", "timeout")
        if code in TRANSIENT:
            (self.log.unsure if self.log.has_promise(key) else self.log.refused)(key, code)
            self.again.append((time.monotonic() + AGAIN_S, key))
        else:
            has_evidence = code != Code.DEAD or getattr(error, "detail", "")
            self.log.failed(key, code if has_evidence else NO_EVIDENCE)

    def pause(self, seconds: float) -> None:
        """Shorter if the end was asked for."""
        until = time.monotonic() + seconds
        while not self.is_stopping and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


def is_durable(key: str) -> bool:
    return key.split("-")[1] == "d"


def run_window(load: Load, kind: Kind) -> None:
    """Keep tasks under way: each new one is accepted before the next; outcomes are taken in the order in which they come."""
    ended: Ended = queue.SimpleQueue()
    num_open, next_at = 0, 0.0
    dies_at = time.monotonic() + kind.life_s * load.random.uniform(0.5, 1.5) if kind.life_s else math.inf
    while num_open or not load.is_over:
        now = time.monotonic()
        if now > dies_at and not load.is_stopping:
            os.kill(os.getpid(), signal.SIGKILL)
        if num_open < kind.window:
            if (key := load.due_again()) is not None:
                num_open += _start(load, key, ended)
                continue
            if not load.is_stopping and now >= next_at:
                next_at = max(next_at + 1.0 / kind.rate, now - 1.0)
                num_open += _start(load, _draw_key(load, kind), ended)
                continue
        try:
            key, task = ended.get(timeout=0.02)
        except queue.Empty:
            continue
        num_open -= 1
        load.end_task(key, task)


def _draw_key(load: Load, kind: Kind) -> str:
    """What a task is for stands in its name, so that a later life knows as well."""
    if load.is_poison_due():
        return load.new_key("poison-d")
    shares = {"cancel": kind.cancel, "large": kind.large, "long": kind.long}
    purpose = next((purpose for purpose, share in shares.items() if load.random.random() < share), "small")
    return load.new_key(f"{purpose}-{'d' if load.random.random() < kind.durable else 'm'}")


def _start(load: Load, key: str, ended: Ended) -> bool:
    """Begin with a task; whether there will be an outcome."""
    task = load.begin(key)
    if task is None:
        return False
    load.wait_accepted(key, task)
    if key.startswith("cancel"):
        task.ask_cancel()
    task.add_done_callback(lambda task: ended.put((key, task)))
    return True


def run_map(load: Load) -> None:
    """Rounds of `map`, not durable."""
    while not load.is_over:
        keys = [key for _, key in load.again]
        load.again.clear()
        if not load.is_stopping:
            keys += [load.new_key("small-m") for _ in range(load.random.randrange(16, 48))]
        items = ({**load.content(key), "pause_ms": 2.0} for key in keys)
        ended = iter(keys)
        try:
            for value in load.ps.map("risky", items, return_exceptions=True):
                error = value if isinstance(value, PenstockError) else None
                load.end(next(ended), value, error)
        except PenstockError as e:
            for key in ended:
                load.end(key, None, e)
        load.pause(1.0)


def run_slow(load: Load) -> None:
    """Submits many at once, reads nothing for a while, and then slowly."""
    while not load.is_over:
        keys = [load.new_key(f"small-{'d' if load.random.random() < 0.5 else 'm'}") for _ in range(60)]
        keys = [key for _, key in load.again] + (keys if not load.is_stopping else [])
        load.again.clear()
        tasks = {key: task for key in keys if (task := load.begin(key)) is not None}
        for key, task in tasks.items():
            load.wait_accepted(key, task)
        load.pause(load.random.uniform(2.0, 8.0))
        for key, task in tasks.items():
            task.exception()
            load.end_task(key, task)
            load.pause(0.05)


def run_probe(load: Load) -> None:
    """One call after the other, as an interactive user: what the latency is taken from."""
    while not load.is_over:
        key = load.due_again() or load.new_key("small-m")
        try:
            value, error = load.ps.call("owned", data=load.content(key)["data"]), None
        except PenstockError as e:
            value, error = None, e
        load.end(key, value, error)
        load.pause(0.03)


def run_stranger(load: Load) -> None:
    """Asks for tasks of another principal by their names, ends and forgets them: all of that must find nothing."""
    asked: list[Callable[..., object]] = [load.ps.cancel_job, load.ps.drop, partial(load.ps.fetch, take=True)]
    verbs = itertools.cycle(asked)
    while not load.is_stopping:
        for key in _latest_keys(load.folder / f"{VICTIM}.log"):
            try:
                next(verbs)(key=f"{VICTIM}/{key}", timeout=ASK_S)
                load.log.done(key, b"stolen")  # which nobody has submitted under its name
            except UnknownTask:
                continue
            except (PenstockError, TimeoutError):
                break
        load.pause(0.3)


def _latest_keys(log: Path) -> list[str]:
    """What another client has just submitted durably, some of it still open."""
    if not log.exists():
        return []
    with log.open("rb") as f:
        f.seek(max(0, log.stat().st_size - 4096))
        lines = f.read().split(b"\n")[1:-1]
    return [line["key"] for line in map(json.loads, lines) if line["is"] == ACCEPTED and is_durable(line["key"])][-3:]


LOOPS = {"map": run_map, "slow": run_slow, "probe": run_probe, "stranger": run_stranger}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kind", choices=(*KINDS, *LOOPS))
    p.add_argument("--name", required=True)
    p.add_argument("--url", required=True)
    p.add_argument("--folder", required=True, type=Path)
    p.add_argument("--key", type=Path)
    p.add_argument("--poison-s", type=float, default=0.0, help="a task that ends its worker so often; 0: none")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rate", type=float, default=1.0, help="times as much as its kind says")
    args = p.parse_args()
    load = Load(args)
    if args.kind in KINDS:
        kind = KINDS[args.kind]
        run_window(load, replace(kind, rate=args.rate * kind.rate))
    else:
        LOOPS[args.kind](load)
    load.log.ended()
    load.ps.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
