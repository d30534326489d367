"""The client's settings. Knows their meaning, units and bounds; `penstock.broker.settings` knows where they come from."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from penstock.broker import settings
from penstock.broker.wire import MAX_ROWS
from penstock.client.options import UNCHANGED, check_timeout

MAX_NAME: Final = 64


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Times are seconds. Sources: arguments of `Client` > PENSTOCK_CLIENT_<FIELD> > [client] of penstock.toml > these."""

    name: str = ""
    """Shown by the broker and used for fair shares; empty: the program's name."""
    timeout: float | None = 60.0
    """Time limit of a task unless `options(timeout=...)` gives another; None: no limit."""
    connect_timeout: float = 5.0
    """How long the first use waits for a broker."""
    url: tuple[str, ...] = ()
    """Where the broker is, several addresses in the order of preference. PENSTOCK_URL goes before it."""
    key: tuple[Path, ...] = ()
    """A file of `penstock keys new` for a broker on tcp that wants keys, or one for each address; none: what PENSTOCK_KEY
    names, if anything."""
    max_rows_per_run: int = 128
    """Tasks that `map`, and `submit` on a busy line, put into one message."""
    max_rows_per_array: int = 256
    """Rows that `map_rows` puts into one message."""
    max_run_bytes: int = 8 << 20
    """Payload bytes of one message, unless a single row is larger."""
    max_waiting: int = 65_536
    """Tasks that may wait in the client beyond the broker's window before `submit` blocks."""
    max_waiting_bytes: int = 256 << 20
    shared_bytes: int = 256 << 20
    """Memory that large arrays may take on their way to workers on this machine, beside the broker's limit; 0: all of them go
    through the socket."""
    flush_s: float = 0.002
    """The longest that a task waits for others to share its message."""
    grace_s: float = 0.25
    """How long after its time limit a task still waits for the broker's word before it is ended here."""
    max_retries: int = 10
    """How often a task with a time limit is submitted again after the broker had no room for it, within that limit. A task
    without one goes on until there is room. 0: neither does."""
    has_throttle: bool = True
    """Whether tasks are held back, as Overloaded, while the broker refuses more than half of them."""
    linger_s: float = 0.5
    """How long `close` tries to hand over what was sent."""

    def __post_init__(self) -> None:
        for name in ("max_rows_per_run", "max_rows_per_array"):
            if not 1 <= getattr(self, name) <= MAX_ROWS:
                raise ValueError(f"{name} must be 1 to {MAX_ROWS}, not {getattr(self, name)!r}")
        for name in ("connect_timeout", "max_run_bytes", "max_waiting", "max_waiting_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)!r}")
        for name in ("flush_s", "grace_s", "linger_s", "max_retries", "shared_bytes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)!r}")

    @property
    def shown_name(self) -> str:
        return (self.name or Path(sys.argv[0] or "python").name or "python")[:MAX_NAME]


def configure(config: ClientConfig | None, *, timeout: float | None = UNCHANGED, **overrides: Any) -> ClientConfig:
    """Arguments > environment > penstock.toml > default; a whole `config` instead is taken as it is."""
    if config is not None:
        return config
    loaded = settings.load(ClientConfig, "client", overrides=overrides)
    return loaded if timeout is UNCHANGED else dataclasses.replace(loaded, timeout=check_timeout(timeout))
