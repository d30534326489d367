"""Quantised weights: what they stand for, how far off they are, and products with them in every form."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.kernels import InvalidInput, LoadError, backends, ops, registry
from penstock.kernels.quantized import dequantize, packed
from penstock.kernels.quantized.layout import pack, unpack
from penstock.kernels.quantized.reference import dequantize as reference_weight
from penstock.kernels.quantized.reference import quantized_linear as reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
KINDS = [(8, None), (8, 32), (8, 128), (4, 32), (4, 64), (4, 128)]
BACKENDS = ["torch", *(["triton"] if backends.has_triton(torch.device("cpu")) else [])]
Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: spoil(empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: spoil(new_empty(*args, **kwargs)))


def bound(x: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """|x| @ |scales * 2**bits|: what a sum could be at most."""
    grouped = x.double().abs().view(len(x), scales.shape[1], -1).sum(2)
    return grouped @ (scales.double() * 2**bits).T + 1e-300


def assert_near(got: torch.Tensor, x: torch.Tensor, quantized: Quantized, bits: int, group_size: int | None) -> None:
    expected = reference(x, *quantized, bits=bits, group_size=group_size)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    error = (got.double() - expected.double()).abs()
    assert (error <= TOLERANCE[x.dtype] * bound(x, quantized[1], bits)).all()


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_quantising_is_off_by_its_step_at_most(bits: int, group_size: int | None, dtype: torch.dtype) -> None:
    weight = (torch.randn(7, 256) * 10 ** torch.linspace(-4, 2, 7)[:, None]).to(dtype)
    weight[3, :128], weight[4] = 0.0, weight[4].abs()
    qweight, scales, zeros = ops.quantize_weight(weight, bits=bits, group_size=group_size)
    restored = reference_weight(qweight, scales, zeros, bits=bits, group_size=group_size)
    steps = scales.double().repeat_interleave(group_size or 256, 1)
    assert ((restored - weight.double()).abs() <= steps * ((0.5 if bits == 8 else 1.0) + 1e-5)).all()
    assert (restored[weight == 0] == 0).all()
    limit = weight.double().abs().view(7, scales.shape[1], -1).amax(2)
    assert (scales <= limit * (1 / 127 if bits == 8 else 2 / 15) * (1 + 1e-6) + (limit == 0)).all()
    torch.testing.assert_close(dequantize(qweight, scales, zeros, bits=bits, group_size=group_size), restored.float())
    assert qweight.nbytes * (8 // bits) == weight.numel()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_packing_round_trip(group_size: int) -> None:
    q = torch.randint(0, 16, (5, 3, group_size), dtype=torch.uint8)
    qweight = pack(q)
    assert qweight.shape == (5, 3 * group_size // 2)
    assert torch.equal(unpack(qweight, group_size), q)
    # As the docstring says it: byte j of a group holds its weight j low and its weight j + group_size / 2 high.
    assert qweight[2, group_size // 2 + 1] == q[2, 1, 1] + 16 * q[2, 1, 1 + group_size // 2]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("bits", "group_size", "num_in", "num_out"), [
    (8, None, 1, 1), (8, None, 101, 37), (8, None, 192, 64), (8, 32, 96, 5), (8, 128, 256, 33),
    (4, 32, 32, 1), (4, 32, 608, 37), (4, 64, 192, 64), (4, 128, 256, 33),
])  # fmt: skip
@pytest.mark.usefixtures("poisoned")
def test_quantized_linear(bits: int, group_size: int | None, num_in: int, num_out: int, dtype: torch.dtype) -> None:
    quantized = ops.quantize_weight(torch.randn(num_out, num_in), bits=bits, group_size=group_size)
    for rows in (1, 3, 17):
        x = torch.randn(rows, num_in).to(dtype)
        for name in [None, *BACKENDS]:
            if name is None:  # what is taken on this machine, torch's packed product included
                got = ops.quantized_linear(x, *quantized, bits=bits, group_size=group_size)
            else:
                with backends.forced(name):
                    got = ops.quantized_linear(x, *quantized, bits=bits, group_size=group_size)
            assert_near(got, x, quantized, bits, group_size)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_other_zeros_bias_and_leading_dimensions(bits: int, group_size: int | None, name: str) -> None:
    qweight, scales, _ = ops.quantize_weight(torch.randn(37, 256), bits=bits, group_size=group_size)
    x, bias = torch.randn(2, 3, 512)[..., ::2], torch.randn(37)
    for zeros in (None, torch.randn_like(scales) * 3):
        with backends.forced(name):
            got = ops.quantized_linear(x, qweight, scales, zeros, bias, bits=bits, group_size=group_size)
            none = ops.quantized_linear(x[:0], qweight, scales, zeros, bits=bits, group_size=group_size)
        assert got.shape == (2, 3, 37)
        assert none.shape == (0, 3, 37)
        assert_near((got - bias).view(6, 37), x.reshape(6, 256), (qweight, scales, zeros), bits, group_size)


@pytest.mark.parametrize("name", BACKENDS)
def test_among_poisoned_neighbours(name: str) -> None:
    quantized = ops.quantize_weight(torch.randn(9, 64), bits=4, group_size=32)
    x = torch.full((5, 64), torch.nan)
    x[3] = torch.randn(64)
    with backends.forced(name):
        got = ops.quantized_linear(x, *quantized, bits=4, group_size=32)
    assert_near(got[3:4], x[3:4], quantized, 4, 32)
    assert got[[0, 1, 2, 4]].isnan().all()


def test_torchs_packed_products_here() -> None:
    x = torch.randn(3, 256).bfloat16()
    for num_out in (64, 192, 320):
        quantized = ops.quantize_weight(torch.randn(num_out, 256), bits=8)
        if packed.can_multiply_int8(x, quantized[0]):
            assert_near(packed.multiply_int8(x, *quantized[:2]), x, quantized, 8, None)
        for group_size in (32, 64, 128):
            qweight, scales, zeros = ops.quantize_weight(torch.randn(num_out, 256), bits=4, group_size=group_size)
            if packed.can_pack_int4(qweight):
                for given in (zeros, None):
                    got = packed.PackedInt4(qweight, scales, given, group_size)(x)
                    assert_near(got, x, (qweight, scales, given), 4, group_size)


def test_packed_products_are_not_taken_where_they_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    x, qweight = torch.zeros(1, 64).bfloat16(), torch.zeros(64, 64, dtype=torch.int8)
    assert not packed.can_multiply_int8(x[:, :48], qweight[:, :48])  # reads past the end
    assert not packed.can_multiply_int8(torch.zeros(9, 64).bfloat16(), qweight)  # slower
    packed._works.cache_clear()
    monkeypatch.setattr(packed, "multiply_int8", lambda x, q, s: x @ q.to(x.dtype).T)
    monkeypatch.setattr(packed, "PackedInt4", lambda *_: _raise)
    assert not packed.can_multiply_int8(x, qweight)
    assert not packed.can_pack_int4(qweight)
    packed._works.cache_clear()


def _raise(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("not on this CPU")


def test_what_cannot_be_quantised_is_refused() -> None:
    weight = torch.zeros(4, 96)
    for bits, group_size, message in (
        (3, None, "4 or 8 bits; got 3"),
        (True, None, "4 or 8 bits; got True"),
        (4, None, "32, 64, 128 for 4 bits; got None"),
        (8, 48, "32, 64, 128 or None for 8 bits; got 48"),
        (8, 10**30, "32, 64, 128 or None"),
        (4, 64, "divide the 96 inputs of the weight; 64 does not"),
    ):
        with pytest.raises(InvalidInput, match=message):
            ops.quantize_weight(weight, bits=bits, group_size=group_size)
    weight[2, 5] = torch.nan
    with pytest.raises(InvalidInput, match="finite"):
        ops.quantize_weight(weight, bits=8)
    for wrong in (torch.zeros(0, 4), torch.zeros(4), torch.zeros(4, 4, dtype=torch.int8)):
        with pytest.raises(InvalidInput, match="weight must be"):
            ops.quantize_weight(wrong, bits=8)


def test_what_does_not_go_together_is_refused() -> None:
    qweight, scales, zeros = ops.quantize_weight(torch.randn(4, 96), bits=4, group_size=32)
    assert zeros is not None
    x = torch.zeros(2, 96)
    for given, message in (
        ((x, qweight.to(torch.int8), scales, zeros), r"qweight must be torch.uint8 \[out, in / 2\]"),
        ((x, qweight, scales[:, :2], zeros), r"scales must be float32 \[4, 3\]; got torch.float32 \[4, 2\]"),
        ((x, qweight, scales, zeros.half()), r"zeros must be float32 \[4, 3\]; got torch.float16"),
        ((x[:, :95], qweight, scales, zeros), r"x must be \[\.\.\., 96\]"),
        ((x.double(), qweight, scales, zeros), "x must be float32, bfloat16 or float16"),
        ((x, qweight, scales, zeros, torch.zeros(5)), r"bias must be torch.float32 \[4\]; got torch.float32 \[5\]"),
    ):
        with pytest.raises(InvalidInput, match=message):
            ops.quantized_linear(*given, bits=4, group_size=32)


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"), [(8, None, torch.float32), (4, 32, torch.bfloat16), (4, 32, torch.float64)]
)
def test_the_layer_as_a_kernel(tmp_path: Path, bits: int, group_size: int | None, dtype: torch.dtype) -> None:
    quantized, bias = ops.quantize_weight(torch.randn(64, 96), bits=bits, group_size=group_size), torch.randn(64)
    file = tmp_path / "layer.safetensors"
    tensors = dict(zip(("qweight", "scales", "zeros"), quantized, strict=True))
    save_file({name: t for name, t in tensors.items() if t is not None} | {"bias": bias}, file)
    options = {} if group_size is None else {"group_size": group_size}
    layer = registry.get("quantized_linear", file=str(file), bits=bits, **options)
    layer.load("cpu")
    x = torch.randn(6, 96).to(dtype)
    x[2:4] = torch.nan  # a neighbour's
    for count, offsets in ((6, [0, 2, 4, 4, 6]), (2, [0, 0, 1, 1, 2])):
        out = layer.run(x=x[:count], x_offsets=torch.tensor(offsets))["out"]
        assert [len(rows) for rows in out] == torch.tensor(offsets).diff().tolist()
        got, rows = torch.cat([out[0], out[1], out[3]])[:2], x[:2]
        assert got.dtype == dtype
        working = torch.float32 if dtype == torch.float64 else dtype
        error = (got - bias).double() - reference(rows.to(working), *quantized, bits=bits, group_size=group_size).double()
        assert (error.abs() <= TOLERANCE[working] * (bound(rows, quantized[1], bits) + bias.abs())).all()
    with pytest.raises(InvalidInput, match=r"x must be \[\.\.\., 96\]"):
        layer.run(x=torch.zeros(1, 7, dtype=dtype), x_offsets=torch.tensor([0, 1]))
    layer.unload()
    assert not layer.is_loaded


def test_the_layer_refuses_files(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"--option quantized_linear\.file="):
        registry.get("quantized_linear").load("cpu")
    file = tmp_path / "layer.safetensors"
    qweight, scales, _ = ops.quantize_weight(torch.randn(4, 96), bits=8)
    save_file({"qweight": qweight, "scales": scales}, file)
    with pytest.raises(LoadError, match="for 4 bits"):
        registry.get("quantized_linear", file=str(file), bits=4, group_size=32).load("cpu")
    save_file({"qweight": qweight, "scales": scales, "bias": torch.zeros(5)}, file)
    with pytest.raises(LoadError, match=r"bias must be \[4\]; it is \[5\]"):
        registry.get("quantized_linear", file=str(file)).load("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_quantized_linear_on_cuda(bits: int, group_size: int | None, dtype: torch.dtype) -> None:
    quantized = ops.quantize_weight(torch.randn(333, 768), bits=bits, group_size=group_size)
    on_device = [None if t is None else t.cuda() for t in quantized]
    for rows in (1, 16, 33, 300):
        x = torch.randn(rows, 768).to(dtype)
        for name in ("torch", "triton"):
            with backends.forced(name):
                got = ops.quantized_linear(x.cuda(), *on_device, bits=bits, group_size=group_size)  # type: ignore[arg-type]
            assert_near(got.cpu(), x, quantized, bits, group_size)
