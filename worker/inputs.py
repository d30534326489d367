"""From a batch's blocks, row scalars and statics to what a kernel is called with.

Knows layouts and a kernel's spec; does not know devices, leases or messages. Tensors share the memory of the received
frame wherever they can: a kernel is a pure function and does not write to its inputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from penstock.broker.columns import Block, Stored, gather, view
from penstock.broker.packed import PackedError, unpack
from penstock.kernels import Blob, InvalidInput, Kernel, KernelSpec, Row, Static, Tensor
from penstock.kernels.inputs import StaticValue, as_static
from penstock.worker import pinned

DTYPES = {
    "bool": torch.bool, "uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32,
    "int64": torch.int64, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32,
    "float64": torch.float64,
}  # fmt: skip
MAX_CACHED_STATICS = 256
LARGE_BYTES = 1 << 20
_VIEWED = frozenset(DTYPES) - {"bool"}  # any byte may come for a bool, and has to become 0 or 1

Inputs = dict[str, Any]
Scalars = Mapping[str, Any]


def take_rows(blocks: Sequence[Block], scalars: Scalars, start: int, stop: int) -> tuple[list[Block], dict[str, Any]]:
    """Rows [start, stop) of a batch, as blocks over the same frames, and their scalars."""
    taken, base = list[Block](), 0
    for block in blocks:
        first, last = max(start - base, 0), min(stop - base, block.num_rows)
        if first < last:
            taken.append(gather([(block, first, last)]))
        base += block.num_rows
    return taken, {k: v[start:stop] if isinstance(v, list) else v for k, v in scalars.items()}


class Plan:
    """How the batches of one kernel are assembled; derived once from its spec."""

    def __init__(self, kernel: Kernel, device: torch.device) -> None:
        spec: KernelSpec = kernel.spec
        self.kernel = kernel
        self._device = device
        self.name = spec.name
        self.digest = spec.to_wire()["digest"]
        self.is_idempotent = spec.idempotent
        self._tensors = [(name, kind) for name, kind in spec.inputs if isinstance(kind, Tensor)]
        self._blobs = [(name, kind) for name, kind in spec.inputs if isinstance(kind, Blob)]
        self._rows = [(name, kind) for name, kind in spec.inputs if isinstance(kind, Row)]
        self._statics = {name: kind for name, kind in spec.inputs if isinstance(kind, Static)}
        self._padded = [name for name, tensor in self._tensors if tensor.ragged == "pad"]
        self.is_padded = bool(self._padded)
        # One tensor of equal shapes and nothing else: the case that is worth a short cut.
        self._is_plain = not self._blobs and not self._rows and [t.ragged for _, t in self._tensors] == ["exact"]
        # The one dtype that Apple's devices do not have is the one that row scalars are promised in.
        self._row_dtype = torch.float32 if device.type == "mps" else torch.float64
        self._cache: dict[bytes, dict[str, StaticValue]] = {}

    def statics(self, packed: bytes) -> dict[str, StaticValue]:
        """The statics of a batch over their defaults. Raises InvalidInput."""
        known = self._cache.get(packed)
        if known is None:
            known = self._parse_statics(packed)
            if len(self._cache) >= MAX_CACHED_STATICS:
                self._cache.clear()
            self._cache[packed] = known
        return known

    def _parse_statics(self, packed: bytes) -> dict[str, StaticValue]:
        try:
            given = unpack(packed) if packed else {}
        except PackedError as e:
            raise InvalidInput(f"{self.name}: the statics are not msgpack") from e
        if not isinstance(given, dict):
            raise InvalidInput(f"{self.name}: the statics are not a map")
        if unknown := sorted(repr(k) for k in given if k not in self._statics):
            known = ", ".join(name for name, _ in self.kernel.spec.inputs)
            raise InvalidInput(f"{self.name} has no input {', '.join(unknown)}; its inputs are {known}")
        values = {name: kind.default for name, kind in self._statics.items()}
        for name, kind in self._statics.items():
            if name in given:
                try:
                    values[name] = as_static(given[name])
                except TypeError as e:
                    raise InvalidInput(f"{self.name}: {name}: {e}") from e
            elif kind.required:
                raise InvalidInput(f"{self.name}: the input {name!r} is missing")
        return values

    def batch(self, blocks: Sequence[Block], scalars: Scalars) -> Inputs:
        """The batched inputs on the CPU, all but the statics; tensors that lie in pinned shared memory are copied to the device
        at once. Raises InvalidInput."""
        if self._is_plain and len(blocks) == 1 and blocks[0].layout.is_plain:
            block, column = blocks[0], blocks[0].columns[0]
            buffer = view(block.frames[0])
            if column.name == self._tensors[0][0] and column.dtype in _VIEWED and len(buffer) and not buffer.readonly:
                flat = torch.frombuffer(buffer, dtype=DTYPES[column.dtype])
                if not flat.data_ptr() % flat.itemsize:
                    return {column.name: flat.view(block.num_rows, *column.shape)}
        num_rows = blocks[0].num_rows if len(blocks) == 1 else sum(b.num_rows for b in blocks)
        inputs: Inputs = {}
        for name, tensor in self._tensors:
            pieces = self._pieces(blocks, name)
            if tensor.ragged == "exact":
                inputs[name] = _stack(self.name, name, pieces, num_rows, self._device)
            elif tensor.ragged == "pad":
                inputs[name], inputs[f"{name}_lengths"] = _pad(self.name, name, pieces, tensor.pad_value, self._device)
            else:
                inputs[name], inputs[f"{name}_offsets"] = _pack(self.name, name, pieces, self._device)
        for name, blob in self._blobs:
            inputs[name] = _blobs(self.name, name, self._pieces(blocks, name), blob.kind)
        for name, row in self._rows:
            values = _scalars(self.name, name, row, scalars, num_rows)
            inputs[name] = torch.tensor(values, dtype=self._row_dtype)
        return inputs

    def padding_ratio(self, batched: Inputs) -> float:
        """Padded elements / real elements - 1 over the ragged inputs of `batch`; 0 if there is no element at all."""
        num_padded = num_real = 0
        for name in self._padded:
            x, lengths = batched[name], batched[f"{name}_lengths"]
            num_padded += x.numel()
            num_real += int(lengths.sum()) * (x[0, 0].numel() if x.numel() else 0)
        return num_padded / num_real - 1.0 if num_real else 0.0

    def single(self, blocks: Sequence[Block], scalars: Scalars) -> Inputs:
        """The inputs of one task without batch dimension: tensors, str or bytes, floats. Raises InvalidInput."""
        inputs = self.batch(blocks, scalars)
        for name, tensor in self._tensors:
            if tensor.ragged == "pack":
                del inputs[f"{name}_offsets"]
            else:
                inputs[name] = inputs[name][0]
                inputs.pop(f"{name}_lengths", None)
        for name, _ in self._blobs:
            inputs[name] = inputs[name][0]
        for name, _ in self._rows:
            inputs[name] = float(inputs[name][0])
        return inputs

    def _pieces(self, blocks: Sequence[Block], name: str) -> list[tuple[Block, int]]:
        """(block, index of the column) for every block."""
        pieces = []
        for block in blocks:
            for index, column in enumerate(block.columns):
                if column.name == name:
                    pieces.append((block, index))
                    break
            else:
                raise InvalidInput(f"{self.name}: the input {name!r} is missing")
        return pieces


Pieces = list[tuple[Block, int]]


def _views(pieces: Pieces) -> list[Any]:
    """The bytes of a column's rows, in order."""
    views = []
    for block, index in pieces:
        if block.layout.is_plain:
            views.append(view(block.frames[0]))
        elif block.columns[index].is_framed:
            views += [block.row(index, row) for row in range(block.num_rows)]
        else:
            views.append(block.column(index, 0, block.num_rows))
    return views


def _frames(pieces: Pieces) -> list[Stored]:
    """Those of a framed column's rows, in order; none if a block has them packed."""
    if not all(block.columns[index].is_framed for block, index in pieces):
        return []
    return [b.frames[b.frame_index(i, row)] for b, i in pieces for row in range(b.num_rows)]


def _flat(kernel: str, name: str, pieces: Pieces, device: torch.device) -> torch.Tensor:
    """All elements of a column, one after another; over the received bytes if they are in one place and aligned."""
    block, index = pieces[0]
    dtype_name = block.columns[index].dtype
    if len(pieces) > 1 and len({b.columns[i].dtype for b, i in pieces}) > 1:
        raise InvalidInput(f"{kernel}: the rows of {name!r} differ in dtype")
    dtype = DTYPES.get(dtype_name)
    if dtype is None:
        raise InvalidInput(f"{kernel}: {name!r} must be an array, not {dtype_name}")
    if device.type == "cuda" and (frames := _frames(pieces)) and pinned.are_pinned(frames):
        on_device = pinned.gather(frames, device)
        return on_device.ne(0) if dtype is torch.bool else on_device.view(dtype)
    views = _views(pieces)
    buffer = views[0] if len(views) == 1 and not views[0].readonly else _join(views)
    if not len(buffer):
        return torch.empty(0, dtype=dtype)
    if dtype is torch.bool:
        return torch.frombuffer(buffer, dtype=torch.uint8).ne(0)  # any byte may come; a bool is 0 or 1
    flat = torch.frombuffer(buffer, dtype=dtype)
    return flat.clone() if flat.data_ptr() % dtype.itemsize else flat


def _join(views: list[Any]) -> Any:
    """All bytes in one place of our own: whatever lies in shared memory may change, and is looked at no more after this."""
    num_bytes = sum(map(len, views))
    if num_bytes < LARGE_BYTES:
        return bytearray().join(views)
    whole = np.empty(num_bytes, np.uint8)  # in large pages, and copied without the interpreter's lock
    start = 0
    for data in views:
        whole[start : start + len(data)] = np.frombuffer(data, np.uint8)
        start += len(data)
    return whole.data


def _stack(kernel: str, name: str, pieces: Pieces, num_rows: int, device: torch.device) -> torch.Tensor:
    """[batch, ...] of rows that are equal in shape."""
    if len(pieces) == 1 and pieces[0][0].lengths[pieces[0][1]] is None:
        return _flat(kernel, name, pieces, device).view(num_rows, *pieces[0][0].columns[pieces[0][1]].shape)
    shapes = set()
    for block, index in pieces:
        shape, lengths = block.columns[index].shape, block.lengths[index]
        shapes |= {shape} if lengths is None else {(n, *shape) for n in set(lengths)}
    if len(shapes) != 1:
        raise InvalidInput(f"{kernel}: the rows of {name!r} differ in shape within a batch")
    return _flat(kernel, name, pieces, device).view(num_rows, *shapes.pop())


def _ragged(kernel: str, name: str, pieces: Pieces, device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """All steps of dimension 0 one after another, `[total, ...]`, and how many each row has."""
    lengths, rests = list[int](), set()
    for block, index in pieces:
        shape, given = block.columns[index].shape, block.lengths[index]
        if given is None and not shape:
            raise InvalidInput(f"{kernel}: {name!r} needs at least one dimension")
        lengths += [shape[0]] * block.num_rows if given is None else given
        rests.add(shape[1:] if given is None else shape)
    if len(rests) != 1:
        raise InvalidInput(f"{kernel}: the rows of {name!r} differ in more than dimension 0")
    return _flat(kernel, name, pieces, device).view(sum(lengths), *rests.pop()), lengths


def _pad(
    kernel: str, name: str, pieces: Pieces, pad_value: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, longest, ...] and the lengths, int64 [batch]."""
    flat, lengths = _ragged(kernel, name, pieces, device)
    if len(set(lengths)) == 1:
        padded = flat.view(len(lengths), lengths[0], *flat.shape[1:])
    else:
        padded = pad_sequence(list(torch.split(flat, lengths)), batch_first=True, padding_value=pad_value)
    return padded, torch.tensor(lengths)


def _pack(kernel: str, name: str, pieces: Pieces, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[total, ...] and the rows' bounds, int64 [batch + 1]."""
    flat, lengths = _ragged(kernel, name, pieces, device)
    return flat, torch.tensor([0, *lengths]).cumsum(0)


def _blobs(kernel: str, name: str, pieces: Pieces, kind: str) -> list[str] | list[bytes]:
    wanted = "str" if kind == "text" else "bytes"
    if any(block.columns[index].dtype != wanted for block, index in pieces):
        raise InvalidInput(f"{kernel}: {name!r} must be {kind}")
    rows = [bytes(block.row(index, row)) for block, index in pieces for row in range(block.num_rows)]
    if kind == "bytes":
        return rows
    try:
        return [row.decode() for row in rows]
    except UnicodeDecodeError as e:
        raise InvalidInput(f"{kernel}: a text of {name!r} is not UTF-8: {e}") from e


def _scalars(kernel: str, name: str, kind: Row, scalars: Scalars, num_rows: int) -> list[float]:
    value = scalars.get(name, kind.default)
    if value is None:
        raise InvalidInput(f"{kernel}: the input {name!r} is missing")
    values = value if isinstance(value, list) else [value] * num_rows
    if len(values) != num_rows:
        raise InvalidInput(f"{kernel}: {name!r} has {len(values)} values for {num_rows} rows")
    low = -float("inf") if kind.minimum is None else kind.minimum
    high = float("inf") if kind.maximum is None else kind.maximum
    if not all(low <= v <= high for v in values):  # not a number is refused too
        raise InvalidInput(f"{kernel}: {name!r} must be a number from {low:g} to {high:g}")
    return values
