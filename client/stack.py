"""The results of `map_rows`, stacked again: the reverse of `rows.py`.

Knows numpy and blocks; does not know sessions or sockets.
"""

import sys
from typing import Any

import numpy as np

from penstock.broker.columns import Block
from penstock.broker.layout import Column
from penstock.client.arrays import Array, is_torch_tensor
from penstock.client.errors import from_wire
from penstock.client.outputs import column_decoder, column_rows, finish
from penstock.client.run import Part, Run, same_part


class Stack:
    """Puts the outputs of `num_rows` tasks together: per output an array `[num_rows, ...]`, or a list where shapes differ."""

    def __init__(self, num_rows: int, is_torch: bool) -> None:
        self._num_rows = num_rows
        self._is_torch = is_torch
        self._num_added = 0
        self._outputs: dict[str, list[Any] | None] = {}
        self._arrays: dict[str, tuple[Column, Array]] = {}

    def add(self, run: Run) -> None:
        """Take the outcomes of a closed run, whose rows come after those before.

        Raises:
            PenstockError: that of the first row that failed; its notes name the row.
        """
        row, slots, first = 0, run.slots, self._num_added
        self._num_added += run.num_rows
        while row < run.num_rows:
            part = slots[row]
            assert part is not None
            stop = same_part(slots, row)
            if part.error is not None:
                error = from_wire(part.error)
                error.add_note(f"row {first + row} of the array")
                raise error
            self._add_part(part, first + row, row, stop)
            row = stop

    def _add_part(self, part: Part, at: int, start: int, stop: int) -> None:
        block = part.block
        assert block is not None
        begin, end = part.base + start - part.start, part.base + stop - part.start
        for index, column in enumerate(block.columns):
            rows = column_rows(block, index, begin, end)
            if rows is None or not self._place(column, rows, at):
                self._append(block, index, at, range(begin, end))

    def _place(self, column: Column, rows: Array, at: int) -> bool:
        """Into the array of this output, if it still is one and fits."""
        if column.name not in self._arrays:
            if column.name in self._outputs:
                return False
            array = np.empty((self._num_rows, *column.shape), rows.dtype)
            self._arrays[column.name] = (column, array)
            self._outputs[column.name] = None
        known, array = self._arrays[column.name]
        if known.shape != column.shape or known.dtype != column.dtype:
            return False
        array[at : at + len(rows)] = rows
        return True

    def _append(self, block: Block, index: int, at: int, rows: range) -> None:
        """As single values: ragged, text, or of a shape that differs from the rows before."""
        column = block.columns[index]
        if self._outputs.get(column.name) is None:
            values: list[Any] = []
            if column.name in self._arrays:
                known, array = self._arrays.pop(column.name)
                values = [finish(array[i, ...].copy(), known.dtype, self._is_torch) for i in range(at)]
            self._outputs[column.name] = values
        output = self._outputs[column.name]
        assert output is not None
        decode = column_decoder(block, index, self._is_torch)
        output += [decode(row) for row in rows]

    def result(self) -> Any:
        """The bare output if it is called "out", else a dict; an empty list if there were no rows."""
        if not self._num_rows:
            return []
        made: dict[str, Any] = {}
        for name, values in self._outputs.items():
            if values is None:
                column, array = self._arrays[name]
                made[name] = finish(array, column.dtype, self._is_torch)
            else:
                made[name] = _stacked(values)
        return made["out"] if list(made) == ["out"] else made


def _stacked(values: list[Any]) -> Any:
    """Large rows come one by one: an array again if their shapes and dtypes are equal."""
    if not isinstance(values[0], np.ndarray):
        if is_torch_tensor(values[0]) and len({(v.shape, v.dtype) for v in values}) == 1:
            return sys.modules["torch"].stack(values)
        return values
    return np.stack(values) if len({(v.shape, v.dtype) for v in values}) == 1 else values
