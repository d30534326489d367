"""Between the text on a command line and what the SDK takes and gives.

Knows how `name=value` becomes an argument of the kind that a kernel declares, and how results look on a terminal or as
JSON. Does not know clients or brokers.
"""

import json
import sys
import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np

NPY_MAGIC: Final = b"\x93NUMPY"
MAX_SHOWN: Final = 24
"""An array of more elements is shown by its ends."""
MAX_TEXT: Final = 500


class ValueProblem(ValueError):
    """An argument that cannot be read; the text says what would do."""


def split(argument: str) -> tuple[str, str]:
    """`name=value` in two. Raises ValueProblem."""
    name, is_given, value = argument.partition("=")
    if not (is_given and name.isidentifier()):
        raise ValueProblem(f"{argument!r} is no name=value, such as x=[1,2,3] or x=@data.npy")
    return name, value


def parse(arguments: Sequence[str], spec: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one call, as the kernel's `spec` (its form on the wire) wants them. Raises ValueProblem."""
    declared = {name: (kind, info) for name, kind, info in spec["inputs"]}
    values: dict[str, Any] = {}
    for argument in arguments:
        name, text = split(argument)
        if name in values:
            raise ValueProblem(f"{name!r} is given twice")
        kind, info = declared.get(name, ("static", {}))  # an unknown name is the SDK's to refuse, with what there is
        values[name] = _read(name, text, f"{kind}:{info['kind']}" if kind == "blob" else kind)
    return values


def _read(name: str, text: str, kind: str) -> Any:
    data = _from_source(name, text[1:]) if text.startswith("@") else None
    if kind == "blob:bytes":
        return text.encode() if data is None else data
    if data is not None and data.startswith(NPY_MAGIC):
        return _from_npy(name, data)
    if data is not None:
        text = _decoded(name, data)
    if kind == "blob:text":
        return text
    try:
        return json.loads(text)
    except ValueError as e:
        if kind == "static" and data is None:
            return text
        what = "no numpy or JSON data" if data is not None else f"no JSON value: {text[:40]!r}"
        raise ValueProblem(f"{name!r} is {what} (a number, a list such as [1,2,3], or @file.npy)") from e


def _from_source(name: str, path: str) -> bytes:
    """The bytes of `@file`, or of standard input for `@-`."""
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise ValueProblem(f"{name!r}: {path} cannot be read: {e.strerror}") from e


def _from_npy(name: str, data: bytes) -> Any:
    try:
        return np.load(BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise ValueProblem(f"{name!r} is no readable .npy data: {e}") from e


def _decoded(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise ValueProblem(f"{name!r} is neither .npy data nor UTF-8 text") from e


# --- results -------------------------------------------------------------------------------------------------------


def show(value: Any) -> str:
    """A result for people: one line per output, arrays with dtype, shape and their ends."""
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {_show_one(one)}" for name, one in value.items())
    return _show_one(value)


def _show_one(value: Any) -> str:
    if isinstance(value, np.ndarray):
        if value.ndim == 0:
            return str(value.item())
        text = np.array2string(value, threshold=MAX_SHOWN, precision=5, suppress_small=True, max_line_width=110)
        return f"{value.dtype.name} {list(value.shape)}{' ' if value.ndim == 1 else chr(10)}{text}"
    if isinstance(value, list):
        return "[" + ", ".join(_show_one(one) for one in value) + "]"
    if isinstance(value, bytes):
        return f"{len(value)} bytes {value[:64].hex(' ')}{' ...' if len(value) > 64 else ''}"
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text)} characters)"


def to_json(value: Any) -> Any:
    """A result as JSON has it: arrays as lists, bytes as hexadecimal digits, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {name: to_json(one) for name, one in value.items()}
    if isinstance(value, np.ndarray):
        return _finite(value.tolist()) if value.dtype.kind == "f" else value.tolist()
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    return value.hex() if isinstance(value, bytes) else _finite(value)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value


def save(path: Path, rows: Sequence[Any]) -> None:
    """Results of one kernel as the arrays of an .npz file, by output: of one row as it is; of several stacked, or, where
    they differ in shape, each as `<output>.<row>`. Raises OSError."""
    arrays: dict[str, Any] = {}
    for name in _names(rows[0]):
        values = [_array(row[name] if isinstance(row, Mapping) else row) for row in rows]
        if len(values) == 1:
            arrays[name] = values[0]
        elif len({(value.dtype.kind, value.shape) for value in values}) == 1:
            arrays[name] = np.stack(values)
        else:
            arrays |= {f"{name}.{i}": value for i, value in enumerate(values)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _names(value: Any) -> list[str]:
    return list(value) if isinstance(value, Mapping) else ["out"]


def _array(value: Any) -> Any:
    """Text as numpy's, bytes as uint8."""
    return np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.asarray(value)


def show_timings(timings: Mapping[str, Any]) -> str:
    """One line: where the time of a task went."""
    parts = [f"{name.removesuffix('_ms')} {ms:.2f}" for name, ms in timings.items() if name.endswith("_ms")]
    return f"ms: {', '.join(parts)}; batch of {timings.get('batch_size', '?')} on {timings.get('worker', '?')}"
