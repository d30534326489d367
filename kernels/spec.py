"""A kernel's spec: its inputs, how it batches, and what it costs, as data that travels to the broker.

Knows how a spec is validated, hashed and put on the wire; does not know how it is derived from a function
(`declare.py`) nor how the kernel runs (`runtime.py`).
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from penstock.kernels.cost import fit_cost
from penstock.kernels.errors import SpecError
from penstock.kernels.inputs import Blob, Input, Row, Static, StaticValue, Tensor

log = logging.getLogger("penstock.kernels")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.:/-]{0,63}")
MAX_BATCH_SIZE = 4096
MAX_INPUTS = 64
MODES = ("batch", "stream")


@dataclass(frozen=True, slots=True)
class Cost:
    """Predicted milliseconds of one task: `base_ms` + the sum of `per[term]` times the term's value.

    Terms: `<tensor>.numel` (number of elements), `<blob>.bytes`, `<row>` (the number itself).
    """

    base_ms: float = 0.0
    per: Mapping[str, float] = field(default_factory=dict)

    def of(self, features: Mapping[str, float]) -> float:
        """Milliseconds of a task whose terms have the values `features`; missing terms count as 0."""
        return self.base_ms + sum(slope * features.get(term, 0.0) for term, slope in self.per.items())


CostFunction = Callable[[dict[str, float]], float]
"""A user's cost: from a task's terms to milliseconds. Called at registration only, to fit a `Cost`.

One that raises, or returns no milliseconds, is left out with a warning: costs are a first guess, and times get measured.
"""


def cost_terms(inputs: tuple[tuple[str, Input], ...]) -> dict[str, tuple[float, float]]:
    """The terms that a cost over `inputs` may use, each with the range of values it can take."""
    terms = {}
    for name, kind in inputs:
        if isinstance(kind, Tensor):
            terms[f"{name}.numel"] = (0.0, math.inf)
        elif isinstance(kind, Blob):
            terms[f"{name}.bytes"] = (0.0, math.inf)
        elif isinstance(kind, Row):
            terms[name] = (
                0.0 if kind.minimum is None else kind.minimum,
                math.inf if kind.maximum is None else kind.maximum,
            )
    return terms


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """Everything the broker and the worker must know of a kernel to batch it.

    `inputs`: (name, kind) in the order of the function's parameters. `modes`: "batch" if it can be called, "stream" if
    it has `open` and `step`. `combine`: a batch takes the maximum or the sum of its tasks' costs. `scoped`: the
    principal is part of the batch key. `resident`: it has state to load first. `options`: what its constructor was
    given; part of the digest, because workers with different options must not share a batch key. `hang_limit_s`: a run or
    a step is not taken for hung before it has lasted so long; None = as the worker's settings and its measured times say.
    `checkpoints`: its streamed tasks can go on elsewhere from what `checkpoint` gave.
    """

    name: str
    inputs: tuple[tuple[str, Input], ...]
    modes: tuple[str, ...] = ("batch",)
    cost: Cost | CostFunction | None = None
    combine: str = "max"
    idempotent: bool = True
    max_batch_size: int = 32
    max_batch_cost_ms: float | None = None
    scoped: bool = False
    resident: bool = False
    version: str = "1"
    doc: str = ""
    options: Mapping[str, StaticValue] = field(default_factory=dict)
    hang_limit_s: float | None = None
    checkpoints: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise SpecError(f"a kernel's name is a letter and up to 63 of A-Z a-z 0-9 _ . : / -; got {self.name!r}")
        self._require(1 <= len(self.inputs) <= MAX_INPUTS, f"it must have 1 to {MAX_INPUTS} inputs")
        self._require(
            bool(self.modes) and all(mode in MODES for mode in self.modes),
            f"modes must be some of {MODES}; got {self.modes!r}",
        )
        self._require(self.combine in ("max", "sum"), f"combine must be max or sum; got {self.combine!r}")
        for flag in ("idempotent", "scoped", "resident"):
            self._require(isinstance(getattr(self, flag), bool), f"{flag} must be True or False")
        self._require(
            type(self.max_batch_size) is int and 1 <= self.max_batch_size <= MAX_BATCH_SIZE,
            f"max_batch_size must be 1 to {MAX_BATCH_SIZE}; got {self.max_batch_size!r}",
        )
        limit = self.max_batch_cost_ms
        self._require(
            limit is None or (_is_finite(limit) and limit > 0),
            f"max_batch_cost_ms must be None or above 0; got {limit!r}",
        )
        hang = self.hang_limit_s
        self._require(hang is None or (_is_finite(hang) and hang > 0), f"hang_limit_s must be None or above 0; got {hang!r}")
        self._require(
            isinstance(self.version, str) and 0 < len(self.version) <= 64,
            f"version must be a string of 1 to 64 characters; got {self.version!r}",
        )
        self._require(
            self.idempotent or not self.checkpoints, "what is not idempotent never runs again, so it has no use for checkpoints"
        )
        object.__setattr__(self, "cost", self._checked_cost())

    def _require(self, is_true: bool, message: str) -> None:
        if not is_true:
            raise SpecError(f"kernel {self.name!r}: {message}")

    def _checked_cost(self) -> Cost:
        terms = cost_terms(self.inputs)
        cost = self.cost
        if cost is None:
            return Cost()
        if not isinstance(cost, Cost):
            self._require(callable(cost), f"cost must be a Cost or a function, not {type(cost).__name__}")
            try:
                return Cost(*fit_cost(self.name, cost, terms))
            except SpecError as e:
                log.warning("%s; the kernel is offered without a cost", e)
                return Cost()
        unknown = sorted(set(cost.per) - set(terms))
        known = ", ".join(terms) or "none: it has no tensor, blob or row input"
        self._require(not unknown, f"cost uses unknown terms {', '.join(map(repr, unknown))}; possible are {known}")
        for term, value in {"base_ms": cost.base_ms, **cost.per}.items():
            self._require(_is_finite(value) and value >= 0, f"cost of {term} must be finite and not negative; got {value!r}")
        return Cost(float(cost.base_ms), {term: float(slope) for term, slope in cost.per.items()})

    @property
    def linear_cost(self) -> Cost:
        """The cost in its linear form, fitted if it was declared as a function."""
        assert isinstance(self.cost, Cost)
        return self.cost

    def with_options(self, options: Mapping[str, StaticValue]) -> "KernelSpec":
        """The same spec for a kernel constructed with `options`."""
        return replace(self, options=dict(options))

    def to_wire(self) -> dict[str, object]:
        """The spec as plain values, as the broker parses it. `digest` (8 bytes) identifies everything that matters."""
        wire: dict[str, object] = {
            "name": self.name,
            "version": self.version,
            "inputs": [_input_to_wire(name, kind) for name, kind in self.inputs],
            "modes": list(self.modes),
            "combine": self.combine,
            "idempotent": self.idempotent,
            "scoped": self.scoped,
            "resident": self.resident,
            "max_batch_size": self.max_batch_size,
            "max_batch_cost_ms": self.max_batch_cost_ms,
            "cost": {"base_ms": self.linear_cost.base_ms, "per": dict(self.linear_cost.per)},
        }
        if self.checkpoints:
            wire["checkpoints"] = True
        hidden = {
            "options": dict(self.options),
            "pad_values": {name: kind.pad_value for name, kind in self.inputs if isinstance(kind, Tensor)},
        }
        text = json.dumps([wire, hidden], sort_keys=True, separators=(",", ":"))
        return {**wire, "digest": hashlib.blake2b(text.encode(), digest_size=8).digest()}


def _input_to_wire(name: str, kind: Input) -> list[object]:
    if isinstance(kind, Tensor):
        dtypes = None if kind.dtypes is None else list(kind.dtypes)
        return [name, "tensor", {"dtypes": dtypes, "rank": kind.rank, "ragged": kind.ragged}]
    if isinstance(kind, Blob):
        return [name, "blob", {"kind": kind.kind}]
    if isinstance(kind, Row):
        return [name, "row", {"default": kind.default, "min": kind.minimum, "max": kind.maximum}]
    assert isinstance(kind, Static)
    return [name, "static", {"required": kind.required, "default": kind.default}]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
