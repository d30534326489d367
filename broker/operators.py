"""What operators may ask of the broker: to drain a worker, to read keys and settings again, to say how it is.

Knows who may ask, and what changes with keys and settings. Does not know sockets, files, or how work is scheduled.
"""

from collections.abc import Callable, Collection
from typing import Any, Protocol

from penstock.broker import reports
from penstock.broker.clients import Clients
from penstock.broker.configuration import Configuration
from penstock.broker.dispatch import Dispatch
from penstock.broker.protocol import Code, Error
from penstock.broker.scheduling.events import Event
from penstock.broker.scheduling.overload import CoDel
from penstock.broker.settings import SettingsError
from penstock.broker.state import BrokerState
from penstock.broker.workers import Workers

KEYED = ("client:", "admin:")
"""How the principals of clients with a key begin."""


class KeyList(Protocol):
    """Who may connect with a key, kept by the shell."""

    def reload(self) -> frozenset[str]:
        """Read it again: the principals whose keys are allowed no more. Raises ValueError: it cannot be used."""
        ...

    def allows(self, principal: str) -> bool:
        """Whether some key of a principal, which has one, is allowed."""
        ...

    def report(self) -> dict[str, Any]:
        """For status."""
        ...


class Operators:
    """See the module.

    Args:
        names: the principals that may control the broker, beside those whose key has the role of an admin.
        configuration: reads the settings again when asked to; without one there is nothing to reload.
        is_settled: whether no worker is still to be expected.
        pid: of this process.
    Attributes:
        gate: who may connect with a key; None: nobody needs one.
    """

    def __init__(
        self,
        state: BrokerState,
        names: Collection[str],
        configuration: Configuration | None,
        is_settled: Callable[[float], bool],
        pid: int,
    ) -> None:
        self.state = state
        self.clients: Clients
        self.workers: Workers
        self.dispatch: Dispatch
        """Do what is asked; set by whoever made all of them."""
        self.gate: KeyList | None = None
        self._names = names
        self.configuration = configuration
        self._is_settled = is_settled
        self._pid = pid

    def may_control(self, principal: str) -> bool:
        """Whether a principal may act on the broker as a whole."""
        return principal in self._names or principal.startswith("admin:")

    def control(self, principal: str, op: str, target: str, now: float) -> Error | None:
        """Do what a principal wishes; why it is not done, else None."""
        if not self.may_control(principal):
            self.state.counters["refused_not_authorised"] += 1
            text = f"{principal} may not control this broker: that is for its own user, and for keys of the role admin"
            return Error(Code.NOT_AUTHORISED, text)
        if op == "reload":
            return self.reload(now)
        if op != "drain":
            return Error(Code.INVALID, f"unknown control {op!r}; there are: drain, reload, requeue, cancel, drop, backup")
        for worker in self.workers.by_secret.values():
            if worker.name == target:
                self.workers.drain(worker)
                return None
        names = ", ".join(sorted(w.name for w in self.workers.by_secret.values())) or "none"
        return Error(Code.INVALID, f"no worker is called {target!r}; workers: {names}")

    def reload(self, now: float) -> Error | None:
        """Read keys and settings again and go by them; the last good ones of each stay if they cannot be used."""
        keys_error = self._reload_keys(now)
        settings_error = self._reload_settings(now)
        return keys_error or settings_error

    def _reload_keys(self, now: float) -> Error | None:
        """A revoked key is out at once, whatever the settings are like and whether they are rolled back."""
        if self.gate is None:
            return None
        try:
            gone = self.gate.reload()
        except ValueError as e:
            self.state.events.add(Event(now, "reload_refused", "keys", str(e)))
            return Error(Code.INVALID, f"the keys stay as they are: {e}")
        self.clients.expel(gone)
        self.disown(now)
        self.workers.expel(gone, now)
        return None

    def disown(self, now: float) -> None:
        """Durable tasks of those whose key was revoked, perhaps while no broker ran, do not go on without them."""
        for session in self.clients.absent.sessions():
            principal = session.principal
            if self.gate is None or not principal.startswith(KEYED) or not session.runs or self.gate.allows(principal):
                continue
            num_rows = session.used_rows - session.returned_rows
            text = f"{num_rows} durable tasks end: its key is revoked"
            self.state.events.add(Event(now, "disowned", principal, text))
            error = Error(Code.NOT_AUTHORISED, f"the key of {principal} was revoked while this task was open")
            self.clients.close(session, error)

    def _reload_settings(self, now: float) -> Error | None:
        if self.configuration is None:
            return Error(Code.INVALID, "this broker was started without a configuration to read again")
        try:
            changes = self.configuration.reload(now)
        except SettingsError as e:
            self.state.events.add(Event(now, "reload_refused", "configuration", str(e)))
            return Error(Code.INVALID, f"the settings stay as they are: {e}")
        if changes:
            self._reconfigure("reloaded", changes, now)
            self.dispatch.reconfigured(now)
        return None

    def roll_back(self, reason: str, now: float) -> None:
        """Go by the settings before the last change, if there was one."""
        changes = self.configuration.roll_back(reason, now) if self.configuration is not None else []
        if changes:
            self._reconfigure("rolled_back", changes, now)

    def _reconfigure(self, what: str, changes: list[str], now: float) -> None:
        """Go by the current settings from now on."""
        assert self.configuration is not None
        state, current = self.state, self.configuration.current
        state.events.add(Event(now, what, "configuration", "; ".join(changes)))
        state.config = current.broker
        if current.scheduling.wait_budgets_s() != state.policy.config.wait_budgets_s():
            state.codel = CoDel(current.scheduling.wait_budgets_s())
        for piece in state.policy.reconfigure(current.scheduling):
            state.ledger.push(piece)
        state.quotas.replace(current.clients)
        for account in state.policy.accounts:
            state.policy.accounts.reweigh(account, state.quotas.rules(account.name).weight)

    def report(self, now: float) -> dict[str, Any]:
        """The body of `status`."""
        state = self.state
        return {
            "pid": self._pid,
            "epoch": state.epoch,
            "uptime_s": now - state.started_at,
            "is_ready": any(w.is_ready for w in self.workers.by_route.values()),
            "is_settled": self._is_settled(now),
            "is_draining": state.is_draining,
            "num_clients": len(self.clients), "num_clients_away": len(self.clients) - len(self.clients.by_route),
            "tasks": {
                "open": state.ledger.num_open, "open_bytes": state.ledger.open_bytes,
                "checkpoint_bytes": state.ledger.saved_bytes,
                "queued": state.ledger.num_rows["queued"], "leased": state.ledger.num_rows["leased"],
                **state.ledger.outcomes,
            },
            "tasks_per_s": state.finish_rate.at(now),
            "queues": reports.of_queues(state.policy),
            **reports.of_scheduling(state, now),
            "workers": self.workers.report(),
            "kernels": {name: dict(spec.wire) for name, spec in state.kernels.known.items()},
            "shared": state.sharing.report(),
            "counters": dict(state.counters),
            **({} if self.gate is None else {"security": self.gate.report()}),
            **({} if self.configuration is None else {"config": self.configuration.report(now)}),
        }  # fmt: skip
