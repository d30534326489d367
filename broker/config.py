"""The broker's settings. Knows their meaning, units and bounds; `settings.py` knows where they come from."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from penstock.broker.address import LOOPBACK, Address
from penstock.broker.wire import MAX_ROWS

NEEDS_RESTART: Final = (
    "url", "listen", "curve", "group_access", "metrics", "state_dir", "max_message_bytes", "heartbeat_ms", "dedup_window_s",
    "dedup_bytes", "journal", "result_ttl_s", "max_kept_bytes", "min_free_bytes",
    "checkpoint_s", "max_checkpoint_bytes",
)  # fmt: skip
"""Settings that sockets, peers and the journal were given once, and cannot be given again."""
_NO_NUMBERS: Final = ("url", "listen", "curve", "group_access", "metrics", "state_dir", "journal", "durable_kernels")
_CURVE: Final = ("auto", "on", "off")
JOURNALS: Final = ("disk", "memory")
_MAY_BE_ZERO: Final = ("worker_grace_s", "drain_s", "shared_bytes", "max_checkpoint_bytes")
_HOST_PORT: Final = re.compile(r"(.+):(\d{1,5})")


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """Limits are refused at the door with a reason; times are seconds unless the name says otherwise."""

    url: str = ""
    """Address to bind; empty: the default ipc folder."""
    group_access: bool = False
    """On ipc: members of the process's group may connect, too, not its user alone."""
    listen: str = ""
    """A tcp address beside `url`, tcp://0.0.0.0:7777 say, for peers on other machines; their keys: docs/keys.md."""
    curve: str = "auto"
    """Whether tcp is encrypted and asks for keys. auto: if there are keys, and always beyond this machine; on: never without;
    off: never, which is for loopback only: every account of the machine may then come in."""
    metrics: str = ""
    """host:port of the pages /metrics, /healthz and /status, on this machine only; empty: none."""
    state_dir: Path | None = None
    """Where to keep what was learned; None: $XDG_STATE_HOME/penstock or ~/.local/state/penstock."""
    max_queue_rows: int = 100_000
    """Open tasks (queued or running) of all clients."""
    max_queue_bytes: int = 1 << 30
    """Their payload bytes."""
    window_rows: int = 4096
    """Open tasks that one client session may have."""
    window_bytes: int = 256 << 20
    max_result_bytes: int = 1 << 30
    """Results of one session that wait for its acknowledgement; past it the session may not submit."""
    max_message_bytes: int = 256 << 20
    """Largest frame from a peer."""
    shared_bytes: int = 256 << 20
    """Shared memory of one session on this machine (ipc, Linux); 0: all payload goes through the sockets."""
    shared_total_bytes: int = 4 << 30
    """Of all sessions."""
    shared_min_bytes: int = 1 << 20
    """From this size on an array goes through shared memory."""
    max_rows_per_run: int = MAX_ROWS
    max_clients: int = 10_000
    max_workers: int = 256
    max_attempts: int = 2
    """Times that a task may bring down a worker while running alone before it is dead."""
    dedup_window_s: float = 3600.0
    """How long an idempotency key is remembered after its outcome."""
    dedup_bytes: int = 256 << 20
    """Payload of outcomes kept for idempotency keys."""
    journal: str = "disk"
    """Where durable tasks are kept: "disk", in the state directory; "memory": durable tasks are refused."""
    durable_kernels: tuple[str, ...] = ()
    """Kernels whose tasks are durable whatever their client asks for."""
    result_ttl_s: float = 86_400.0
    """How long a durable task's outcome is kept for a client that does not fetch it."""
    max_kept_bytes: int = 4 << 30
    """Payload of such outcomes; past it no durable task is taken."""
    min_free_bytes: int = 256 << 20
    """Space on the journal's disk below which no durable task is taken."""
    checkpoint_s: float = 5.0
    """How often a worker sends what a long streaming task can go on from, at most."""
    max_checkpoint_bytes: int = 64 << 20
    """Largest of one task; all of them together have half of `max_queue_bytes`. 0: none is taken."""
    heartbeat_ms: float = 1000.0
    liveness_s: float = 5.0
    """A worker silent for this long is lost."""
    progress_s: float = 600.0
    """A worker that holds a lease and makes no progress for this long is lost."""
    client_liveness_s: float = 5.0
    """A client silent for this long is away: what it is to be told waits here until it attaches again."""
    session_ttl_s: float = 60.0
    """A client silent for this long loses its session and its open tasks."""
    worker_grace_s: float = 30.0
    """How long after the start, or while workers are starting, an unknown kernel may still turn up."""
    drain_s: float = 30.0
    """How long a stopping broker lets open tasks finish."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _MAY_BE_ZERO:
                if not value >= 0:
                    raise ValueError(f"{f.name} must be 0 or more, not {value!r}")
            elif f.name not in _NO_NUMBERS and not value > 0:
                raise ValueError(f"{f.name} must be above 0, not {value!r}")
        if self.journal not in JOURNALS:
            raise ValueError(f"journal must be one of {', '.join(JOURNALS)}, not {self.journal!r}")
        if self.max_rows_per_run > MAX_ROWS:
            raise ValueError(f"max_rows_per_run is at most {MAX_ROWS}")
        if self.liveness_s * 1000 < 2 * self.heartbeat_ms:
            raise ValueError("liveness_s must be at least two heartbeats")
        if self.client_liveness_s * 1000 < 2 * self.heartbeat_ms:
            raise ValueError("client_liveness_s must be at least two heartbeats")
        if self.curve not in _CURVE:
            raise ValueError(f"curve must be {', '.join(_CURVE)}, not {self.curve!r}")
        if self.listen and Address(self.listen).is_ipc:
            raise ValueError(f"listen is tcp://host:port, not {self.listen!r}")
        if self.metrics:
            self.metrics_endpoint()

    def metrics_endpoint(self) -> tuple[str, int]:
        """Where the pages are: a numeric loopback address and a port; 0 is any that is free.

        Raises:
            ValueError: `metrics` is none, or not on this machine.
        """
        match = _HOST_PORT.fullmatch(self.metrics)
        if not match or int(match[2]) > 65535:
            raise ValueError(f"metrics is host:port, such as 127.0.0.1:9464, not {self.metrics!r}")
        if match[1] not in LOOPBACK:
            raise ValueError(f"metrics are for this machine only: use 127.0.0.1:{match[2]}, not {self.metrics!r}")
        return ("127.0.0.1" if match[1] == "localhost" else match[1].strip("[]")), int(match[2])
