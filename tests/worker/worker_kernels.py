"""Small kernels for the worker's tests; loaded by worker processes through `--kernels worker_kernels`."""

import hashlib
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from penstock.kernels import Blob, Context, InvalidInput, LoadError, Row, Static, Step, Tensor, kernel


@kernel("scale", max_batch_size=64)
def scale(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    return x * factor


@kernel("picky", max_batch_size=64)
def picky(x: torch.Tensor) -> torch.Tensor:
    """Fails for a batch with a row that begins with 666; refuses one that begins with 13."""
    if (x[:, 0] == 13).any():
        raise InvalidInput("picky: thirteen is refused")
    if (x[:, 0] == 666).any():
        raise ValueError("the number of the beast")
    return x + 1


@kernel("once", idempotent=False, max_batch_size=64)
def once(x: torch.Tensor) -> torch.Tensor:
    if (x[:, 0] == 666).any():
        raise ValueError("half done")
    return x


@kernel("hungry", max_batch_size=64)
def hungry(x: torch.Tensor, max_rows: int = 4) -> torch.Tensor:
    """Out of memory for more than `max_rows` rows, and for any row that begins with 999."""
    if len(x) > max_rows or (x[:, 0] == 999).any():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    return x


@kernel("pads", inputs={"x": Tensor(ragged="pad", pad_value=-1.0)})
def pads(x: torch.Tensor, x_lengths: torch.Tensor) -> dict[str, Any]:
    return {"out": x, "length": x_lengths, "rows": [row[:n] for row, n in zip(x, x_lengths.tolist(), strict=True)]}


@kernel("packs", inputs={"x": Tensor(ragged="pack")})
def packs(x: torch.Tensor, x_offsets: torch.Tensor) -> dict[str, Any]:
    return {"out": [x[a:b] * 2 for a, b in itertools.pairwise(x_offsets.tolist())]}


WORDS: dict[str, Any] = {"text": Blob("text"), "data": Blob("bytes"), "weight": Row(default=1.5, minimum=0.0), "mode": Static()}


@kernel("words", inputs=WORDS)
def words(text: list[str], data: list[bytes], weight: torch.Tensor, mode: str) -> dict[str, Any]:
    return {
        "text": [f"{mode}:{t}" for t in text],
        "data": [hashlib.sha256(d).digest()[: len(d)] for d in data],
        "weight": weight,
    }


@kernel("returns")
class Returns:
    """Gives back whatever the test puts into `values`: outputs of every kind, good and bad."""

    values: Any = None

    def __call__(self, x: torch.Tensor) -> Any:
        return type(self).values


@kernel("heavy")
class Heavy:
    """Loads if its file exists; says how often it was loaded."""

    def __init__(self, file: str = "/nonexistent") -> None:
        self.file = Path(file)
        self.num_loads = 0

    def load(self, device: torch.device) -> None:
        if not self.file.exists():
            raise LoadError(f"no weights at {self.file}")
        if self.file.read_text() == "broken":
            raise ValueError("a header that is no header")
        self.num_loads += 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.num_loads


@kernel("busy", inputs={"seconds": Row()})
def busy(seconds: torch.Tensor) -> torch.Tensor:
    """Pure Python for so long: the interpreter's lock is only given up when another thread asks."""
    end = time.monotonic() + float(seconds.max())
    count = 0
    while time.monotonic() < end:
        count += 1
    return seconds


@kernel("nap", inputs={"seconds": Row()})
def nap(seconds: torch.Tensor) -> torch.Tensor:
    time.sleep(float(seconds.max()))
    return seconds


@kernel("mark", inputs={"seconds": Row()})
def mark(seconds: torch.Tensor, context: Context) -> torch.Tensor:
    """A nap that leaves a file behind when it begins."""
    (context.state_dir / "begun").touch()
    time.sleep(float(seconds.max()))
    return seconds


@kernel("count", inputs={"start": Tensor(dtypes=("int64",), rank=0)}, max_batch_size=8)
class Count:
    """Streams `start`, `start + 1`, ...; a start of 666 fails in its second step, one of 667 when opened."""

    def open(self, start: torch.Tensor, steps: int = 3, pause: float = 0.0, context: Context | None = None) -> dict[str, Any]:
        if int(start) == 667:
            raise ValueError("cannot open that")
        return {"start": int(start), "steps": steps, "done": 0, "pause": pause}

    def step(self, states: list[dict[str, Any]]) -> list[Step]:
        time.sleep(max(state["pause"] for state in states))
        if any(state["start"] == 666 and state["done"] == 1 for state in states):
            raise ValueError("the number of the beast")
        return [self._advance(state) for state in states]

    def _advance(self, state: dict[str, Any]) -> Step:
        value = torch.tensor(state["start"] + state["done"])
        state["done"] += 1
        if state["done"] < state["steps"]:
            return Step(chunk={"value": value, "word": str(int(value))})
        every = torch.arange(state["start"], state["start"] + state["steps"])
        return Step(chunk={"value": value, "word": str(int(value))}, result={"values": every})


@kernel("think", inputs={"prompt": Blob("text")}, max_batch_size=8)
class Think:
    """Writes tokens, each of which depends on all before it, into a buffer that stays where it is; it can go on elsewhere.

    `saves` is what happens to its checkpoints: well, not now, fails, large; restoring fails where it says so.
    """

    num_steps = 0

    def open(self, prompt: str, num_tokens: int = 20, saves: str = "well", pause: float = 0.0) -> dict[str, Any]:
        tokens = torch.zeros(num_tokens, dtype=torch.int64)
        return {"tokens": tokens, "at": 0, "seed": sum(prompt.encode()), "heat": 0.1, "saves": saves, "pause": pause}

    def step(self, states: list[dict[str, Any]]) -> list[Step]:
        type(self).num_steps += len(states)
        time.sleep(max(state["pause"] for state in states))
        return [self._write(state) for state in states]

    def _write(self, state: dict[str, Any]) -> Step:
        tokens, at = state["tokens"], state["at"]
        tokens[at] = (6364136223846793005 * int(tokens[:at].sum()) + state["seed"] + at) % 50_000
        state["at"], state["heat"] = at + 1, state["heat"] * 1.1
        done = {"tokens": tokens.clone(), "heat": torch.tensor(state["heat"], dtype=torch.float64)}
        return Step(chunk={"token": tokens[at].clone()}, result=done if at + 1 == len(tokens) else None)

    def checkpoint(self, state: dict[str, Any]) -> dict[str, Any] | None:
        if state["saves"] == "not now" and state["at"] % 7:
            return None
        if state["saves"] == "fails":
            raise ValueError("nothing to hand over")
        pad = bytes(10_000) if state["saves"] == "large" else b""
        note = {"note": "\u00fcber", "pad": pad, "is_odd": state["at"] % 2 == 1, "none": torch.zeros(0, 3)}
        return {"tokens": state["tokens"], "at": state["at"], "heat": state["heat"], **note}

    def restore(self, state: dict[str, Any], saved: Any) -> dict[str, Any]:
        state["at"] = int(saved["at"])
        if state["saves"] == "cannot":
            raise ValueError("that is not mine")
        assert saved["note"] == "\u00fcber"
        assert bool(saved["is_odd"]) == (state["at"] % 2 == 1)
        assert saved["none"].shape == (0, 3)
        return {**state, "tokens": saved["tokens"], "heat": float(saved["heat"])}


@kernel("mark_once", inputs={"seconds": Row()}, idempotent=False)
def mark_once(seconds: torch.Tensor, context: Context) -> torch.Tensor:
    """`mark`, which must not run twice."""
    return mark(seconds, context)
