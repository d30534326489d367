"""What goes in comes out: every dtype, shape and layout, through rows, runs and blocks."""

import subprocess
import sys
from typing import Any

import msgpack
import numpy as np
import pytest
from client_fakes import SPECS, renamed
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from penstock.broker.columns import Block
from penstock.client.arrays import NUMPY_DTYPES
from penstock.client.bundler import Bundler
from penstock.client.errors import InvalidInput
from penstock.client.outputs import decode
from penstock.client.plan import Plan
from penstock.client.rows import RowsInput
from penstock.client.run import Options, Part, Run
from penstock.client.stack import Stack

PLANS = {name: Plan(name, spec) for name, spec in SPECS.items()}


def travel(block: Block) -> Block:
    """As it arrives: parsed from its description, in memory of its own."""
    described = msgpack.unpackb(msgpack.packb(block.describe()))
    return Block.parse(described, [bytearray(f) for f in block.frames], 4096)


def through(kernel: str, *arguments: dict[str, Any]) -> list[Any]:
    """Each task's arguments as the task's echo gives them back."""
    bundler = Bundler(Options(), 32, 8 << 20, lambda: b"i" * 16)
    runs = [run for a in arguments if (run := bundler.add(PLANS[kernel].row(a), 0.0))]
    last = bundler.flush()
    values = []
    for run in [*runs, last] if last else runs:
        run.seal()
        assert run.block is not None
        part = Part(0, 0, renamed(travel(run.block)))
        values += [decode(part, row, run.shape.is_torch) for row in range(run.num_rows)]
    return values


DTYPES = st.sampled_from([*NUMPY_DTYPES.values(), *(d.newbyteorder(">") for d in NUMPY_DTYPES.values())])
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))


@given(ARRAYS, st.sampled_from(["echo", "ragged"]), st.booleans())
def test_arrays_come_back_as_they_went(x, kernel, is_transposed):
    x = x.T if is_transposed else x
    (got,) = through(kernel, {"x": x})
    assert got.dtype == x.dtype.newbyteorder("=")
    assert got.shape == x.shape
    np.testing.assert_array_equal(got, x)
    assert got.flags.writeable


@given(st.lists(ARRAYS, min_size=1, max_size=8), st.sampled_from(["echo", "ragged"]))
def test_mixed_arrays_in_a_row_keep_their_places(xs, kernel):
    for x, got in zip(xs, through(kernel, *({"x": x} for x in xs)), strict=True):
        np.testing.assert_array_equal(got, x)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=10))
def test_texts_come_back_as_they_went(texts):
    assert through("text", *({"text": t} for t in texts)) == texts


@pytest.mark.parametrize("value", [b"", b"ab", bytearray(b"ab"), memoryview(b"ab"), b"x" * 70_000])
def test_bytes_come_back_as_they_went(value):
    assert through("data", {"data": value}) == [bytes(value)]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1.5, "float32"), (3, "int64"), (True, "bool"), ([1.0, 2.0], "float32"), ([[1, 2], [3, 4]], "int64"),
        ((1, 2.5), "float32"), (np.float64(2.0), "float64"), (np.int8(3), "int8"), ([], "float32"),
    ],
)  # fmt: skip
def test_python_numbers_take_the_dtypes_of_torch(value, dtype):
    (got,) = through("echo", {"x": value})
    assert got.dtype.name == dtype
    np.testing.assert_array_equal(got, np.asarray(value))


def test_python_numbers_take_a_dtype_that_the_kernel_accepts():
    (got,) = through("small", {"x": [1, 2]})
    assert got.dtype == np.float32


def test_large_rows_are_framed_writable_and_their_own():
    xs = [np.full(20_000, i, "f4") for i in range(3)]
    got = through("echo", *({"x": x} for x in xs))
    got[0][:] = 9
    assert [g[0] for g in got] == [9, 1, 2]
    assert not any(np.shares_memory(a, b) for a in got for b in xs)


def test_small_rows_do_not_share_memory_either():
    got = through("echo", *({"x": np.full(4, i, "f4")} for i in range(3)))
    got[0][:] = 9
    assert [g[0] for g in got] == [9, 1, 2]


def test_the_arguments_are_copied_when_taken():
    x = np.zeros(4, "f4")
    bundler = Bundler(Options(), 32, 1 << 20, lambda: b"i" * 16)
    bundler.add(PLANS["echo"].row({"x": x}), 0.0)
    x[:] = 1
    run = bundler.flush()
    assert run is not None
    run.seal()
    assert run.block is not None
    assert not any(bytes(run.block.row(0, 0)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2), (40_000,)])
def test_torch_tensors_come_back_as_torch(dtype, shape):
    torch = pytest.importorskip("torch")
    x = (torch.rand(shape) * 4).to(getattr(torch, dtype))
    (got,) = through("echo", {"x": x})
    assert got.dtype == x.dtype
    assert torch.equal(got, x)


def test_strided_torch_tensors_and_those_with_gradients():
    torch = pytest.importorskip("torch")
    x = torch.rand(4, 6, requires_grad=True)[:, ::2].T
    (got,) = through("echo", {"x": x})
    assert torch.equal(got, x.detach())


def test_bfloat16_for_numpy_is_widened_exactly():
    torch = pytest.importorskip("torch")
    x = torch.tensor([1.5, -2.0, 3e38]).to(torch.bfloat16)
    run = Run(b"i" * 16, PLANS["echo"].row({"x": x}).shape, Options(), 0.0)
    run.add(PLANS["echo"].row({"x": x}))
    run.seal()
    assert run.block is not None
    got = decode(Part(0, 0, renamed(run.block)), 0, False)
    np.testing.assert_array_equal(got, x.float().numpy())


@pytest.mark.parametrize(
    ("kernel", "arguments", "says"),
    [
        ("echo", {}, "missing argument 'x'"),
        ("echo", {"x": 1.0, "y": 2}, r"unknown argument 'y'.*echo takes x \(tensor\)"),
        ("echo", {"x": "text"}, "wants numbers"),
        ("echo", {"x": np.array([object()])}, "dtype object cannot travel"),
        ("echo", {"x": np.array([1j])}, "complex128 cannot travel"),
        ("echo", {"x": np.array(["a"])}, "cannot travel"),
        ("echo", {"x": [[1.0], [1.0, 2.0]]}, "is no array"),
        ("echo", {"x": 2**64}, "'x'"),
        ("echo", {"x": np.zeros((1,) * 9)}, "9 dimensions"),
        ("small", {"x": np.zeros(3)}, "'x' is float64; the kernel takes float32"),
        ("small", {"x": np.zeros((3, 3), "f4")}, "takes 1 dimensions"),
        ("text", {"text": ["a", "b"]}, r"one str per task.*map_rows\(\.\.\., text=\[\.\.\.\]\)"),
        ("text", {"text": b"a"}, "one str per task"),
        ("text", {"text": "\ud800"}, "no valid text"),
        ("text", {"text": "a", "upper": object()}, "'upper' is a setting"),
        ("text", {"text": "a", "upper": "x" * 20_000}, "at most 16384"),
        ("text", {"text": "a", "upper": 2**70}, "cannot travel"),
        ("data", {"data": "a"}, "wants bytes"),
        ("sleep", {"seconds": "1"}, "one number"),
        ("sleep", {"seconds": float("nan")}, "finite"),
        ("sleep", {"seconds": 101}, "from 0.0 to 100.0"),
        ("sleep", {"seconds": True}, "one number"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(kernel, arguments, says):
    with pytest.raises(InvalidInput, match=says) as caught:
        PLANS[kernel].row(arguments)
    assert "\n" not in str(caught.value)


def test_equal_settings_give_equal_bytes_in_any_order():
    plan = Plan("k", {"inputs": [["a", "static", {}], ["b", "static", {}]]})
    assert plan.row({"a": 1, "b": [2]}).shape is plan.row({"b": (2,), "a": np.int64(1)}).shape


def rows_through(kernel: str, **arguments: Any) -> tuple[Any, list[int]]:
    rows = RowsInput(PLANS[kernel], arguments)
    stack = Stack(rows.num_rows, rows.is_torch)
    sizes = []
    for row in rows.cut(4, 300_000):
        run = Run(b"i" * 16, row.shape, Options(), 0.0)
        run.add(row)
        run.seal()
        assert run.block is not None
        assert run.nbytes == run.block.nbytes
        run.settle(0, run.num_rows, Part(0, 0, renamed(travel(run.block))))
        stack.add(run)
        sizes.append(run.num_rows)
    return stack.result(), sizes


@given(hnp.arrays(DTYPES, hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=9)))
def test_map_rows_stacks_what_it_split(x):
    got, sizes = rows_through("echo", x=x)
    np.testing.assert_array_equal(got, x)
    assert got.flags.writeable
    assert max(sizes) <= 4


@pytest.mark.parametrize("shape", [(5, 20_000), (3, 0), (7, 2, 3)])
@pytest.mark.parametrize("kernel", ["echo", "ragged"])
def test_map_rows_of_large_and_empty_rows(shape, kernel):
    x = np.random.default_rng(0).random(shape)
    got, _ = rows_through(kernel, x=x)
    np.testing.assert_array_equal(np.stack(list(got)), x)


def test_map_rows_takes_torch_lists_texts_and_numbers():
    torch = pytest.importorskip("torch")
    x = torch.rand(6, 3).to(torch.bfloat16)
    assert torch.equal(rows_through("echo", x=x)[0], x)
    ragged, _ = rows_through("ragged", x=[[1.0], [1.0, 2.0], [3.0]])
    assert [r.tolist() for r in ragged] == [[1.0], [1.0, 2.0], [3.0]]
    texts = ["a", "", "c" * 70_000, "d", "e", "f"]
    assert rows_through("text", text=texts)[0] == texts
    rows = RowsInput(PLANS["sleep"], {"seconds": np.arange(3), "mode": "spin"})
    assert [r.scalars for r in rows.cut(10, 100)] == [[[0.0, 1.0, 2.0]]]
    both, _ = rows_through("two", a=np.zeros((6, 2)), b=np.arange(6))
    assert both["b"].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("kernel", "arguments", "says"),
    [
        ("two", {"a": np.zeros((3, 2)), "b": np.zeros(4)}, "'a' has 3, 'b' has 4"),
        ("sleep", {"seconds": 1.0}, "no argument has rows"),
        ("echo", {"x": np.float32(1)}, "an array or a list"),
        ("echo", {"x": np.zeros(())}, "one row per task"),
        ("text", {"text": "abc"}, "an array or a list"),
        ("echo", {}, "missing"),
    ],
)
def test_map_rows_refuses_what_has_no_rows(kernel, arguments, says):
    with pytest.raises(InvalidInput, match=says):
        RowsInput(PLANS[kernel], arguments)


def test_importing_the_client_never_imports_torch():
    code = "import sys, penstock.client as c; assert not {'torch', 'rich'} & set(sys.modules); assert c.Executor"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
