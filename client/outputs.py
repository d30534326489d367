"""From the bytes of an outcome to what users hold.

Results are numpy arrays, or CPU torch tensors if a tensor went in. numpy has no bfloat16: it comes back as float32, exactly.
Every result is writable memory of its own: rows under 64 KiB are copied out, larger ones own the frame they came in, which
a second `result()` of the same task shows again.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from penstock.broker.columns import Block, view
from penstock.broker.layout import BLOBS
from penstock.client.arrays import NUMPY_DTYPES, Array
from penstock.client.errors import from_wire
from penstock.client.run import Part, Run, same_part


def _widen(bits: Array) -> Array:
    """bfloat16 patterns as the float32 of equal value."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _bits_dtype(dtype: str) -> np.dtype[Any]:
    return np.dtype("<u2") if dtype == "bfloat16" else NUMPY_DTYPES[dtype]


def column_decoder(block: Block, index: int, is_torch: bool) -> Callable[[int], Any]:
    """Row number -> value, for one column."""
    column, lengths = block.columns[index], block.lengths[index]
    if column.dtype in BLOBS:
        if column.dtype == "str":
            return lambda row: str(block.row(index, row), "utf-8", "replace")
        return lambda row: bytes(block.row(index, row))
    dtype, bits = column.dtype, _bits_dtype(column.dtype)
    if lengths is None and not column.is_framed:
        whole = np.frombuffer(_packed(block, index), bits).reshape(block.num_rows, *column.shape)
        if not is_torch and dtype != "bfloat16" and column.shape:
            return lambda row: whole[row].copy()
        return lambda row: finish(whole[row, ...].copy(), dtype, is_torch)

    def decode(row: int) -> Any:
        shape = column.shape if lengths is None else (lengths[row], *column.shape)
        array = np.frombuffer(block.row(index, row), bits).reshape(shape)
        if not (column.is_framed and array.flags.writeable):
            array = array.copy()
        return finish(array, dtype, is_torch)

    return decode


def _packed(block: Block, index: int) -> Any:
    """The bytes of all rows of a packed column; the layout of a block with a single one need not be worked out."""
    return view(block.frames[0]) if block.layout.is_plain else block.column(index, 0, block.num_rows)


def _decoder(block: Block, is_torch: bool) -> Callable[[int], Any]:
    decoders = [(c.name, column_decoder(block, i, is_torch)) for i, c in enumerate(block.columns)]
    if len(decoders) == 1 and decoders[0][0] == "out":
        return decoders[0][1]
    return lambda row: {name: decode(row) for name, decode in decoders}


def decode(part: Part, row: int, is_torch: bool) -> Any:
    """The value of a run's row from a part that is not an error: the bare output if it is called "out", else a dict."""
    decoder = part.decoder
    if decoder is None:
        assert part.block is not None
        decoder = part.decoder = _decoder(part.block, is_torch)
    return decoder(part.base + row - part.start)


def decode_rows(part: Part, start: int, stop: int, is_torch: bool) -> Iterable[Any]:
    """The values of a run's rows [start, stop) from a part that is not an error."""
    block = part.block
    assert block is not None
    if not is_torch and len(block.columns) == 1:
        column = block.columns[0]
        if column.name == "out" and column.shape and column.dtype != "bfloat16":
            base = part.base - part.start
            rows = column_rows(block, 0, base + start, base + stop)
            if rows is not None:
                return map(np.ndarray.copy, rows)
    return (decode(part, row, is_torch) for row in range(start, stop))


def values_of(run: Run, return_exceptions: bool) -> Iterator[Any]:
    """The values of a closed run's rows, in order; an error is raised, or yielded."""
    row, slots, is_torch = 0, run.slots, run.shape.is_torch
    while row < run.num_rows:
        part, stop = slots[row], same_part(slots, row)
        assert part is not None
        if part.error is None:
            yield from decode_rows(part, row, stop, is_torch)
        elif return_exceptions:
            for _ in range(row, stop):
                yield from_wire(part.error)
        else:
            raise from_wire(part.error)
        row = stop


def column_rows(block: Block, index: int, start: int, stop: int) -> Array | None:
    """Rows of a packed tensor column of fixed shape as one array (bfloat16 as bits), uncopied; else None."""
    column = block.columns[index]
    if column.is_framed or column.is_ragged or column.dtype in BLOBS:
        return None
    bits = np.frombuffer(_packed(block, index), _bits_dtype(column.dtype))
    return bits.reshape(block.num_rows, *column.shape)[start:stop]


def finish(array: Array, dtype: str, is_torch: bool) -> Any:
    """An array of our own (bfloat16 as bits) as the user gets it."""
    if not is_torch:
        return _widen(array) if dtype == "bfloat16" else array
    torch = sys.modules["torch"]
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
