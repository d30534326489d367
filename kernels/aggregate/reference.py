"""Measures by their definitions: Python floats, exact sums, one task after the other."""

import math
from itertools import pairwise

import torch

from penstock.kernels.expression import parse


def aggregate(
    table: torch.Tensor,
    table_offsets: torch.Tensor,
    columns: list[str],
    measures: list[str],
    by: str | None = None,
) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Collects the rows of every group in a dict, then measures each group alone."""
    bounds = table_offsets.tolist()
    groups, outs = [], []
    for start, stop in pairwise(bounds):
        part = table[start:stop]
        rows_of: dict[float, list[int]] = {} if by else {0.0: list(range(len(part)))}
        for row, value in enumerate(part[:, columns.index(by)].tolist() if by else []):
            key = math.inf if math.isnan(value) else value + 0.0
            rows_of.setdefault(math.nextafter(math.inf, 0) if value == math.inf else key, []).append(row)
        keys = sorted(rows_of)
        names = [part[rows_of[key][0], columns.index(by)].item() + 0.0 for key in keys] if by else [0.0]
        groups.append(torch.tensor(names, dtype=table.dtype))
        out = [[_measure(part[rows_of[key]], columns, text) for text in measures] for key in keys]
        outs.append(torch.tensor(out, dtype=torch.float64).reshape(-1, len(measures)))
    return {"group": groups, "out": outs} if by else {"out": torch.cat(outs)}


def _measure(rows: torch.Tensor, columns: list[str], text: str) -> float:
    name, _, rest = text.strip().partition("(")
    if rest == ")":
        return float(len(rows))
    named = dict(zip(columns, rows.unbind(1), strict=True))
    values: list[float] = parse(rest[:-1]).compute(named, rows.new_empty(len(rows))).double().tolist()
    num, has_nan = len(values), any(map(math.isnan, values))
    if name == "count":
        return float(sum(not math.isnan(value) for value in values))
    if has_nan or (num == 0 and name != "sum") or (num < 2 and name in ("var", "std")):
        return math.nan
    if name in ("min", "max"):
        return min(values) if name == "min" else max(values)
    total = math.fsum(values)
    if name == "sum":
        return total
    mean = total / num
    if name == "mean":
        return mean
    variance = math.fsum((value - mean) ** 2 for value in values) / (num - 1)
    return variance if name == "var" else math.sqrt(variance)
