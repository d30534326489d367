"""The kinds of inputs that a kernel may declare, and what each accepts.

Knows how one input is described; does not know how batches are made from them (the worker) nor what they cost.
"""

import math
from dataclasses import dataclass

DTYPES = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
)
FLOATS = ("float16", "bfloat16", "float32", "float64")
RAGGED = ("exact", "pad", "pack")
MAX_RANK = 8

StaticValue = bool | int | float | str | None | list["StaticValue"]
"""What a static may hold; nested lists of these included."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array per task, sent as payload bytes.

    `dtypes`: allowed dtype names, None = all of `DTYPES`. `rank`: number of dimensions of one task's array, None = any.
    `ragged`: how the arrays of a batch are joined:

    - "exact": shapes are equal; stacked to `[batch, ...]`;
    - "pad": dimension 0 may differ; filled with `pad_value` to `[batch, longest, ...]`, and the true lengths come as
      `<name>_lengths`, int64 `[batch]`, if the function has a parameter of that name;
    - "pack": dimension 0 may differ; concatenated to `[total, ...]`, and the bounds come as `<name>_offsets`, int64
      `[batch + 1]`, a parameter that the function must have.
    """

    dtypes: tuple[str, ...] | None = None
    rank: int | None = None
    ragged: str = "exact"
    pad_value: float = 0.0

    def __post_init__(self) -> None:
        if self.dtypes is not None:
            object.__setattr__(self, "dtypes", tuple(self.dtypes))
            unknown = sorted(set(self.dtypes) - set(DTYPES))
            if unknown or not self.dtypes:
                raise ValueError(f"dtypes must be some of {', '.join(DTYPES)}; got {list(self.dtypes)}")
        if self.rank is not None and not (type(self.rank) is int and 0 <= self.rank <= MAX_RANK):
            raise ValueError(f"rank must be None or 0 to {MAX_RANK}; got {self.rank!r}")
        if self.ragged not in RAGGED:
            raise ValueError(f"ragged must be one of {', '.join(RAGGED)}; got {self.ragged!r}")
        if self.ragged != "exact" and self.rank == 0:
            raise ValueError(f"ragged={self.ragged!r} needs a dimension that may differ; rank is 0")


@dataclass(frozen=True, slots=True)
class Blob:
    """A text or a byte string per task; a batch is a `list[str]` ("text") or `list[bytes]` ("bytes")."""

    kind: str = "bytes"

    def __post_init__(self) -> None:
        if self.kind not in ("text", "bytes"):
            raise ValueError(f"kind must be text or bytes; got {self.kind!r}")


@dataclass(frozen=True, slots=True)
class Row:
    """A number per task that the broker sees: it may enter the cost and does not split batches.

    A batch is a float64 tensor `[batch]`. Without a `default` it is required. `minimum` and `maximum` are inclusive.
    """

    default: float | None = None
    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        for field in ("default", "minimum", "maximum"):
            value = getattr(self, field)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{field} must be a finite number; got {value!r}")
            object.__setattr__(self, field, float(value))
        low = -math.inf if self.minimum is None else self.minimum
        high = math.inf if self.maximum is None else self.maximum
        if low > high or (self.default is not None and not low <= self.default <= high):
            raise ValueError(f"minimum <= default <= maximum does not hold: {low}, {self.default}, {high}")


@dataclass(frozen=True, slots=True)
class Static:
    """A value that is equal for the whole batch, as part of the batch key: bool, number, string, None, lists of them.

    A parameter with a default value is one without declaration; declare it to make it required.
    """

    required: bool = True
    default: StaticValue = None


Input = Tensor | Blob | Row | Static
"""Any declared input."""


def as_static(value: object) -> StaticValue:
    """`value` as a static, tuples turned into lists. Raises TypeError for anything that a static cannot hold."""
    if value is None or isinstance(value, bool | int | float | str):
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise TypeError(f"integer {value} does not fit 64 bits")
        return value
    if isinstance(value, list | tuple):
        return [as_static(item) for item in value]
    raise TypeError(f"a static holds bool, numbers, strings, None and lists of them, not {type(value).__name__}")
