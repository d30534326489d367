"""Predicted against measured times of the built-in kernels: predict, run, learn, next; beside what is simpler.

Every input, a random batch, runs many times, in another order each time, so that its own median is known. How far single
times are from that, on average, is the noise floor: nobody predicts better than that but by luck. Times are those that a
worker reports; costs are those that a broker binds. Everything runs in one process, torch with its usual threads.
"""

import gc
import math
import random
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, Protocol

import torch
from prediction_inputs import KERNELS, RAGGED, Bench, Input
from rich.progress import Progress

from penstock.broker.scheduling.boundaries import optimal_boundaries
from penstock.broker.scheduling.prediction import BatchLoad, Predictor
from penstock.broker.scheduling.scores import CLASSIC_MS, BucketMean, LastValue, MaxOfTen

LONG_MS = 5.0
"""Goals are for inputs that take longer."""
STEADY_ROUND = 6
"""Rounds before this one are the cold part: most inputs are new, or nearly."""
NUM_BINS, BATCH_SIZE = 8, 32
GOALS = {"ratio": 1.3, "coverage": (0.93, 0.97), "faster": 0.01}


class Guesser(Protocol):
    """Anything that predicts."""

    def guess(self, load: BatchLoad) -> tuple[float, float]:
        """(mean, bound) ms."""

    def learn(self, load: BatchLoad, measured_ms: float) -> None: ...


class Ours:
    """The broker's predictor."""

    def __init__(self) -> None:
        self._predictor = Predictor()

    def guess(self, load: BatchLoad) -> tuple[float, float]:
        return self._predictor.batch_ms(load, "worker")

    def learn(self, load: BatchLoad, measured_ms: float) -> None:
        self._predictor.observe(load, "worker", "cpu", measured_ms)


class Simple:
    """A baseline per kernel and batch key, with the declared cost until it knows any better."""

    def __init__(self, model: LastValue | BucketMean | MaxOfTen) -> None:
        self._model = model

    def guess(self, load: BatchLoad) -> tuple[float, float]:
        ms = self._model.predict((load.kernel, load.context), load.cost_ms) or max(load.cost_ms, 0.01)
        return ms, ms

    def learn(self, load: BatchLoad, measured_ms: float) -> None:
        self._model.learn((load.kernel, load.context), load.cost_ms, measured_ms)


@dataclass(slots=True)
class Trial:
    """One run of an input: when, what was predicted, what it took."""

    number: int
    round: int
    mean_ms: float
    bound_ms: float
    ms: float


@dataclass(slots=True)
class Recording:
    """Inputs and every run of them in order, as (input, round, ms)."""

    inputs: list[Input]
    runs: list[tuple[int, int, float]] = field(default_factory=list)

    def medians(self, rounds: range) -> list[float]:
        """ms per input, in these rounds: the machine's load changes, and with it the median."""
        times: list[list[float]] = [[] for _ in self.inputs]
        for number, at, ms in self.runs:
            if at in rounds:
                times[number].append(ms)
        return [median(t) for t in times]


def record(num_inputs: int, num_rounds: int, seed: int) -> Recording:
    """Run `num_inputs` random batches of every kernel, round after round."""
    torch.manual_seed(seed)
    order = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="ps-bench-") as folder, Progress(transient=True) as progress:
        bench = Bench(Path(folder), seed)
        made = Recording([bench.make(kernel) for kernel in KERNELS for _ in range(num_inputs)])
        for kernel in KERNELS:
            bench.run(bench.make(kernel))
        gc.collect()
        gc.freeze()
        numbers = list(range(len(made.inputs)))
        for at in progress.track(range(num_rounds), description="kernels"):
            order.shuffle(numbers)
            for number in numbers:
                _, ms = bench.run(made.inputs[number])
                made.runs.append((number, at, ms))
    return made


def replay(recording: Recording, guesser: Guesser) -> Iterator[Trial]:
    """Predict, then learn, in the order in which the batches ran.

    Batches of unequal rows come again only here: their costs are told a little differently each time, so that nobody
    knows them by that.
    """
    for number, at, ms in recording.runs:
        load = recording.inputs[number].load
        if load.kernel in RAGGED:
            load = replace(load, cost_ms=load.cost_ms * (1.0 + 1e-6 * at))
        yield Trial(number, at, *guesser.guess(load), ms)
        guesser.learn(load, ms)


def figures(trials: Sequence[Trial], medians: Sequence[float], edges: Sequence[float]) -> dict[str, float]:
    """What one kernel's trials say. Errors count relative to the input's median, as the noise floor does."""
    if not trials:
        return {"batches": 0}
    own = [medians[t.number] for t in trials]
    floors = [abs(t.ms - m) / m for t, m in zip(trials, own, strict=True)]
    errors = [abs(t.ms - t.mean_ms) / m for t, m in zip(trials, own, strict=True)]
    floor, error = fmean(floors), fmean(errors)
    return {
        "batches": len(trials), "median_ms": median(own), "floor": floor, "error": error, "ratio": error / floor,
        "median_floor": median(floors), "median_error": median(errors),
        "mape": fmean(abs(t.ms - t.mean_ms) / t.ms for t in trials),
        "coverage": fmean(t.ms <= t.bound_ms for t in trials),
        "faster": fmean(bisect_right(edges, t.bound_ms) < bisect_right(edges, m) for t, m in zip(trials, own, strict=True)),
        "faster_than_it_took": fmean(bisect_right(edges, t.bound_ms) < bisect_right(edges, t.ms) for t in trials),
        "faster_classic": fmean(
            bisect_right(CLASSIC_MS, t.bound_ms) < bisect_right(CLASSIC_MS, m) for t, m in zip(trials, own, strict=True)
        ),
    }  # fmt: skip


def measure(num_inputs: int = 32, num_rounds: int = 24, seed: int = 1) -> dict[str, Any]:
    """Figures per kernel and method, for the cold and the steady part."""
    recording = record(num_inputs, num_rounds, seed)
    guessers: dict[str, Guesser] = {
        "ours": Ours(), "last": Simple(LastValue()), "bucket": Simple(BucketMean()), "max10": Simple(MaxOfTen()),
    }  # fmt: skip
    trials = {name: list(replay(recording, guesser)) for name, guesser in guessers.items()}
    kernels = dict[str, Any]()
    for part, rounds in (("cold", range(STEADY_ROUND)), ("steady", range(STEADY_ROUND, num_rounds))):
        medians = recording.medians(rounds)
        for kernel in KERNELS:
            mine = [number for number, item in enumerate(recording.inputs) if item.load.kernel == kernel]
            edges = optimal_boundaries([medians[number] for number in mine], NUM_BINS, BATCH_SIZE)
            long = {number for number in mine if medians[number] > LONG_MS}
            row = kernels.setdefault(kernel, {})
            row[part] = {"long_inputs": len(long), "edges_ms": edges}
            for name, everything in trials.items():
                row[part][name] = figures([t for t in everything if t.number in long and t.round in rounds], medians, edges)
    return {"threads": torch.get_num_threads(), "rounds": num_rounds, "goals": GOALS, "kernels": kernels}


def lines(result: dict[str, Any]) -> list[str]:
    names = (
        "inputs", "ms", "floor %", "error %", "ratio", "cold", "median",
        "q95 %", "faster %", "last", "bucket", "max10", "> max10",
    )  # fmt: skip
    made = [f"{'':>10s}" + "".join(f"{name:>10s}" for name in names)]
    all_ours = list[dict[str, float]]()
    for kernel, row in result["kernels"].items():
        steady, cold = row["steady"], row["cold"]["ours"]
        ours = steady["ours"]
        if not ours["batches"]:
            continue
        all_ours.append(ours)
        values = [
            f"{steady['long_inputs']}", f"{ours['median_ms']:.1f}", f"{100 * ours['floor']:.1f}", f"{100 * ours['error']:.1f}",
            f"{ours['ratio']:.2f}", f"{cold['ratio']:.2f}" if cold["batches"] else "",
            f"{ours['median_error'] / ours['median_floor']:.2f}",
            f"{100 * ours['coverage']:.1f}", f"{100 * ours['faster']:.2f}",
            *(f"{steady[name]['ratio']:.2f}" for name in ("last", "bucket", "max10")),
            f"{100 * (1 - steady['max10']['coverage']):.1f} %",
        ]  # fmt: skip
        made.append(f"{kernel:>10s}" + "".join(f"{value:>10s}" for value in values))
    most, (low, high) = result["goals"]["ratio"], result["goals"]["coverage"]
    num_met = sum(ours["ratio"] <= most for ours in all_ours)
    ratio = math.exp(fmean(math.log(ours["ratio"]) for ours in all_ours))
    coverage, faster = (100 * fmean(ours[name] for ours in all_ours) for name in ("coverage", "faster"))
    return [
        *made, "",
        f"{result['rounds']} rounds; inputs over {LONG_MS:g} ms, from round {STEADY_ROUND} (cold: before it); "
        f"torch threads: {result['threads']}.",
        "floor: how far an input's times are from its own median; ratio: the prediction's error over that "
        f"(goal {most}: {num_met} of {len(all_ours)} kernels; mean {ratio:.2f}).",
        "median: the same of medians: in quiet moments, when noise is small, what the model does not know is the larger part.",
        f"q95: times not above it (goal {100 * low:.0f} to {100 * high:.0f}; mean {coverage:.1f}). "
        f"faster: put into a faster one of {NUM_BINS} learned bins than its median belongs to (goal < 1; mean {faster:.2f}).",
        "last, bucket, max10: ratios of the last value, the mean per octave of cost, the largest of the last ten.",
    ]  # fmt: skip
