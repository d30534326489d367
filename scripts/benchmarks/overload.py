"""Ten times the load that a worker can take: what is accepted ends in time, what is not is refused honestly.

The worker's capacity is 500 tasks/s: batches of 16 that take 32 ms. Several clients offer ten times as much with a time
limit of a second. Nothing is held back or tried again by the SDK, so that the broker meets all of it.
"""

import asyncio
import bisect
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from load import LIMIT_S, Cpu, Ended, Task, closed_loop, connect, lateness_ms, open_loop, percentile
from stack import HERE, Stack

from penstock.client import DeadlineExceeded, Overloaded
from penstock.client.config import ClientConfig

KERNEL, BATCH, BATCH_S = "nap.16", 16, 0.032
CAPACITY = BATCH / BATCH_S
TIMEOUT_S, HEARD_S = 1.0, 0.05
NUM_CLIENTS = 4
GOALS = {"in time, at least": 0.99, "goodput / peak, at least": 0.95, "retry_after / drained": (0.5, 2.0)}


def poisson(rate: float, seconds: float, seed: int) -> list[Task]:
    draw, at, made = random.Random(seed), 0.0, list[Task]()
    while (at := at + draw.expovariate(rate)) < seconds:
        made.append(Task(at, KERNEL, {"seconds": BATCH_S}))
    return made


async def offer(url: str, rate: float, seconds: float) -> list[Ended]:
    """Several clients, each with its part of the load."""

    async def one(index: int) -> list[Ended]:
        tasks = poisson(rate / NUM_CLIENTS, seconds, seed=index)
        config = ClientConfig(name=f"client-{index}", timeout=TIMEOUT_S, max_retries=0, has_throttle=False)
        async with connect(url, config=config) as ps:
            await ps.kernels()
            return await open_loop(ps, tasks)

    parts = await asyncio.gather(*(one(index) for index in range(NUM_CLIENTS)))
    return sorted((task for part in parts for task in part), key=_sent_s)


async def saturate(url: str, seconds: float) -> float:
    """Tasks/s with eight batches under way."""
    tasks = iter(lambda: Task(0.0, KERNEL, {"seconds": BATCH_S}), None)
    async with connect(url, timeout=LIMIT_S) as ps:
        await closed_loop(ps, tasks, 8 * BATCH, 1.0)
        return len(await closed_loop(ps, tasks, 8 * BATCH, seconds)) / seconds


def _sent_s(task: Ended) -> float:
    return task.sent_s


def is_refusal(task: Ended) -> bool:
    return isinstance(task.error, Overloaded)


def is_in_time(task: Ended) -> bool:
    """It has a result. The broker gives none after the time limit; what the driver needs to look at it is its own affair."""
    return task.error is None and task.ended_s - task.sent_s <= TIMEOUT_S + HEARD_S


def goodput(ended: Sequence[Ended], seconds: float, warm_up_s: float) -> float:
    """Tasks per second that ended within their time limit, after the warm-up."""
    return sum(is_in_time(task) and warm_up_s <= task.ended_s < seconds for task in ended) / (seconds - warm_up_s)


def drained_ratios(ended: Sequence[Ended], seconds: float) -> list[float]:
    """`retry_after` of each refusal / the time until all that had been accepted before it had ended.

    Of those while the load lasted: after its end there is nothing to be compared.
    """
    accepted = [task for task in ended if not is_refusal(task)]
    sent = [task.sent_s for task in accepted]
    last_end = list(accumulate((task.ended_s for task in accepted), max))
    ratios = list[float]()
    for task in ended:
        if is_refusal(task) and task.error is not None and task.error.retry_after and task.sent_s < seconds:
            index = bisect.bisect_right(sent, task.sent_s)
            if index and (left_s := last_end[index - 1] - task.sent_s) > BATCH_S:
                ratios.append(task.error.retry_after / left_s)
    return ratios


def measure(seconds: float = 60.0) -> dict[str, Any]:
    """The peak, the load of the capacity itself, and ten times as much for `seconds`."""
    warm_up_s = min(5.0, seconds / 4)
    with tempfile.TemporaryDirectory(prefix="ps-bench-") as folder:
        kernels = ("--kernels", str(HERE / "nap_kernels.py"))
        with Stack(Path(folder), worker_args=kernels) as stack:
            peak = asyncio.run(saturate(stack.url, min(10.0, seconds)))
            level = asyncio.run(offer(stack.url, CAPACITY, min(15.0, seconds)))
            assert stack.broker is not None
            with Cpu() as cpu, Cpu(stack.broker.pid) as broker_cpu:
                ended = asyncio.run(offer(stack.url, 10 * CAPACITY, seconds))
    refused = [task for task in ended if is_refusal(task)]
    accepted = [task for task in ended if not is_refusal(task)]
    in_time = [task for task in accepted if is_in_time(task)]
    ratios = drained_ratios(ended, seconds)
    at_1x, at_10x = goodput(level, min(15.0, seconds), 1.0), goodput(ended, seconds, warm_up_s)
    return {
        "offered": len(ended), "accepted": len(accepted), "refused": len(refused), "in time": len(in_time) / len(accepted),
        "late": dict(Counter(_reason(task) for task in accepted if isinstance(task.error, DeadlineExceeded)).most_common(5)),
        "peak tasks/s": peak, "goodput at 1x": at_1x, "goodput at 10x": at_10x, "goodput / peak": at_10x / max(peak, at_1x),
        "without reason": sum(not task.error.message for task in refused if task.error),
        "without retry_after": sum(task.error.retry_after is None for task in refused if task.error),
        "reasons": dict(Counter(_reason(task) for task in refused).most_common(5)),
        "retry_after / drained": {p: percentile(ratios, p / 100) for p in (1, 5, 25, 50, 75, 95, 99)},
        "within a factor of two": sum(0.5 <= r <= 2.0 for r in ratios) / len(ratios) if ratios else 0.0,
        "broker": broker_cpu.share, "driver": cpu.share, "driver late ms": lateness_ms(ended), "goals": GOALS,
    }  # fmt: skip


def _reason(task: Ended) -> str:
    """The words of a refusal without its numbers."""
    words = str(task.error).split()
    return " ".join(word for word in words if not any(c.isdigit() for c in word))[:80]


def lines(result: dict[str, Any]) -> list[str]:
    ratios = result["retry_after / drained"]
    missing = result["without reason"] + result["without retry_after"]
    return [
        f"offered {result['offered']:,} tasks, ten times the capacity: accepted {result['accepted']:,}, "
        f"refused {result['refused']:,}",
        f"accepted work that ended in time    {result['in time']:8.2%}{_verdict(result['in time'] >= 0.99)}",
        f"goodput / peak                      {result['goodput / peak']:8.3f}   ({result['goodput at 10x']:.0f} tasks/s; "
        f"{result['peak tasks/s']:.0f} saturated, {result['goodput at 1x']:.0f} at the capacity)"
        f"{_verdict(result['goodput / peak'] >= 0.95)}",
        f"refusals without reason or retry_after {missing:5d}{_verdict(missing == 0)}",
        f"retry_after / time until drained    {ratios[50]:8.2f}   (5 % below {ratios[5]:.2f}, 95 % below {ratios[95]:.2f}; "
        f"{result['within a factor of two']:.1%} within a factor of two){_verdict(ratios[5] >= 0.5 and ratios[95] <= 2.0)}",
        *(f"  refused {count:,} times: {reason}" for reason, count in result["reasons"].items()),
        *(f"  late {count:,} times: {reason}" for reason, count in result["late"].items()),
        f"the broker used {result['broker']:.0%} of a core, the driver {result['driver']:.0%}; the driver was "
        f"{result['driver late ms']:.1f} ms late (99th percentile)",
    ]


def _verdict(is_met: bool) -> str:
    return "   goal met" if is_met else "   goal NOT MET"
