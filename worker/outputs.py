"""From what a kernel returned to one block of rows, checked.

Knows tensors, texts and layouts; does not know which task a row belongs to. A batched tensor leaves as the one buffer
that it is, never row by row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from penstock.broker.columns import Block, pack
from penstock.broker.layout import FRAMED_ROW_BYTES, MAX_COLUMNS, MAX_NAME, MAX_RANK, Column, Layout, Lengths
from penstock.worker.inputs import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_LAYOUTS = 1024
# Of single dense outputs seen before, which leave unchecked but for their number of rows.
_LAYOUTS: dict[tuple[str, torch.dtype, torch.Size], Layout] = {}

Packed = tuple[Column, Lengths, Sequence[Any]]


class BadOutput(Exception):
    """A kernel returned something that is no answer to its batch; the message names the kernel and the output."""


def fetch(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs with all tensors on the CPU; on a device this is where its work has ended and is copied back."""
    return {name: _to_cpu(value) for name, value in outputs.items()}


def to_block(kernel: str, outputs: Mapping[str, Any], num_rows: int) -> Block:
    """The outputs of a batch (`Kernel.run`) as a block with `num_rows` rows. Raises BadOutput."""
    if not 0 < len(outputs) <= MAX_COLUMNS:
        raise BadOutput(f"kernel {kernel!r} returned {len(outputs)} outputs; 1 to {MAX_COLUMNS} are possible")
    if len(outputs) == 1:
        [(name, value)] = outputs.items()
        layout = _LAYOUTS.get((name, value.dtype, value.shape[1:])) if type(value) is torch.Tensor else None
        if layout is not None and len(value) == num_rows and value.is_contiguous() and not value.is_neg():
            return Block(num_rows, layout, layout.no_lengths, [value.numpy().data.cast("B")])
    return pack([_column(kernel, name, value, num_rows) for name, value in outputs.items()], num_rows)


def to_row(kernel: str, values: Mapping[str, Any]) -> Block:
    """One task's values (arrays, numbers, str, bytes; no batch dimension) as a block with one row. Raises BadOutput."""
    batched: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, str | bytes):
            batched[name] = [value]
            continue
        try:
            batched[name] = torch.as_tensor(value).unsqueeze(0)
        except (TypeError, ValueError, RuntimeError) as e:
            raise BadOutput(f"kernel {kernel!r}: output {name!r} is a {type(value).__name__}, no array or text") from e
    return to_block(kernel, fetch(batched), 1)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if value and isinstance(value[0], torch.Tensor) and value[0].device.type != "cpu":
        return [tensor.cpu() for tensor in value]
    return value


def _column(kernel: str, name: str, value: Any, num_rows: int) -> Packed:
    label = f"kernel {kernel!r}: output {name!r}"
    if not 0 < len(name) <= MAX_NAME:
        raise BadOutput(f"{label}: the name must have 1 to {MAX_NAME} characters")
    if len(value) != num_rows:
        raise BadOutput(f"{label} has {len(value)} rows for a batch of {num_rows}")
    if isinstance(value, torch.Tensor):
        return _dense(label, name, value)
    if isinstance(value[0], torch.Tensor):
        return _ragged(label, name, value)
    return _blobs(label, name, value)


def _buffer(label: str, tensor: torch.Tensor) -> tuple[str, memoryview]:
    """(dtype name, all bytes in C order)."""
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        raise BadOutput(f"{label} is {str(tensor.dtype).removeprefix('torch.')}; possible are {', '.join(DTYPES)}")
    if tensor.layout is not torch.strided:
        raise BadOutput(f"{label} is a sparse tensor; only dense ones are possible")
    if tensor.dtype is not torch.bfloat16 and tensor.numel():
        return dtype, tensor.resolve_neg().contiguous().numpy().data.cast("B")
    flat = tensor.resolve_neg().reshape(-1)
    # numpy has no bfloat16, and cannot cast an empty array.
    return dtype, flat.view(torch.uint8).numpy().data


def _dense(label: str, name: str, tensor: torch.Tensor) -> Packed:
    """A tensor [batch, ...] as a column of rows of equal shape."""
    shape = tuple(tensor.shape[1:])
    if len(shape) > MAX_RANK:
        raise BadOutput(f"{label} has {len(shape)} dimensions per row; at most {MAX_RANK} are possible")
    dtype, data = _buffer(label, tensor)
    row_bytes = data.nbytes // len(tensor)
    if row_bytes < FRAMED_ROW_BYTES:
        column = Column(name, dtype, shape)
        if tensor.dtype is not torch.bfloat16 and row_bytes:
            _remember((name, tensor.dtype, tensor.shape[1:]), column)
        return column, None, (data,)
    rows = [data[i : i + row_bytes] for i in range(0, data.nbytes, row_bytes)]
    return Column(name, dtype, shape, is_framed=True), None, rows


def _remember(seen: tuple[str, torch.dtype, torch.Size], column: Column) -> None:
    if len(_LAYOUTS) >= MAX_LAYOUTS:
        _LAYOUTS.clear()
    _LAYOUTS[seen] = Layout.of((column,))


def _ragged(label: str, name: str, tensors: list[torch.Tensor]) -> Packed:
    """A list of tensors that differ in dimension 0 only, as a ragged column; as a plain one if they do not differ."""
    first = tensors[0]
    if any(t.ndim != first.ndim or t.shape[1:] != first.shape[1:] for t in tensors):
        raise BadOutput(f"{label}: the rows differ in more than dimension 0")
    if len({t.dtype for t in tensors}) > 1:
        raise BadOutput(f"{label}: the rows differ in dtype")
    if first.ndim == 0 or len({t.shape[0] for t in tensors}) == 1:
        return _dense(label, name, torch.stack(tensors))
    rest, lengths = tuple(first.shape[1:]), [t.shape[0] for t in tensors]
    if len(rest) > MAX_RANK:
        raise BadOutput(f"{label} has {len(rest) + 1} dimensions per row; at most {MAX_RANK + 1} are possible")
    dtype, data = _buffer(label, torch.cat(tensors))
    step = data.nbytes // max(sum(lengths), 1)
    if max(lengths) * step < FRAMED_ROW_BYTES:
        return Column(name, dtype, rest, True), lengths, (data,)
    rows, start = [], 0
    for length in lengths:
        rows.append(data[start : start + length * step])
        start += length * step
    return Column(name, dtype, rest, True, True), lengths, rows


def _blobs(label: str, name: str, values: list[Any]) -> Packed:
    """A list of texts or byte strings as a ragged column of bytes."""
    kinds = {type(value) for value in values}
    if kinds == {str}:
        try:
            rows = [value.encode() for value in values]
        except UnicodeEncodeError as e:
            raise BadOutput(f"{label}: a text cannot be written as UTF-8: {e}") from e
        dtype = "str"
    elif kinds == {bytes}:
        rows, dtype = values, "bytes"
    else:
        raise BadOutput(f"{label} must be a tensor, or a list of tensors, str or bytes of one kind")
    lengths = [len(row) for row in rows]
    if max(lengths) >= FRAMED_ROW_BYTES:
        return Column(name, dtype, (), True, True), lengths, rows
    return Column(name, dtype, (), True), lengths, (b"".join(rows),)
