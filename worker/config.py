"""What a worker can be told: one frozen dataclass, filled by `penstock.broker.settings`.

Knows the settings and their bounds; does not know torch or the protocol, so that a wrong setting is refused at once and a
supervisor is small.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

DEVICE = re.compile(r"auto|cpu|mps|cuda|cuda:\d{1,3}")
LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_NAME = 64
PRECISION = re.compile(r"([^=\s]+)=(fp32|fp16|bf16)")
SCRUBS = ("zero", "poison", "none")
MAX_THREADS = 1024
MAX_SLOTS = 16
MAX_BYTES = (1 << 63) - 1
MAX_LIMIT_S = 7 * 86400.0


DEVICE_FAULT_STATUS = 86
REFUSED_STATUS = 77
"""The broker does not allow this worker's key: a person has to do something."""
"""Exit status: the device is broken for this process; a new one may find it well."""
GAVE_UP_STATUS = 87
"""Exit status: the worker has failed so often in a row that it is not started again."""
SCANS = ("off", "warn", "fail")


class StartError(Exception):
    """This worker cannot start, or not go on; the text is one line that says what to change."""

    status = 1


class DeviceFault(Exception):
    """The device is broken for good (an illegal access, an assert, ECC, wrong answers): this process must end."""


SESSIONS_VARIABLE = "PENSTOCK_WORKER_SESSIONS_HEX"
"""In a worker's environment, from its supervisor: the secret of its session, and that of the process before, which is gone."""

Option = bool | int | float | str | None | list["Option"]


def default_state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return Path(base) / "penstock" if base else Path.home() / ".local" / "state" / "penstock"


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The settings of one worker process.

    Args:
        broker: the broker's URLs, in the order of preference; none = PENSTOCK_URL, the connection file, the default ipc folder.
        key: a key file for a broker on tcp, or one for each URL; none = what PENSTOCK_KEY names.
        device: auto, cpu, mps, cuda or cuda:<index>; auto is the first of cuda:0, mps, cpu that exists.
        name: shown in status and logs, 1 to 64 characters; None = made from the device and the process id.
        kernels: modules or .py files with kernels, beside the built-in ones.
        options: `kernel.key=value`, values as JSON or else as text.
        precision: `kernel=bf16`, `kernel=fp16`: torch.autocast around that kernel; `kernel=fp32` is the default.
        state_dir: where kernels keep files; None = $XDG_STATE_HOME/penstock or ~/.local/state/penstock.
        threads: torch's threads within an operator on the CPU; None = torch's own choice.
        max_bytes: payload bytes that the broker may assign ahead of the answers.
        slots: batches in flight on the device; 0 = one after another; None = 3 on cuda, 0 elsewhere.
        pool_bytes: pinned host memory for batches in flight, and as much on the device; without slots none is taken.
        scrub: what becomes of clients' bytes in that memory: zero (before another client has it), poison, none.
        shared_bytes: memory that large results may take on their way to clients on this machine; 0: all go through the socket.
        parent: process id of the starter; the worker ends when that is no longer its parent.
        log_level: debug, info, warning or error.
        hang_limit_s: no run of a kernel counts as hung before it has taken this many seconds.
        first_run_limit_s: the same for a kernel's loading, its first run, which may compile, and the worker's start.
        drain_limit_s: seconds that what is held may take after SIGTERM.
        max_failures: failures in a row after which the worker is not started again.
        scan_outputs: `off`, `warn` or `fail` for rows of batches with outputs that are not finite; `kernel=fail` for one
            kernel.
        memory_high: share of the memory in use from which caches are given back; it ends a twentieth below.
    """

    broker: tuple[str, ...] = ()
    device: str = "auto"
    name: str | None = None
    kernels: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    precision: tuple[str, ...] = ()
    state_dir: Path | None = None
    key: tuple[Path, ...] = ()
    threads: int | None = None
    max_bytes: int = 256 * 1024 * 1024
    slots: int | None = None
    pool_bytes: int = 256 * 1024 * 1024
    scrub: str = "zero"
    shared_bytes: int = 256 * 1024 * 1024
    parent: int | None = None
    log_level: str = "info"
    hang_limit_s: float = 10.0
    first_run_limit_s: float = 600.0
    drain_limit_s: float = 120.0
    max_failures: int = 10
    scan_outputs: tuple[str, ...] = ()
    memory_high: float = 0.95

    def __post_init__(self) -> None:
        if not DEVICE.fullmatch(self.device):
            raise ValueError(f"device must be auto, cpu, mps, cuda or cuda:<index>, not {self.device!r}")
        if self.name is not None and not 0 < len(self.name) <= MAX_NAME:
            raise ValueError(f"name must have 1 to {MAX_NAME} characters")
        if self.threads is not None and not 0 < self.threads <= MAX_THREADS:
            raise ValueError(f"threads must be 1 to {MAX_THREADS}, not {self.threads}")
        if not 1024 * 1024 <= self.max_bytes <= MAX_BYTES:
            raise ValueError(f"max_bytes must be 1048576 or more, not {self.max_bytes}")
        if self.slots is not None and not 0 <= self.slots <= MAX_SLOTS:
            raise ValueError(f"slots must be 0 to {MAX_SLOTS}, not {self.slots}")
        if not 1024 * 1024 <= self.pool_bytes <= MAX_BYTES:
            raise ValueError(f"pool_bytes must be 1048576 or more, not {self.pool_bytes}")
        if self.scrub not in SCRUBS:
            raise ValueError(f"scrub must be one of {', '.join(SCRUBS)}, not {self.scrub!r}")
        if not 0 <= self.shared_bytes <= MAX_BYTES:
            raise ValueError(f"shared_bytes must not be negative, not {self.shared_bytes}")
        if self.parent is not None and self.parent < 1:
            raise ValueError(f"parent must be a process id, not {self.parent}")
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"log_level must be one of {', '.join(LOG_LEVELS)}, not {self.log_level!r}")
        for name in ("hang_limit_s", "first_run_limit_s", "drain_limit_s"):
            if not 0.0 < getattr(self, name) <= MAX_LIMIT_S:
                raise ValueError(f"{name} must be above 0 and at most {MAX_LIMIT_S:.0f}, not {getattr(self, name)}")
        if self.max_failures < 1:
            raise ValueError(f"max_failures must be 1 or more, not {self.max_failures}")
        if not 0.1 <= self.memory_high <= 1.0:
            raise ValueError(f"memory_high is a share of the memory from 0.1 to 1, not {self.memory_high}")
        parse_options(self.options)
        parse_precision(self.precision)
        parse_scans(self.scan_outputs)

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


def parse_scans(scans: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """`("warn", "embed=fail")` as `("warn", {"embed": "fail"})`. Raises ValueError."""
    others, by_kernel = "off", dict[str, str]()
    for scan in scans:
        kernel, is_one, mode = scan.rpartition("=")
        if mode not in SCANS or bool(is_one) != bool(kernel):
            raise ValueError(f"scan_outputs are off, warn or fail, for one kernel as kernel=fail, not {scan!r}")
        if kernel:
            by_kernel[kernel] = mode
        else:
            others = mode
    return others, by_kernel


def _value(text: str) -> Option:
    try:
        value: Option = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, dict) else value


def parse_precision(entries: tuple[str, ...]) -> dict[str, str]:
    """`("embed=bf16",)` as `{"embed": "bf16"}`. Raises ValueError."""
    parsed: dict[str, str] = {}
    for entry in entries:
        found = PRECISION.fullmatch(entry)
        if found is None:
            raise ValueError(f"a precision is kernel=fp32, kernel=fp16 or kernel=bf16, not {entry!r}")
        parsed[found[1]] = found[2]
    return parsed
