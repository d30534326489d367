"""What a worker can be told: one frozen dataclass, filled by `penstock.broker.settings`.

Knows the settings and their bounds; does not know torch, so that a wrong setting is refused at once.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from penstock.broker.protocol import MAX_COUNT

DEVICE = re.compile(r"auto|cpu|mps|cuda|cuda:\d{1,3}")
LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_NAME = 64
MAX_THREADS = 1024


class StartError(Exception):
    """This worker cannot start; the text is one line that says what to change."""


Option = bool | int | float | str | None | list["Option"]


def default_state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return Path(base) / "penstock" if base else Path.home() / ".local" / "state" / "penstock"


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The settings of one worker process.

    Args:
        broker: the broker's URL; None = PENSTOCK_URL, the connection file, the default ipc folder.
        device: auto, cpu, mps, cuda or cuda:<index>; auto is the first of cuda:0, mps, cpu that exists.
        name: shown in status and logs, 1 to 64 characters; None = made from the device and the process id.
        kernels: modules or .py files with kernels, beside the built-in ones.
        options: `kernel.key=value`, values as JSON or else as text.
        state_dir: where kernels keep files; None = $XDG_STATE_HOME/penstock or ~/.local/state/penstock.
        threads: torch's threads within an operator on the CPU; None = torch's own choice.
        max_bytes: payload bytes that the broker may assign ahead of the answers.
        parent: process id of the starter; the worker ends when that is no longer its parent.
        log_level: debug, info, warning or error.
    """

    broker: str | None = None
    device: str = "auto"
    name: str | None = None
    kernels: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    state_dir: Path | None = None
    key: Path | None = None
    threads: int | None = None
    max_bytes: int = 256 * 1024 * 1024
    parent: int | None = None
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not DEVICE.fullmatch(self.device):
            raise ValueError(f"device must be auto, cpu, mps, cuda or cuda:<index>, not {self.device!r}")
        if self.name is not None and not 0 < len(self.name) <= MAX_NAME:
            raise ValueError(f"name must have 1 to {MAX_NAME} characters")
        if self.threads is not None and not 0 < self.threads <= MAX_THREADS:
            raise ValueError(f"threads must be 1 to {MAX_THREADS}, not {self.threads}")
        if not 1024 * 1024 <= self.max_bytes <= MAX_COUNT:
            raise ValueError(f"max_bytes must be 1048576 or more, not {self.max_bytes}")
        if self.parent is not None and self.parent < 1:
            raise ValueError(f"parent must be a process id, not {self.parent}")
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"log_level must be one of {', '.join(LOG_LEVELS)}, not {self.log_level!r}")
        parse_options(self.options)

    @property
    def session_name(self) -> str:
        """The name, or one that is unique on this machine."""
        device = "worker" if self.device == "auto" else self.device.replace(":", "-")
        return self.name or f"{device}-{os.getpid()}"


def parse_options(options: tuple[str, ...]) -> dict[str, dict[str, Option]]:
    """`("embed.model=/a/b",)` as `{"embed": {"model": "/a/b"}}`. Raises ValueError."""
    parsed: dict[str, dict[str, Option]] = {}
    for option in options:
        path, is_given, value = option.partition("=")
        kernel, _, key = path.rpartition(".")
        if not (is_given and kernel and key):
            raise ValueError(f"an option is kernel.key=value, not {option!r}")
        parsed.setdefault(kernel, {})[key] = _value(value)
    return parsed


def _value(text: str) -> Option:
    try:
        value: Option = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, dict) else value
