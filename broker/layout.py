"""What a block's rows consist of: the `Column` and the `Layout`, their limits, and how they are read from the wire.

Knows descriptors only. Does not know frames, bytes of rows (`columns.py`), messages, numpy or torch.

A row of a column is either of fixed shape or *ragged*: its dimension 0 is among the block's lengths and `shape` holds the
others. Text and bytes are ragged columns of one-byte items. A column is *packed*, or *framed* (rows of 64 KiB and more).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

ITEM_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
    "str": 1, "bytes": 1,
}  # fmt: skip
BLOBS = frozenset(("str", "bytes"))
FRAMED_ROW_BYTES = 64 * 1024
MAX_COLUMNS = 64
MAX_RANK = 8
MAX_NAME = 64
MAX_LAYOUT_BYTES = 8192
MAX_ITEMS = 1 << 44
"""Of a row, dimensions of 0 left out: no array may be of a shape that cannot be counted, not even an empty one."""
MAX_INTERNED = 4096

Lengths = Sequence[int] | None
"""Of a column: each row's dimension 0 when it is ragged."""


class LayoutError(ValueError):
    """The descriptors and the frames of a block do not fit together."""


@dataclass(frozen=True, slots=True)
class Column:
    """One input or output of every row. `shape` is a row's shape, without dimension 0 when it is ragged."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    is_ragged: bool = False
    is_framed: bool = False

    @property
    def item_bytes(self) -> int:
        """Bytes of a row, or of one step of dimension 0 when it is ragged."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


class Layout:
    """The columns of a block, interned: equal columns are the same object, and what follows from them is worked out once.

    `packed` is the wire's form, msgpack of [[name, dtype, shape, is_ragged, is_framed], ...].
    """

    __slots__ = ("columns", "has_packed", "is_plain", "item_bytes", "no_lengths", "num_framed", "packed")

    def __init__(self, columns: tuple[Column, ...]) -> None:
        self.columns = columns
        self.item_bytes = tuple(c.item_bytes for c in columns)
        self.num_framed = sum(c.is_framed for c in columns)
        self.has_packed = self.num_framed < len(columns)
        self.no_lengths = (None,) * len(columns)
        self.is_plain = len(columns) == 1 and not columns[0].is_framed and not columns[0].is_ragged
        """One packed column of fixed shape: the case that is worth a short cut."""
        described = [[c.name, c.dtype, c.shape, c.is_ragged, c.is_framed] for c in columns]
        self.packed: bytes = msgpack.packb(described)

    @classmethod
    def of(cls, columns: tuple[Column, ...]) -> "Layout":
        found = _BY_COLUMNS.get(columns)
        return found if found is not None else _intern(cls(columns))

    @classmethod
    def parse(cls, packed: Any) -> "Layout":
        """The layout behind the wire's form.

        Raises:
            LayoutError: it is none.
        """
        found = _BY_BYTES.get(packed) if type(packed) is bytes else None
        if found is not None:
            return found
        made = cls.of(tuple(_parse_columns(packed)))
        if len(_BY_BYTES) >= MAX_INTERNED:
            _BY_BYTES.clear()
        _BY_BYTES[packed] = made  # a peer may pack the same columns in other bytes
        return made

    def parse_lengths(self, described: Any, num_rows: int) -> list[Lengths]:
        """A block's lengths, per column nil or one count per row.

        Raises:
            LayoutError: they are none.
        """
        if not (isinstance(described, list) and len(described) == len(self.columns)):
            raise LayoutError("lengths are one list or nil per column")
        for column, lengths in zip(self.columns, described, strict=True):
            if lengths is not None and not (isinstance(lengths, list) and len(lengths) == num_rows and _are_counts(lengths)):
                raise LayoutError(f"lengths of {column.name!r} must be one count per row")
        return described


_BY_COLUMNS: dict[tuple[Column, ...], Layout] = {}
_BY_BYTES: dict[bytes, Layout] = {}


def _intern(layout: Layout) -> Layout:
    if len(_BY_BYTES) >= MAX_INTERNED:  # equality of layouts does not hang on identity, only speed does
        _BY_COLUMNS.clear()
        _BY_BYTES.clear()
    _BY_COLUMNS[layout.columns] = _BY_BYTES[layout.packed] = layout
    return layout


def _parse_columns(packed: Any) -> list[Column]:
    if type(packed) is not bytes or len(packed) > MAX_LAYOUT_BYTES:
        raise LayoutError(f"a layout is msgpack in at most {MAX_LAYOUT_BYTES} bytes")
    try:
        described = msgpack.unpackb(packed, max_array_len=MAX_COLUMNS)
    except (ValueError, msgpack.UnpackException, RecursionError) as e:
        raise LayoutError(f"a layout is not msgpack as it should be: {type(e).__name__}") from e
    if not isinstance(described, list) or len(described) > MAX_COLUMNS:
        raise LayoutError(f"columns must be a list of at most {MAX_COLUMNS}")
    columns = [_parse_column(c) for c in described]
    if len({c.name for c in columns}) != len(columns):
        raise LayoutError("two columns have the same name")
    return columns


def _parse_column(described: Any) -> Column:
    if not (isinstance(described, list) and len(described) == 5):
        raise LayoutError("a column is [name, dtype, shape, is_ragged, is_framed]")
    name, dtype, shape, is_ragged, is_framed = described
    if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME):
        raise LayoutError(f"a column's name has 1 to {MAX_NAME} characters")
    if not (isinstance(dtype, str) and dtype in ITEM_BYTES):
        raise LayoutError(f"dtype of {name!r} must be one of {', '.join(ITEM_BYTES)}")
    if not (isinstance(shape, list) and len(shape) <= MAX_RANK and _are_counts(shape)):
        raise LayoutError(f"shape of {name!r} must be at most {MAX_RANK} counts")
    if math.prod(n or 1 for n in shape) > MAX_ITEMS:
        raise LayoutError(f"rows of {name!r} have more than {MAX_ITEMS} items, or would with no dimension of 0")
    if type(is_ragged) is not bool or type(is_framed) is not bool or (dtype in BLOBS and (shape or not is_ragged)):
        raise LayoutError(f"column {name!r} is malformed")
    return Column(name, dtype, tuple(shape), is_ragged, is_framed)


def _are_counts(values: list[Any]) -> bool:
    return all(type(v) is int and 0 <= v < 1 << 48 for v in values)
