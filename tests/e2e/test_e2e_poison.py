"""Poisoned rows in batches of 256, with real processes: found within ten deaths each, all others done."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from poison_kernels import EXIT, KILL, SEGFAULT
from running import Running, running, until

from penstock.client import Dead

KERNELS = Path(__file__).with_name("poison_kernels.py")
MAX_DEATHS = 10
"""Per poisoned row: a batch of 256 is halved eight times, and the last two deaths are alone."""


@contextmanager
def site(folder: Path, *names: str) -> Iterator[Running]:
    """Workers that take batches of 256 from the first on, unless they have just died."""
    (folder / "penstock.toml").write_text("[scheduling]\nfirst_batch_sizes = [256, 256, 256]\n")
    with running(folder, *names, broker=("--config", str(folder / "penstock.toml")), worker=("--kernels", str(KERNELS))) as run:
        yield run


def rows(num_rows: int, poison: dict[int, float]) -> Any:
    """[N, 2], all of them 0 or more but those that are poisoned."""
    x = np.arange(2.0 * num_rows, dtype=np.float32).reshape(num_rows, 2)
    for row, how in poison.items():
        x[row, 0] = how
    return x


def run_all(run: Running, x: Any, limit_s: float) -> list[Any]:
    """Each row's value or error."""
    with run.client(timeout=limit_s) as client:
        return list(client.map("brittle", ({"x": row} for row in x), window=len(x), return_exceptions=True))


def check(x: Any, outcomes: list[Any]) -> None:
    """The poisoned rows are dead, with a line for each of two deaths alone; all others are done."""
    assert len(outcomes) == len(x)
    for row, outcome in zip(x, outcomes, strict=True):
        if row[0] < 0:
            assert isinstance(outcome, Dead), outcome
            assert len(outcome.detail.splitlines()) == 2
        else:
            np.testing.assert_array_equal(outcome, row + 1)


def deaths(run: Running, name: str) -> list[str]:
    return [line for line in run.log(name).splitlines() if "it starts again in" in line]


@pytest.mark.slow
def test_one_among_512(folder: Path) -> None:
    """A worker that is back begins with small batches, so that it takes even fewer deaths than halving alone would."""
    with site(folder, "a") as run:
        x = rows(512, {300: SEGFAULT})
        check(x, run_all(run, x, 240.0))
        assert 3 <= len(deaths(run, "a")) <= MAX_DEATHS
        assert all("it starts again in 0.0 s" in line for line in deaths(run, "a")), "no pause after a kernel's end"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_among_4000_on_two_workers_while_another_client_works(folder: Path) -> None:
    with site(folder, "a", "b") as run, run.client(timeout=300.0) as other:
        x = rows(4000, {500: EXIT, 1700: SEGFAULT, 1701: KILL, 3999: EXIT})
        good = rows(64, {})
        began = time.monotonic()
        check(good, run_all(run, good, 60.0))
        alone_s, began = time.monotonic() - began, time.monotonic()
        pending = other.submit("brittle", x=good[0])
        check(x, run_all(run, x, 600.0))
        took_s = time.monotonic() - began
        assert pending.result(60).tolist() == (good[0] + 1).tolist()
        count = len(deaths(run, "a")) + len(deaths(run, "b"))
        assert count <= 4 * MAX_DEATHS
        until(lambda: all(w["state"] == "ready" for w in other.status()["workers"]), "both are back")
        print(f"{count} deaths, {took_s:.1f} s for 4,000 rows, {alone_s:.2f} s for 64 without poison")
