"""Which is sooner for an expert that has no slot: fetching it, or computing its rows on the CPU. By what was measured.

Knows seconds only.
"""

from collections.abc import Mapping

SMOOTHING = 0.2
"""Weight of a new measurement in the running mean."""
MAX_AGE = 256
"""Fetches after which the CPU's times are measured anew."""


class Estimate:
    """Running means of the seconds that a fetch took, and that the CPU took for a number of rows."""

    def __init__(self) -> None:
        self._fetch_s: float | None = None
        self._cpu_s: dict[int, float] = {}  # bit length of the number of rows -> seconds
        self._num_fetches = 0  # since the CPU's times were last measured

    def observe_fetch(self, seconds: float) -> None:
        """One expert was copied to its slot."""
        self._fetch_s = _mixed(self._fetch_s, seconds)
        self._num_fetches += 1
        if self._num_fetches > MAX_AGE:  # the CPU's times may be those of a cold file, or of a busy moment
            self._cpu_s.clear()

    def observe_cpu(self, num_rows: int, seconds: float) -> None:
        """One expert's answers for so many rows were computed on the CPU."""
        size = num_rows.bit_length()
        self._num_fetches = 0
        self._cpu_s[size] = _mixed(self._cpu_s.get(size), seconds)

    @property
    def fetch_s(self) -> float | None:
        """Seconds to fetch an expert; None if none was fetched yet."""
        return self._fetch_s

    def cpu_s(self, num_rows: int) -> float | None:
        """Seconds for so many rows on the CPU; None if none were computed yet.

        From the nearest number of rows that was measured: twice the rows take twice as long, half of them just as long,
        so that a guess errs towards fetching.
        """
        if not self._cpu_s:
            return None
        size = num_rows.bit_length()
        near = min(self._cpu_s, key=lambda known: abs(known - size))
        return self._cpu_s[near] * 2.0 ** max(size - near, 0)

    def choose_cpu(self, rows: Mapping[int, int]) -> list[int]:
        """Those of the experts in `rows` (expert -> its rows) that are done sooner on the CPU; the others are fetched.

        Fetches follow one another, and so do experts on the CPU, at the same time as the fetches: each expert, the one
        with the fewest rows first, goes where it is done first. What was never measured is tried once.
        """
        chosen: list[int] = []
        num_fetched, cpu_busy_s = 0, 0.0
        for expert in sorted(rows, key=lambda e: (rows[e], e)):
            on_cpu_s = self.cpu_s(rows[expert])
            if self._fetch_s is None:
                is_sooner = on_cpu_s is None and bool(num_fetched) and not chosen
            elif on_cpu_s is None:
                is_sooner = not chosen
            else:
                is_sooner = cpu_busy_s + on_cpu_s < (num_fetched + 1) * self._fetch_s
            if is_sooner:
                chosen.append(expert)
                cpu_busy_s += on_cpu_s or 0.0
            else:
                num_fetched += 1
        return chosen


def _mixed(mean: float | None, value: float) -> float:
    return value if mean is None else mean + SMOOTHING * (value - mean)
