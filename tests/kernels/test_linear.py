"""The linear layer with its epilogue against its definition, in both forms, and as a resident kernel."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.kernels import InvalidInput, LoadError, backends, ops, registry
from penstock.kernels.linear import ACTIVATIONS
from penstock.kernels.linear.reference import linear as reference

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 3e-3}
BACKENDS = ["torch", *(["triton"] if backends.has_triton(torch.device("cpu")) else [])]


SHAPES = [((), 5, 3), ((1,), 1, 1), ((13,), 7, 31), ((2, 0), 3, 4), ((3, 5), 17, 2)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_near(
    got: torch.Tensor,
    expected: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *others: torch.Tensor | None,
) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    bound = x.double().abs() @ weight.double().abs().T + sum(o.double().abs() for o in others if o is not None) + 1e-300
    assert ((got.double() - expected.double()).abs() <= TOLERANCE[got.dtype] * bound).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(("lead", "num_in", "num_out"), SHAPES)
def test_linear(lead: tuple[int, ...], num_in: int, num_out: int, activation: str | None, dtype: torch.dtype) -> None:
    x, weight = torch.randn(*lead, num_in).to(dtype), torch.randn(num_out, num_in).to(dtype)
    for bias in (None, torch.randn(num_out).to(dtype)):
        for residual in (None, torch.randn(*lead, num_out).to(dtype)):
            expected = reference(x, weight, bias, activation=activation, residual=residual)
            before = None if residual is None else residual.clone()
            for name in BACKENDS if residual is not None and dtype != torch.float64 and activation else ["torch"]:
                with backends.forced(name):
                    got = ops.linear(x, weight, bias, activation=activation, residual=residual)
                assert_near(got, expected, x, weight, bias, residual)
            assert residual is None or torch.equal(residual, before)


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_and_poisoned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(6, 9, 4).transpose(0, 2), torch.randn(6, 11)[:, ::2].T
    residual = torch.randn(5, 9, 4).transpose(0, 2)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    with backends.forced(name):
        got = ops.linear(x[..., :6], weight[:5, :6], activation="silu", residual=residual[:, :, :5])
    expected = reference(x[..., :6], weight[:5, :6], activation="silu", residual=residual[:, :, :5])
    assert_near(got, expected, x[..., :6], weight[:5, :6], residual[:, :, :5])


def test_extremes_and_poisoned_neighbours() -> None:
    x = torch.full((9, 16), torch.nan)
    x[4] = torch.randn(16) * 100
    weight = torch.randn(8, 16)
    for activation in ACTIVATIONS:
        got = ops.linear(x, weight, activation=activation)
        assert got[[0, 8]].isnan().all()
        assert_near(got[4], ops.linear(x[4:5], weight, activation=activation)[0], x[4], weight)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.zeros(3, 4), torch.zeros(5, 4)
    with pytest.raises(InvalidInput, match=r"x must be \[\.\.\., in\]"):
        ops.linear(x, weight.T)
    with pytest.raises(InvalidInput, match=r"bias must be \[5\]; got \[1\]"):
        ops.linear(x, weight, torch.zeros(1))
    with pytest.raises(InvalidInput, match=r"residual must be \[3, 5\]; got \[5\]"):
        ops.linear(x, weight, residual=torch.zeros(5))
    with pytest.raises(InvalidInput, match="activation must be relu, gelu, gelu_tanh, silu or none; got 'tanh'"):
        ops.linear(x, weight, activation="tanh")
    with pytest.raises(InvalidInput, match="one float dtype"):
        ops.linear(x, weight.double())
    with pytest.raises(InvalidInput, match="one float dtype"):
        ops.linear(x.int(), weight.int())


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_layer_as_a_kernel(tmp_path: Path, has_bias: bool) -> None:
    weight, bias = torch.randn(5, 7), torch.randn(5) if has_bias else None
    file = tmp_path / "layer.safetensors"
    save_file({"weight": weight} | ({"bias": bias} if bias is not None else {}), file)
    layer = registry.get("linear", file=str(file), activation="gelu")
    layer.load("cpu")
    x = torch.randn(6, 7)
    x[2:4] = torch.nan  # a neighbour's
    out = layer.run(x=x, x_offsets=torch.tensor([0, 2, 4, 4, 6]))["out"]
    assert [len(rows) for rows in out] == [2, 2, 0, 2]
    for rows, part in ((out[0], x[:2]), (out[3], x[4:])):
        assert_near(rows, reference(part, weight, bias, activation="gelu"), part, weight, bias)
    with pytest.raises(InvalidInput, match=r"x must be \[rows, 7\]"):
        layer.run(x=torch.zeros(2, 6), x_offsets=torch.tensor([0, 2]))
    layer.unload()
    file.unlink()
    with pytest.raises(LoadError, match="cannot be read"):
        layer.load("cpu")


def test_the_layer_refuses_files_and_options(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"--option linear\.file="):
        registry.get("linear").load("cpu")
    file = tmp_path / "layer.safetensors"
    for tensors, message in (
        ({"other": torch.zeros(1)}, "has no tensor weight"),
        ({"weight": torch.zeros(2, 2, 2)}, "weight must have 2 dimensions"),
        ({"weight": torch.zeros(2, 2, dtype=torch.int8)}, "weight must be torch.float32 or"),
    ):
        save_file(tensors, file)
        with pytest.raises(LoadError, match=message):
            registry.get("linear", file=str(file)).load("cpu")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LoadError, match="cannot be read"):
        registry.get("linear", file=str(file)).load("cpu")
    with pytest.raises(registry.RegistryError, match="activation"):
        registry.get("linear", activation="tanh")
    with pytest.raises(registry.RegistryError, match="file is the path"):
        registry.get("linear", file=7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_linear_on_cuda(activation: str | None, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 67, 96).to(dtype), torch.randn(80, 96).to(dtype), torch.randn(80).to(dtype)
    for given in (None, bias):
        for residual in (None, torch.randn(3, 67, 80).to(dtype)):
            on_device = [None if t is None else t.cuda() for t in (x, weight, given, residual)]
            got = ops.linear(*on_device[:3], activation=activation, residual=on_device[3])  # type: ignore[arg-type]
            expected = reference(x, weight, given, activation=activation, residual=residual)
            assert_near(got.cpu(), expected, x, weight, given, residual)
