"""Column expressions, one row at a time."""

from itertools import pairwise

import torch

from penstock.kernels.expression import parse
from penstock.kernels.transform import split_assignment


def transform(
    table: torch.Tensor, table_offsets: torch.Tensor, columns: list[str], expressions: list[str]
) -> dict[str, list[torch.Tensor]]:
    """The assigned columns of every row, computed in float64 from that row alone, rounded once per assignment."""
    bounds = table_offsets.tolist()
    out = []
    for start, stop in pairwise(bounds):
        rows = torch.empty(stop - start, len(expressions), dtype=table.dtype)
        for i in range(stop - start):
            values = {name: table[start + i, j].double() for j, name in enumerate(columns)}
            for j, text in enumerate(expressions):
                name, expression = split_assignment(text)
                rows[i, j] = parse(expression).compute(values, torch.empty((), dtype=torch.float64)).to(table.dtype)
                values[name] = rows[i, j].double()
        out.append(rows)
    return {"out": out}
