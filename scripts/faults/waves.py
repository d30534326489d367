"""A client that keeps account: waves of tasks of every sort, each logged before it is sent and when its outcome has come.

    python waves.py URL LOG NAME NUM_TASKS     goes on where an earlier process of this name was killed; then plays a wave for
                                               each line that it reads, a number, and says so in a line when it is settled

Knows the client's verbs and `accounting.py`; does not know who is killed meanwhile. What a key's number says: every third
task is not durable, every fourth is too large for a row of the journal, every fifth is fetched by its key, every twelfth has an
answer that comes through shared memory.
"""

import functools
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accounting import Log

from penstock.client import Client, Conflict, Overloaded, PenstockError, ResultGone, Task, Unavailable, UnknownTask

LIMIT_S = 60.0
LARGE_BYTES = 80_000
LARGE_COPIES = 2500
HUGE_COPIES = 40_000
KERNEL = "owned"


def keys(log: Log, num_tasks: int, wave: int = 0) -> list[str]:
    """What this client has to see the end of: what is open from earlier lives, then the rest of a wave. No two clients of a
    user may have a key in common, so its name is in it."""
    of_wave = [f"{log.client}.{wave}-{i}" for i in range(num_tasks)]
    return [*log.unsettled(), *(key for key in of_wave if not log.knows(key))]


def is_durable(key: str) -> bool:
    return _number(key) % 3 != 2


def is_large(key: str) -> bool:
    return _number(key) % 4 == 3


def num_copies(key: str) -> int:
    return HUGE_COPIES if _number(key) % 12 == 11 else LARGE_COPIES if is_large(key) else 1


def play(ps: Client, log: Log, keys: Iterable[str], limit_s: float = LIMIT_S) -> None:
    """Submit all of these, or fetch what was accepted in an earlier life; see each accepted and its outcome delivered.

    Delivered is what a callback is told, so that a client which tells twice is seen. Raises TimeoutError.
    """
    num_told = threading.Semaphore(0)
    begun = {key: _begin(ps, log, key) for key in keys}
    tasks = {key: task for key, task in begun.items() if task is not None}
    for key, task in tasks.items():
        if is_durable(key) and _is_accepted(task):
            log.accepted(key)
            if _number(key) % 5 == 0:
                task = ps.fetch(key=key, take=True, timeout=LIMIT_S)
        task.add_done_callback(functools.partial(_deliver, log, key, num_told))
    end = time.monotonic() + limit_s
    for _ in tasks:
        if not num_told.acquire(timeout=max(0.0, end - time.monotonic())):
            raise TimeoutError(f"no outcome within {limit_s:.0f} s: {', '.join(log.unsettled())}")


def _number(key: str) -> int:
    return int(key.rpartition("-")[2])


def _begin(ps: Client, log: Log, key: str) -> Task | None:
    """None: the broker does not know what it had accepted. That is noted: submitted again, it would not be seen."""
    if log.has_promise(key):
        try:
            return ps.fetch(key=key, take=True, timeout=LIMIT_S)
        except (UnknownTask, ResultGone):
            log.gone(key)
            return None
    data = log.submitted(key, is_durable(key), LARGE_BYTES if is_large(key) else 0)
    options = ps.options(durable=is_durable(key), idempotency_key=key, timeout=None)
    return options.submit(KERNEL, data=data, num_copies=num_copies(key))


def _is_accepted(task: Task) -> bool:
    try:
        task.accepted(LIMIT_S)
    except PenstockError:
        return False  # it is told as the outcome
    return True


def _deliver(log: Log, key: str, num_told: threading.Semaphore, task: Task) -> None:
    error = task.exception()
    if isinstance(error, Unavailable | Conflict):
        log.unsure(key, error.code)
    elif isinstance(error, Overloaded):
        log.refused(key, error.code)
    elif error is not None:
        log.failed(key, error.code)
    else:
        value: Any = task.result()
        log.done(key, value.tobytes())
    num_told.release()


def main(url: str, path: str, name: str, num_tasks: int) -> None:
    log = Log(Path(path), name)
    with Client(url, name=name, connect_timeout=LIMIT_S) as ps:
        play(ps, log, log.unsettled())
        ps.status(timeout=LIMIT_S)
        print("connected", flush=True)
        for wave in sys.stdin:
            play(ps, log, keys(log, num_tasks, int(wave)))
            print("settled", wave.strip(), flush=True)
    log.ended()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
