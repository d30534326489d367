"""Filtering, one row at a time."""

from itertools import pairwise

import torch

from penstock.kernels.expression import parse


def filter_rows(
    table: torch.Tensor, table_offsets: torch.Tensor, columns: list[str], where: str
) -> dict[str, list[torch.Tensor]]:
    """Looks at every row alone and keeps it or not."""
    bounds = table_offsets.tolist()
    tables, indices = [], []
    for start, stop in pairwise(bounds):
        kept = []
        for row in range(start, stop):
            values = {name: table[row, j] for j, name in enumerate(columns)}
            if parse(where).compute(values, table.new_empty(())).item():
                kept.append(row - start)
        index = torch.tensor(kept, dtype=torch.int64)
        tables.append(table[start:stop][index])
        indices.append(index)
    return {"table": tables, "index": indices}
