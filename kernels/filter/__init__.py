"""The rows of a table that meet a condition."""

import torch

from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, shown
from penstock.kernels.expression import parse
from penstock.kernels.inputs import Static
from penstock.kernels.spec import Cost
from penstock.kernels.table import TABLE, named_columns, split_rows, true_rows


@kernel(
    "filter",
    inputs={"table": TABLE, "columns": Static(), "where": Static()},
    cost=Cost(base_ms=0.1, per={"table.numel": 5e-6}),
    combine="sum",
)
def filter_rows(
    table: torch.Tensor, table_offsets: torch.Tensor, columns: list[str], where: str
) -> dict[str, list[torch.Tensor]]:
    """Keeps the rows for which `where` holds, such as `"price > 10 and not isnan(qty)"`, in their order.

    table: float32 or float64, `[rows, columns]` per task, packed to `[total, columns]`; `columns`: the columns' names.
    The language is that of `penstock.kernels.expression`; comparisons with NaN are false. Returns per task `table`:
    `[kept, columns]`, the rows bit for bit, and `index`: int64 `[kept]`, their numbers in the task's table. No rows in,
    or none kept, gives 0 rows. Tolerance: exact whatever shares the batch, unless a value of a function such as `exp`
    lies within its last bit of the bound. Source: torch.
    """
    named = named_columns("filter", table, columns)
    condition = parse(where)
    if not condition.is_condition:
        raise InvalidInput(f"filter: {shown(condition.text)} is a number; expected a condition such as 'price > 10'")
    keep = condition.compute(named, table.new_empty(table.shape[0]))
    offsets = table_offsets.to(table.device)
    kept, sizes, counts = true_rows(keep, offsets)
    index = kept if len(counts) == 1 else kept - offsets[:-1].repeat_interleave(sizes, output_size=len(kept))
    return {"table": split_rows(table.index_select(0, kept), counts), "index": split_rows(index, counts)}
