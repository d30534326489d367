"""Failpoints: named places where a test lets a process die, stand still, or meet an error of the system.

Knows names and what to do there; does not know what the places mean. Broker, worker and client read at their start

    PENSTOCK_FAILPOINTS="broker.committing.taken=kill@3;worker.sent.final=kill:0.05;broker.payload.written=error:ENOSPC"

`kill[:S]` is SIGKILL to this process itself, S seconds after it got there; `pause:S` stands still; `error:NAME` raises OSError
as if what comes next had failed; `@n` waits for the n-th time. With PENSTOCK_FAILPOINTS_FOLDER a site waits until that folder
has a file of its name; when it fires, once and in one process, the file is renamed to `<site>.fired`.

Each place asks ARMED first, a constant of the process, so that it costs a few ns where nothing is armed.
"""

import errno
import itertools
import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

_STAGES: Final = {
    "broker.received": "attach submit ack fetch control workerhello ready workerfinal",
    "broker.decided": "submit ack workerfinal control",
    "broker.committing": "taken started died outcome acked erase",
    "broker.committed": "taken started died outcome acked erase",
    "broker.payload": "begun written synced unlinked",
    "broker.sending": "accepted assign results reply",
    "broker.sent": "accepted assign results reply",
    "broker.restore": "begun record done",
    "broker.backup": "begun copied renamed",
    "broker.stop": "begun drained closed",
    "worker.received": "welcome assign",
    "worker.kernel": "before after",
    "worker.sending": "hello ready final heartbeat",
    "worker.sent": "ready final",
    "worker.stop": "begun",
    "client.sending": "hello submit ack fetch goodbye",
    "client.sent": "submit ack",
    "client.received": "welcome accepted results reply",
    "client.taken": "accepted results",
}
SITES: Final = tuple(f"{stage}.{what}" for stage, names in _STAGES.items() for what in names.split())
FALLIBLE: Final = tuple(s for s in SITES if s.startswith(("broker.committing.", "broker.payload.", "broker.backup.")))
"""Where an `error` may be: what comes next may fail there."""
_KINDS: Final = {0: "erase", 1: "taken", 2: "started", 3: "died", 5: "acked", 7: "outcome", 8: "acked"}
"""Of records, see `kept.py`; others have no sites."""


class BadFailpoint(ValueError):
    """PENSTOCK_FAILPOINTS cannot be understood; the text says what and why."""


class Failpoint:
    """What is to happen at one site, the n-th time that a thread of this process gets there."""

    def __init__(self, site: str, action: str, argument: str, nth: int, folder: Path | None) -> None:
        if nth < 1:
            raise ValueError("times are counted from 1")
        self._nth = nth
        self._action = action
        self._seconds = float(argument or 0.0) if action != "error" else 0.0
        self._errno = int(getattr(errno, argument)) if action == "error" else 0
        self._switch = None if folder is None else folder / site
        self._count = itertools.count(1)

    def hit(self) -> None:
        """Raises OSError where that was asked for."""
        if self._switch is not None and not self._switch.exists():
            return
        if next(self._count) != self._nth or not self._may_fire():
            return
        time.sleep(self._seconds)
        if self._action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._action == "error":
            raise OSError(self._errno, os.strerror(self._errno))

    def _may_fire(self) -> bool:
        """Whether no other process was faster."""
        if self._switch is not None:
            try:
                self._switch.rename(f"{self._switch}.fired")
            except FileNotFoundError:
                return False
        return True


def parse(text: str, folder: Path | None = None) -> dict[str, Failpoint]:
    """What PENSTOCK_FAILPOINTS says, by site.

    Raises:
        BadFailpoint: no such site, action or error, or not this action there.
    """
    made = dict[str, Failpoint]()
    for part in filter(None, (part.strip() for part in text.split(";"))):
        site, what = (word.strip() for word in part.split("=", 1)) if "=" in part else (part, "")
        how, _, nth = what.partition("@")
        action, _, argument = how.partition(":")
        if site not in SITES:
            raise BadFailpoint(f"{part!r}: there is no site {site!r}; sites: {', '.join(SITES)}")
        if action == "error" and site not in FALLIBLE:
            raise BadFailpoint(f"{part!r}: nothing can fail there; error is for {', '.join(FALLIBLE)}")
        if action not in ("kill", "pause", "error") or (action != "kill" and not argument):
            raise BadFailpoint(f"{part!r}: what to do is kill, kill:SECONDS, pause:SECONDS or error:NAME, perhaps with @n")
        if site in made:
            raise BadFailpoint(f"{part!r}: {site} is armed already")
        try:
            made[site] = Failpoint(site, action, argument, int(nth or 1), folder)
        except (ValueError, AttributeError) as e:
            raise BadFailpoint(f"{part!r}: {e}") from e
    return made


def _from(env: Mapping[str, str]) -> dict[str, Failpoint]:
    folder = env.get("PENSTOCK_FAILPOINTS_FOLDER")
    return parse(env.get("PENSTOCK_FAILPOINTS", ""), Path(folder) if folder else None)


_armed: Final = _from(os.environ)
ARMED: Final = bool(_armed)
"""Whether any site is armed in this process."""


def hit(site: str) -> None:
    """This place was reached. Raises OSError if that was asked for."""
    point = _armed.get(site)
    if point is not None:
        point.hit()


def hit_message(stage: str, message: object) -> None:
    """This stage was reached with a message; its type is the rest of the site's name."""
    hit(f"{stage}.{type(message).__name__.lower()}")


def hit_records(stage: str, kinds: Iterable[int]) -> None:
    """This stage was reached with records of these kinds (`kept.py`; 0: an erasure)."""
    for name in sorted({_KINDS[kind] for kind in kinds if kind in _KINDS}):
        hit(f"{stage}.{name}")


def armed() -> str:
    """What is armed, for the log."""
    return ", ".join(sorted(_armed))
