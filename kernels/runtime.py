"""A kernel as a worker holds it: loaded or not, called with batches, or opened and stepped.

Knows how a kernel is called and what it may return; does not know batches' origin, devices' streams or messages.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.kernels.spec import KernelSpec

Output = torch.Tensor | list[torch.Tensor] | list[str] | list[bytes]
"""One named output of a batch: `[batch, ...]`, or a list with one tensor, text or byte string per task."""


@dataclass(frozen=True, slots=True)
class Context:
    """Where a batch runs and for whom. `principal` is the owner of the batch's tasks; see `KernelSpec.scoped`."""

    device: torch.device
    state_dir: Path
    principal: str


@dataclass(frozen=True, slots=True)
class Step:
    """What one iteration gave one task: a part of the result, or the whole of it, or neither.

    `chunk`: name -> array or text of this iteration. `result`: name -> array or text; the task is finished.
    """

    chunk: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None


class Kernel:
    """A kernel that runs. Not thread-safe: one thread calls it."""

    def __init__(self, spec: KernelSpec, target: Any, source: str) -> None:
        """`target`: the function, or the instance of the class; `source`: where it came from, for messages."""
        self.spec = spec
        self.source = source
        self._target = target
        self._takes: dict[str, frozenset[str]] = {}
        if "batch" in spec.modes:
            self._takes["batch"] = self._known_to(target)
        if "stream" in spec.modes:
            self._takes["stream"] = self._known_to(target.open)
        self._is_loaded = not spec.resident

    def _known_to(self, function: Callable[..., Any]) -> frozenset[str]:
        """What may be passed on to a function: its parameters, and every declared input."""
        return frozenset(inspect.signature(function).parameters) | {name for name, _ in self.spec.inputs}

    def __repr__(self) -> str:
        return f"Kernel({self.spec.name!r}, from {self.source})"

    @property
    def is_loaded(self) -> bool:
        """True if it can run: always, for a kernel without state."""
        return self._is_loaded

    def load(self, device: torch.device | str) -> None:
        """Loads the kernel's state onto `device`; nothing to do if it has none, or is loaded."""
        if not self._is_loaded:
            self._target.load(torch.device(device))
            self._is_loaded = True

    def unload(self) -> None:
        """Gives the state's memory back; nothing to do if it has none, or no `unload`."""
        if self.can_unload and self._is_loaded:
            self._target.unload()
            self._is_loaded = False

    def trim(self) -> int:
        """Gives back the caches that it can do without, by the class's own `trim()`; the bytes, 0 where it has none."""
        if not self._is_loaded or not hasattr(self._target, "trim"):
            return 0
        return int(self._target.trim() or 0)

    @property
    def can_unload(self) -> bool:
        """True if it has state that can be given back."""
        return self.spec.resident and hasattr(self._target, "unload")

    def run(self, **batched: Any) -> dict[str, Any]:
        """The outputs of a batch, `Output`s by name, computed without gradients; a bare tensor is the output "out".

        `context`, `<name>_lengths` and `<name>_offsets` may always be given: they are dropped where the function has no
        such parameter. Raises InvalidInput for input that the kernel refuses, TypeError for an output of a wrong kind.
        """
        return _checked(self.spec.name, self._call("batch", self._target, batched))

    def open(self, **inputs: Any) -> Any:
        """The state of one streamed task, from its inputs without batch dimension (texts as str, rows as float)."""
        return self._call("stream", self._target.open, inputs)

    def step(self, states: Sequence[Any]) -> list[Step]:
        """One iteration for all `states`; the answers are aligned with them."""
        self._require("stream")
        with torch.no_grad():
            steps = list(self._target.step(list(states)))
        if len(steps) != len(states) or not all(isinstance(step, Step) for step in steps):
            raise TypeError(f"kernel {self.spec.name!r}: step() must return one Step per state")
        return steps

    def checkpoint(self, state: Any) -> Mapping[str, Any] | None:
        """What a streamed task can go on from: name -> array, number, str or bytes; None if this is no good moment."""
        self._require("stream")
        with torch.no_grad():
            saved: Mapping[str, Any] | None = self._target.checkpoint(state)
        return saved

    def restore(self, state: Any, saved: Mapping[str, Any]) -> Any:
        """The state of a task that was opened just now, brought to where `checkpoint` gave `saved`: tensors on the device,
        numbers as tensors without dimensions on the CPU, str, bytes."""
        self._require("stream")
        with torch.no_grad():
            return self._target.restore(state, saved)

    def _require(self, mode: str) -> None:
        if mode not in self.spec.modes:
            raise RuntimeError(f"kernel {self.spec.name!r} has no mode {mode!r}")
        if not self._is_loaded:
            raise RuntimeError(f"kernel {self.spec.name!r} is not loaded")

    def _call(self, mode: str, function: Callable[..., Any], given: dict[str, Any]) -> Any:
        self._require(mode)
        takes = self._takes[mode]
        inputs = {name: value for name, value in given.items() if name in takes}
        if not torch.is_grad_enabled():
            return function(**inputs)
        with torch.no_grad():
            return function(**inputs)


def _checked(name: str, outputs: object) -> dict[str, Any]:
    if isinstance(outputs, torch.Tensor):
        outputs = {"out": outputs}
    if not isinstance(outputs, dict) or not outputs:
        raise TypeError(f"kernel {name!r} must return a tensor or a dict of outputs, not {type(outputs).__name__}")
    for key, value in outputs.items():
        if not isinstance(key, str):
            raise TypeError(f"kernel {name!r}: the name of an output must be a string, not {key!r}")
        if isinstance(value, torch.Tensor):
            if value.ndim == 0:
                raise TypeError(f"kernel {name!r}: output {key!r} has no batch dimension")
        elif not isinstance(value, list) or len({type(item) for item in value}) > 1:
            raise TypeError(f"kernel {name!r}: output {key!r} must be a tensor or a list of one kind")
        elif value and not isinstance(value[0], torch.Tensor | str | bytes):
            raise TypeError(f"kernel {name!r}: output {key!r} is a list of {type(value[0]).__name__}")
    return outputs
