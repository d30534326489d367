"""What outlives a broker: a folder for its address, and in it small JSON files, whole or not there at all.

Knows files. What stands in them is known to whoever learned it, and forgotten without harm: a broken file is a cold start.
"""

import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Protocol

log = logging.getLogger("penstock.broker")

SAVE_EVERY_S: Final = 60.0
MAX_FILE_BYTES: Final = 16 << 20
MAX_WRITE_S: Final = 10.0
MAX_READABLE: Final = 40


class Learner(Protocol):
    """Something that learns while the broker runs."""

    def dump(self) -> dict[str, Any]:
        """All of it, as plain JSON values."""
        ...

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up a dump. Raises ValueError: this is none."""
        ...


def default_state_dir(env: Mapping[str, str] = os.environ) -> Path:
    """Where files of this user are kept; workers keep theirs there, too."""
    base = env.get("XDG_STATE_HOME")
    return Path(base, "penstock") if base else Path.home() / ".local" / "state" / "penstock"


def broker_folder(state_dir: Path, url: str) -> Path:
    """The folder of the broker at an address: two brokers never share one."""
    readable = re.sub(r"[^a-z0-9]+", "-", url.lower()).strip("-")[-MAX_READABLE:].strip("-")
    return state_dir / "brokers" / f"{readable}-{blake2b(url.encode(), digest_size=6).hexdigest()}"


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file, mode 0600: after a crash it holds the old content or the new, never a part. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Keeper:
    """Keeps what a learner knows in a file: takes it up at the start, writes it now and then if it changed, and at the end.

    Writing waits for the disk, which may take long, so it happens beside the loop; making the text does not.
    """

    def __init__(self, path: Path, learner: Learner, now: float) -> None:
        self._path = path
        self._learner = learner
        self._due_at = now + SAVE_EVERY_S
        self._writer: threading.Thread | None = None
        self._has_warned = False
        self._saved = self._text()  # who has learned nothing leaves no file

    def restore(self) -> bool:
        """Take up what the file holds; one that cannot be used is moved aside. True: there is something to go on with."""
        try:
            data = _read(self._path)
            self._learner.restore(_parse(data))
        except FileNotFoundError:
            return False
        except OSError as e:
            log.warning("%s cannot be read, so it starts from nothing: %s", self._path, e)
            return False
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:  # an old or torn file, in any way
            log.warning("%s is moved aside, and it starts from nothing: %s", self._path, e)
            with contextlib.suppress(OSError):
                self._path.replace(self._path.with_name(f"{self._path.name}.broken"))
            return False
        self._saved = self._text()
        return True

    def turn(self, now: float) -> None:
        """Save if it is time and something changed. Wants no wake-up: what is not saved now is saved at the end."""
        if now >= self._due_at and (self._writer is None or not self._writer.is_alive()):
            self._due_at = now + SAVE_EVERY_S
            self._save(self._write_beside)

    def close(self) -> None:
        """Save if something changed."""
        if self._writer is not None:
            self._writer.join(MAX_WRITE_S)
        self._save(self._write)

    def _save(self, write: Callable[[bytes], None]) -> None:
        data = self._text()
        if data and data != self._saved:
            write(data)

    def _text(self) -> bytes:
        """What it knows as JSON; nothing if that cannot be."""
        try:
            return json.dumps(self._learner.dump(), allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError) as e:
            self._warn(e)
            return b""

    def _write_beside(self, data: bytes) -> None:
        self._writer = threading.Thread(target=self._write, args=(data,), name="keeper", daemon=True)
        self._writer.start()

    def _write(self, data: bytes) -> None:
        try:
            write_whole(self._path, data)
        except OSError as e:
            self._warn(e)
        else:
            self._saved = data

    def _warn(self, e: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning("%s is not saved: %s", self._path, e)


def _parse(data: bytes) -> dict[str, Any]:
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _read(path: Path) -> bytes:
    with path.open("rb") as f:
        data = f.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES >> 20} MiB")
    return data
