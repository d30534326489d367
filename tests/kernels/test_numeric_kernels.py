"""softmax, matmul and sha256 against their references, on awkward shapes, alone and among poisoned neighbours."""

import hashlib
import random

import pytest
import torch

from penstock.kernels import InvalidInput, ops
from penstock.kernels.matmul.reference import matmul as matmul_reference
from penstock.kernels.sha256.reference import sha256 as sha256_reference
from penstock.kernels.softmax.reference import softmax as softmax_reference

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-14}
FLOATS = tuple(TOLERANCE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_near(got: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=relative, atol=relative * 1e-3, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((1, 1), -1), ((3, 7), 0), ((2, 13, 5), 0), ((2, 13, 5), 1), ((2, 3, 4, 5), -3), ((5, 1031), -1), ((4, 0), -1)],
)
def test_softmax(dtype: torch.dtype, shape: tuple[int, ...], axis: int) -> None:
    x = (torch.randn(shape, dtype=torch.float64) * 10).to(dtype)
    assert_near(ops.softmax(x, axis), softmax_reference(x, axis), TOLERANCE[dtype])


def test_softmax_of_extremes() -> None:
    x = torch.tensor([[1e30, 1e30], [-torch.inf, 0.0], [-1e38, 1e38], [torch.nan, 1.0], [-torch.inf, -torch.inf]])
    expected = [[0.5, 0.5], [0.0, 1.0], [0.0, 1.0], [torch.nan] * 2, [torch.nan] * 2]
    assert_near(ops.softmax(x), torch.tensor(expected), 1e-6)


def test_softmax_of_strided_and_large_input() -> None:
    x = torch.randn(1000, 37, 3)[:, ::2].transpose(1, 2)
    assert_near(ops.softmax(x, 1), softmax_reference(x, 1), 1e-6)


@pytest.mark.parametrize("scale", [1, 5])
def test_softmax_of_a_vocabulary(scale: int) -> None:
    x = torch.randn(4, 131_072) * scale
    torch.testing.assert_close(ops.softmax(x), softmax_reference(x), rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize(("shape", "axis"), [((3, 2), 1), ((3, 2), -2), ((3,), 0), ((3, 2), True), ((3, 2), 0.0)])
def test_softmax_refuses_axes(shape: tuple[int, ...], axis: object) -> None:
    with pytest.raises(InvalidInput, match="axis"):
        ops.softmax(torch.zeros(shape), axis)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 7, 64, 1021])
def test_softmax_among_poisoned_neighbours(length: int) -> None:
    x = torch.full((9, length), torch.nan)
    x[4] = torch.randn(length)
    assert_near(ops.softmax(x)[4], ops.softmax(x[4:5])[0], 1e-6)


SHAPES = [(1, 1, 1, 1), (3, 2, 5, 7), (2, 31, 17, 13), (4, 1, 257, 1), (2, 3, 0, 4), (2, 0, 3, 4), (33, 8, 8, 8)]


def matmul_bound(a: torch.Tensor, b: torch.Tensor, relative: float) -> torch.Tensor:
    return relative * (a.double().abs() @ b.double().abs()) + 1e-300


@pytest.mark.parametrize(
    ("dtype", "relative"),
    [(torch.float32, 2e-6), (torch.float64, 1e-14), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul(shape: tuple[int, ...], dtype: torch.dtype, relative: float) -> None:
    batch, m, k, n = shape
    a, b = torch.randn(batch, m, k).to(dtype), torch.randn(batch, k, n).to(dtype)
    got, expected = ops.matmul(a, b), matmul_reference(a, b)
    assert got.shape == (batch, m, n)
    assert got.dtype == dtype
    assert ((got.double() - expected.double()).abs() <= matmul_bound(a, b, relative)).all()


def test_matmul_of_transposed_views() -> None:
    a, b = torch.randn(3, 5, 4).transpose(1, 2), torch.randn(3, 6, 10)[:, :5, ::2]
    assert ((ops.matmul(a, b) - matmul_reference(a, b)).abs() <= matmul_bound(a, b, 2e-6)).all()


def test_matmul_among_poisoned_neighbours() -> None:
    a, b = torch.full((5, 19, 23), torch.nan), torch.full((5, 23, 11), torch.inf)
    a[2], b[2] = torch.randn(19, 23), torch.randn(23, 11)
    difference = (ops.matmul(a, b)[2] - ops.matmul(a[2:3], b[2:3])[0]).abs()
    assert (difference <= matmul_bound(a[2], b[2], 2e-6)).all()


def test_matmul_refuses_what_does_not_fit() -> None:
    with pytest.raises(InvalidInput, match=r"a \[2, 3\] and b \[4, 5\]"):
        ops.matmul(torch.zeros(1, 2, 3), torch.zeros(1, 4, 5))
    with pytest.raises(InvalidInput, match="float32 and float64"):
        ops.matmul(torch.zeros(1, 2, 3), torch.zeros(1, 3, 5, dtype=torch.float64))


def test_sha256_of_every_length_around_a_block() -> None:
    generator = random.Random(0)
    data = [generator.randbytes(n) for n in (0, 1, 54, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 1000)]
    got = ops.sha256(data)
    assert got.dtype == torch.uint8
    assert torch.equal(got, sha256_reference(data))


def test_sha256_of_known_answers() -> None:
    got = ops.sha256([b"abc", b"x" * (1 << 20)])
    assert bytes(got[0].tolist()).hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert bytes(got[1].tolist()) == hashlib.sha256(b"x" * (1 << 20)).digest()
