"""Everything that a broker was told, and how that changes while it runs: all or nothing, with a way back.

Knows which settings belong together and that the last good ones stay. Does not know what they mean, nor how they are applied.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from penstock.broker import settings
from penstock.broker.config import NEEDS_RESTART, BrokerConfig
from penstock.broker.scheduling.config import SchedulingConfig
from penstock.broker.scheduling.quotas import ClientRules, parse_rules
from penstock.broker.settings import SettingsError

log = logging.getLogger("penstock.broker")


@dataclass(frozen=True, slots=True)
class Settings:
    """[broker], [scheduling] and the tables of [clients] by client name."""

    broker: BrokerConfig
    scheduling: SchedulingConfig
    clients: Mapping[str, ClientRules]


def load_settings(
    file: Path | None = None, overrides: Mapping[str, Any] | None = None, env: Mapping[str, str] = os.environ
) -> Settings:
    """Read all of it, in one reading of the file.

    Args:
        file: a TOML file that must exist; None looks for ./penstock.toml.
        overrides: settings of [broker] from the command line.
    Raises:
        SettingsError: something in it cannot be used.
    """
    content = settings.read(file)
    broker = settings.load(BrokerConfig, "broker", overrides=overrides, env=env, content=content)
    scheduling = settings.load(SchedulingConfig, "scheduling", env=env, content=content)
    try:
        return Settings(broker, scheduling, parse_rules(content.get("clients", {})))
    except ValueError as e:
        raise SettingsError(str(e)) from e


class Configuration:
    """The settings in force and those before.

    Args:
        load: reads them again, from where the first ones came.
    Attributes:
        previous: what `roll_back` returns to; None if there is nothing to return to.
        loaded_at: when the current settings came into force.
        error: why the last change did not come, or was taken back; empty if it came.
    """

    def __init__(self, current: Settings, load: Callable[[], Settings], now: float) -> None:
        self.current = current
        self.previous: Settings | None = None
        self.loaded_at = now
        self.error = ""
        self._load = load

    def reload(self, now: float) -> list[str]:
        """Read everything again, and take it if all of it can be used.

        Returns:
            What has changed, a line for each setting; empty: nothing.
        Raises:
            SettingsError: it cannot be used; the current settings stay.
        """
        try:
            wanted = self._load()
            _check_restart(self.current.broker, wanted.broker)
        except (OSError, ValueError) as e:
            self.error = str(e)
            log.warning("the settings stay as they are: %s", e)
            raise SettingsError(self.error) from e
        self.error = ""
        return self._change(wanted, self.current, "reloaded", now)

    def roll_back(self, reason: str, now: float) -> list[str]:
        """Return to the settings before the last change, if there was one; once.

        Returns:
            What has changed, as `reload` does.
        """
        if self.previous is None:
            return []
        changes = self._change(self.previous, None, f"rolled back ({reason})", now)
        self.error = f"rolled back: {reason}"
        return changes

    def report(self, now: float) -> dict[str, Any]:
        """For status."""
        return {"age_s": now - self.loaded_at, "error": self.error, "can_roll_back": self.previous is not None}

    def _change(self, wanted: Settings, previous: Settings | None, what: str, now: float) -> list[str]:
        changes = differences(self.current, wanted)
        if changes:
            self.current, self.previous, self.loaded_at = wanted, previous, now
        log.info("settings %s: %s", what, "; ".join(changes) or "nothing has changed")
        return changes


def _check_restart(current: BrokerConfig, wanted: BrokerConfig) -> None:
    changed = [f"broker.{name}" for name in NEEDS_RESTART if getattr(current, name) != getattr(wanted, name)]
    if changed:
        raise SettingsError(f"{' and '.join(changed)} cannot change while the broker runs: it needs a restart")


def differences(old: Settings, new: Settings) -> list[str]:
    """A line per setting that differs: `broker.max_clients: 10000 -> 20`."""
    before, after = _flat(old), _flat(new)
    names = [*before, *(name for name in after if name not in before)]
    return [f"{n}: {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def _flat(all_settings: Settings) -> dict[str, Any]:
    sections: dict[str, Any] = {"broker": all_settings.broker, "scheduling": all_settings.scheduling}
    sections |= {f"clients.{name}": rules for name, rules in all_settings.clients.items()}
    return {f"{section}.{f.name}": getattr(given, f.name) for section, given in sections.items() for f in fields(given)}
