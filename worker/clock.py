"""What one lease took, phase by phase, and what was out of the ordinary: written down while it runs, told in its answer.

Knows the names and their meaning; does not know batches, kernels or what the broker makes of it.
"""

import time


class Clock:
    """Milliseconds spent per phase of one lease, and what was out of the ordinary, as they travel in `final.timings`.

    Attributes:
        num_runs: calls of the kernel, those that failed included; of a stream, as if it were one.
        num_oom: how many of them ran out of memory; oom_rows: the fewest rows that did.
        num_not_finite: rows with outputs that are not finite, where outputs are scanned.
        padding_ratio: padded elements / real elements - 1 over the batch's ragged inputs.
    """

    __slots__ = (
        "compute_ms", "d2h_ms", "h2d_ms", "load_ms", "mark", "num_not_finite", "num_oom", "num_runs", "oom_rows",
        "padding_ratio", "wait_ms",
    )  # fmt: skip

    def __init__(self, received_at: float) -> None:
        self.mark = time.perf_counter()
        self.wait_ms = (self.mark - received_at) * 1e3
        self.load_ms = self.h2d_ms = self.compute_ms = self.d2h_ms = 0.0
        self.num_runs = 1
        self.num_oom = self.oom_rows = self.num_not_finite = 0
        self.padding_ratio = 0.0

    def lap(self) -> float:
        """Milliseconds since the last lap."""
        now = time.perf_counter()
        took, self.mark = (now - self.mark) * 1e3, now
        return took

    def out_of_memory(self, num_rows: int) -> None:
        """A run of so many rows did not fit."""
        self.num_oom += 1
        self.oom_rows = min(self.oom_rows or num_rows, num_rows)

    def timings(self) -> dict[str, float]:
        """The times, always; the facts only where they are not those of a batch that ran once, unpadded."""
        timings = {
            "batch_wait_ms": self.wait_ms, "load_ms": self.load_ms, "h2d_ms": self.h2d_ms,
            "compute_ms": self.compute_ms, "d2h_ms": self.d2h_ms,
        }  # fmt: skip
        if self.num_runs != 1:
            timings["num_runs"] = self.num_runs
        if self.num_oom:
            timings |= {"num_oom": self.num_oom, "oom_rows": self.oom_rows}
        if self.num_not_finite:
            timings["num_not_finite"] = self.num_not_finite
        if self.padding_ratio:
            timings["padding_ratio"] = self.padding_ratio
        return timings
