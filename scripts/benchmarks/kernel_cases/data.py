"""transform, filter and aggregate on one resident table, against plain torch on its columns, and Polars on the CPU."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kernel_cases import FLOOR, Case
from penstock.kernels import registry
from penstock.kernels.aggregate.reference import aggregate as aggregate_reference
from penstock.kernels.filter.reference import filter_rows as filter_reference
from penstock.kernels.transform.reference import transform as transform_reference

COLUMNS = ["store", "price", "qty", "tax"]
EXPRESSIONS = ["total = price * qty", "due = where(total > 1, total * tax, 0)"]
WHERE = "price > 0.5 and qty != 2"
MEASURES = ["count()", "sum(price * qty)", "mean(price)", "max(price)"]
NUM_CHECKED = 300
REFERENCES: dict[str, Any] = {
    "transform": transform_reference,
    "filter": filter_reference,
    "aggregate": aggregate_reference,
}

Run = Callable[[], Any]


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    num_rows = (20_000_000 if device.type == "cuda" else 1_000_000) // (4 if is_quick else 1)
    store, qty = (torch.randint(0, limit, (num_rows,)).float() for limit in (100, 5))
    table = torch.stack([store, torch.randn(num_rows), qty, torch.rand(num_rows)], 1).to(device)
    frame = _frame(table) if importlib.util.find_spec("polars") is not None else None
    per_column = 4.0 * num_rows
    num_kept = int(((table[:, 1] > 0.5) & (table[:, 2] != 2)).sum())
    assigned = {"expressions": EXPRESSIONS}
    yield _case("transform", assigned, table, _transform(table), _polars("transform", frame), 5 * per_column)
    filter_bytes = table.nbytes + num_kept * (table.shape[1] * 4 + 8)
    yield _case("filter", {"where": WHERE}, table, _filter(table), _polars("filter", frame), filter_bytes)
    yield _case("aggregate", {"measures": MEASURES}, table, _aggregate(table), _polars("aggregate", frame), 2 * per_column)
    grouped = {"measures": MEASURES, "by": "store"}
    yield _case("aggregate", grouped, table, _grouped(table), _polars("by", frame), 3 * per_column)


def _case(name: str, arguments: dict[str, Any], table: torch.Tensor, plain: Run, polars: Run | None, num_bytes: float) -> Case:
    kernel, offsets = registry.get(name), torch.tensor([0, len(table)], device=table.device)
    def run(part: torch.Tensor, bounds: torch.Tensor) -> dict[str, Any]:
        return kernel.run(table=part, table_offsets=bounds, columns=COLUMNS, **arguments)

    def check() -> None:
        few, bounds = table[:NUM_CHECKED], torch.tensor([0, min(NUM_CHECKED, len(table))])
        expected = REFERENCES[name](few.cpu(), bounds, COLUMNS, **arguments)
        got = run(few, bounds.to(table.device))
        for key, parts in expected.items():
            for one, other in zip(got[key], parts, strict=True):
                torch.testing.assert_close(one.cpu(), other, rtol=1e-6, atol=1e-7)

    is_cuda = table.device.type == "cuda"
    peers = {"torch": plain} | ({"polars": polars} if polars is not None else {})
    goals = {FLOOR: 0.7, "polars": 10.0} if is_cuda else {"torch": 0.95}
    size = f"{len(table)} rows" + (" by group" if "by" in arguments else "")
    return Case(
        name, size, lambda: run(table, offsets), check, peers, num_bytes,
        goals={key: value for key, value in goals.items() if key == FLOOR or key in peers}, can_graph=False,
    )  # fmt: skip


def _transform(table: torch.Tensor) -> Run:
    def run() -> torch.Tensor:
        total = table[:, 1] * table[:, 2]
        return torch.stack([total, torch.where(total > 1, total * table[:, 3], 0.0)], 1)

    return run


def _filter(table: torch.Tensor) -> Run:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        index = ((table[:, 1] > 0.5) & (table[:, 2] != 2)).nonzero().squeeze(1)
        return table[index], index

    return run


def _aggregate(table: torch.Tensor) -> Run:
    def run() -> torch.Tensor:
        price, amount = table[:, 1].double(), (table[:, 1] * table[:, 2]).double()
        return torch.stack([price.new_full((), len(table)), amount.sum(), price.mean(), price.max()])

    return run


def _grouped(table: torch.Tensor) -> Run:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        group, place = torch.unique(table[:, 0], return_inverse=True)
        price, amount = table[:, 1].double(), (table[:, 1] * table[:, 2]).double()
        zeros = price.new_zeros(len(group))
        count = zeros.index_add(0, place, torch.ones_like(price))
        total, sums = zeros.index_add(0, place, amount), zeros.index_add(0, place, price)
        largest = (zeros - torch.inf).scatter_reduce(0, place, price, "amax")
        return group, torch.stack([count, total, sums / count, largest], 1)

    return run


def _frame(table: torch.Tensor) -> Any:
    import polars

    return polars.DataFrame({name: table[:, i].contiguous().cpu().numpy() for i, name in enumerate(COLUMNS)})


def _polars(what: str, frame: Any) -> Run | None:
    if frame is None:
        return None
    import polars as pl

    price, qty, tax = (pl.col(name) for name in COLUMNS[1:])
    total = price * qty
    measures = [pl.len(), total.sum().alias("total"), price.mean().alias("mean"), price.max().alias("max")]
    runs: dict[str, Run] = {
        "transform": lambda: frame.select(total.alias("total"), pl.when(total > 1).then(total * tax).otherwise(0).alias("due")),
        "filter": lambda: frame.filter((price > 0.5) & (qty != 2)),
        "aggregate": lambda: frame.select(measures),
        "by": lambda: frame.group_by("store").agg(measures).sort("store"),
    }
    return runs[what]
