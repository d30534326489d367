"""How rows of tensors and blobs lie in frames: the `Block`, and what is done with blocks.

Knows byte layout only: strides, slicing, joining. Does not know how columns are described (`layout.py`), messages, tasks,
numpy or torch.

A block holds `num_rows` rows of some columns. Column by column, all rows of the packed columns lie one after the other in the
first frame; a framed column has one frame per row after it, or a descriptor of where the row lies in shared memory
(`shared.py`).
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, cast

import zmq

from penstock.broker import shared
from penstock.broker.layout import MAX_ITEMS, Column, Layout, LayoutError, Lengths
from penstock.broker.shared import SharedBytes

Buffer = bytes | bytearray | memoryview | zmq.Frame
Stored = Buffer | SharedBytes
"""What a block's frames are: bytes that travel, or a reference."""
_HAS_BUFFER = (zmq.Frame, SharedBytes)


def view(frame: Stored) -> Any:
    """The frame's bytes as something that can be sliced without a copy and has a len()."""
    return frame.buffer if isinstance(frame, _HAS_BUFFER) else memoryview(frame)


def frame_bytes(frame: Stored) -> int:
    return len(frame) if not isinstance(frame, memoryview) else frame.nbytes


class Block:
    """Rows in frames. Immutable; slicing is `gather`.

    Args:
        num_rows: rows held, >= 0.
        columns: the descriptors, or their layout.
        lengths: per column, each row's dimension 0 when it is ragged, else None.
        frames: the packed frame when any column is packed, then the framed columns' rows.
    """

    __slots__ = ("_offsets", "frames", "layout", "lengths", "num_rows")

    def __init__(
        self, num_rows: int, columns: tuple[Column, ...] | Layout, lengths: Sequence[Lengths], frames: Sequence[Stored]
    ) -> None:
        self.num_rows = num_rows
        self.layout = columns if isinstance(columns, Layout) else Layout.of(columns)
        self.lengths = lengths
        self.frames = frames
        self._offsets: list[Sequence[int] | None] | None = None

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.layout.columns

    @property
    def nbytes(self) -> int:
        if self.layout.is_plain:
            return self.num_rows * self.layout.item_bytes[0]
        return sum(map(frame_bytes, self.frames))

    def column_bytes(self, index: int) -> int:
        lengths, item = self.lengths[index], self.layout.item_bytes[index]
        return item * (self.num_rows if lengths is None else sum(lengths))

    def row_bytes(self, index: int, row: int) -> int:
        lengths, item = self.lengths[index], self.layout.item_bytes[index]
        return item if lengths is None else item * lengths[row]

    def frame_index(self, index: int, row: int) -> int:
        """Where the frame of a framed column's row stands in `frames`."""
        return self.layout.has_packed + sum(c.is_framed for c in self.columns[:index]) * self.num_rows + row

    def packed_range(self, index: int, start: int, stop: int) -> tuple[int, int]:
        """Byte range of rows [start, stop) of a packed column within the packed frame."""
        if self._offsets is None:
            self._offsets = self._layout()
        offsets = self._offsets[index]
        assert offsets is not None
        if self.lengths[index] is None:
            item = self.layout.item_bytes[index]
            return offsets[0] + start * item, offsets[0] + stop * item
        return offsets[start], offsets[stop]

    def _layout(self) -> list[Sequence[int] | None]:
        base, layout = 0, list[Sequence[int] | None]()
        for i, column in enumerate(self.columns):
            if column.is_framed:
                layout.append(None)
                continue
            lengths, item = self.lengths[i], self.layout.item_bytes[i]
            if lengths is None:
                layout.append((base,))
            else:
                layout.append(list(accumulate((n * item for n in lengths), initial=base)))
            base += self.column_bytes(i)
        return layout

    def column(self, index: int, start: int, stop: int) -> Any:
        """Bytes of rows [start, stop) of a packed column, as a view."""
        a, b = self.packed_range(index, start, stop)
        return view(self.frames[0])[a:b]

    def row(self, index: int, row: int) -> Any:
        """Bytes of one row of any column, as a view."""
        if self.columns[index].is_framed:
            return view(self.frames[self.frame_index(index, row)])
        return self.column(index, row, row + 1)

    @property
    def has_shared(self) -> bool:
        """Some of its rows lie in shared memory."""
        return bool(self.layout.num_framed) and any(isinstance(f, SharedBytes) for f in self.frames)

    @property
    def sent_frames(self) -> Sequence[Buffer]:
        """Those that travel."""
        if not self.layout.num_framed:
            return cast("Sequence[Buffer]", self.frames)
        return [f for f in self.frames if not isinstance(f, SharedBytes)]

    def inlined(self) -> "Block":
        """The same bytes with none by reference: what is shared is a view of it."""
        frames = [f.buffer if isinstance(f, SharedBytes) else f for f in self.frames]
        return Block(self.num_rows, self.layout, self.lengths, frames)

    def copied(self) -> "Block":
        """The same bytes, those that are shared as a copy of our own."""
        frames = [bytes(f.buffer) if isinstance(f, SharedBytes) else f for f in self.frames]
        return Block(self.num_rows, self.layout, self.lengths, frames)

    def describe(self) -> list[Any]:
        """The header's form: `content`, and the descriptors of frames that do not travel, if there are any."""
        if self.layout.num_framed and (descriptors := shared.describe(self.frames)):
            content = self.content()
            return [*content, descriptors] if len(content) == 3 else [*content, None, descriptors]
        return self.content()

    def content(self) -> list[Any]:
        """[num_rows, layout], and the lengths (nil or one count per row) of each column if any has them."""
        layout = self.layout
        if layout.is_plain or all(n is None for n in self.lengths):
            return [self.num_rows, layout.packed]
        return [self.num_rows, layout.packed, self.lengths]

    @property
    def num_frames(self) -> int:
        return self.layout.num_framed * self.num_rows + self.layout.has_packed

    @classmethod
    def parse(cls, described: Any, frames: Sequence[Buffer], max_rows: int) -> "Block":
        """The inverse of `describe`: takes the block's frames off the front of `frames`.

        Raises:
            LayoutError: whatever does not fit, down to the last byte.
        """
        if not (type(described) is list and 2 <= len(described) <= 4):
            raise LayoutError("a block is [rows, layout], [rows, layout, lengths] or [rows, layout, lengths, descriptors]")
        num_rows = described[0]
        if type(num_rows) is not int or not 0 <= num_rows <= max_rows:
            raise LayoutError(f"rows must be 0 to {max_rows}")
        layout = Layout.parse(described[1])
        lengths: Sequence[Lengths] = layout.no_lengths
        if len(described) > 2 and not (len(described) == 4 and described[2] is None):
            lengths = layout.parse_lengths(described[2], num_rows)
        block = cls(num_rows, layout, lengths, ())
        num_frames = block.num_frames
        if len(described) == 4:
            try:
                block.frames = shared.merge(described[3], frames, int(layout.has_packed), num_frames)
            except shared.DescriptorError as e:
                raise LayoutError(str(e)) from e
        elif num_frames > len(frames):
            raise LayoutError(f"{num_frames} payload frames expected, {len(frames)} came")
        else:
            block.frames = frames[:num_frames]
        block._check_sizes()
        return block

    def _check_sizes(self) -> None:
        layout = self.layout
        is_fixed = layout.is_plain and self.lengths is layout.no_lengths
        if not is_fixed and any(c.is_ragged != (n is not None) for c, n in zip(layout.columns, self.lengths, strict=True)):
            raise LayoutError("a ragged column has lengths, and no other")
        if not is_fixed and 0 in layout.item_bytes:
            self._check_empty()
        if layout.has_packed:
            if layout.is_plain:
                packed = self.num_rows * layout.item_bytes[0]
            else:
                packed = sum(self.column_bytes(i) for i, c in enumerate(layout.columns) if not c.is_framed)
            if frame_bytes(self.frames[0]) != packed:
                raise LayoutError(f"the packed frame has {frame_bytes(self.frames[0])} bytes, {packed} expected")
        if layout.num_framed:
            self._check_framed()

    def _check_empty(self) -> None:
        """Where no byte says how long a row is, its length still has to be one that can be."""
        for column, item, lengths in zip(self.columns, self.layout.item_bytes, self.lengths, strict=True):
            if not item and lengths and max(lengths) * math.prod(n or 1 for n in column.shape) > MAX_ITEMS:
                raise LayoutError(f"rows of {column.name!r} are longer than {MAX_ITEMS} items")

    def _check_framed(self) -> None:
        for i, column in enumerate(self.columns):
            if column.is_framed:
                for row in range(self.num_rows):
                    size = frame_bytes(self.frames[self.frame_index(i, row)])
                    if size != self.row_bytes(i, row):
                        raise LayoutError(f"row {row} of {column.name!r} has {size} bytes, not as declared")


def any_shared(blocks: Iterable[Block | None]) -> bool:
    """Whether rows of any of these lie in shared memory."""
    for block in blocks:  # noqa: SIM110 - asked of every message: a generator costs twice as much
        if block is not None and block.layout.num_framed and block.has_shared:
            return True
    return False


def gather(pieces: Sequence[tuple[Block, int, int]]) -> Block:
    """Join row ranges [start, stop) of blocks with equal columns into one block.

    A single whole block comes back as it is, so that a received frame is handed on uncopied; everything else is one copy.
    """
    first, start, stop = pieces[0]
    if len(pieces) == 1 and start == 0 and stop == first.num_rows:
        return first
    layout = first.layout
    if layout.is_plain:
        return _gather_plain(layout, pieces)
    lengths: list[Lengths] = []
    packed: list[Any] = []
    framed: list[Stored] = []
    for i, column in enumerate(layout.columns):
        lengths.append([n for b, s, e in pieces for n in (b.lengths[i] or ())[s:e]] if column.is_ragged else None)
        if column.is_framed:
            framed += [b.frames[b.frame_index(i, row)] for b, s, e in pieces for row in range(s, e)]
        else:
            packed += [b.column(i, s, e) for b, s, e in pieces]
    frames: list[Stored] = framed
    if layout.has_packed:
        frames = [packed[0] if len(packed) == 1 else b"".join(packed), *framed]
    return Block(sum(e - s for _, s, e in pieces), layout, lengths, frames)


def _gather_plain(layout: Layout, pieces: Sequence[tuple[Block, int, int]]) -> Block:
    size = layout.item_bytes[0]
    parts = [view(b.frames[0])[s * size : e * size] for b, s, e in pieces]
    frame = parts[0] if len(parts) == 1 else b"".join(parts)
    return Block(sum(e - s for _, s, e in pieces), layout, layout.no_lengths, [frame])


def reshape(block: Block, index: int, is_ragged: bool) -> Block:
    """The same bytes with column `index` declared ragged (dimension 0 in the lengths) or fixed.

    Raises:
        LayoutError: the rows differ in dimension 0 and cannot be fixed, or have no dimension 0.
    """
    column, lengths = block.columns[index], block.lengths[index]
    if column.is_ragged == is_ragged:
        return block
    new_lengths: Lengths
    if is_ragged:
        if not column.shape:
            raise LayoutError(f"{column.name!r} needs at least one dimension")
        new = Column(column.name, column.dtype, column.shape[1:], True, column.is_framed)
        new_lengths = [column.shape[0]] * block.num_rows
    else:
        if lengths is None or len(set(lengths)) > 1:
            raise LayoutError(f"rows of {column.name!r} differ in shape")
        length = lengths[0] if lengths else 0
        new = Column(column.name, column.dtype, (length, *column.shape), False, column.is_framed)
        new_lengths = None
    columns = (*block.columns[:index], new, *block.columns[index + 1 :])
    return Block(
        block.num_rows, columns, (*block.lengths[:index], new_lengths, *block.lengths[index + 1 :]), block.frames
    )


def pack(columns: Iterable[tuple[Column, Lengths, Sequence[Stored]]], num_rows: int) -> Block:
    """Build a block from each column's rows (`num_rows` buffers; or one buffer with all rows of a packed column)."""
    descriptors, all_lengths, packed, framed = list[Column](), list[Lengths](), list[Any](), list[Stored]()
    for column, lengths, rows in columns:
        descriptors.append(column)
        all_lengths.append(lengths)
        (framed if column.is_framed else packed).extend(rows)
    frames: list[Stored] = framed
    if any(not c.is_framed for c in descriptors):
        frames = [packed[0] if len(packed) == 1 else b"".join(packed), *framed]
    return Block(num_rows, tuple(descriptors), all_lengths, frames)
