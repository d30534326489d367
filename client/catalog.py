"""What is known of the broker's kernels, from its answers to `status`.

Knows specs and plans; does not know how the answers come.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, Final

from penstock.client.errors import DeadlineExceeded, UnknownKernel
from penstock.client.inputs import Place, nowhere
from penstock.client.plan import Plan
from penstock.client.run import Options, deadline_of

log = logging.getLogger("penstock.client")

FIRST_PAUSE_S: Final = 0.05
MAX_PAUSE_S: Final = 1.0


class Catalog:
    """Kernel name -> `Plan`, as of one version of the session's knowledge. `place`: see `inputs.py`."""

    def __init__(self, place: Place = nowhere) -> None:
        self._place = place
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
                plans[name] = Plan(name, spec, self._place)
            except (KeyError, TypeError, ValueError) as e:
                log.warning("the spec of kernel %r cannot be read, is this client too old? %r", name, e)
        self.specs, self._plans, self._version = dict(specs), plans, version

    def check_coming(self, kernel: str, body: Mapping[str, Any]) -> None:
        """Raises UnknownKernel, naming the known ones, unless workers are still starting."""
        if body.get("is_settled", True):
            known = ", ".join(sorted(self.specs)) or "none: no worker is there"
            raise UnknownKernel(f"no kernel {kernel!r}; known: {known}")


class Search:
    """The search for one kernel through one answer to `status` after another, while workers may still be starting.

    Whoever searches asks and waits; this says for how long. `now` is monotonic seconds.
    """

    def __init__(self, catalog: Catalog, kernel: str, options: Options, now: float) -> None:
        self._catalog = catalog
        self._kernel = kernel
        self._until = deadline_of(options, now)
        self._pause_s = FIRST_PAUSE_S
        self._why = "the broker has not said which kernels it has"

    def time_left(self, now: float) -> float | None:
        """Seconds; None if there is no limit."""
        return None if self._until == math.inf else self._until - now

    def look(self, body: Mapping[str, Any], version: int) -> Plan | None:
        """Take in a reply, asked for at `version`.

        Raises:
            UnknownKernel: the kernel is not there, and no worker is still starting.
        """
        self._catalog.update(body, version)
        plan = self._catalog.get(self._kernel, version)
        if plan is None:
            self._catalog.check_coming(self._kernel, body)
            self._why = f"no worker offers kernel {self._kernel!r} yet"
        return plan

    def pause(self, now: float) -> float:
        """Seconds until it is worth asking again, a little longer each time.

        Raises:
            DeadlineExceeded: the time limit is over.
        """
        left = self._until - now
        if left <= 0:
            raise self.time_is_over()
        pause, self._pause_s = min(self._pause_s, left), min(MAX_PAUSE_S, self._pause_s * 2)
        return pause

    def time_is_over(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the time limit is over; {self._why}")
