"""A small closed language over numeric columns: `where(qty > 10, price * 0.9, price) * qty`.

Knows how a text is parsed, checked and computed with torch; does not know tables or batches. Nothing is ever
evaluated as Python: the text is only parsed to a syntax tree, of which a fixed set of nodes is accepted.

    number     3, 2.5e-3, a column's name
    arithmetic + - * / // % ** and unary + -        as in Python, on floats: x / 0 is inf or nan, never an error
    condition  < <= > >= == != (chains too), isnan(x), combined by and, or, not
    functions  abs ceil cos exp floor log log1p round sign sin sqrt tan tanh (x); minimum maximum (x, y);
               clip(x, low, high); where(condition, x, y)

Numbers and conditions do not mix: `(a > 1) + 2` is refused, `where(a > 1, 1, 0) + 2` is meant. NaN compares as false,
except with `!=`. Functions of two values give NaN if either is NaN.
"""

import ast
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from penstock.kernels.errors import InvalidInput, listed, shown

MAX_CHARACTERS = 1000
MAX_NODES = 400
MAX_DEPTH = 64

Columns = Mapping[str, torch.Tensor]

_ARITHMETIC: dict[type[ast.AST], Callable[..., torch.Tensor]] = {
    ast.Add: torch.add,
    ast.Sub: torch.sub,
    ast.Mult: torch.mul,
    ast.Div: torch.div,
    ast.FloorDiv: torch.floor_divide,
    ast.Mod: torch.remainder,
    ast.Pow: torch.pow,
    ast.USub: torch.neg,
    ast.UAdd: torch.clone,
}
_COMPARISONS: dict[type[ast.AST], Callable[..., torch.Tensor]] = {
    ast.Lt: torch.lt,
    ast.LtE: torch.le,
    ast.Gt: torch.gt,
    ast.GtE: torch.ge,
    ast.Eq: torch.eq,
    ast.NotEq: torch.ne,
}
_LOGIC: dict[type[ast.AST], Callable[..., torch.Tensor]] = {ast.And: torch.logical_and, ast.Or: torch.logical_or}
_NUMBER, _CONDITION = "a number", "a condition"

# name -> (function, kinds of its arguments, kind of its result)
_FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[str, ...], str]] = {
    **{
        function.__name__: (function, (_NUMBER,), _NUMBER)
        for function in (
            *(torch.abs, torch.ceil, torch.cos, torch.exp, torch.floor, torch.log, torch.log1p, torch.round),
            *(torch.sign, torch.sin, torch.sqrt, torch.tan, torch.tanh),
        )
    },
    "minimum": (torch.minimum, (_NUMBER, _NUMBER), _NUMBER),
    "maximum": (torch.maximum, (_NUMBER, _NUMBER), _NUMBER),
    "clip": (torch.clip, (_NUMBER, _NUMBER, _NUMBER), _NUMBER),
    "where": (torch.where, (_CONDITION, _NUMBER, _NUMBER), _NUMBER),
    "isnan": (torch.isnan, (_NUMBER,), _CONDITION),
}


@dataclass(frozen=True, slots=True)
class Expression:
    """A checked expression: the columns that it reads, and whether it is a condition or a number."""

    text: str
    tree: ast.expr
    names: frozenset[str]
    is_condition: bool

    def compute(self, columns: Columns, like: torch.Tensor) -> torch.Tensor:
        """Its value in every row: shape of `like`; bool for a condition, else the dtype of `like`.

        `columns`: name -> tensor of the shape, dtype and device of `like`. Raises InvalidInput for an unknown column.
        """
        if unknown := sorted(self.names - set(columns)):
            raise InvalidInput(
                f"expression {shown(self.text)}: there is no column {listed(unknown)}; there are {listed(columns)}"
            )
        return _compute(self.tree, columns, like).expand(like.shape)


def parse(text: object) -> Expression:
    """The checked expression; raises InvalidInput, saying what is not accepted, for any other text."""
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_CHARACTERS:
        raise InvalidInput(f"an expression is a text of 1 to {MAX_CHARACTERS} characters")
    return _parse(text.strip())


@lru_cache(maxsize=256)
def _parse(text: str) -> Expression:
    tree = _syntax_tree(text)
    _check_size(text, tree)
    names: set[str] = set()
    kind = _check(text, tree, names)
    return Expression(text, tree, frozenset(names), kind == _CONDITION)


def _syntax_tree(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a doubtful literal is refused, not warned about
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, Warning) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise InvalidInput(f"expression {shown(text)} cannot be read: {reason}") from error
    except (RecursionError, MemoryError) as error:
        raise InvalidInput(f"expression {shown(text)} is nested too deeply") from error


def _check_size(text: str, tree: ast.expr) -> None:
    """Bounds the depth and the number of nodes, without recursion."""
    level: list[ast.AST] = [tree]
    num_nodes, depth = 0, 0
    while level:
        num_nodes, depth = num_nodes + len(level), depth + 1
        if depth > MAX_DEPTH or num_nodes > MAX_NODES:
            raise InvalidInput(f"expression {shown(text)} is too large: at most {MAX_DEPTH} levels and {MAX_NODES} parts")
        level = [child for node in level for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


def _check(text: str, node: ast.expr, names: set[str]) -> str:
    """The kind of `node`; collects the columns into `names`; raises InvalidInput for what is not in the language."""

    def expect(kind: str, *parts: ast.expr) -> None:
        for part in parts:
            if _check(text, part, names) != kind:
                raise _refused(text, part, f"must be {kind}")

    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if not _is_finite(value):
                raise _refused(text, node, "is too large a number")
            return _NUMBER
        case ast.Name(id=name):
            if name in _FUNCTIONS:
                raise _refused(text, node, "is a function and cannot be a column")
            names.add(name)
            return _NUMBER
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _ARITHMETIC:
            expect(_NUMBER, left, right)
            return _NUMBER
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            expect(_CONDITION, operand)
            return _CONDITION
        case ast.UnaryOp(op=operator, operand=operand) if type(operator) in _ARITHMETIC:
            expect(_NUMBER, operand)
            return _NUMBER
        case ast.BoolOp(values=values):
            expect(_CONDITION, *values)
            return _CONDITION
        case ast.Compare(left=left, ops=operators, comparators=others) if all(
            type(operator) in _COMPARISONS for operator in operators
        ):
            expect(_NUMBER, left, *others)
            return _CONDITION
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            _, kinds, result = _FUNCTIONS[name]
            if len(arguments) != len(kinds):
                raise _refused(text, node, f"must have {len(kinds)} argument{'s' * (len(kinds) > 1)}")
            for kind, argument in zip(kinds, arguments, strict=True):
                expect(kind, argument)
            return result
        case ast.Call(func=ast.Name(id=name)) if name not in _FUNCTIONS:
            raise _refused(text, node, f"calls no known function; there are {listed(_FUNCTIONS)}")
    raise _refused(text, node, "is not part of the language of expressions")


def _compute(node: ast.expr, columns: Columns, like: torch.Tensor) -> torch.Tensor:
    def value(part: ast.expr) -> torch.Tensor:
        return _compute(part, columns, like)

    def number(part: ast.Constant) -> float:
        """As the dtype has it: 1e300 is infinite in float32."""
        return float(torch.tensor(float(part.value), dtype=like.dtype))  # type: ignore[arg-type]

    def second(part: ast.expr) -> torch.Tensor | float:
        """A second operand, which may be a plain number: that is one kernel less and faster."""
        return number(part) if isinstance(part, ast.Constant) else value(part)

    match node:
        case ast.Constant():
            return torch.full((), number(node), dtype=like.dtype, device=like.device)  # a copy would wait for the device
        case ast.Name(id=name):
            return columns[name]
        case ast.BinOp(left=left, op=(ast.Add() | ast.Sub() | ast.Mult()) as operator, right=right):
            return _ARITHMETIC[type(operator)](value(left), second(right))
        case ast.BinOp(left=left, op=operator, right=right):  # by a number, quotients and powers take shortcuts
            return _ARITHMETIC[type(operator)](value(left), value(right))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return torch.logical_not(value(operand))
        case ast.UnaryOp(op=operator, operand=operand):
            return _ARITHMETIC[type(operator)](value(operand))
        case ast.BoolOp(op=operator, values=[first, *others]):
            result = value(first)
            for other in others:
                result = _LOGIC[type(operator)](result, value(other))
            return result
        case ast.Compare(left=left, ops=operators, comparators=others):
            values = [value(left), *map(value if len(others) > 1 else second, others)]
            result = _COMPARISONS[type(operators[0])](values[0], values[1])
            for comparison, low, high in zip(operators[1:], values[1:], values[2:], strict=False):
                result = torch.logical_and(result, _COMPARISONS[type(comparison)](low, high))
            return result
        case ast.Call(func=ast.Name(id="where"), args=[condition, one, ast.Constant() as other]):
            return torch.where(value(condition), value(one), second(other))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name][0](*map(value, arguments))
    raise AssertionError(f"unchecked node {type(node).__name__}")


def _refused(text: str, node: ast.expr, reason: str) -> InvalidInput:
    part = ast.get_source_segment(text, node) or type(node).__name__
    return InvalidInput(f"expression {shown(text)}: {shown(part)} {reason}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
