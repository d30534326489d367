"""From a kernel's arguments to rows that travel.

Knows all inputs of one kernel together, and how arguments that look like the last ones take a short way; does not know
runs, sessions or sockets.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from penstock.broker.layout import Column
from penstock.client.arrays import WIRE_DTYPES, Array, is_torch_tensor
from penstock.client.errors import InvalidInput
from penstock.client.inputs import (
    KINDS,
    MAX_CACHED,
    BlobInput,
    Input,
    Place,
    RowInput,
    StaticInput,
    TensorInput,
    nowhere,
    pack_statics,
)
from penstock.client.run import Row, Shape

_NO_LENGTHS: Final = (None,)


class Plan:
    """How the arguments of one kernel become rows, compiled from the spec it offers. `place` is where large ones may go."""

    def __init__(self, kernel: str, spec: Mapping[str, Any], place: Place = nowhere) -> None:
        self.kernel = kernel
        self.place = place
        self.inputs: dict[str, Input] = {name: KINDS[kind](name, info, place) for name, kind, info in spec["inputs"]}
        self.can_stream = "stream" in spec.get("modes", ())
        self.payload = [i for i in self.inputs.values() if isinstance(i, TensorInput | BlobInput)]
        self.rows = [i for i in self.inputs.values() if isinstance(i, RowInput)]
        self.statics = [i for i in self.inputs.values() if isinstance(i, StaticInput)]
        self._required = {i.name for i in self.payload}
        self._required |= {i.name for i in self.rows if i.is_required}
        self._required |= {i.name for i in self.statics if i.is_required}
        self._shapes: dict[Any, Shape] = {}
        self._only = self.payload[0].name if len(self.payload) == 1 and self.payload[0].kind == "tensor" else None
        self._arrays: dict[Any, Shape] = {}
        self._last_array: tuple[Any, Any, Shape | None] = (None, None, None)
        self._last: tuple[Any, Shape | None] = (None, None)  # one attribute: threads share a plan

    def describe(self) -> str:
        """The arguments that the kernel takes, on one line."""
        given = (f"{i.name}{'' if i.name in self._required else '=...'} ({i.kind})" for i in self.inputs.values())
        return f"{self.kernel} takes {', '.join(given) or 'no arguments'}"

    def check_names(self, arguments: Mapping[str, Any]) -> None:
        """Raises InvalidInput for missing or unknown names."""
        unknown = [name for name in arguments if name not in self.inputs]
        missing = sorted(self._required - set(arguments))
        if unknown or missing:
            wrong = [f"unknown argument {', '.join(map(repr, unknown))}"] if unknown else []
            wrong += [f"missing argument {', '.join(map(repr, missing))}"] if missing else []
            raise InvalidInput(f"{'; '.join(wrong)}: {self.describe()}")

    def shape(self, columns: tuple[Column, ...], statics: bytes, scalars: tuple[str, ...], is_torch: bool) -> Shape:
        """The one `Shape` object of this combination."""
        key = (columns, statics, scalars, is_torch)
        last_key, shape = self._last
        if shape is not None and key == last_key:
            return shape
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= MAX_CACHED:
                self._shapes.clear()
            shape = self._shapes.setdefault(key, Shape(self.kernel, columns, statics, scalars, is_torch))
        self._last = (key, shape)
        return shape

    def row(self, arguments: Mapping[str, Any]) -> Row:
        """One task's inputs.

        Raises:
            InvalidInput: names, types, dtypes or bounds that the kernel did not declare.
        """
        if self._only is not None and len(arguments) == 1:
            value = arguments.get(self._only)
            if type(value) is np.ndarray:
                dtype, array_shape, shape = self._last_array
                if value.dtype is not dtype or value.shape != array_shape:
                    shape = self._arrays.get((value.dtype, value.shape))
                    if shape is not None:
                        self._last_array = (value.dtype, value.shape, shape)
                if shape is not None:
                    lengths = ((value.shape[0],),) if shape.columns[0].is_ragged else _NO_LENGTHS
                    data = value.tobytes()
                    return Row(shape, ((data,),), lengths, (), len(data))
        row = self._row(arguments)
        if self._only is not None and len(arguments) == 1 and isinstance(value := arguments[self._only], np.ndarray):
            self._remember(value, row.shape)
        return row

    def _remember(self, value: Array, shape: Shape) -> None:
        """The next array of this dtype and shape, given to the only argument, takes a short way, unless it is large."""
        if value.dtype in WIRE_DTYPES and type(value) is np.ndarray and not shape.columns[0].is_framed:
            if len(self._arrays) >= MAX_CACHED:
                self._arrays.clear()
            self._arrays[value.dtype, value.shape] = shape

    def _row(self, arguments: Mapping[str, Any]) -> Row:
        if not (arguments.keys() <= self.inputs.keys() and self._required <= arguments.keys()):
            self.check_names(arguments)
        columns, buffers, lengths, nbytes, is_torch = [], [], [], 0, False
        for declared in self.payload:
            value = arguments[declared.name]
            column, length, data, size = declared.one(value)
            if type(value) is not np.ndarray and is_torch_tensor(value):
                is_torch = True
            columns.append(column)
            buffers.append((data,))
            lengths.append((length,) if column.is_ragged else None)
            nbytes += size
        names: tuple[str, ...] = ()
        values, statics = list[tuple[float]](), b""
        if len(columns) != len(arguments):
            given = [i for i in self.rows if i.name in arguments]
            names = tuple(i.name for i in given)
            values = [(i.one(arguments[i.name]),) for i in given]
            statics = self.pack_statics(arguments)
        return Row(self.shape(tuple(columns), statics, names, is_torch), buffers, lengths, values, nbytes)

    def pack_statics(self, arguments: Mapping[str, Any]) -> bytes:
        return pack_statics({i.name: i.one(arguments[i.name]) for i in self.statics if i.name in arguments})
