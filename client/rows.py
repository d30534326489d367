"""Many tasks from one array: `map_rows` cuts its arguments into pieces that travel as runs; `stack.py` puts the results
together again.

Knows numpy and columns; does not know sessions or sockets.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from penstock.broker.layout import Column, Lengths
from penstock.client.arrays import Array, is_torch_tensor
from penstock.client.errors import InvalidInput
from penstock.client.inputs import Payload, Place, RowInput, TensorInput
from penstock.client.plan import Plan
from penstock.client.run import Row, Shape


class _ArraySource:
    """A payload input whose rows lie in one array: sliced, and copied only into shared memory."""

    def __init__(
        self, place: Place, column: Column, lengths: list[int] | None, array: Array, num_rows: int, row_bytes: int
    ) -> None:
        self.num_rows = num_rows
        self._place = place
        self._column, self._lengths, self._row_bytes = column, lengths, row_bytes
        self._data = array.reshape(-1).view(np.uint8)

    def column(self, row: int) -> Column:
        return self._column

    def row_bytes(self, row: int) -> int:
        return self._row_bytes

    def cut(self, start: int, stop: int) -> tuple[Lengths, Sequence[Any]]:
        size = self._row_bytes
        lengths = None if self._lengths is None else self._lengths[start:stop]
        if self._column.is_framed:
            rows = [self._data[i * size : (i + 1) * size] for i in range(start, stop)]
            return lengths, [self._place(row) or row.data for row in rows]
        return lengths, [self._data[start * size : stop * size].data]


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
        self._sources = [_source(declared, arguments[declared.name], plan.place) for declared in plan.payload]
        self.is_torch = any(is_torch_tensor(arguments[declared.name]) for declared in plan.payload)
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
        return self._plan.shape(self._columns(row), self._statics, tuple(self._scalars), self.is_torch)

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


def _source(declared: Payload, value: Any, place: Place) -> _Source:
    if isinstance(declared, TensorInput):
        many = declared.many(value)
        if many is not None:
            return _ArraySource(place, *many)
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
