"""A kernel that takes a given time: for tests and benchmarks of everything around it."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, shown
from penstock.kernels.inputs import Row
from penstock.kernels.runtime import Step
from penstock.kernels.spec import Cost

MAX_SECONDS = 3600.0
MAX_STEPS = 10_000


@dataclass(slots=True)
class Nap:
    """One streamed task: how long it takes in all, in how many steps, and how many are done."""

    seconds: float
    num_steps: int
    num_done: int = 0


@kernel(
    "sleep",
    inputs={"seconds": Row(minimum=0.0, maximum=MAX_SECONDS)},
    cost=Cost(per={"seconds": 1000.0}),
    combine="max",
)
class Sleep:
    """Sleeps for `seconds`, all tasks of a batch at the same time; streamed, in `steps` equal parts.

    seconds: a number per task, 0 to 3600. `steps`: 1 to 10,000; it only matters when streamed. Returns `seconds`,
    float64 `[batch]`, as given. Streamed: each iteration sleeps once for all its tasks, as long as the longest of their
    parts, and gives every task `{"step": number from 0}`; the result is `{"seconds", "step": 0..steps-1}`, int64
    `[steps]`. Tolerance: values exact; time never shorter, and longer by what the system's scheduler takes.
    """

    def __call__(self, seconds: torch.Tensor, steps: int = 1) -> dict[str, torch.Tensor]:
        """Sleeps for the longest of `seconds`, float64 `[batch]`."""
        _check_steps(steps)
        time.sleep(float(seconds.max()))
        return {"seconds": seconds}

    def open(self, seconds: float, steps: int = 1) -> Nap:
        """The state of one streamed task."""
        _check_steps(steps)
        return Nap(float(seconds), steps)

    def step(self, states: list[Nap]) -> list[Step]:
        """One part for every task at the same time."""
        time.sleep(max(nap.seconds / nap.num_steps for nap in states))
        return [_advance(nap) for nap in states]


def _advance(nap: Nap) -> Step:
    chunk: dict[str, Any] = {"step": torch.tensor(nap.num_done)}
    nap.num_done += 1
    if nap.num_done < nap.num_steps:
        return Step(chunk=chunk)
    seconds = torch.tensor(nap.seconds, dtype=torch.float64)
    return Step(chunk=chunk, result={"seconds": seconds, "step": torch.arange(nap.num_steps)})


def _check_steps(steps: object) -> None:
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
        raise InvalidInput(f"sleep: steps must be an integer from 1 to {MAX_STEPS}; got {shown(steps)}")
