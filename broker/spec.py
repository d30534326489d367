"""What the broker knows of a kernel: the parsed `ready` spec, and how a submission binds to it.

Knows declared inputs, modes, cost terms and how rows may share a batch. Does not know tensors, models or queues.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.broker.columns import Block, reshape
from penstock.broker.layout import BLOBS, MAX_NAME, Column, LayoutError
from penstock.broker.protocol import Submit
from penstock.broker.wire import MAX_ROWS, ProtocolError, record

MAX_INPUTS = 64
MAX_DIGEST_BYTES = 32
MAX_PAYLOAD_FRAMES = 2 * MAX_ROWS
MAX_LISTED_BYTES = 36 * 1024
_LISTED_BYTES = {"blob": 5, "pad": 5, "pack": 5, "row": 9}
MAX_PLANS = 1024
Plan = tuple[str, tuple[Any, ...] | None]


class InputError(ValueError):
    """A submission that its kernel cannot take; the text says what the kernel wants."""


@dataclass(frozen=True, slots=True)
class Input:
    """One declared input: `kind` is tensor, blob, row or static; the rest as the kind needs it."""

    name: str
    kind: str
    dtypes: tuple[str, ...] | None = None
    rank: int | None = None
    ragged: str = "exact"
    is_required: bool = True
    minimum: float | None = None
    maximum: float | None = None


Cost = float | list[float]
"""Predicted alone-time in ms: one for every row, or one per row."""


@record
class Binding:
    """A submission as its kernel sees it: the block in the kernel's layout, what it may share a batch with, its cost."""

    block: Block
    key: tuple[Any, ...]
    mode: str
    cost_ms: Cost


@dataclass(frozen=True, slots=True)
class Spec:
    """A kernel on offer. `digest` tells versions of it apart; `wire` is what the worker sent."""

    name: str
    digest: bytes
    inputs: Mapping[str, Input]
    modes: tuple[str, ...]
    combine: str
    is_idempotent: bool
    is_scoped: bool
    max_batch_size: int
    max_batch_cost_ms: float | None
    base_ms: float
    per: Mapping[str, float]
    wire: Mapping[str, Any]
    has_checkpoints: bool = False
    _plans: "dict[tuple[Any, ...], Plan]" = field(default_factory=dict)

    def bind(self, m: Submit, principal: str) -> Binding:
        """Check a submission against this kernel and lay it out.

        Raises:
            InputError: names, dtypes, shapes or bounds that the kernel did not declare.
        """
        plan = self._plans.get((m.block.layout, m.wants_partials, *m.scalars))
        if plan is None:
            plan = self._plan(m)
        mode, shape_class = plan
        block = m.block
        if shape_class is None:
            block, shape_class = self._lay_out_all(block)
        for name, values in m.scalars.items():
            self._check_scalar(self.inputs[name], values, block.num_rows)
        owner = principal if self.is_scoped else ""
        names = tuple(sorted(m.scalars)) if m.scalars else ()
        key = (self.name, self.digest, mode, m.statics, shape_class, names, owner)
        return Binding(block, key, mode, self.cost_ms(block, m.scalars) if self.per else self.base_ms)

    def _plan(self, m: Submit) -> "Plan":
        """What the names and the layout of a submission decide; remembered, since they repeat.

        The shape class is None where it depends on the rows' lengths.
        """
        self._check_names(m)
        mode = self._mode(m.wants_partials)
        is_fixed = all(not c.is_ragged and self.inputs[c.name].ragged == "exact" for c in m.block.columns)
        shape_class = None
        if is_fixed:
            _, shape_class = self._lay_out_all(m.block)
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        self._plans[m.block.layout, m.wants_partials, *m.scalars] = plan = (mode, shape_class)
        return plan

    def _lay_out_all(self, block: Block) -> tuple[Block, tuple[Any, ...]]:
        """The block in the kernel's layout, and what its rows must share with a batch."""
        shape_class = []
        for index, column in enumerate(block.columns):
            block = self._lay_out(block, index, self.inputs[column.name])
            shape_class.append(_shape_class(block, index, self.inputs[column.name]))
        return block, tuple(shape_class)

    def max_rows(self, shape_class: Iterable[tuple[Any, ...]]) -> int:
        """Rows that one message can hold: each has an entry in the header per listed input, and a frame per framed one."""
        num_framed = sum(1 for *_, is_framed in shape_class if is_framed)
        listed_bytes = sum(_LISTED_BYTES.get(i.ragged if i.kind == "tensor" else i.kind, 0) for i in self.inputs.values())
        return min(self.max_batch_size, MAX_PAYLOAD_FRAMES // max(num_framed, 1), MAX_LISTED_BYTES // max(listed_bytes, 1))

    def _check_names(self, m: Submit) -> None:
        given = {c.name for c in m.block.columns} | m.scalars.keys()
        wanted = {i.name for i in self.inputs.values() if i.kind != "static"}
        missing = {i.name for i in self.inputs.values() if i.is_required and i.kind != "static"} - given
        if given - wanted or missing:
            raise InputError(
                f"{self.name!r} takes {_names(wanted)}; "
                + (f"missing: {_names(missing)}" if missing else f"unknown: {_names(given - wanted)}")
            )

    def _mode(self, wants_partials: bool) -> str:
        if wants_partials and "stream" not in self.modes:
            raise InputError(f"{self.name!r} does not stream: call it, or ask for it without partials")
        return "stream" if wants_partials or "batch" not in self.modes else "batch"

    def _lay_out(self, block: Block, index: int, wanted: Input) -> Block:
        column = block.columns[index]
        is_blob = column.dtype in BLOBS
        if wanted.kind != ("blob" if is_blob else "tensor"):
            raise InputError(f"{self.name}.{column.name} is a {wanted.kind}, not {column.dtype}")
        if wanted.dtypes is not None and column.dtype not in wanted.dtypes:
            raise InputError(f"{self.name}.{column.name} takes {' or '.join(wanted.dtypes)}, not {column.dtype}")
        if is_blob:
            return block
        rank = len(column.shape) + column.is_ragged
        if wanted.rank is not None and rank != wanted.rank:
            raise InputError(f"{self.name}.{column.name} has {wanted.rank} dimensions per task, not {rank}")
        try:
            return reshape(block, index, wanted.ragged != "exact")
        except LayoutError as e:
            raise InputError(f"{self.name}: {e}") from e

    def _check_scalar(self, wanted: Input, values: Any, num_rows: int) -> None:
        if wanted.kind != "row":
            raise InputError(f"{self.name}.{wanted.name} is a {wanted.kind}, not a number per task")
        if isinstance(values, list) and len(values) != num_rows:
            raise InputError(f"{self.name}.{wanted.name} has {len(values)} values for {num_rows} tasks")
        low = -math.inf if wanted.minimum is None else wanted.minimum
        high = math.inf if wanted.maximum is None else wanted.maximum
        for value in values if isinstance(values, list) else (values,):
            if not low <= value <= high:
                raise InputError(f"{self.name}.{wanted.name} must be from {low:g} to {high:g}, not {value:g}")

    def cost_ms(self, block: Block, scalars: Mapping[str, Any]) -> Cost:
        """The declared linear form over shapes, bytes and row scalars, in ms of one task alone."""
        cost: Cost = self.base_ms
        for term, weight in self.per.items():
            name, _, feature = term.partition(".")
            values = _sizes(block, name, feature) if feature else scalars.get(name, 0.0)
            cost = _add(cost, values, weight)
        return cost


def _add(cost: Cost, values: Any, weight: float) -> Cost:
    if isinstance(values, list):
        costs = cost if isinstance(cost, list) else [cost] * len(values)
        return [c + weight * v for c, v in zip(costs, values, strict=True)]
    added: float = weight * values
    return [c + added for c in cost] if isinstance(cost, list) else cost + added


def _sizes(block: Block, name: str, feature: str) -> Any:
    """numel or bytes of a column's rows: one number when they are equal, else a list."""
    for index, column in enumerate(block.columns):
        if column.name == name:
            unit = column.item_bytes if feature == "bytes" else math.prod(column.shape)
            lengths = block.lengths[index]
            return unit if lengths is None else [unit * n for n in lengths]
    return 0


def _shape_class(block: Block, index: int, wanted: Input) -> tuple[Any, ...]:
    """What rows must have in common to share a batch: padded rows also the power of two of their length."""
    column: Column = block.columns[index]
    lengths = block.lengths[index]
    bucket = 0
    if wanted.ragged == "pad" and lengths:
        bucket = max(lengths).bit_length()
    return (column.name, column.dtype, column.shape, bucket, column.is_framed)


def parse(wire: Mapping[str, Any]) -> Spec:
    """A spec from a worker's `ready`.

    Raises:
        ProtocolError: a field that is missing or of the wrong kind.
    """
    try:
        inputs = {name: _parse_input(name, kind, facts) for name, kind, facts in wire["inputs"]}
        cost = wire["cost"]
        spec = Spec(
            name=_typed(wire["name"], str), digest=_typed(wire["digest"], bytes), inputs=inputs,
            modes=tuple(_typed(m, str) for m in wire["modes"]), combine=_typed(wire["combine"], str),
            is_idempotent=_typed(wire["idempotent"], bool), is_scoped=_typed(wire["scoped"], bool),
            max_batch_size=_typed(wire["max_batch_size"], int),
            max_batch_cost_ms=_maybe_float(wire["max_batch_cost_ms"]), base_ms=_finite(cost["base_ms"]),
            per={_typed(k, str): _finite(v) for k, v in cost["per"].items()}, wire=wire,
            has_checkpoints=_typed(wire.get("checkpoints", False), bool),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ProtocolError(f"a kernel spec is malformed: {type(e).__name__}: {e}") from e
    if not (set(spec.modes) <= {"batch", "stream"} and spec.modes and spec.combine in ("max", "sum")):
        raise ProtocolError(f"spec of {spec.name!r}: unknown mode or combine")
    if not (0 < len(spec.name) <= MAX_NAME and len(spec.digest) <= MAX_DIGEST_BYTES):
        raise ProtocolError(f"a kernel's name has 1 to {MAX_NAME} characters, its digest at most {MAX_DIGEST_BYTES} bytes")
    if not 1 <= spec.max_batch_size <= 4096 or len(inputs) > MAX_INPUTS:
        raise ProtocolError(f"spec of {spec.name!r}: max_batch_size or number of inputs out of bounds")
    return spec


def _parse_input(name: Any, kind: Any, facts: Any) -> Input:
    name, kind = _typed(name, str), _typed(kind, str)
    if kind == "tensor":
        dtypes = facts["dtypes"]
        ragged = facts["ragged"]
        if ragged not in ("exact", "pad", "pack"):
            raise ValueError(f"ragged of {name} is {ragged!r}")
        rank = None if facts["rank"] is None else _typed(facts["rank"], int)
        return Input(name, kind, None if dtypes is None else tuple(_typed(d, str) for d in dtypes), rank, ragged)
    if kind == "row":
        has_default = facts["default"] is not None
        low, high = _maybe_float(facts["min"]), _maybe_float(facts["max"])
        return Input(name, kind, is_required=not has_default, minimum=low, maximum=high)
    if kind not in ("blob", "static"):
        raise ValueError(f"kind of {name} is {kind!r}")
    return Input(name, kind, is_required=kind == "blob")


def _typed(value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value


def _maybe_float(value: Any) -> float | None:
    return None if value is None else _finite(value)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} where a finite number belongs")
    return number


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "no inputs"
