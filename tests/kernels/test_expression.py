"""The language of expressions: right values for what is in it, a clear refusal for everything that is not."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.kernels import InvalidInput
from penstock.kernels.expression import MAX_CHARACTERS, parse

nan, inf = math.nan, math.inf
A = torch.tensor([1.0, -2.5, 0.0, 3.0, nan, inf], dtype=torch.float64)
B = torch.tensor([2.0, 0.5, 0.0, 3.0, 1.0, -1.0], dtype=torch.float64)


def compute(text: str, **columns: torch.Tensor) -> torch.Tensor:
    columns = columns or {"a": A, "b": B}
    return parse(text).compute(columns, next(iter(columns.values())))


NUMBERS: list[tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = [
    ("a", lambda a, b: a),
    (" 2.5e-1 ", lambda a, b: torch.full_like(a, 0.25)),
    ("a + b * 2", lambda a, b: a + b * 2),
    ("(a + b) * 2", lambda a, b: (a + b) * 2),
    ("a - b - 1", lambda a, b: a - b - 1),
    ("a / b", lambda a, b: a / b),
    ("-a ** 2", lambda a, b: -(a**2)),
    ("+a", lambda a, b: a),
    ("2 ** -1 + a * 0", lambda a, b: 0.5 + a * 0),
    ("9 ** 9 ** 9 ** 9", lambda a, b: torch.full_like(a, inf)),
    ("abs(a)", lambda a, b: a.abs()),
    ("sqrt(b * b)", lambda a, b: (b * b).sqrt()),
    ("log(exp(b))", lambda a, b: b.exp().log()),
    ("sin(b) ** 2 + cos(b) ** 2", lambda a, b: torch.ones_like(b)),
    ("round(b) + floor(b) - ceil(b)", lambda a, b: b.round() + b.floor() - b.ceil()),
    ("minimum(a, b)", lambda a, b: torch.minimum(a, b)),
    ("maximum(a, 1)", lambda a, b: torch.maximum(a, torch.ones_like(a))),
    ("clip(a, -1, 1)", lambda a, b: a.clip(-1, 1)),
    ("where(a > b, a, 0 - 1)", lambda a, b: torch.where(a > b, a, -1.0)),
    ("where(isnan(a), 0, a)", lambda a, b: torch.where(a.isnan(), 0.0, a)),
]
CONDITIONS: list[tuple[str, Callable[[float, float], bool]]] = [
    ("a > b", lambda a, b: a > b),
    ("a != b", lambda a, b: a != b),
    ("a == b", lambda a, b: a == b),
    ("0 <= a < b", lambda a, b: 0 <= a < b),
    ("b > a > 0 or a == b", lambda a, b: b > a > 0 or a == b),
    ("not a > 0 and b >= 0", lambda a, b: not a > 0 and b >= 0),
    ("isnan(a) or isnan(b / b)", lambda a, b: math.isnan(a) or b == 0),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_numbers(text: str, expected: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    assert not parse(text).is_condition
    torch.testing.assert_close(compute(text), expected(A, B), equal_nan=True)
    torch.testing.assert_close(
        compute(text, a=A.float(), b=B.float()), expected(A, B).float(), rtol=1e-6, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize(("text", "expected"), CONDITIONS)
def test_conditions(text: str, expected: Callable[[float, float], bool]) -> None:
    assert parse(text).is_condition
    got = compute(text)
    assert got.dtype == torch.bool
    assert got.tolist() == [expected(a, b) for a, b in zip(A.tolist(), B.tolist(), strict=True)]


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6).filter(lambda b: abs(b) > 1e-3))
def test_division_is_pythons(a: float, b: float) -> None:
    columns = {"a": torch.tensor([a], dtype=torch.float64), "b": torch.tensor([b], dtype=torch.float64)}
    assert compute("a // b", **columns).item() == a // b
    assert compute("a % b", **columns).item() == pytest.approx(a % b, abs=1e-9)


def test_no_rows() -> None:
    assert compute("a + 1", a=torch.empty(0)).shape == (0,)
    assert compute("1", a=torch.empty(0)).shape == (0,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "a +",
        "a b",
        "a; b",
        "a = 1",
        "(a := 1)",
        "lambda: a",
        "lambda x: x",
        "[a]",
        "(a, b)",
        "{a}",
        "{a: b}",
        "[a for a in b]",
        "a if b > 0 else 1",
        "a[0]",
        "a.T",
        "a.__class__",
        "(1).__class__.__bases__",
        "__import__('os')",
        "__import__",
        "eval",
        "abs",
        "abs.__globals__",
        "abs(a).data",
        "open('x')",
        "print(a)",
        "getattr(a, 'T')",
        "abs(a)(b)",
        "(abs)(a)(b)",
        "abs()",
        "abs(a, b)",
        "where(a, a, b)",
        "where(a > 1, a > 2, b)",
        "abs(*a)",
        "abs(x=a)",
        "abs(a, **b)",
        "'a'",
        "f'{a}'",
        "b'a'",
        "a + 'b'",
        "True",
        "None",
        "...",
        "1j",
        "1e999",
        "9" * 400,
        "a & b",
        "a | b",
        "a ^ b",
        "~a",
        "a << 1",
        "a @ b",
        "a is b",
        "a in b",
        "a and b",
        "not a",
        "(a > 1) + 2",
        "-(a > 1)",
        "(a > 1) > 0",
        "1 if a else 2",
        "await a",
        "yield a",
        "a\x00",
        "a #\n+ b\n c",
        "0777",
        "1or 2",
        "'\\d' < a",
        "c + 1",
        "a" * 65 + " + 1",
        "é + a",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        compute(text)


@pytest.mark.parametrize("text", [None, 3, True, ["a"], b"a", {"a": 1}])
def test_what_is_no_text_is_refused(text: object) -> None:
    with pytest.raises(InvalidInput, match="an expression is a text"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "a" + "+a" * 600,
        "(" * 400 + "a" + ")" * 400,
        "-" * 900 + "a",
        "not " * 200 + "a > 1",
        "abs(" * 190 + "a" + ")" * 190,
        "a" + "**a" * 300,
        "a" + "<a" * 480,
        "a" + " " * MAX_CHARACTERS + "+ b",
    ],
)
def test_large_and_deep_texts_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(text)
    assert len(str(caught.value)) < 300


def test_messages_say_what_is_wrong() -> None:
    for text, message in {
        "pric * 2": r"no column pric; there are a, b",
        "a.mean()": r"'a\.mean\(\)' is not part of the language",
        "max(a, b)": r"calls no known function; there are .*maximum",
        "abs(a, b)": r"must have 1 argument$",
        "where(a, 1, 2)": r"'a' must be a condition",
    }.items():
        with pytest.raises(InvalidInput, match=message):
            compute(text)


@given(st.text(alphabet="ab01.+-*/%<>=!(), andort", max_size=40))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    try:
        result = compute(text)
    except InvalidInput:
        return
    assert result.shape == A.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_count_in_the_tables_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([0.1, -2.0, 3e38], dtype=dtype)
    texts = ["x * 1e300", "1e300 * x", "x - 1e300", "where(x > 0, x, 1e300)", "where(x > 0, 1e300, 0.1)", "x / 3", "x == 0.1"]
    assert torch.equal(parse("x + " + "9" * 200).compute({"x": x}, x), x + float("9" * 200))
    for text in texts:
        got = parse(text).compute({"x": x}, x)
        columns = {"x": x, "big": torch.full_like(x, float(torch.tensor(1e300, dtype=dtype)))}
        columns |= {"tenth": torch.full_like(x, 0.1), "three": torch.full_like(x, 3.0), "zero": torch.zeros_like(x)}
        named = text.replace("1e300", "big").replace("0.1", "tenth").replace("3", "three").replace("> 0", "> zero")
        assert torch.equal(got, parse(named).compute(columns, x)), text
        assert got.dtype in (dtype, torch.bool)
