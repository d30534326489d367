"""New columns computed from a table's columns, row by row."""

import re

import torch

from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, shown
from penstock.kernels.expression import parse
from penstock.kernels.inputs import Static
from penstock.kernels.spec import Cost
from penstock.kernels.table import COLUMN, TABLE, named_columns, sizes_of, split_rows, text_list

_ASSIGNMENT = re.compile(rf"\s*({COLUMN.pattern})\s*=(?!=)(.*)", re.DOTALL)


@kernel(
    "transform",
    inputs={"table": TABLE, "columns": Static(), "expressions": Static()},
    cost=Cost(base_ms=0.1, per={"table.numel": 5e-6}),
    combine="sum",
)
def transform(
    table: torch.Tensor, table_offsets: torch.Tensor, columns: list[str], expressions: list[str]
) -> dict[str, list[torch.Tensor]]:
    """Assignments such as `["total = price * qty", "tax = total * 0.2"]`, in order; later ones may use earlier names.

    table: float32 or float64, `[rows, columns]` per task, packed to `[total, columns]`; `columns`: the columns' names.
    The language is that of `penstock.kernels.expression`; a condition gives 1 and 0. Assigning to a column's name
    replaces it for what follows. Returns `out`: per task `[rows, len(expressions)]` in the table's dtype, the assigned
    columns in order; a table without rows gives one. Tolerance: rows are independent; 1e-6 relative in float32 (1e-14
    in float64) whatever shares the batch, for functions' last bits; arithmetic is exact to IEEE. Source: torch.
    """
    named = dict(named_columns("transform", table, columns))
    like = table.new_empty(table.shape[0])
    results = []
    for text in text_list("transform", "expressions", expressions):
        name, expression = split_assignment(text)
        results.append(parse(expression).compute(named, like).to(table.dtype))
        named[name] = results[-1]
    return {"out": split_rows(torch.stack(results, 1), sizes_of(table_offsets))}


def split_assignment(text: str) -> tuple[str, str]:
    """(name, expression) of `name = expression`. Raises InvalidInput."""
    match = _ASSIGNMENT.fullmatch(text)
    if match is None:
        raise InvalidInput(f"transform: expected 'name = expression'; got {shown(text)}")
    return match[1], match[2]
