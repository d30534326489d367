"""What is known of the broker's kernels, from its answers to `status`.

Knows specs and plans; does not know how the answers come.
"""

import logging
from collections.abc import Mapping
from typing import Any, Final

from penstock.client.convert import Plan
from penstock.client.errors import UnknownKernel

log = logging.getLogger("penstock.client")

FIRST_PAUSE_S: Final = 0.05
MAX_PAUSE_S: Final = 1.0


class Catalog:
    """Kernel name -> `Plan`, as of one version of the session's knowledge."""

    def __init__(self) -> None:
        self._plans: dict[str, Plan] = {}
        self._version = -1
        self.specs: dict[str, Mapping[str, Any]] = {}

    def get(self, kernel: str, version: int) -> Plan | None:
        """The plan, unless it is unknown or was made before `version`."""
        return self._plans.get(kernel) if version == self._version else None

    def update(self, body: Mapping[str, Any], version: int) -> None:
        """Take in a reply to `status`; plans of specs that have not changed stay."""
        specs = body.get("kernels", {})
        plans: dict[str, Plan] = {}
        for name, spec in specs.items():
            known = self._plans.get(name)
            if known is not None and self.specs.get(name) == spec:
                plans[name] = known
                continue
            try:
                plans[name] = Plan(name, spec)
            except (KeyError, TypeError, ValueError) as e:
                log.warning("the spec of kernel %r cannot be read, is this client too old? %r", name, e)
        self.specs, self._plans, self._version = dict(specs), plans, version

    def check_coming(self, kernel: str, body: Mapping[str, Any]) -> None:
        """Raises UnknownKernel, naming the known ones, unless workers are still starting."""
        if body.get("is_settled", True):
            known = ", ".join(sorted(self.specs)) or "none: no worker is there"
            raise UnknownKernel(f"no kernel {kernel!r}; known: {known}")
