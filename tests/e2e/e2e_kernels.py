"""Kernels that a user might have written, and some that nobody should: for tests with real processes."""

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from penstock.kernels import Blob, Step, Tensor, kernel
from penstock.kernels.declare import spec_of
from penstock.kernels.simulate import Simulate, Simulation


@kernel("scale", max_batch_size=64)
def scale(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    return x * factor


@kernel("picky", max_batch_size=64)
def picky(x: torch.Tensor) -> torch.Tensor:
    """Fails as a whole if one of the batch is negative."""
    if bool((x < 0).any()):
        raise ValueError("a negative number")
    return x + 1


@kernel("slow_hash", inputs={"data": Blob("bytes")}, max_batch_size=16)
def slow_hash(data: list[bytes]) -> torch.Tensor:
    """SHA-256, and a pause per batch: time enough to kill the worker. E2E_DELAY_S makes one worker slower."""
    time.sleep(float(os.environ.get("E2E_DELAY_S", "0.03")))
    return torch.stack([torch.frombuffer(bytearray(hashlib.sha256(item).digest()), dtype=torch.uint8) for item in data])


@kernel("echo", inputs={"x": Tensor()}, max_batch_size=8)
def echo(x: torch.Tensor) -> torch.Tensor:
    return x


@kernel("echo_bytes", inputs={"data": Blob("bytes")}, max_batch_size=8)
def echo_bytes(data: list[bytes]) -> dict[str, list[bytes]]:
    return {"out": data}


@kernel("slow_echo", inputs={"x": Tensor()}, max_batch_size=1)
def slow_echo(x: torch.Tensor) -> torch.Tensor:
    """The input, after a while."""
    time.sleep(float(os.environ.get("E2E_DELAY_S", "0.3")))
    return x


@kernel("fatal", max_batch_size=2)
def fatal(x: torch.Tensor) -> torch.Tensor:
    """Ends its process if one of the batch is negative."""
    if bool((x < 0).any()):
        os.kill(os.getpid(), signal.SIGKILL)
    return x + 1


@kernel("haunted", max_batch_size=2)
def haunted(x: torch.Tensor) -> torch.Tensor:
    """Ends its process while the file E2E_GHOST exists."""
    if os.path.exists(os.environ["E2E_GHOST"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return x + 1


@kernel("once", idempotent=False, max_batch_size=2)
def once(x: torch.Tensor) -> torch.Tensor:
    """As `fatal`, but it must not run twice."""
    return fatal(x)


SIMULATE = spec_of(Simulate)
assert SIMULATE is not None


@kernel("counted", inputs=dict(SIMULATE.inputs), max_batch_size=4)
class Counted(Simulate):
    """`simulate`, with a line in the file E2E_STEPS for what each iteration of each task has done: process, from, to."""

    def step(self, tasks: list[Simulation]) -> list[Step]:
        before = [task.steps_done for task in tasks]
        steps = super().step(tasks)
        with Path(os.environ["E2E_STEPS"]).open("a") as file:
            for task, start in zip(tasks, before, strict=True):
                file.write(f"{os.getpid()} {start} {task.steps_done}\n")
        return steps


@kernel("think", inputs={"prompt": Blob("text")}, max_batch_size=4)
class Think:
    """Writes tokens slowly, each of which depends on all before it."""

    def open(self, prompt: str, num_tokens: int = 100) -> dict[str, Any]:
        return {"tokens": [sum(prompt.encode())], "left": num_tokens}

    def step(self, states: list[dict[str, Any]]) -> list[Step]:
        time.sleep(0.02)
        return [self._write(state) for state in states]

    def _write(self, state: dict[str, Any]) -> Step:
        tokens = state["tokens"]
        tokens.append((31 * sum(tokens) + len(tokens)) % 9973)
        state["left"] -= 1
        return Step(chunk={"token": tokens[-1]}, result=None if state["left"] else {"out": torch.tensor(tokens)})

    def checkpoint(self, state: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": torch.tensor(state["tokens"]), "left": state["left"]}

    def restore(self, state: dict[str, Any], saved: Any) -> dict[str, Any]:
        return {"tokens": saved["tokens"].tolist(), "left": int(saved["left"])}
