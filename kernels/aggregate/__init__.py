"""Measures of a table's columns, for the whole table or per group of rows."""

import re

import torch

from penstock.kernels.aggregate.segments import MEASURES, Segments
from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, listed, shown
from penstock.kernels.expression import Expression, parse
from penstock.kernels.inputs import Static
from penstock.kernels.spec import Cost
from penstock.kernels.table import TABLE, named_columns, split_rows, text_list

_MEASURE = re.compile(r"\s*([a-z]+)\s*\((.*)\)\s*", re.DOTALL)


@kernel(
    "aggregate",
    inputs={"table": TABLE, "columns": Static(), "measures": Static()},
    cost=Cost(base_ms=0.2, per={"table.numel": 2e-5}),
    combine="sum",
)
def aggregate(
    table: torch.Tensor,
    table_offsets: torch.Tensor,
    columns: list[str],
    measures: list[str],
    by: str | None = None,
) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Measures such as `["count()", "sum(price * qty)", "mean(price)"]`, of all rows or per value of the column `by`.

    table: float32 or float64, `[rows, columns]` per task, packed to `[total, columns]`; `columns`: the columns' names.
    A measure is one of count, sum, mean, min, max, std, var, of an expression (`penstock.kernels.expression`; a
    condition counts as 1 and 0, so `mean(price > 3)` is a share). Without `by`, returns `out`: float64
    `[batch, len(measures)]`. With `by`, returns per task `group`: `[groups]`, the values of that column in ascending
    order, in the table's dtype, and `out`: float64 `[groups, len(measures)]`.

    Expressions are computed in the table's dtype, measures in float64, summed in an order that depends on the run alone: the
    same bits whatever shares the batch, but for functions' last bits in expressions. `count()` counts rows, `count(x)` those
    whose x is not NaN; any other measure of values with a NaN is NaN. var and std divide by n - 1. No rows: count and
    sum are 0, the others NaN; var and std of one row are NaN. As a group, NaN is one value, the last, and -0 is 0.
    Tolerance against exact sums: 1e-12 of the sum of magnitudes. Source: `segments.py`.
    """
    named = named_columns("aggregate", table, columns)
    parsed = [_parse_measure(text) for text in text_list("aggregate", "measures", measures)]
    like = table.new_empty(table.shape[0])
    if by is None:
        segments = Segments.of_tasks(table_offsets)
    elif isinstance(by, str) and by in named:
        segments = Segments.of_groups(table_offsets, named[by])
    else:
        raise InvalidInput(f"aggregate: there is no column {shown(by)} to group by; there are {listed(named)}")
    results = [segments.lengths.double()] * len(parsed)  # which is count()
    for expression in dict.fromkeys(expression for _, expression in parsed if expression is not None):
        values = segments.arrange(expression.compute(named, like))  # once for all measures of it
        for i, (measure, of) in enumerate(parsed):
            if of is expression:
                results[i] = MEASURES[measure](values, segments)
        del values
    out = torch.stack(results, 1)
    if segments.groups is None:
        return {"out": out}
    return {
        "group": split_rows(segments.groups, segments.groups_per_task),
        "out": split_rows(out, segments.groups_per_task),
    }


def _parse_measure(text: str) -> tuple[str, Expression | None]:
    match = _MEASURE.fullmatch(text)
    if match is None or match[1] not in MEASURES:
        raise InvalidInput(f"aggregate: expected one of {', '.join(MEASURES)}, as in 'sum(price)'; got {shown(text)}")
    if match[1] == "count" and not match[2].strip():
        return "count", None
    return match[1], parse(match[2])
