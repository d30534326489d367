"""Who submitted what, and what came of it: a client's log on disk, and the account that is made of all logs at the end.

The accounting of Jepsen's "total-queue" test. Each client appends to a log of its own: a submission *before* it is sent,
an acceptance and a delivered outcome *after* they are seen. A line is one write, so it outlives `kill -9` of the client,
and a client that is started again reads in its log what it has to submit again. Content follows from client and key
alone, and its answer is the SHA-256 of both, so an answer that belongs to somebody else is seen.

Knows files and digests; does not know Penstock. `owned` in `fault_kernels.py` is the kernel that answers like this.

    log = Log(folder / "c0.log", "c0")
    for key in [*log.unsettled(), *new_keys]:
        data = log.submitted(key, is_durable=True)
        task = ps.options(durable=True, idempotency_key=key).submit("owned", data=data)
        task.accepted()
        log.accepted(key)
        log.done(key, task.result().tobytes())      # or log.failed(key, error.code), log.refused(key, error.code)
    log.ended()
    account = settle(folder.glob("*.log"))
    assert account.is_clean, account.text()
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIGEST_BYTES = 32
BEGUN, SUBMITTED, ACCEPTED, REFUSED, DONE, FAILED, GONE, UNSURE, ENDED = (
    "begun", "submitted", "accepted", "refused", "done", "failed", "gone", "unsure", "ended",
)  # fmt: skip


def content(client: str, key: str, num_bytes: int = 0) -> bytes:
    """What a client submits under a key: both names, filled up to `num_bytes` with bytes that follow from them."""
    head = f"{client}\0{key}\0".encode()
    return head + hashlib.shake_128(head).digest(max(0, num_bytes - len(head)))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_of_answer(answer: bytes) -> str:
    """What `owned` answered: the digest, or the same digest again and again; anything else is told as it is."""
    first = answer[:DIGEST_BYTES]
    is_whole = len(first) == DIGEST_BYTES and answer == first * (len(answer) // DIGEST_BYTES)
    return first.hex() if is_whole else f"no digest: {len(answer)} bytes, {digest(answer)}"


class Log:
    """One client's log, to append to; it goes on where an earlier life of the client has ended. Thread-safe.

    Args:
        path: one file per client; client: the name that its content carries.
    """

    def __init__(self, path: Path, client: str) -> None:
        self.client = client
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.ftruncate(self._fd, path.read_bytes().rfind(b"\n") + 1)  # a line that was cut off has never been written
        self._history = _history_of(_lines(path))
        self._write(BEGUN, client=client, pid=os.getpid())

    def unsettled(self) -> list[str]:
        """The keys that were submitted, in this life or earlier, and have no outcome yet: to submit again, or to fetch."""
        return [key for key, of_key in self._history.items() if of_key.submissions and not of_key.is_settled]

    def knows(self, key: str) -> bool:
        """Whether this client has ever submitted it."""
        return key in self._history

    def has_promise(self, key: str) -> bool:
        """Whether it was accepted as durable, so that the broker must know it."""
        return key in self._history and self._history[key].is_accepted and self._history[key].is_durable

    def num_bytes(self, key: str) -> int:
        """How large the content of a key was."""
        return int(self._history[key].submissions[0]["num_bytes"])

    def submitted(self, key: str, is_durable: bool, num_bytes: int = 0) -> bytes:
        """About to be sent: what to send."""
        data = content(self.client, key, num_bytes)
        self._write(SUBMITTED, key, sha256=digest(data), num_bytes=num_bytes, is_durable=is_durable)
        return data

    def accepted(self, key: str) -> None:
        self._write(ACCEPTED, key)

    def refused(self, key: str, code: str) -> None:
        """The broker has not taken it: nothing is promised."""
        self._write(REFUSED, key, code=code)

    def done(self, key: str, answer: bytes) -> None:
        """Delivered to the user: from here on it is known to have come. Once more would be a duplicate."""
        self._write(DONE, key, sha256=digest_of_answer(answer))

    def failed(self, key: str, code: str) -> None:
        """Delivered as an error that is its outcome."""
        self._write(FAILED, key, code=code)

    def gone(self, key: str) -> None:
        """The broker does not know what it had promised to keep: lost, whatever comes of a second submission."""
        self._write(GONE, key)

    def unsure(self, key: str, code: str) -> None:
        """The client cannot tell what became of it (no broker, taken over); whoever comes next has to ask again."""
        self._write(UNSURE, key, code=code)

    def ended(self) -> None:
        """This client says that it has seen the end of everything it submitted."""
        self._write(ENDED)
        os.close(self._fd)

    def _write(self, what: str, key: str | None = None, **about: Any) -> None:
        line = {"is": what, **({} if key is None else {"key": key}), **about}
        os.write(self._fd, (json.dumps(line) + "\n").encode())
        if key is not None:
            self._history.setdefault(key, History()).add(line)


@dataclass
class History:
    """All lines about one key of one client."""

    submissions: list[dict[str, Any]] = field(default_factory=list)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    last: str = ""
    is_accepted: bool = False
    is_durable: bool = False
    is_gone: bool = False

    @property
    def is_settled(self) -> bool:
        return bool(self.outcomes) or self.is_gone or (self.last == REFUSED and not self.is_accepted)

    def add(self, line: dict[str, Any]) -> None:
        self.last = line["is"]
        if self.last == SUBMITTED:
            self.submissions.append(line)
            self.is_durable = line["is_durable"]
        elif self.last == ACCEPTED:
            self.is_accepted = True
        elif self.last in (DONE, FAILED):
            self.outcomes.append(line)
        elif self.last == GONE:
            self.is_gone = True


@dataclass
class Account:
    """What became of all submissions; lists hold `client/key`.

    Attributes:
        lost: accepted durable, or submitted by a client that has ended by itself, and no outcome; or the broker had forgotten
            what it had promised.
        unexpected: an outcome, or something the broker holds, that nobody submitted.
        wrong_owner: the answer is not the digest of what this client submitted under this key.
        duplicates: delivered to the user more than once.
        refused: not taken by the broker, and not submitted again.
        indeterminate: no outcome, and none was promised: never accepted or not durable, and its client died.
        failed: outcomes that are errors, by code; unsure: how often a client lost sight of something, by code.
    """

    num_submitted: int = 0
    num_accepted: int = 0
    num_done: int = 0
    num_lives: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    unsure: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_owner: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    indeterminate: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Nothing lost, unexpected, cross-wired or delivered twice. Says nothing about `failed`, `refused`, `indeterminate`."""
        return not (self.lost or self.unexpected or self.wrong_owner or self.duplicates)

    def text(self) -> str:
        """For people: the counts, and the first names of what must not be."""
        wrong = {name: getattr(self, name) for name in ("lost", "unexpected", "wrong_owner", "duplicates")}
        lines = [
            f"submitted {self.num_submitted}, accepted {self.num_accepted}, done {self.num_done}, failed {dict(self.failed)}, "
            f"refused {len(self.refused)}, indeterminate {len(self.indeterminate)}, lives of clients {self.num_lives}, "
            f"lost sight {dict(self.unsure)}",
            ", ".join(f"{name.replace('_', ' ')} {len(names)}" for name, names in wrong.items()),
        ]
        lines += [f"{name}: {', '.join(sorted(names)[:10])}" for name, names in wrong.items() if names]
        return "\n".join(lines)


def settle(logs: Iterable[Path], held: Iterable[str] = ()) -> Account:
    """Read all clients' logs, once no client runs any more.

    Args:
        held: keys of durable tasks that the broker still knows (`jobs()`); somebody must have submitted them.

    Raises:
        ValueError: two logs are of one client, or a log is not one.
    """
    account, known, clients = Account(), set[str](), set[str]()
    for path in logs:
        lines = list(_lines(path))
        if not lines or lines[0]["is"] != BEGUN or lines[0]["client"] in clients:
            raise ValueError(f"{path} is no log, or another one is of the same client")
        client = lines[0]["client"]
        clients.add(client)
        account.num_lives += sum(line["is"] == BEGUN for line in lines)
        account.unsure.update(line["code"] for line in lines if line["is"] == UNSURE)
        for key, history in _history_of(lines).items():
            known.add(key)
            _add(account, f"{client}/{key}", client, key, history, has_ended=lines[-1]["is"] == ENDED)
    account.unexpected += sorted(set(held) - known)
    return account


def _add(account: Account, name: str, client: str, key: str, history: History, has_ended: bool) -> None:
    submissions, outcomes = history.submissions, history.outcomes
    account.num_submitted += bool(submissions)
    account.num_accepted += history.is_accepted
    if history.is_gone:
        account.lost.append(name)
    elif outcomes:
        if not submissions:
            account.unexpected.append(name)
            return
        expected = digest(content(client, key, submissions[0]["num_bytes"]))
        account.num_done += any(line["is"] == DONE for line in outcomes)
        account.failed.update(line["code"] for line in outcomes if line["is"] == FAILED)
        if any(line["sha256"] != expected for line in outcomes if line["is"] == DONE):
            account.wrong_owner.append(name)
        if len(outcomes) > 1:
            account.duplicates.append(name)
    elif history.is_accepted and history.is_durable:
        account.lost.append(name)
    elif history.is_settled:
        account.refused.append(name)
    elif has_ended:
        account.lost.append(name)
    else:
        account.indeterminate.append(name)


def _history_of(lines: Iterable[dict[str, Any]]) -> dict[str, History]:
    found: dict[str, History] = {}
    for line in lines:
        if "key" in line:
            found.setdefault(line["key"], History()).add(line)
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that were written whole. Raises ValueError for any that cannot be read."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        yield json.loads(line)
