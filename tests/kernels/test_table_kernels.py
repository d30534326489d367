"""transform, filter and aggregate against their references: ragged batches, empty tables, NaN, neighbours."""

import itertools
import warnings
from typing import Any

import pytest
import torch

from penstock.kernels import InvalidInput, registry
from penstock.kernels.aggregate import segments
from penstock.kernels.aggregate.reference import aggregate as aggregate_reference
from penstock.kernels.filter.reference import filter_rows as filter_reference
from penstock.kernels.transform.reference import transform as transform_reference

COLUMNS = ["store", "price", "qty"]
MEASURES = [
    *("count()", "count(price)", "sum(price * qty)", "mean(price)", "min(price)", "max(qty)"),
    *("var(price)", "std(price)", "mean(price > 0)", "sum(2)"),
]
EXPRESSIONS = ["total = price * qty", "dear = total > 1", "price = exp(-abs(price))", "both = price + dear"]
WHERE = "price > 0 and (qty != 2 or store < 1)"
KERNELS = [
    ("transform", {"expressions": EXPRESSIONS}),
    ("filter", {"where": WHERE}),
    ("aggregate", {"measures": MEASURES}),
    ("aggregate", {"measures": MEASURES, "by": "store"}),
]
SIZES = [[1], [0], [5], [0, 0], [3, 0, 1], [7, 13, 1, 0, 29], [1031, 2], [4001]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tables(sizes: list[int], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    total = sum(sizes)
    table = torch.stack([torch.randint(-2, 3, (total,)), torch.randn(total), torch.randint(0, 4, (total,))], 1)
    return {"table": table.to(dtype), "table_offsets": torch.tensor([0, *itertools.accumulate(sizes)])}


def assert_same(got: Any, expected: Any, relative: float = 0.0) -> None:
    assert set(got) == set(expected)
    for name in expected:
        assert type(got[name]) is type(expected[name])
        assert len(got[name]) == len(expected[name])
        for one, other in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=relative, atol=relative, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES[:-1])
def test_transform(sizes: list[int], dtype: torch.dtype) -> None:
    batch = tables(sizes, dtype)
    got = registry.get("transform").run(**batch, columns=COLUMNS, expressions=EXPRESSIONS)
    assert [tuple(part.shape) for part in got["out"]] == [(size, 4) for size in sizes]
    if sum(sizes) < 100:
        expected = transform_reference(**batch, columns=COLUMNS, expressions=EXPRESSIONS)
        assert_same(got, expected, 1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES[:-1])
def test_filter(sizes: list[int], dtype: torch.dtype) -> None:
    batch = tables(sizes, dtype)
    got = registry.get("filter").run(**batch, columns=COLUMNS, where=WHERE)
    assert_same(got, filter_reference(**batch, columns=COLUMNS, where=WHERE))


@pytest.mark.parametrize("where", ["price > 1e30", "price < 1e30"])
def test_filter_of_none_and_all(where: str) -> None:
    batch = tables([3, 0, 4])
    got = registry.get("filter").run(**batch, columns=COLUMNS, where=where)
    assert_same(got, filter_reference(**batch, columns=COLUMNS, where=where))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by", [None, "store", "price"])
@pytest.mark.parametrize("sizes", SIZES)
def test_aggregate(sizes: list[int], by: str | None, dtype: torch.dtype) -> None:
    if by == "price" and sum(sizes) > 100:
        sizes = [97, 2]
    batch = tables(sizes, dtype)
    got = registry.get("aggregate").run(**batch, columns=COLUMNS, measures=MEASURES, by=by)
    assert_same(got, aggregate_reference(**batch, columns=COLUMNS, measures=MEASURES, by=by), 1e-12)


def test_aggregate_of_nan_and_infinity() -> None:
    nan, inf = torch.nan, torch.inf
    keys = [nan, 1.0, -0.0, nan, 0.0, inf, -inf, 1.0, inf]
    values = [1.0, nan, 2.0, 3.0, 4.0, inf, 5.0, 6.0, 7.0]
    table = torch.tensor([keys, values, values]).T
    batch = {"table": table.repeat(2, 1), "table_offsets": torch.tensor([0, 9, 18])}
    arguments = {"columns": COLUMNS, "by": "store"}
    got = registry.get("aggregate").run(**batch, **arguments, measures=["count()", "count(price)", "sum(price)"])
    for part, out in zip(got["group"], got["out"], strict=True):
        torch.testing.assert_close(part, torch.tensor([-inf, 0.0, 1.0, inf, nan]), equal_nan=True)
        assert not part[1].signbit()
        expected = [[1, 1, 5], [2, 2, 6], [2, 1, nan], [2, 2, inf], [2, 2, 4]]
        torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    extremes = registry.get("aggregate").run(**batch, **arguments, measures=["min(price)", "max(price)"])["out"][0]
    expected = [[5, 5], [2, 4], [nan, nan], [7, inf], [1, 3]]
    torch.testing.assert_close(extremes, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_sums_are_exact_where_float32_is_not() -> None:
    table = torch.ones(20_000_001 // 100, 1) * 16_777_217 / 3
    batch = {"table": table, "table_offsets": torch.tensor([0, len(table)])}
    got = registry.get("aggregate").run(**batch, columns=["x"], measures=["sum(x)", "var(x)"])["out"][0]
    assert got[0].item() == pytest.approx(table[0, 0].double().item() * len(table), rel=1e-12)
    assert got[1].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("name", "arguments"), KERNELS)
def test_poisoned_neighbours_change_nothing(name: str, arguments: dict[str, Any]) -> None:
    kernel = registry.get(name)
    mine = tables([17])
    poison = torch.full((5, 3), torch.nan)
    shared = {"table": torch.cat([poison, mine["table"], poison]), "table_offsets": torch.tensor([0, 5, 22, 27])}
    alone = kernel.run(**mine, columns=COLUMNS, **arguments)
    among = kernel.run(**shared, columns=COLUMNS, **arguments)
    for key, value in alone.items():
        torch.testing.assert_close(among[key][1], value[0], rtol=1e-6, atol=1e-7, equal_nan=True)


def test_tables_may_be_strided() -> None:
    batch = tables([11, 6])
    strided = {**batch, "table": batch["table"].T.contiguous().T}
    for name, arguments in (("filter", {"where": WHERE}), ("aggregate", {"measures": MEASURES, "by": "store"})):
        kernel = registry.get(name)
        one, other = (kernel.run(**item, columns=COLUMNS, **arguments) for item in (batch, strided))
        assert_same(one, other)


@pytest.mark.parametrize("sizes", [[1], [0], [0, 5, 0], [1, 2, 3, 70, 0, 5], [200, 1, 64, 65]])
@pytest.mark.parametrize("how", ["sum", "amin", "amax"])
def test_reducing_in_pieces_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, how: str, sizes: list[int]) -> None:
    monkeypatch.setattr(segments, "PIECE", 8)
    values, lengths = torch.randn(sum(sizes), dtype=torch.float64), torch.tensor(sizes)
    expected = segments._by_segments(values, lengths, how)
    torch.testing.assert_close(segments._reduced_in_pieces(values, lengths, how), expected, rtol=1e-14, atol=1e-14)
    if len(sizes) > 1 and sizes[-1]:  # the same bits in other company
        alone = segments._reduced_in_pieces(values[-sizes[-1] :], lengths[-1:], how)
        assert torch.equal(alone[0], segments._reduced_in_pieces(values, lengths, how)[-1])


@pytest.mark.parametrize("sizes", [[5], [64], [3, 64, 0, 200, 1], [64, 64], [0]])
@pytest.mark.parametrize("how", ["sum", "amin", "amax"])
def test_long_and_short_runs(monkeypatch: pytest.MonkeyPatch, how: str, sizes: list[int]) -> None:
    monkeypatch.setattr(segments, "LONG", 64)
    values, lengths = torch.randn(sum(sizes), dtype=torch.float64), torch.tensor(sizes)
    got = segments._reduced(values, lengths, how)
    torch.testing.assert_close(got, segments._by_segments(values, lengths, how), rtol=1e-14, atol=1e-14)
    alone = [segments._reduced(part, torch.tensor([len(part)]), how) for part in values.split(sizes)]
    assert torch.equal(torch.cat(alone), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[0], [1], [0, 7, 0, 300], [50, 50, 50]])
def test_groups_by_sorting_as_on_a_gpu(sizes: list[int], dtype: torch.dtype) -> None:
    key = torch.randint(-3, 4, (sum(sizes),)).to(dtype) * 0.5
    for value in (torch.nan, torch.inf, -torch.inf, -0.0):
        key[torch.rand(len(key)) < 0.1] = value
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    hashed, ordered = (form(offsets, key + 0.0) for form in (segments.Segments._by_hashing, segments.Segments._by_sorting))
    assert hashed.groups is not None
    torch.testing.assert_close(hashed.groups, ordered.groups, rtol=0, atol=0, equal_nan=True)
    assert hashed.groups_per_task == ordered.groups_per_task
    assert torch.equal(hashed.lengths, ordered.lengths)
    values = torch.randn(len(key))
    for measure, function in segments.MEASURES.items():
        one, other = (function(runs.arrange(values), runs) for runs in (hashed, ordered))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True, msg=measure)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [*SIZES, [100_003, 0, 5]])
@pytest.mark.parametrize(("name", "arguments"), KERNELS)
def test_on_a_gpu(name: str, arguments: dict[str, Any], sizes: list[int], dtype: torch.dtype) -> None:
    batch, kernel = tables(sizes, dtype), registry.get(name)
    got = kernel.run(**{key: value.cuda() for key, value in batch.items()}, columns=COLUMNS, **arguments)
    expected = kernel.run(**batch, columns=COLUMNS, **arguments)
    for key, parts in expected.items():
        for one, other in zip(got[key], parts, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "arguments"), KERNELS)
def test_a_gpu_is_waited_for_once_at_most(name: str, arguments: dict[str, Any]) -> None:
    batch = {key: value.cuda() for key, value in tables([1000, 3]).items()}
    kernel = registry.get(name)
    kernel.run(**batch, columns=COLUMNS, **arguments)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            kernel.run(**batch, columns=COLUMNS, **arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(item.message) for item in record) <= 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("filter", {"columns": ["a", "b"], "where": "a > 1"}, "3 columns, but 2 names"),
        ("filter", {"columns": ["a", "a", "b"], "where": "a > 1"}, "must differ"),
        ("filter", {"columns": ["a", "b c", "d"], "where": "a > 1"}, "letters, digits and _; 64|got 'b c'"),
        ("filter", {"columns": "abc", "where": "a > 1"}, "columns must be a list of texts"),
        ("filter", {"columns": ["a", "b", 3], "where": "a > 1"}, "columns must be a list of texts"),
        ("filter", {"columns": [], "where": "1 > 1"}, "1 to 1024"),
        ("filter", {"columns": COLUMNS, "where": "price"}, "is a number; expected a condition"),
        ("filter", {"columns": COLUMNS, "where": "cost > 1"}, "no column cost"),
        ("filter", {"columns": COLUMNS, "where": 1}, "is a text"),
        ("transform", {"columns": COLUMNS, "expressions": "a = price"}, "list of texts"),
        ("transform", {"columns": COLUMNS, "expressions": []}, "1 to 64"),
        ("transform", {"columns": COLUMNS, "expressions": ["a = 1"] * 65}, "1 to 64"),
        ("transform", {"columns": COLUMNS, "expressions": ["price"]}, "expected 'name = expression'"),
        ("transform", {"columns": COLUMNS, "expressions": ["a == price"]}, "expected 'name = expression'"),
        ("transform", {"columns": COLUMNS, "expressions": ["a.b = price"]}, "expected 'name = expression'"),
        ("transform", {"columns": COLUMNS, "expressions": ["a = b = price"]}, "cannot be read"),
        ("aggregate", {"columns": COLUMNS, "measures": ["median(price)"]}, "expected one of count, sum"),
        ("aggregate", {"columns": COLUMNS, "measures": ["sum"]}, "expected one of"),
        ("aggregate", {"columns": COLUMNS, "measures": ["sum()"]}, "an expression is a text"),
        ("aggregate", {"columns": COLUMNS, "measures": ["sum(price) + sum(qty)"]}, "cannot be read"),
        ("aggregate", {"columns": COLUMNS, "measures": ["sum(price, qty)"]}, "not part of the language"),
        ("aggregate", {"columns": COLUMNS, "measures": ["count()"], "by": "region"}, "no column 'region'"),
        ("aggregate", {"columns": COLUMNS, "measures": ["count()"], "by": ["store"]}, "to group by"),
    ],
)
def test_wrong_arguments_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        registry.get(name).run(**tables([4]), **arguments)
