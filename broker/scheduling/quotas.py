"""What each client may use: tasks per second, open tasks and bytes, device-seconds per second.

Token buckets without timers: what was used comes back with the time that has passed. Knows accounts and their rules. Does
not know queues or tasks: the caller says what is open.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from penstock.broker.scheduling.events import duration_text
from penstock.broker.scheduling.overload import retry_after
from penstock.broker.wire import record

MAX_ACCOUNTS = 10_000
MAX_SHARE = 9
SLACK = 1e-9
"""Of a bucket: sums of floats may not refuse what waited exactly as long as it was told."""

Account = tuple[str, str]
"""(principal, client name)"""


@dataclass(frozen=True, slots=True)
class ClientRules:
    """The share and the limits of one client; None is no limit."""

    weight: float = 1.0
    """Share of the devices while others have work queued too."""
    rate_per_s: float | None = None
    """Tasks submitted per second, in the long run."""
    burst: float | None = None
    """Tasks at once; left out, a second's worth and at least one."""
    max_open: int | None = None
    """Tasks queued or running."""
    max_bytes: int | None = None
    """Their payload bytes."""
    device_s_per_s: float | None = None
    """Device-seconds per second, in the long run; new tasks wait while the account is overdrawn."""
    device_burst_s: float | None = None
    """Device-seconds at once; left out, a second's worth."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.default is None:
                continue
            is_count = f.name.startswith("max_")
            is_number = isinstance(value, int if is_count else int | float) and not isinstance(value, bool)
            if not (is_number and 0 < value < math.inf):
                raise ValueError(f"{f.name} must be a {'whole ' if is_count else ''}number above 0, not {value!r}")
        if self.burst is not None and (self.rate_per_s is None or self.burst < 1):
            raise ValueError("burst must be 1 or more and needs rate_per_s")
        if self.device_burst_s is not None and self.device_s_per_s is None:
            raise ValueError("device_burst_s needs device_s_per_s")


def parse_rules(tables: Mapping[str, Any]) -> dict[str, ClientRules]:
    """Rules by client name from the tables below [clients].

    Raises:
        ValueError: an unknown setting, a value that cannot be, or a name with a `*` before its end.
    """
    known = {f.name for f in fields(ClientRules)}
    rules = {}
    for name, table in tables.items():
        label = f"[clients.{name}]"
        if not isinstance(table, Mapping):
            raise ValueError(f"{label} must be a table, not {table!r}")
        if "*" in name[:-1]:
            raise ValueError(f"{label}: a * may only end a name")
        if unknown := sorted(table.keys() - known):
            raise ValueError(f"{label}: unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        try:
            rules[name] = ClientRules(**table)
        except ValueError as e:
            raise ValueError(f"{label}: {e}") from e
    return rules


@record
class QuotaExceeded:
    """Why not now: one line for people, and when to try again; None if waiting does not help."""

    reason: str
    retry_after_s: float | None


def may_have_more(own: int, used: int, limit: int) -> bool:
    """Whether a principal with `own` of `used` may have more of what has one limit for all: up to nine times what is free.

    So nobody alone takes more than nine tenths, and whoever has nothing finds room.
    """
    return own < MAX_SHARE * (limit - used)


class _Meter:
    """A token bucket told by what is missing from it, so that a change of its size or rate needs no care."""

    __slots__ = ("at", "missing")

    def __init__(self) -> None:
        self.missing = self.at = 0.0

    def read(self, per_s: float | None, now: float) -> float:
        """What is missing now; nothing where there is no limit."""
        return 0.0 if per_s is None else max(self.missing - (now - self.at) * per_s, 0.0)

    def add(self, amount: float, per_s: float, now: float) -> None:
        """Use some, or put some back."""
        self.missing, self.at = self.read(per_s, now) + amount, now


class Quotas:
    """Rules by client name: exact, else the longest `prefix*`, else "default", else none; and what each account has used.

    A name with a colon is a principal: `uid:1000` on ipc, `client:alice` for a key, `client:*` for all keys of a role.
    """

    def __init__(self, rules: Mapping[str, ClientRules]) -> None:
        self._meters: dict[Account, tuple[_Meter, _Meter]] = {}  # tasks, device-seconds; none is full
        self.replace(rules)

    def replace(self, rules: Mapping[str, ClientRules]) -> None:
        """Other rules from now on; what the accounts have used stays used."""
        self._rules = dict(rules)
        self._default = rules.get("default", ClientRules())
        prefixes = sorted((name for name in rules if name.endswith("*")), key=len, reverse=True)
        self._prefixes = [(name[:-1], self._rules.pop(name)) for name in prefixes]
        self.has_any = bool(rules)
        """Whether there is any rule: without one nobody has to ask."""

    def account_name(self, principal: str, name: str) -> str:
        """What a client's account is called: the principal, where a rule is about it, whatever name the client gives itself.

        So all clients of that principal share one account. A name that looks like a principal is not taken for one.
        """
        prefixes = tuple(prefix for prefix, _ in self._prefixes if ":" in prefix)
        if principal in self._rules or principal.startswith(prefixes):
            return principal
        return name.replace(":", "_")

    def rules(self, name: str) -> ClientRules:
        """The rules of a client."""
        found = self._rules.get(name)
        if found is None:
            found = next((r for prefix, r in self._prefixes if name.startswith(prefix)), self._default)
        return found

    def check(
        self, account: Account, num_rows: int, num_open: int, num_open_bytes: int, num_bytes: int, now: float,
        drain_s: float = 1.0,
    ) -> QuotaExceeded | None:  # fmt: skip
        """Whether a submission of `num_rows` tasks and `num_bytes` exceeds a limit; takes nothing.

        Args:
            num_open: tasks of the account that are open, `num_open_bytes` their payload.
            drain_s: predicted time until these have ended: the hint where the limit is on what is open.
        """
        rules, name = self.rules(account[1]), account[1]
        if rules.max_open is not None and num_open + num_rows > rules.max_open:
            return _too_many_open(name, "tasks", num_rows, num_open, rules.max_open, drain_s)
        if rules.max_bytes is not None and num_open_bytes + num_bytes > rules.max_bytes:
            return _too_many_open(name, "bytes", num_bytes, num_open_bytes, rules.max_bytes, drain_s)
        tasks, device = self._meters.get(account) or (None, None)
        if (per_s := rules.rate_per_s) is not None:
            burst = rules.burst or max(per_s, 1.0)
            over = (tasks.read(per_s, now) if tasks else 0.0) + num_rows - burst
            if over > SLACK * burst:
                return _too_fast(name, num_rows, per_s, burst, over)
        if (per_s := rules.device_s_per_s) is not None and device is not None:
            burst = rules.device_burst_s or per_s
            over = device.read(per_s, now) - burst
            if over > SLACK * burst:
                return _overdrawn(name, per_s, over)
        return None

    def take(self, account: Account, num_rows: int, now: float) -> None:
        """Tasks of the account were accepted."""
        per_s = self.rules(account[1]).rate_per_s
        if per_s is not None:
            self._of(account, now)[0].add(num_rows, per_s, now)

    def spend(self, account: Account, device_ms: float, now: float) -> None:
        """Device time of the account; below zero to correct what was charged too much."""
        per_s = self.rules(account[1]).device_s_per_s
        if per_s is not None:
            self._of(account, now)[1].add(device_ms / 1000.0, per_s, now)

    def _of(self, account: Account, now: float) -> tuple[_Meter, _Meter]:
        meters = self._meters.get(account)
        if meters is None:
            if len(self._meters) >= MAX_ACCOUNTS:
                self._forget_some(now)
            meters = self._meters[account] = (_Meter(), _Meter())
        return meters

    def _forget_some(self, now: float) -> None:
        """Drop full buckets, which are the same as none, and if need be the half that was least recently used."""
        used = list[tuple[float, Account]]()
        for account, (tasks, device) in self._meters.items():
            rules = self.rules(account[1])
            if tasks.read(rules.rate_per_s, now) or device.read(rules.device_s_per_s, now):
                used.append((max(tasks.at, device.at), account))
        used.sort()
        self._meters = {account: self._meters[account] for _, account in used[-(MAX_ACCOUNTS // 2) :]}


def _too_many_open(name: str, what: str, more: int, num_open: int, most: int, drain_s: float) -> QuotaExceeded:
    if more > most:
        return QuotaExceeded(f"{name} may have {most:,} {what} open and this has {more:,}: submit less at a time", None)
    retry_s = retry_after(drain_s)
    again = f"wait for some to end, or try again in {duration_text(retry_s)}"
    return QuotaExceeded(f"{name} may have {most:,} {what} open, has {num_open:,} and this has {more:,}: {again}", retry_s)


def _too_fast(name: str, num_rows: int, per_s: float, burst: float, over: float) -> QuotaExceeded:
    limit = f"{name} may submit {per_s:g} tasks per second and {burst:g} at once"
    if num_rows > burst:
        return QuotaExceeded(f"{limit}, not {num_rows:,}: submit less at a time", None)
    retry_s = retry_after(over / per_s)
    return QuotaExceeded(f"{limit}: try again in {duration_text(retry_s)}", retry_s)


def _overdrawn(name: str, per_s: float, over_s: float) -> QuotaExceeded:
    retry_s = retry_after(over_s / per_s)
    used = f"{name} may use {per_s:g} device-seconds per second and is {duration_text(over_s)} over"
    return QuotaExceeded(f"{used}: try again in {duration_text(retry_s)}", retry_s)
