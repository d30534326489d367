"""The Prometheus text format 0.0.4: metric families as text, label values escaped, values written so that they read back.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/. Knows the format; does not know what is measured.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[str, ...]
_LABEL_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})
_HOLE = "\0"


def escape(value: str) -> str:
    """A label's value, to stand between double quotes. A NUL, which marks a place in our templates, is left out."""
    return value.translate(_LABEL_ESCAPES).replace(_HOLE, "")


def number(value: float) -> str:
    """A value that reads back as the same number."""
    if math.isfinite(value):
        return repr(float(value))  # numpy's numbers, too
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def header(name: str, kind: str, text: str) -> str:
    """What comes before a family's samples; `kind` is counter, gauge or histogram."""
    return f"# HELP {name} {text.translate(_HELP_ESCAPES)}\n# TYPE {name} {kind}\n"


def family(name: str, kind: str, text: str, label_names: Labels, values: Mapping[Labels, float]) -> str:
    """A counter or a gauge with a sample per label set; without labels the one label set is `()`."""
    lines = [header(name, kind, text)]
    for labels, value in values.items():
        lines.append(f"{name}{_label_text(label_names, labels)} {number(value)}\n")
    return "".join(lines)


def histogram(name: str, text: str, label: str, bounds: Sequence[float], rows: Mapping[str, Sequence[float]]) -> str:
    """A histogram with one label.

    Args:
        bounds: the buckets' upper bounds, ascending, without +Inf.
        rows: per value of the label: counts per bucket (one more than bounds, not cumulative), then the values' sum.
    """
    template = _histogram_template(name, label, tuple(bounds))
    blocks = [header(name, "histogram", text)]
    for value, row in rows.items():
        counts = list(accumulate(row[:-1]))
        blocks.append((template % (*counts, float(row[-1]), counts[-1])).replace(_HOLE, escape(value)))
    return "".join(blocks)


def _label_text(names: Labels, values: Labels) -> str:
    if not names:
        return ""
    pairs = (f'{name}="{escape(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}"


@lru_cache(maxsize=64)
def _histogram_template(name: str, label: str, bounds: tuple[float, ...]) -> str:
    """One label set's lines with places for the numbers: a single format is much faster than one per line."""
    place = f'{label}="{_HOLE}"'
    lines = [f'{name}_bucket{{{place},le="{number(bound)}"}} %d\n' for bound in (*bounds, math.inf)]
    return "".join((*lines, f"{name}_sum{{{place}}} %r\n", f"{name}_count{{{place}}} %d\n"))
