"""The inputs that a kernel declares, and what an argument given for one becomes on the wire.

Knows one input at a time; `plan.py` knows a whole kernel. What an argument becomes is decided by the kernel's spec, never
guessed from its value:

- *tensor*: numpy arrays and torch tensors of any device keep their dtype, in C order and little endian. Python numbers
  and lists become bool, int64 or float32 like `torch.tensor`, else float32, float64 or the first dtype that the kernel takes.
- *blob*: str for text, bytes-like for bytes. One task has one.
- *row*: a number per task.
- *static*: None, bool, numbers, str and lists of them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgpack
import numpy as np

from penstock.broker.layout import FRAMED_ROW_BYTES, MAX_RANK, Column
from penstock.broker.protocol import MAX_STATICS_BYTES
from penstock.broker.shared import SharedBytes
from penstock.client.arrays import NUMPY_DTYPES, Array, describe, is_torch_tensor, to_array
from penstock.client.errors import InvalidInput

MAX_CACHED: Final = 1024
Place = Callable[[Array], SharedBytes | None]
"""Puts an array into memory that workers can read; None: it is not worth it, or there is no room."""


def nowhere(array: Array) -> SharedBytes | None:
    """Nothing is shared."""
    return None


class TensorInput:
    """A declared tensor: checks dtype and rank, and makes columns. `is_ragged`: rows may differ in dimension 0."""

    __slots__ = ("_columns", "_place", "dtypes", "is_ragged", "name", "rank")
    kind = "tensor"

    def __init__(self, name: str, info: Mapping[str, Any], place: Place = nowhere) -> None:
        self.name = name
        self._place = place
        dtypes = info.get("dtypes")
        self.dtypes: tuple[str, ...] | None = None if dtypes is None else tuple(dtypes)
        self.rank: int | None = info.get("rank")
        self.is_ragged = info.get("ragged", "exact") != "exact"
        self._columns: dict[Any, Column] = {}

    def one(self, value: Any) -> tuple[Column, int, Any, int]:
        """One task's array: column, its length if ragged, a copy of its bytes that is ours, their number."""
        if type(value) is np.ndarray:
            column = self._columns.get((value.dtype, value.shape))
            if column is not None:
                data = (column.is_framed and self._place(value)) or value.tobytes()
                return column, value.shape[0] if column.is_ragged else 0, data, value.nbytes
        dtype, array = to_array(value, self.name, self.dtypes)
        column = self.column(dtype, array.shape, array.nbytes)
        if type(value) is np.ndarray and value.dtype == array.dtype and dtype in NUMPY_DTYPES:
            if len(self._columns) >= MAX_CACHED:
                self._columns.clear()
            self._columns[value.dtype, value.shape] = column
        data = (column.is_framed and self._place(array)) or array.tobytes()
        return column, array.shape[0] if column.is_ragged else 0, data, array.nbytes

    def column(self, dtype: str, shape: tuple[int, ...], row_bytes: int) -> Column:
        """The column for rows of this dtype and whole shape.

        Raises:
            InvalidInput: not what the kernel takes.
        """
        if self.dtypes is not None and dtype not in self.dtypes:
            raise InvalidInput(f"{self.name!r} is {dtype}; the kernel takes {', '.join(self.dtypes)}")
        if self.rank is not None and len(shape) != self.rank:
            raise InvalidInput(f"{self.name!r} has shape {list(shape)} per task; the kernel takes {self.rank} dimensions")
        if len(shape) > MAX_RANK:
            raise InvalidInput(f"{self.name!r} has {len(shape)} dimensions, at most {MAX_RANK} can travel")
        is_ragged = self.is_ragged and bool(shape)
        return Column(self.name, dtype, shape[1:] if is_ragged else shape, is_ragged, row_bytes >= FRAMED_ROW_BYTES)

    def many(self, value: Any) -> tuple[Column, list[int] | None, Any, int, int] | None:
        """An array `[N, ...]` of N tasks: column, lengths, the array, N, bytes of a row. None: give the rows one by one."""
        if not (is_torch_tensor(value) or isinstance(value, np.ndarray)):
            return None
        dtype, array = to_array(value, self.name, self.dtypes)
        if not array.ndim:
            raise InvalidInput(f"{self.name!r}: map_rows wants an array with one row per task, got a single number")
        num_rows = array.shape[0]
        row_bytes = math.prod(array.shape[1:]) * array.itemsize
        column = self.column(dtype, array.shape[1:], row_bytes)
        return column, [array.shape[1]] * num_rows if column.is_ragged else None, array, num_rows, row_bytes


class BlobInput:
    """A declared text or byte string."""

    __slots__ = ("_framed", "_packed", "_place", "is_text", "name")
    kind = "blob"

    def __init__(self, name: str, info: Mapping[str, Any], place: Place = nowhere) -> None:
        self.name = name
        self._place = place
        self.is_text = info.get("kind") == "text"
        dtype = "str" if self.is_text else "bytes"
        self._packed = Column(name, dtype, (), True, False)
        self._framed = Column(name, dtype, (), True, True)

    def one(self, value: Any) -> tuple[Column, int, Any, int]:
        if self.is_text:
            if not isinstance(value, str):
                raise InvalidInput(f"{self.name!r} wants one str per task, got {describe(value)}{self._hint(value)}")
            try:
                data = value.encode()
            except UnicodeEncodeError as e:
                raise InvalidInput(f"{self.name!r} is no valid text: {e.reason}") from None
        else:
            if not isinstance(value, bytes | bytearray | memoryview):
                raise InvalidInput(f"{self.name!r} wants bytes, got {describe(value)}{self._hint(value)}")
            data = bytes(value)
        size = len(data)
        if size >= FRAMED_ROW_BYTES:
            return self._framed, size, self._place(np.frombuffer(data, np.uint8)) or data, size
        return self._packed, size, data, size

    def _hint(self, value: Any) -> str:
        return f"; for many tasks at once use map_rows(..., {self.name}=[...])" if isinstance(value, list | tuple) else ""


Payload = TensorInput | BlobInput


class RowInput:
    """A declared number per task, with its bounds."""

    __slots__ = ("is_required", "maximum", "minimum", "name")
    kind = "row"

    def __init__(self, name: str, info: Mapping[str, Any], place: Place = nowhere) -> None:
        self.name = name
        self.is_required = info.get("default") is None
        self.minimum: float | None = info.get("min")
        self.maximum: float | None = info.get("max")

    def one(self, value: Any) -> float:
        if is_torch_tensor(value) and value.numel() == 1:
            value = value.item()
        if isinstance(value, np.generic | np.ndarray) and value.size == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidInput(f"{self.name!r} wants one number per task, got {describe(value)}")
        if not math.isfinite(value):
            raise InvalidInput(f"{self.name!r} must be finite, not {value!r}")
        low, high = self.minimum, self.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            raise InvalidInput(f"{self.name!r} must be from {low} to {high}, not {value!r}")
        return value if isinstance(value, float) else float(value)


class StaticInput:
    """A declared value that is equal for a whole batch."""

    __slots__ = ("is_required", "name")
    kind = "static"

    def __init__(self, name: str, info: Mapping[str, Any], place: Place = nowhere) -> None:
        self.name = name
        self.is_required = bool(info.get("required"))

    def one(self, value: Any) -> Any:
        if type(value) in (str, bool, float, int) or value is None:
            return value
        if isinstance(value, list | tuple):
            return [self.one(v) for v in value]
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufU":
            return value.tolist()
        if isinstance(value, str | int | float):
            return value
        raise InvalidInput(f"{self.name!r} is a setting: None, bool, number, str or lists of them, not {describe(value)}")


Input = TensorInput | BlobInput | RowInput | StaticInput
KINDS: Final[dict[str, Callable[[str, Mapping[str, Any], Place], Input]]] = {
    "tensor": TensorInput, "blob": BlobInput, "row": RowInput, "static": StaticInput,
}  # fmt: skip


def pack_statics(statics: Mapping[str, Any]) -> bytes:
    """The same statics always give the same bytes; none give empty bytes.

    Raises:
        InvalidInput: too large, or an integer over 64 bits.
    """
    if not statics:
        return b""
    try:
        packed: bytes = msgpack.packb(dict(sorted(statics.items())))
    except (OverflowError, ValueError, TypeError) as e:
        raise InvalidInput(f"the settings {', '.join(sorted(statics))} cannot travel: {e}") from None
    if len(packed) > MAX_STATICS_BYTES:
        raise InvalidInput(f"the settings have {len(packed)} bytes, at most {MAX_STATICS_BYTES} can travel")
    return packed
