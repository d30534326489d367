"""token_transform: both forms against the reference, padding, ids outside of the table, the resident kernel."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.kernels import InvalidInput, LoadError, backends, ops, registry
from penstock.kernels.tokens.reference import token_transform as reference

BACKENDS = ["torch", "triton"]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [((1, 1), 3, 1), ((3, 7), 11, 5), ((2, 13), 50, 131), ((5,), 9, 64), ((0, 4), 3, 8), ((2, 0), 3, 8), ((1, 3), 4, 1030)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs(shape: tuple[int, ...], vocab: int, hidden: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "ids": torch.randint(0, vocab, shape),
        "table": torch.randn(vocab, hidden).to(dtype),
        "positions": torch.randn(20, hidden).to(dtype),
        "norm_weight": torch.randn(hidden).to(dtype),
        "norm_bias": torch.randn(hidden).to(dtype),
    }


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert got.dtype == expected.dtype == dtype
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[dtype] * max(largest, 1.0))


@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize(("shape", "vocab", "hidden"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reference(backend: str, shape: tuple[int, ...], vocab: int, hidden: int, norm: str | None) -> None:
    given = inputs(shape, vocab, hidden)
    with backends.forced(backend):
        got = ops.token_transform(**given, norm=norm, scale=1.7)
    assert got.shape == (*shape, hidden)
    assert_near(got, reference(**given, norm=norm, scale=1.7))


@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), *((backend, dtype) for backend in BACKENDS for dtype in (torch.float16, torch.bfloat16))],
)
def test_other_dtypes(backend: str, norm: str | None, dtype: torch.dtype) -> None:
    given = inputs((2, 9), 30, 70, dtype)
    with backends.forced(backend):
        got = ops.token_transform(**given, norm=norm, lengths=torch.tensor([9, 4]))
    assert_near(got, reference(**given, norm=norm, lengths=torch.tensor([9, 4])), dtype)


@pytest.mark.parametrize("absent", ["positions", "norm_weight", "norm_bias", "all"])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_may_be_absent(backend: str, norm: str | None, absent: str) -> None:
    given = inputs((3, 5), 11, 24)
    given = {key: value for key, value in given.items() if key in ("ids", "table") or (key != absent and absent != "all")}
    table = given["table"].clone()
    with backends.forced(backend):
        assert_near(ops.token_transform(**given, norm=norm), reference(**given, norm=norm))
    assert torch.equal(table, given["table"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_of_packed_tokens(backend: str) -> None:
    given = inputs((9,), 11, 24) | {"position_ids": torch.tensor([0, 1, 2, 0, 1, 19, 3, 3, 0], dtype=torch.int32)}
    with backends.forced(backend):
        assert_near(ops.token_transform(**given), reference(**given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_not_looked_at_and_gives_zeros(backend: str) -> None:
    given = inputs((4, 6), 11, 40)
    lengths = torch.tensor([6, 0, 3, 1])
    is_padding = torch.arange(6) >= lengths[:, None]
    given["ids"] = given["ids"].clamp_min(1).masked_fill(is_padding, -(2**40))
    given["table"][0] = torch.nan  # where the ids of padding might be sent
    with backends.forced(backend):
        got = ops.token_transform(**given, lengths=lengths)
        assert (got[is_padding] == 0).all()
        assert_near(got, reference(**given, lengths=lengths))
        for row, length in enumerate(lengths.tolist()):  # alone
            part = {**given, "ids": given["ids"][row : row + 1, :length]}
            assert_near(ops.token_transform(**part)[0], got[row, :length])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input(backend: str) -> None:
    given = inputs((3, 5), 11, 24)
    strided = {**given, "ids": given["ids"].T.contiguous().T, "table": given["table"].T.contiguous().T}
    with backends.forced(backend):
        assert_near(ops.token_transform(**strided), reference(**given))


def test_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given, real = inputs((2, 5), 11, 24) | {"lengths": torch.tensor([2, 5])}, torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: real(*size, **options).fill_(torch.nan))
    with backends.forced("triton"):
        assert_near(ops.token_transform(**given), reference(**given))


@pytest.mark.parametrize("bad", [-1, 11, 2**40, -(2**62)])
def test_ids_outside_of_the_table(bad: int) -> None:
    given = inputs((2, 5), 11, 24)
    expected = reference(**given)
    given["ids"][1, 2] = bad
    with pytest.raises(InvalidInput, match="ids must be from 0 to 10"):
        ops.token_transform(**given)
    with backends.forced("triton"):
        got = ops.token_transform(**given)
    is_bad = torch.zeros(2, 5, dtype=torch.bool)
    is_bad[1, 2] = True
    assert got[is_bad].isnan().all()
    assert_near(got[~is_bad], expected[~is_bad])


def test_positions_outside_of_their_table() -> None:
    given = inputs((1, 3), 11, 24) | {"position_ids": torch.tensor([[0, 20, 1]])}
    with pytest.raises(InvalidInput, match="positions to 19"):
        ops.token_transform(**given)
    with backends.forced("triton"):
        assert ops.token_transform(**given).isnan().all(2).tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(2, 3)}, "ids must be int64"),
        ({"ids": torch.zeros(2, 3, 4, dtype=torch.int64)}, "ids must be int64"),
        ({"ids": torch.zeros(2, 21, dtype=torch.int64)}, "20 positions for 21 tokens"),
        ({"table": torch.zeros(3)}, "table must be float"),
        ({"table": torch.zeros(3, 4, dtype=torch.int64)}, "table must be float"),
        ({"norm": "batch"}, "norm must be"),
        ({"norm_weight": torch.zeros(3)}, r"norm_weight must be \[24\]"),
        ({"positions": torch.zeros(3, 4)}, r"positions must be \[n, 24\]"),
        ({"position_ids": torch.zeros(2, dtype=torch.int64)}, "shape of ids"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, "lengths must be"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ops.token_transform(**{**inputs((2, 3), 11, 24), **change})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({"wte": torch.randn(30, 16), "wpe": torch.randn(8, 16), "ln.g": torch.randn(16)}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_the_kernel(weights: Path) -> None:
    names = {"table": "wte", "positions": "wpe", "norm_weight": "ln.g"}
    kernel = registry.get("token_transform", weights=str(weights), **names, norm="rms", scale=4.0)
    kernel.load("cpu")
    ids, lengths = torch.randint(0, 30, (3, 8)), torch.tensor([8, 0, 3])
    out = kernel.run(ids=ids, ids_lengths=lengths)["out"]
    assert [tuple(part.shape) for part in out] == [(8, 16), (0, 16), (3, 16)]
    from safetensors.torch import load_file

    tensors = load_file(weights)
    given = {key: tensors[name] for key, name in names.items()}
    for row, part in enumerate(out):
        assert_near(part, reference(ids[row, : lengths[row]], **given, norm="rms", scale=4.0))
    ids[2, 1] = 30
    with pytest.raises(InvalidInput, match="from 0 to 29"):
        kernel.run(ids=ids, ids_lengths=lengths)
    kernel.unload()
    kernel.load("cpu")
    assert kernel.is_loaded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a safetensors file"),
        ({"weights": "w.safetensors"}, "cannot be read"),
        ({"weights": "w.safetensors", "table": "ln.g"}, r"table must be float \[rows, hidden\]"),
        ({"weights": "w.safetensors", "table": "wte", "norm_weight": "wpe"}, r"norm_weight must be float \[hidden\]"),
        ({"weights": "broken"}, "cannot be read"),
    ],
)
def test_weights_that_cannot_be_had(weights: Path, options: dict[str, str], message: str) -> None:
    (weights.parent / "broken").write_bytes(b"broken")
    options = {key: str(weights.parent / value) if key == "weights" else value for key, value in options.items()}
    with pytest.raises(LoadError, match=message):
        registry.get("token_transform", **options).load("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize(("shape", "hidden"), [((1, 1), 1), ((7, 20), 384), ((3, 11), 4096), ((2, 5), 10_007)])
def test_on_a_gpu(shape: tuple[int, ...], hidden: int, norm: str | None, dtype: torch.dtype) -> None:
    given = inputs(shape, 50, hidden, dtype)
    on_device = {key: value.cuda() for key, value in given.items()}
    lengths = torch.arange(shape[0]) + 1
    ops.token_transform(**on_device, norm=norm, lengths=lengths.cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = ops.token_transform(**on_device, norm=norm, lengths=lengths.cuda())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert backends.ran()["token_transform", "cuda"] == "triton"
    assert_near(got.cpu(), reference(**given, norm=norm, lengths=lengths), dtype)
    on_device["ids"][0, 0] = 2**40
    assert ops.token_transform(**on_device, norm=norm)[0, 0].isnan().all()
