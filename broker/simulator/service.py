"""How long tasks take alone: a distribution by formula, or a trace of measured times.

Knows shapes and files. Does not know units (a number is in the unit of the whole simulation), clients or batches.
"""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]
_Draw = Callable[[np.random.Generator, int], Times]
MAX_TRACE: Final = 10_000_000

FORMS: Final = """\
uniform:a:b          from a to b, all equally likely
exponential:mean     most of it short, a long tail
lognormal:mu:sigma   exp of a normal with this mean and deviation
bimodal:p:a:b        a for a share p of the tasks, b for the others
trace:FILE[:COLUMN]  measured times in their order, from the start again at the end: a number per line, a CSV column,
                     or JSON (numbers, or objects with a COLUMN)"""


class ServiceError(ValueError):
    """A `--service` that says nothing usable; the text says what it should be."""


@dataclass(frozen=True, slots=True)
class Service:
    """Times of single tasks. `text` is how it was asked for; `trace` is set if they are measured ones."""

    text: str
    _draw: _Draw | None = None
    trace: Times | None = None

    def draw(self, random: np.random.Generator, num: int, num_before: int = 0) -> Times:
        """The next times.

        Args:
            num_before: how many were drawn already: a trace goes on from there.
        Returns:
            [num], above 0 or equal to it.
        """
        if self.trace is not None:
            return self.trace[(num_before + np.arange(num)) % len(self.trace)]
        assert self._draw is not None
        return self._draw(random, num)

    def sample(self, random: np.random.Generator, num: int) -> Times:
        """Times to learn boundaries from; of a trace all that it has."""
        return self.trace if self.trace is not None else self.draw(random, num)


def parse(text: str) -> Service:
    """A service from its command line form, one of `FORMS`.

    Raises:
        ServiceError: it has none of the forms, its numbers make no sense, or its file cannot be read.
    """
    kind, _, rest = text.partition(":")
    if kind == "trace" and rest:
        return Service(text, trace=_read_trace(rest))
    if kind not in _MAKERS:
        raise ServiceError(f"unknown service {text!r}; there are:\n{FORMS}")
    num_wanted, make = _MAKERS[kind]
    try:
        numbers = [float(part) for part in rest.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) != num_wanted or not all(map(math.isfinite, numbers)):
        form = next(line for line in FORMS.splitlines() if line.startswith(kind)).split()[0]
        raise ServiceError(f"{text!r} is not of the form {form}")
    return Service(text, make(*numbers))


def _uniform(low: float, high: float) -> _Draw:
    if not 0 <= low <= high or high == 0:
        raise ServiceError(f"uniform:{low:g}:{high:g}: needs 0 <= a <= b, b above 0")
    return lambda random, num: random.uniform(low, high, num)


def _exponential(mean: float) -> _Draw:
    if mean <= 0:
        raise ServiceError(f"exponential:{mean:g}: the mean must be above 0")
    return lambda random, num: random.exponential(mean, num)


def _lognormal(mu: float, sigma: float) -> _Draw:
    if sigma < 0:
        raise ServiceError(f"lognormal:{mu:g}:{sigma:g}: sigma must not be negative")
    return lambda random, num: random.lognormal(mu, sigma, num)


def _bimodal(share: float, first: float, second: float) -> _Draw:
    if not (0 <= share <= 1 and first > 0 and second > 0):
        raise ServiceError(f"bimodal:{share:g}:{first:g}:{second:g}: needs a share from 0 to 1 and times above 0")
    return lambda random, num: np.where(random.random(num) < share, first, second)


_MAKERS: Final[dict[str, tuple[int, Callable[..., _Draw]]]] = {
    "uniform": (2, _uniform), "exponential": (1, _exponential), "lognormal": (2, _lognormal), "bimodal": (3, _bimodal),
}  # fmt: skip


def _read_trace(name: str) -> Times:
    """The times in a file; `name` may end in `:COLUMN`."""
    path, column = Path(name), ""
    if not path.is_file() and ":" in name:
        head, _, column = name.rpartition(":")
        path = Path(head)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ServiceError(f"trace {path}: {getattr(e, 'strerror', None) or e}") from e
    values = _json_values(path, text, column) if text.lstrip()[:1] in ("[", "{") else _csv_values(path, text, column)
    try:
        times = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise ServiceError(f"trace {path}: {e}") from e
    if not 0 < times.size <= MAX_TRACE or times.ndim != 1 or not np.all(np.isfinite(times) & (times >= 0)) or times.max() == 0:
        raise ServiceError(f"trace {path}: needs 1 to {MAX_TRACE:,} times, none negative and not all 0")
    return times


def _json_values(path: Path, text: str, column: str) -> list[Any]:
    try:
        try:
            content = json.loads(text)
        except json.JSONDecodeError:
            content = [json.loads(line) for line in text.splitlines() if line.strip()]  # one object per line
    except json.JSONDecodeError as e:
        raise ServiceError(f"trace {path}: not JSON: {e}") from e
    if isinstance(content, dict):
        content = content.get(column)
    elif column and isinstance(content, list):
        content = [row.get(column) if isinstance(row, dict) else row for row in content]
    if not isinstance(content, list) or not all(isinstance(value, int | float) for value in content):
        where = f" under {column!r}" if column else ", or trace:FILE:COLUMN"
        raise ServiceError(f"trace {path}: needs a list of numbers{where}")
    return content


def _csv_values(path: Path, text: str, column: str) -> list[str]:
    """A named column, or the first one; a first line that is no number is a heading."""
    rows = [row for row in csv.reader(text.splitlines()) if row and not row[0].startswith("#")]
    index = 0
    if rows and column:
        if column not in rows[0]:
            raise ServiceError(f"trace {path}: no column {column!r}; there are: {', '.join(rows[0])}")
        index = rows[0].index(column)
    if rows and (column or not _is_number(rows[0][index])):
        rows = rows[1:]
    if any(len(row) <= index for row in rows):
        raise ServiceError(f"trace {path}: a line without column {column or index + 1!r}")
    return [row[index] for row in rows]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
