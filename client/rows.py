"""Many tasks from one array: `map_rows` splits its arguments into runs and stacks their results again.

Knows numpy and blocks; does not know sessions or sockets.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from penstock.broker.columns import Block, Column, Lengths
from penstock.client.arrays import Array, is_torch_tensor
from penstock.client.convert import Plan, RowInput, TensorInput
from penstock.client.errors import InvalidInput, PenstockError, from_wire
from penstock.client.outputs import column_decoder, column_rows, finish
from penstock.client.run import Part, Row, Run, Shape, same_part


class _ArraySource:
    """A payload input whose rows lie in one array: sliced, never copied."""

    def __init__(self, column: Column, lengths: list[int] | None, array: Array, num_rows: int, row_bytes: int) -> None:
        self.num_rows = num_rows
        self._column, self._lengths, self._row_bytes = column, lengths, row_bytes
        self._data = array.reshape(-1).view(np.uint8).data

    def column(self, row: int) -> Column:
        return self._column

    def row_bytes(self, row: int) -> int:
        return self._row_bytes

    def cut(self, start: int, stop: int) -> tuple[Lengths, Sequence[Any]]:
        size = self._row_bytes
        lengths = None if self._lengths is None else self._lengths[start:stop]
        if self._column.is_framed:
            return lengths, [self._data[i * size : (i + 1) * size] for i in range(start, stop)]
        return lengths, [self._data[start * size : stop * size]]


class _ListSource:
    """A payload input given as a list with one value per task."""

    def __init__(self, converted: list[tuple[Column, int, Any, int]]) -> None:
        self.num_rows = len(converted)
        self._converted = converted

    def column(self, row: int) -> Column:
        return self._converted[row][0]

    def row_bytes(self, row: int) -> int:
        return self._converted[row][3]

    def cut(self, start: int, stop: int) -> tuple[Lengths, Sequence[Any]]:
        rows = self._converted[start:stop]
        return [r[1] for r in rows] if rows[0][0].is_ragged else None, [r[2] for r in rows]


_Source = _ArraySource | _ListSource


class RowsInput:
    """The arguments of one `map_rows`, converted: `num_rows` tasks that `cut` hands out in pieces for runs.

    Raises:
        InvalidInput: arguments that do not fit the kernel, or differ in their number of rows.
    """

    def __init__(self, plan: Plan, arguments: Mapping[str, Any]) -> None:
        plan.check_names(arguments)
        self._plan = plan
        self._sources = [_source(declared, arguments[declared.name]) for declared in plan.payload]
        self._is_torch = any(is_torch_tensor(arguments[declared.name]) for declared in plan.payload)
        counts = {d.name: s.num_rows for d, s in zip(plan.payload, self._sources, strict=True)}
        given = [declared for declared in plan.rows if declared.name in arguments]
        columns = {d.name: _numbers(d, arguments[d.name]) for d in given}
        counts.update({name: len(values) for name, values in columns.items() if isinstance(values, list)})
        if len(set(counts.values())) != 1:
            found = ", ".join(f"{name!r} has {n}" for name, n in counts.items()) or "no argument has rows"
            raise InvalidInput(f"map_rows wants the same number of rows in every argument: {found}")
        self.num_rows = next(iter(counts.values()))
        self._scalars = {n: v if isinstance(v, list) else [v] * self.num_rows for n, v in columns.items()}
        self._statics = plan.pack_statics(arguments)

    def cut(self, max_rows: int, max_bytes: int) -> Iterator[Row]:
        """The rows in order, as pieces that may each be a run."""
        start = 0
        while start < self.num_rows:
            shape = self._shape(start)
            stop, nbytes = self._stop(start, min(max_rows, shape.max_rows), max_bytes)
            cuts = [source.cut(start, stop) for source in self._sources]
            scalars = [values[start:stop] for values in self._scalars.values()]
            yield Row(shape, [b for _, b in cuts], [n for n, _ in cuts], scalars, nbytes, stop - start)
            start = stop

    def _columns(self, row: int) -> tuple[Column, ...]:
        return tuple(source.column(row) for source in self._sources)

    def _shape(self, row: int) -> Shape:
        return self._plan.shape(self._columns(row), self._statics, tuple(self._scalars), self._is_torch)

    def _stop(self, start: int, max_rows: int, max_bytes: int) -> tuple[int, int]:
        """Where the piece from `start` on ends, and its bytes: equal columns, within the bounds, at least one row."""
        if all(isinstance(source, _ArraySource) for source in self._sources):
            size = sum(source.row_bytes(start) for source in self._sources)
            stop = min(self.num_rows, start + max(1, min(max_rows, max_bytes // size if size else max_rows)))
            return stop, size * (stop - start)
        columns, stop, nbytes = self._columns(start), start, 0
        while stop < min(self.num_rows, start + max_rows):
            size = sum(source.row_bytes(stop) for source in self._sources)
            if stop > start and (nbytes + size > max_bytes or self._columns(stop) != columns):
                break
            stop, nbytes = stop + 1, nbytes + size
        return stop, nbytes


def _source(declared: Any, value: Any) -> _Source:
    if isinstance(declared, TensorInput):
        many = declared.many(value)
        if many is not None:
            return _ArraySource(*many)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise InvalidInput(f"{declared.name!r}: map_rows wants an array or a list with one value per task")
    return _ListSource([declared.one(v) for v in value])


def _numbers(declared: RowInput, value: Any) -> list[float] | float:
    """A number for all rows, or a list with one per row."""
    if is_torch_tensor(value):
        value = value.tolist()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [declared.one(v) for v in value]
    return declared.one(value)


class Stack:
    """Puts the outputs of `num_rows` tasks together: per output an array `[num_rows, ...]`, or a list where shapes differ."""

    def __init__(self, num_rows: int, is_torch: bool) -> None:
        self._num_rows = num_rows
        self._is_torch = is_torch
        self._outputs: dict[str, list[Any] | None] = {}
        self._arrays: dict[str, tuple[Column, Array]] = {}

    def add(self, run: Run, first: int) -> None:
        """Take the outcomes of a closed run whose first row is number `first`.

        Raises:
            PenstockError: that of the first row that failed; its notes name the row.
        """
        row, slots = 0, run.slots
        while row < run.num_rows:
            part = slots[row]
            assert part is not None
            stop = same_part(slots, row)
            if part.error is not None:
                raise noted(from_wire(part.error), first + row)
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


def noted(error: PenstockError, row: int) -> PenstockError:
    error.add_note(f"row {row} of the array")
    return error
